"""Uncertainty of a fit: resampled clusters, redrawn seed noise, profile likelihood with a proper noise model,
jackknife.

Every method is a batch of refits of one compiled program: clusters are resampled as integer row weights,
metrics are redrawn as other targets, profile points hold one parameter, jackknife fits give one cluster
weight 0.

Legend: b draws, n rows, p parameters, c clusters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import special, stats

from recscale.scaling.laws.fitting.solver import WARM, Control, Problem, Solution, refine

MIN_SEED_SIZES = 2
_MAX_CHI2 = 2.0
_NU_GRID = np.geomspace(2.0, 30.0, 6)
# Multiples of the curvature's standard deviation at which a profile is evaluated; wide, for skewed ones.
_OFFSETS = np.array([0.3, 0.7, 1.1, 1.5, 1.9, 2.3, 2.8, 3.5, 5.0, 8.0, 14.0, 30.0])
_DEVIANCE = Control(limit=80, tolerance=1e-9, calm=2, stuck=1e4, polish=False)


@dataclass(frozen=True)
class SeedNoise:
    """sd of the metric over repeated seeds, log-linear in the metric: ln sd = intercept + slope ln y."""

    intercept: float
    slope: float
    sizes: int
    repeats: int

    def sd(self, y: np.ndarray) -> np.ndarray:
        """Standard deviation at metric values y."""
        return np.exp(self.intercept + self.slope * np.log(np.abs(y)))


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


def cluster_counts(clusters: int, draws: int, generator: np.random.Generator) -> np.ndarray:
    """How often each of c clusters is drawn in b resamples of c with replacement: integers [b, c]."""
    return generator.multinomial(clusters, np.full(clusters, 1.0 / clusters), size=draws)


def bootstrap(
    problem: Problem,
    solution: Solution,
    codes: np.ndarray,
    draws: int,
    seed: int,
    *,
    counts: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    restart: bool = True,
) -> np.ndarray:
    """phi[b, p] of refits on resampled clusters, each the better of a warm start and (with `restart`) one
    random restart.

    codes[n]: cluster of each row. counts[b, c]: resamples drawn elsewhere, so that two fits can share them
    (paired comparison).
    """
    generator = np.random.default_rng(seed)
    if counts is None:
        counts = cluster_counts(int(codes.max()) + 1, draws, generator)
    base = problem.weights if weights is None else weights
    resampled = counts[:, codes] * base
    if not restart:
        starts = np.broadcast_to(solution.phi, (len(resampled), len(solution.phi)))
        return refine(problem, starts, weights=resampled, control=WARM).phi
    return _better_of_two(problem, solution, generator, weights=resampled)


def _better_of_two(problem: Problem, solution: Solution, generator: np.random.Generator, **changes) -> np.ndarray:
    """Refits from the optimum and from a random one of the refined or perturbed starts; the lower objective
    wins.
    """
    count = len(next(iter(changes.values())))
    warm = np.broadcast_to(solution.phi, (count, len(solution.phi)))
    ends = solution.starts.phi[generator.integers(len(solution.starts.phi), size=count)]
    restart = ends + 0.3 * generator.standard_normal(ends.shape)
    first = refine(problem, warm, control=WARM, **changes)
    second = refine(problem, restart, control=WARM, **changes)
    keep = np.where(np.isfinite(second.objective), second.objective, np.inf) < first.objective
    return np.where(keep[:, None], second.phi, first.phi)


def seed_noise(frame: pd.DataFrame, same: list[str], y: np.ndarray) -> SeedNoise | None:
    """sd over rows that share the columns `same` and differ in `seed`; None without repeats at two or more
    sizes.
    """
    if "seed" not in frame.columns:
        return None
    groups = pd.DataFrame({**{c: frame[c].to_numpy() for c in same}, "seed": frame["seed"].to_numpy(), "y": y})
    per_seed = groups.groupby([*same, "seed"], dropna=False, sort=True)["y"].mean().reset_index()
    table = per_seed.groupby(same, dropna=False)["y"].agg(["mean", "var", "count"])
    table = table[(table["count"] >= 2) & (table["var"] > 0)]
    if len(table) < MIN_SEED_SIZES:
        return None
    free = table["count"].to_numpy() - 1.0
    # E[ln s^2] = ln sigma^2 + digamma(f/2) - ln(f/2): removes the bias of averaging logs of variances.
    log_sd = 0.5 * (np.log(table["var"].to_numpy()) - special.digamma(free / 2) + np.log(free / 2))
    log_y = np.log(np.abs(table["mean"].to_numpy()))
    slope = 0.0
    if np.ptp(log_y) > 0 and len(table) >= 3:
        slope = float(np.polyfit(log_y, log_sd, 1, w=np.sqrt(free))[0])
    intercept = float(np.average(log_sd - slope * log_y, weights=free))
    return SeedNoise(intercept, slope, len(table), int(table["count"].sum()))


def seed_bootstrap(problem: Problem, solution: Solution, noise: SeedNoise, draws: int, seed: int) -> np.ndarray:
    """phi[b, p] of refits to metrics redrawn around the fitted law with the sd of repeated seeds."""
    generator = np.random.default_rng(seed)
    fitted = problem.form.value(solution.phi, problem.axes)
    redrawn = fitted + noise.sd(fitted) * generator.standard_normal((draws, len(fitted)))
    if problem.kind == "log":
        redrawn = np.log(np.maximum(redrawn, 1e-3 * fitted))
    return _better_of_two(problem, solution, generator, targets=redrawn)


def jackknife(problem: Problem, solution: Solution, codes: np.ndarray) -> np.ndarray:
    """phi[c, p] of refits that leave one cluster out."""
    count = int(codes.max()) + 1
    weights = problem.weights * (codes[None, :] != np.arange(count)[:, None])
    starts = np.broadcast_to(solution.phi, (count, len(solution.phi)))
    return refine(problem, starts, weights=weights, control=WARM).phi


def residual_scale(residuals: np.ndarray) -> float:
    """Robust scale 1.4826 MAD of residuals[n]."""
    return float(1.4826 * np.median(np.abs(residuals - np.median(residuals))))


def residuals(problem: Problem, phi: np.ndarray) -> np.ndarray:
    """Residuals [n] on the fitted scale: ln yhat - ln y, or (yhat - y) / unit."""
    fitted = problem.form.value(phi, problem.axes)
    if problem.kind == "log":
        return np.log(fitted) - problem.target
    return (fitted - problem.y) / problem.unit


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


def _profile_values(problem: Problem, best: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Search-space values [names, 2 * offsets] to hold: multiples of the curvature's standard deviation, both
    sides.
    """
    sd = curvature_sd(problem, best)[index]
    offsets = np.concatenate([-_OFFSETS[::-1], _OFFSETS])
    values = best[index][:, None] + np.clip(sd, 1e-6, 1.0)[:, None] * offsets
    return np.clip(values, problem.low[index][:, None], problem.high[index][:, None])


