"""What the gates weigh: whether the metric moves along an axis at all, whether the form describes how, whether
anything simpler does as well, and what speaks for a floor.

Legend: n rows, p parameters, l levels of an axis, k directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from jaxtyping import Float
from scipy import special

from recscale.scaling.laws.fitting.problem import Problem, residuals
from recscale.scaling.laws.fitting.solver import Solution, refine, solve
from recscale.scaling.laws.forms.form import Form
from recscale.scaling.laws.uncertainty.curvature import LEVEL, ROUNDING, axis_levels, jacobian
from recscale.scaling.laws.uncertainty.profile import Squares

_HELD_OUT_QUANTILE = 0.85
_SIMULATED = 999
# Decays over the whole range of an axis that a trend may have, in e-folds; 0 is a straight line in ln x.
_DECAYS = (0.0, 1.0, 2.0, 4.0, 8.0)
_MOST_STEPS = 15
# Least share of what another axis varies that lies within levels, for its slope to be learned there.
_MOSTLY_WITHIN = 0.5


def slopes(axes: Mapping[str, np.ndarray], y: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """d y / d ln x of every axis, by weighted least squares on all axes together: what may be said when
    exponents may not.
    """
    varying = {
        slot: np.log(values) for slot, values in axes.items() if np.all(values > 0) and np.ptp(np.log(values)) > 0
    }
    if not varying:
        return {}
    design = np.stack([u - u.mean() for u in varying.values()] + [np.ones(len(y))], axis=1)
    root = np.sqrt(weights)
    solved, *_ = np.linalg.lstsq(design * root[:, None], y * root, rcond=None)
    return {slot: float(value) for slot, value in zip(varying, solved, strict=False)}


def largest_f(
    design: Float[np.ndarray, "l p"], response: Float[np.ndarray, " l"], directions: Float[np.ndarray, "l k"]
) -> tuple[float, float]:
    """(p-value, sum of squares explained) of the further column that adds most to a design, errors independent and
    normal: the largest of k F statistics has no closed form, so it is simulated, with the same draws every time.
    """
    base, kept = np.linalg.svd(design, full_matrices=False)[:2]
    base = base[:, kept > 1e-9 * kept.max()] if len(kept) else base
    outside = directions - base @ (base.T @ directions)
    size = np.linalg.norm(outside, axis=0)
    told = size > 1e-6 * np.maximum(np.linalg.norm(directions, axis=0), 1e-300)
    spare = len(response) - base.shape[1] - 1
    if spare < 1 or not told.any():
        return 1.0, 0.0
    outside = outside[:, told] / size[told]
    draws = np.random.default_rng(0).standard_normal((_SIMULATED, len(response)))

    def statistic(values: np.ndarray) -> np.ndarray:
        left = values - (values @ base) @ base.T
        caught = np.max((left @ outside) ** 2, axis=1)
        total = np.sum(left**2, axis=1)
        return np.where(total > len(response) * ROUNDING**2, caught / np.maximum(total, 1e-300), 0.0)

    found = statistic(response[None])[0]
    left = response - base @ (base.T @ response)
    return float((1 + np.sum(statistic(draws) >= found)) / (1 + _SIMULATED)), float(found * (left @ left))


def _level_means(levels: np.ndarray, weights: np.ndarray, *columns: np.ndarray) -> list[np.ndarray]:
    """Weighted means of columns [n] or [n, q] per level, each level times the root of its weight."""
    total = np.bincount(levels, weights)
    found = []
    for column in columns:
        wide = column.reshape(len(levels), -1)
        sums = np.zeros((len(total), wide.shape[1]))
        np.add.at(sums, levels, weights[:, None] * wide)
        found.append((sums / np.sqrt(total)[:, None]).reshape((len(total),) + column.shape[1:]))
    return found


def _steps(column: np.ndarray) -> np.ndarray:
    """Indicators [n, k] of lying above each gap between an axis' distinct values, at most fifteen of them."""
    levels = axis_levels(column)
    count = int(levels.max()) + 1
    gaps = np.unique(np.linspace(1, count - 1, min(_MOST_STEPS, count - 1)).round().astype(int))
    return (levels[:, None] >= gaps).astype(float)


def trend(axes: Float[np.ndarray, "n d"], target: Float[np.ndarray, " n"], weights: np.ndarray, at: int) -> float:
    """p-value that the metric does not move along axis `at`: level means against a constant, with the other axes' own
    lines taken out, tried on straight lines and decays in ln x.

    What the other axes do is learned within the levels where they vary there, as on a grid, whole or with runs missing;
    level means, which may be few, tell only the rest.
    """
    u, root = axes[:, at], np.sqrt(weights)[:, None]
    others = np.delete(axes, at, axis=1)
    reach = (u - u.min()) / max(np.ptp(u), 1e-300)
    directions = np.stack([np.exp(-decay * reach) if decay else reach for decay in _DECAYS], axis=1)
    levels = axis_levels(u)
    lines = np.column_stack([others, others**2])
    lines = lines - np.average(lines, axis=0, weights=weights)
    lines = lines / np.maximum(np.linalg.norm(lines * root, axis=0), 1e-300)

    def within(columns: np.ndarray) -> np.ndarray:
        (means,) = _level_means(levels, weights, columns)
        return (columns - (means / np.sqrt(np.bincount(levels, weights))[:, None])[levels]) * root

    _, inside, rotation = np.linalg.svd(within(lines), full_matrices=False)
    lines, known = lines @ rotation.T, inside > _MOSTLY_WITHIN
    slopes = np.linalg.lstsq(within(lines[:, known]), within(target[:, None])[:, 0], rcond=None)[0]
    design = np.column_stack([np.ones(len(u)), lines[:, ~known]])
    return largest_f(*_level_means(levels, weights, design, target - lines[:, known] @ slopes, directions))[0]


