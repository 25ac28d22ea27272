"""Profiles: how far one parameter can be held from its best value, all others refitted, before the rows object.

The objective is the sum of squares. An interval ends where it has risen by what clusters say is noise (`curvature`),
so a skewed parameter gets a skewed interval while its width is that of whole clusters, not of rows. All points of all
profiles are one batch of refits; each is then refitted from the ends of both its neighbours until none gains, so that
no point is left in another basin.

Legend: b points, n rows, p parameters, k profiles, m points of a profile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from recscale.scaling.laws.fitting.problem import Problem, residuals
from recscale.scaling.laws.fitting.solver import Control, Solution, refine

from .curvature import ROUNDING, Grouping, Spread, jacobian

# Where a profile is evaluated, in half-widths of the interval of a quadratic objective; wide, for skewed ones.
_OFFSETS = np.array([0.4, 0.75, 0.95, 1.1, 1.3, 1.7, 2.5, 4.0, 8.0, 20.0])
_REFIT = Control(limit=150, tolerance=1e-9, calm=2, stuck=1e4, polish=False)
_SWEEPS, _MOVES = 8, 4
# Two searches of one minimum agree to this share; a point this much lower is another, better minimum.
_SAME = 1e-6


@dataclass(frozen=True)
class Profile:
    """Profile of one parameter: natural values, rise of the sum of squares above its minimum, and the 95% interval.

    An end that is not reached inside the search interval is open: 0 or -inf below, inf above. best: natural value of
    the least-squares optimum.
    """

    name: str
    values: Float[np.ndarray, " m"]
    rise: Float[np.ndarray, " m"]
    cut: float
    interval: tuple[float, float]
    best: float

    @property
    def closed(self) -> bool:
        """Whether the rows set both ends."""
        return np.isfinite(self.interval[1]) and np.isfinite(self.interval[0]) and self.interval[0] != 0.0


@dataclass(frozen=True)
class Squares:
    """The least-squares fit behind the intervals: its problem, optimum, sum of squares, and variances."""

    problem: Problem
    phi: Float[np.ndarray, " p"]
    rss: float
    spread: Spread


def least_squares(problem: Problem, starts: Float[np.ndarray, "s p"], groups: list[Grouping]) -> Squares:
    """The best least-squares fit from these starts; the problem's own Huber width is set aside."""
    squares = replace(problem, delta=np.full(len(problem.y), np.inf))
    batch = refine(squares, starts)
    at = int(np.nanargmin(np.where(np.isfinite(batch.objective), batch.objective, np.inf)))
    return _squares(squares, batch.phi[at], 2 * float(batch.objective[at]), groups)


def _squares(problem: Problem, phi: np.ndarray, rss: float, groups: list[Grouping]) -> Squares:
    rate = np.where(problem.pull[2] > 0, np.exp(phi), 1.0)
    r = residuals(problem, phi) * np.sqrt(problem.weights)
    return Squares(problem, phi, rss, Spread(jacobian(problem, phi), r, groups, problem.pull[0] * rate**2))


def profiles(
    problem: Problem, solution: Solution, names: Sequence[str], groups: list[Grouping]
) -> tuple[dict[str, Profile], Squares]:
    """95% profile intervals of the named parameters, and the least-squares fit they belong to.

    A profile point that lies below the optimum found is a better optimum: everything starts again from there.
    """
    found = least_squares(problem, np.vstack([solution.phi[None], solution.starts.phi]), groups)
    form = problem.form
    index = np.array([form.names.index(name) for name in names], int)
    for _ in range(_MOVES):
        cuts = np.array([found.spread.cut(k) for k in index])
        values, phi, rise = _evaluated(found, index, cuts)
        least = np.unravel_index(np.argmin(rise), rise.shape) if rise.size else None
        if least is None or rise[least] >= -(_SAME * found.rss + ROUNDING**2 * len(problem.y)):
            break
        found = least_squares(problem, np.vstack([phi[least][None], found.phi[None]]), groups)
    else:
        # The objective keeps falling along the profiles: no interval can be trusted to hold the optimum.
        return {}, found
    told = {}
    for k, name in enumerate(names):
        told[name] = _profile(found, int(index[k]), values[k], phi[k], np.maximum(rise[k], 0.0), float(cuts[k]))
    return told, found