def jacobian(problem: Problem, phi: np.ndarray) -> np.ndarray:
    """d residual / d phi [n, p] times the root of the weights, by central differences."""
    step = 1e-5
    columns = []
    for k in range(len(phi)):
        move = np.zeros(len(phi))
        move[k] = step
        columns.append((residuals(problem, phi + move) - residuals(problem, phi - move)) / (2 * step))
    return np.stack(columns, axis=1) * np.sqrt(problem.weights)[:, None]


def curvature_sd(problem: Problem, phi: np.ndarray) -> np.ndarray:
    """Standard deviations [p] from (J'J)^-1 times the residual variance at phi: independent rows of equal
    noise.
    """
    j = jacobian(problem, phi)
    r = residuals(problem, phi) * np.sqrt(problem.weights)
    variance = np.sum(r**2) / max(len(r) - len(phi), 1)
    return np.sqrt(np.maximum(np.diag(np.linalg.pinv(j.T @ j, rcond=1e-13)) * variance, 0.0))


def cluster_sd(problem: Problem, phi: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Standard deviations [p] at a least-squares fit that allow any correlation inside clusters.

    Sandwich (J'J)^-1 [sum_c (J_c'r_c)(J_c'r_c)'] (J'J)^-1 times C/(C-1) (n-1)/(n-p).
    """
    j = jacobian(problem, phi)
    r = residuals(problem, phi) * np.sqrt(problem.weights)
    n, p = j.shape
    count = int(codes.max()) + 1
    scores = np.zeros((count, p))
    np.add.at(scores, codes, j * r[:, None])
    bread = np.linalg.pinv(j.T @ j, rcond=1e-13)
    factor = count / max(count - 1, 1) * (n - 1) / max(n - p, 1)
    return np.sqrt(np.maximum(np.diag(bread @ (scores.T @ scores) @ bread) * factor, 0.0))


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