def lack_of_fit(found: Squares, at: int) -> tuple[float, float]:
    """What a fit leaves along axis `at`, level means of its residuals against a bend and against steps: the p-value of
    its being noise, and its share of all that the metric varies along the axis.
    """
    problem = found.problem
    u, weights = problem.axes[:, at], problem.weights
    design = jacobian(problem, found.phi) / np.sqrt(weights)[:, None]
    # Columns differ in size by many orders (a floor near 0); only their span matters here.
    design = design / np.maximum(np.linalg.norm(design, axis=0), 1e-300)
    target = problem.target if problem.kind == "log" else problem.y / problem.unit
    left = residuals(problem, found.phi)
    columns = (design, left, np.column_stack([u**2, _steps(u)]), target - np.average(target, weights=weights))
    *tested, varies = _level_means(axis_levels(u), weights, *columns)
    p_value, explained = largest_f(*tested)
    return p_value, explained / max(float(varies @ varies), 1e-300)


def rivals(found: Squares) -> dict[str, tuple[float, int]]:
    """Sum of squares and number of parameters of what a law must beat: the metric linear in every ln x, and one step
    along every axis.
    """
    problem = found.problem
    slots = len(problem.form.slots)
    # On relative residuals, as the law where it is fitted in logarithms.
    scale = problem.y if problem.kind == "log" else problem.unit
    root = np.sqrt(problem.weights)

    def rss(columns: np.ndarray) -> float:
        design = np.column_stack([np.ones(len(problem.y)), columns]) / scale[:, None] * root[:, None]
        response = problem.y / scale * root
        solved, *_ = np.linalg.lstsq(design, response, rcond=None)
        return float(np.sum((design @ solved - response) ** 2))

    axes = problem.axes[:, :slots]
    chosen = axes * 0.0
    stepped = np.inf
    # One axis after the other, twice: each step is placed best given the others.
    for _ in range(2 if slots > 1 else 1):
        for j in range(slots):
            tried = []
            for step in _steps(axes[:, j]).T:
                columns = chosen.copy()
                columns[:, j] = step
                tried.append((rss(columns), step))
            stepped, chosen[:, j] = min(tried, key=lambda pair: pair[0])
    return {"a straight line in ln x": (rss(axes), 1 + slots), "a single step": (stepped, 1 + 2 * slots)}


def beaten(found: Squares, rival: tuple[float, int]) -> float:
    """F statistic by which a law is better than a rival over its 95% quantile: below 1 it is not better."""
    rss, parameters = rival
    extra = max(len(found.phi) - parameters, 1)
    spare = max(found.spread.groups[0].count - int(found.spread.groups[0].between.sum()), 1)
    statistic = (rss - found.rss) / extra / found.spread.noise
    return float(statistic / special.fdtri(extra, spare, LEVEL))


def held_out_masks(axes: np.ndarray) -> np.ndarray:
    """Rows to hold out, one mask per varying axis [d', n]: its largest values (the top 15% of the distinct
    ones, at least one).
    """
    masks = []
    for column in axes.T:
        distinct = np.unique(column)
        if len(distinct) >= 3:
            cut = distinct[min(int(np.ceil(_HELD_OUT_QUANTILE * len(distinct))), len(distinct) - 1)]
            masks.append(column >= cut)
    return np.array(masks, bool).reshape(len(masks), len(axes))


def floor_evidence(problem: Problem, solution: Solution) -> tuple[dict[str, float], Solution]:
    """What the `floor` gate weighs besides its interval, and the fit with the floor fixed at 0.

    ratio: largest over smallest fitted excess above the floor, over the whole table. held_out_ratio: rms error on the
    largest values of each axis with a floor over that without.
    """
    form, at = problem.form, problem.form.floor_at
    kept = np.arange(len(form.names)) != at
    bare = replace(
        problem, form=form.without_floor(), low=problem.low[kept], high=problem.high[kept], pull=problem.pull[:, kept]
    )
    rival = solve(bare)
    masks = held_out_masks(problem.axes)
    rows = (~masks).astype(float) * problem.weights
    errors = {}
    for name, which, start in (("with", problem, solution.phi), ("without", bare, rival.phi)):
        squares = replace(which, delta=np.full(len(problem.y), np.inf))
        ends = refine(squares, np.tile(start, (len(rows), 1)), weights=rows).phi if len(rows) else []
        outside = [residuals(squares, phi)[mask] for phi, mask in zip(ends, masks, strict=True)]
        errors[name] = float(np.sqrt(np.mean(np.concatenate(outside) ** 2))) if outside else 0.0
    # Rounding is not evidence: errors below 1e-10 count as equal.
    held_out = (errors["with"] + 1e-10) / (errors["without"] + 1e-10)
    above = np.abs(excess(form, solution.phi, problem.axes))
    return {"ratio": float(above.max() / max(above.min(), 1e-300)), "held_out_ratio": held_out}, rival


def excess(form: Form, phi: Float[np.ndarray, " p"], axes: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " m"]:
    """Fitted y above the floor in every row; of a form of two streams, in the rows of the stream that has the floor."""
    at = form.floor_at
    axes = axes[axes[:, -1] < 0.5] if form.streams else axes
    return form.value(phi, axes) - (np.exp(phi[at]) if form.parameters[at].searched == "log" else phi[at])