def _held(found: Squares, phi: np.ndarray, at: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Refits phi[b, p] and their rise[b] with parameter at[b] held at values[b], from starts phi[b, p]."""
    rows = np.arange(len(at))
    phi = phi.copy()
    phi[rows, at] = values
    free = np.ones_like(phi)
    free[rows, at] = 0.0
    batch = refine(found.problem, phi, free=free, control=_REFIT)
    return batch.phi, np.where(np.isfinite(batch.objective), 2 * batch.objective, np.inf) - found.rss


def _evaluated(found: Squares, index: np.ndarray, cuts: np.ndarray):
    """Search-space values [k, m] in rising order, refits [k, m, p] and rises [k, m] of the profiles of `index`."""
    problem, p = found.problem, len(found.phi)
    reach = np.clip(np.sqrt(cuts * np.diag(found.spread.inverse)[index]), 1e-9, 1.0)
    offsets = np.concatenate([-_OFFSETS[::-1], _OFFSETS])
    values = found.phi[index][:, None] + reach[:, None] * offsets
    values = np.clip(values, problem.low[index][:, None], problem.high[index][:, None])
    k, m = values.shape
    at = np.repeat(index, m)
    held = values.ravel()
    phi, rise = _held(found, np.tile(found.phi, (k * m, 1)), at, held)
    place = np.arange(k * m).reshape(k, m)
    # Neighbours on either side, and which of them have changed since a point was last refitted from there.
    sides = [(place[:, 1:].ravel(), place[:, :-1].ravel()), (place[:, :-1].ravel(), place[:, 1:].ravel())]
    news = [np.ones(k * m, bool), np.ones(k * m, bool)]
    for _ in range(_SWEEPS):
        for side, (points, neighbours) in enumerate(sides):
            look = news[side][neighbours]
            news[side][:] = False
            points, neighbours = points[look], neighbours[look]
            if not len(points):
                continue
            other, level = _held(found, phi[neighbours], at[points], held[points])
            better = level < rise[points] - _SAME * (found.rss + rise[points]) - ROUNDING**2
            gained = points[better]
            phi[gained], rise[gained] = other[better], level[better]
            for changed in news:
                changed[gained] = True
        if not any(changed.any() for changed in news):
            break
    return values, phi.reshape(k, m, p), rise.reshape(k, m)


def _profile(found: Squares, at: int, values: np.ndarray, phi: np.ndarray, rise: np.ndarray, cut: float) -> Profile:
    """The interval: the bracket of each end is split once more, then the root of the rise, which is straight where the
    objective is quadratic, is interpolated.
    """
    parameter = found.problem.form.parameters[at]
    natural = np.exp if parameter.searched == "log" else np.asarray
    best, ends = found.phi[at], []
    for side in (-1, 1):
        inside = np.flatnonzero(values < best if side < 0 else values > best)[::side]
        v, d = np.concatenate([[best], values[inside]]), np.concatenate([[0.0], rise[inside]])
        beyond = np.flatnonzero(d >= cut)
        if not len(beyond):
            ends.append((0.0 if parameter.searched == "log" else -np.inf) if side < 0 else np.inf)
            continue
        j = beyond[0]
        split = v[j - 1] + (v[j] - v[j - 1]) * np.array([0.25, 0.5, 0.75])
        _, within = _held(found, np.tile(phi[inside[j - 1]], (3, 1)), np.full(3, at), split)
        v, d = np.concatenate([[v[j - 1]], split, [v[j]]]), np.concatenate([[d[j - 1]], within, [d[j]]])
        j = int(np.flatnonzero(d >= cut)[0])
        roots = np.sqrt(np.maximum(d[[max(j - 1, 0), j]], 0.0))
        ends.append(float(natural(np.interp(np.sqrt(cut), roots, v[[max(j - 1, 0), j]]))))
    return Profile(parameter.name, natural(values), rise, cut, (ends[0], ends[1]), float(natural(best)))
