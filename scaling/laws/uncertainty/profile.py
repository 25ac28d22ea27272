"""Profile likelihood: how far one parameter can be held from its best value before the data speak against it.

All points of all profiles are one batch of refits, each with one parameter held.

Legend: b points, n rows, p parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import special, stats

from recscale.scaling.laws.fitting.problem import Problem, residual_scale, residuals
from recscale.scaling.laws.fitting.solver import Control, Solution, refine

from .curvature import curvature_sd
from .seed_noise import SeedNoise

_MAX_CHI2 = 2.0
_NU_GRID = np.geomspace(2.0, 30.0, 6)
# Multiples of the curvature's standard deviation at which a profile is evaluated; wide, for skewed ones.
_OFFSETS = np.array([0.3, 0.7, 1.1, 1.5, 1.9, 2.3, 2.8, 3.5, 5.0, 8.0, 14.0, 30.0])
_DEVIANCE = Control(limit=80, tolerance=1e-9, calm=2, stuck=1e4, polish=False)


@dataclass(frozen=True)
class Profile:
    """Profile likelihood of one parameter: values tried (natural), twice the drop in log likelihood, and the
    interval.

    noise: "student" with nu, or "gaussian" with the sd of repeated seeds. Rows count as independent given the
    law.
    """

    name: str
    values: np.ndarray
    deviance: np.ndarray
    interval: tuple[float, float]
    noise: str
    nu: float
    scale: float


def profiles(
    problem: Problem, solution: Solution, names: list[str], noise: SeedNoise | None = None
) -> dict[str, Profile]:
    """Profile-likelihood intervals (95%) of the named parameters under Student-t noise, nu in [2, 30] fitted.

    With `noise` the residuals are Gaussian with the sd of repeated seeds instead, unless they are larger than
    that (chi^2 per degree of freedom above 2): then the law misses by more than seeds do, and Student-t
    stands. A profile is centred at its own likelihood's optimum, which need not be Huber's: Huber's objective
    is not a likelihood and is never profiled. The cut is n ln(1 + F_95(1, n - p) / (n - p)), which tends to
    3.84 for large n; an end that is not reached inside the search interval is infinite (or 0).
    """
    form, n, p = problem.form, len(problem.y), len(problem.form.names)
    if n - p < 1 or not names:
        return {}
    nu, scale = np.inf, 1.0
    best, least = solution.phi, 0.0
    if noise is not None:
        gaussian = _gaussian(problem, noise, solution.phi)
        batch = refine(gaussian, solution.phi[None])
        best, least = batch.phi[0], 2 * float(batch.objective[0])
        noise = None if least / (n - p) > _MAX_CHI2 else noise
    if noise is None:
        cut = float(n * np.log1p(stats.f.ppf(0.95, 1, n - p) / (n - p)))
        start = np.array([max(residual_scale(residuals(problem, solution.phi)), 1e-12)])
        fits = [
            (float(v), *_student(problem, solution.phi[None], np.ones((1, p)), float(v), start, 3)) for v in _NU_GRID
        ]
        nu, best, scale, least = min(fits, key=lambda fit: fit[3][0])
        best, scale, least = best[0], float(scale[0]), float(least[0])
    else:
        cut = float(stats.chi2.ppf(0.95, 1))
        problem = _gaussian(problem, noise, solution.phi)
    index = np.array([form.names.index(name) for name in names])
    values = _profile_values(problem, best, index)
    phi = np.tile(best, (values.size, 1))
    rows = np.repeat(index, values.shape[1])
    phi[np.arange(values.size), rows] = values.ravel()
    free = np.ones_like(phi)
    free[np.arange(values.size), rows] = 0.0
    if noise is None:
        _, _, deviance = _student(problem, phi, free, nu, np.full(len(phi), scale), 3)
    else:
        deviance = 2 * refine(problem, phi, free=free).objective
    deviance = np.maximum(deviance.reshape(values.shape) - least, 0.0)
    kind = "student" if noise is None else "gaussian"
    return {
        name: _one_profile(
            form[name].searched == "log", name, values[k], deviance[k], best[index[k]], cut, kind, nu, scale
        )
        for k, name in enumerate(names)
    }


def _student(problem: Problem, phi: np.ndarray, free: np.ndarray, nu: float, scale: np.ndarray, rounds: int):
    """Location and scale of Student-t residuals at fixed nu, by turns: (phi[b, p], scale[b], -2 log
    likelihood[b]).
    """
    weights, total = problem.weights, problem.weights.sum()
    for _ in range(rounds):
        phi = refine(problem, phi, free=free, nu=nu, scale=scale, control=_DEVIANCE).phi
        r2 = np.stack([residuals(problem, point) for point in phi]) ** 2
        for _ in range(30):
            pull = (nu + 1) / (nu + r2 / scale[:, None] ** 2)
            scale = np.sqrt(np.maximum(np.sum(weights * pull * r2, axis=1) / total, 1e-30))
    constant = special.gammaln(nu / 2) - special.gammaln((nu + 1) / 2) + 0.5 * np.log(nu * np.pi)
    per_row = np.log(scale)[:, None] + constant + 0.5 * (nu + 1) * np.log1p(r2 / (nu * scale[:, None] ** 2))
    return phi, scale, 2 * np.sum(weights * per_row, axis=1)


def _gaussian(problem: Problem, noise: SeedNoise, phi: np.ndarray) -> Problem:
    """The problem with squared residuals weighted by the sd of repeated seeds: its objective is half the
    deviance.
    """
    fitted = problem.form.value(phi, problem.axes)
    sd = noise.sd(fitted) / (fitted if problem.kind == "log" else problem.unit)
    return replace(problem, weights=1.0 / sd**2, delta=np.full(len(sd), np.inf))


def _profile_values(problem: Problem, best: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Search-space values [names, 2 * offsets] to hold: multiples of the curvature's standard deviation, both
    sides.
    """
    sd = curvature_sd(problem, best)[index]
    offsets = np.concatenate([-_OFFSETS[::-1], _OFFSETS])
    values = best[index][:, None] + np.clip(sd, 1e-6, 1.0)[:, None] * offsets
    return np.clip(values, problem.low[index][:, None], problem.high[index][:, None])


def _one_profile(log: bool, name, values, deviance, best, cut, noise, nu, scale) -> Profile:
    """Interval by linear interpolation of the signed root of the deviance, which is straight where the
    profile is quadratic.
    """
    order = np.argsort(values)
    values, deviance = values[order], deviance[order]
    natural = np.exp if log else np.asarray
    ends = []
    for side in (-1, 1):
        inside = values < best if side < 0 else values > best
        v, d = values[inside][::side], np.sqrt(deviance[inside])[::side]
        v, d = np.concatenate([[best], v]), np.concatenate([[0.0], d])
        beyond = np.flatnonzero(d >= np.sqrt(cut))
        if not len(beyond):
            ends.append((0.0 if log else -np.inf) if side < 0 else np.inf)
            continue
        k = beyond[0]
        ends.append(float(natural(np.interp(np.sqrt(cut), d[k - 1 : k + 1], v[k - 1 : k + 1]))))
    return Profile(name, natural(values), deviance, (ends[0], ends[1]), noise, float(nu), float(scale))
