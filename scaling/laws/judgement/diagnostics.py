"""Refits that the gates need: the evidence for a floor, log-linear slopes, and intra-cluster correlation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from scipy import stats

from recscale.scaling.laws.fitting.problem import Problem, residuals
from recscale.scaling.laws.fitting.solver import Solution, refine, solve
from recscale.scaling.laws.uncertainty.curvature import cluster_sd

from .gates import f_test

_HELD_OUT_QUANTILE = 0.85


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


def floor_evidence(problem: Problem, solution: Solution, codes: np.ndarray) -> tuple[dict[str, float], Solution]:
    """What the `floor` gate weighs, and the fit with the floor fixed at 0.

    dof: rows - parameters. p_value: F-test of a zero floor by least squares; where clusters hold several
    rows, the larger of it and a t-test of the floor with cluster-robust errors. ratio: largest over smallest
    fitted y - E along an axis, others at their centre; the largest over axes. held_out_ratio: rms error on
    the largest values of each axis with a floor over that without.
    """
    form, at = problem.form, problem.form.floor_at
    bare = replace(problem, form=form.without_floor(), low=np.delete(problem.low, at), high=np.delete(problem.high, at))
    rival = solve(bare)
    masks = held_out_masks(problem.axes)
    rows = np.concatenate([np.ones((1, len(problem.y))), (~masks).astype(float)]) * problem.weights
    squared = {"delta": np.full(len(problem.y), np.inf)}
    fits, errors, rss = {}, {}, {}
    for name, which, start in (("with", problem, solution.phi), ("without", bare, rival.phi)):
        squares = replace(which, **squared)
        fits[name] = refine(squares, np.tile(start, (len(rows), 1)), weights=rows).phi
        r = np.stack([residuals(squares, phi) for phi in fits[name]])
        rss[name] = float(np.sum(problem.weights * r[0] ** 2))
        outside = [r[1 + k][mask] for k, mask in enumerate(masks)]
        errors[name] = float(np.sqrt(np.mean(np.concatenate(outside) ** 2))) if outside else 0.0
    n, p = len(problem.y), len(form.names)
    # Rounding is not evidence: errors below 1e-10 count as equal.
    held_out = (errors["with"] + 1e-10) / (errors["without"] + 1e-10)
    evidence = {
        "dof": float(n - p),
        "p_value": max(f_test(rss["without"], rss["with"], n, p), _cluster_p_value(problem, fits["with"][0], codes)),
        "ratio": _range_above_floor(problem, solution.phi),
        "held_out_ratio": held_out,
    }
    return evidence, rival


def _cluster_p_value(problem: Problem, phi: np.ndarray, codes: np.ndarray) -> float:
    """Two-sided p-value of floor = 0 with cluster-robust errors; 0 where every row is its own cluster."""
    form, count = problem.form, int(codes.max()) + 1
    if count == len(codes) or count < 3:
        return 0.0
    at = form.floor_at
    spread = cluster_sd(problem, phi, codes)[at]
    # The error of ln E is that of E relative to E, so E / se(E) = 1 / se(ln E).
    ratio = (1.0 if form.parameters[at].searched == "log" else abs(phi[at])) / max(spread, 1e-300)
    return float(2 * stats.t.sf(ratio, count - 1))


def _range_above_floor(problem: Problem, phi: np.ndarray) -> float:
    """max over axes of max/min of fitted y - E along that axis, the other axes at their centre."""
    form, centre = problem.form, problem.axes.mean(axis=0)
    centre[len(form.slots) :] = 0.0  # the stream marker, where there is one: the metric with the floor
    at = form.floor_at
    floor = np.exp(phi[at]) if form.parameters[at].searched == "log" else phi[at]
    ratios = [1.0]
    for j in range(len(form.slots)):
        points = np.tile(centre, (2, 1))
        points[:, j] = problem.axes[:, j].min(), problem.axes[:, j].max()
        above = np.abs(form.value(phi, points) - floor)
        ratios.append(float(above.max() / max(above.min(), 1e-300)))
    return max(ratios)
