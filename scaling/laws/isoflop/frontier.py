"""Efficient frontier and compute-optimal size: N_opt = G C^a from groups of runs with one compute budget.

Both are pictures of a sweep; the headline is a direct joint fit. Two estimators of the minimum of a group are
printed side by side because they fail in opposite ways: Akima interpolation (log metric against ln size, the
recipe of arXiv 2406.19146) is nearly unbiased but passes every bit of noise on; a parabola (metric against ln
size, approach 2 of arXiv 2203.15556) averages noise but is biased on wide grids or grids whose centre drifts
with the budget. When they disagree by more than two standard errors neither exponent may be quoted.

Groups come from the planned budget column, never from rounding the achieved one. Every row and every group
left out is returned with a reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
from scipy.interpolate import Akima1DInterpolator

from recscale.scaling.laws.uncertainty.seed_noise import seed_noise

Excluded = list[tuple[str, str]]
Noise = float | Callable[[np.ndarray], np.ndarray] | str | None
_EDGE_ROUNDING = 1e-12  # in ln size: a minimum this close to an edge is on it
_MOST_LOST_REDRAWS = 0.5  # beyond this the surviving redraws no longer describe the optimum


@dataclass(frozen=True)
class Frontier:
    """Rows on the lower convex hull of (ln compute, metric), cheapest first, and the rows left out."""

    rows: pd.DataFrame
    excluded: Excluded


@dataclass(frozen=True)
class Optimum:
    """Minimum of one group: size, metric there, and sd of ln size from seed noise (None: unknown)."""

    size: float
    value: float
    log_sd: float | None = None


@dataclass(frozen=True)
class IsoflopGroup:
    """One budget: ascending sizes with their metric values; `rejected` says why there is no minimum."""

    budget: float
    sizes: np.ndarray
    values: np.ndarray
    akima: Optimum | None
    parabola: Optimum | None
    rejected: dict[str, str]


@dataclass(frozen=True)
class AllocationLaw:
    """N_opt = coefficient * C^exponent, by weighted least squares of ln N_opt on ln C.

    `se_source` is "seed noise" (bootstrap of the metric) or "regression" (residual scatter only, noise
    unknown). `interval` is the 95% percentile interval of the bootstrap, None without noise.
    """

    exponent: float
    coefficient: float
    se: float
    se_source: str
    interval: tuple[float, float] | None
    n_optima: int


@dataclass(frozen=True)
class Isoflop:
    """Both estimators over all groups.

    `quotable` is False, with `reasons`, when they disagree, one has too few optima, or the noise is unknown.
    """

    groups: list[IsoflopGroup]
    akima: AllocationLaw | None
    parabola: AllocationLaw | None
    quotable: bool
    reasons: list[str]
    excluded: Excluded
    settings: dict[str, Any]


@dataclass(frozen=True)
class _Rules:
    min_sizes: int
    edge_spacing: float
    log_metric: bool
    points_per_interval: int | None
    noise: float | Callable[[np.ndarray], np.ndarray] | None
    draws: int


def efficient_frontier(table: pd.DataFrame, *, flops: str = "train_flops", target: str = "logloss") -> Frontier:
    """Rows on the lower convex hull of (ln `flops`, `target`), up to the row with the lowest `target`.

    Only finished, decayed rows take part (where the table has `status` and `decayed`). Raises KeyError for a
    missing column and ValueError if no row is left.
    """
    kept, excluded = usable_rows(table, [flops, target], decayed_only=True)
    if kept.empty:
        raise ValueError(f"no row can be on the frontier; exclusions: {excluded[:3]}")
    kept = kept.sort_values([flops, target], kind="stable")
    x, y = np.log(kept[flops].to_numpy(float)), kept[target].to_numpy(float)
    hull: list[int] = []
    for i in range(int(np.argmin(y)) + 1):
        while len(hull) >= 2 and _turns_down(x, y, hull[-2], hull[-1], i):
            hull.pop()
        if hull and x[hull[-1]] == x[i]:
            continue  # rows are sorted by metric within one budget: the first is the lower one
        hull.append(i)
    return Frontier(kept.iloc[hull].copy(), excluded)


def isoflop(
    table: pd.DataFrame,
    *,
    size: str = "dense_params",
    flops: str = "train_flops",
    budget: str = "flops_target",
    target: str = "logloss",
    min_sizes: int = 5,
    edge_spacing: float = 0.5,
    budget_tolerance: float = 0.02,
    reduce: Literal["mean", "min"] = "mean",
    log_metric: bool = True,
    points_per_interval: int | None = None,
    noise: Noise = "seeds",
    draws: int = 400,
    seed: int = 0,
) -> Isoflop:
    """Compute-optimal size per budget and its power law, by Akima interpolation and by a parabola.

    Arguments:
      size, flops, budget, target: columns. Rows with one `budget` value form a group.
      budget_tolerance: where achieved `flops` differ from the budget by more than this, the size's own curve
        is interpolated to the exact budget in log-log, between rows of the same decay state, seed, schedule.
      min_sizes: a group with fewer sizes is rejected.
      edge_spacing: a minimum within this share of a grid spacing from either end is rejected.
      reduce: "mean" over repeated runs of one size, or "min" (what 2406.19146 does over learning rates;
        biased low under noise).
      log_metric: Akima interpolates ln metric (else the metric); the parabola always fits the metric.
      points_per_interval: None finds the exact minimum of the interpolant; k takes the lowest of
        k (sizes - 1) log-spaced points.
      noise: sd of the metric between seeds: a number, a function of the metric, or "seeds" to estimate it
      from
        repeated seeds in the table. Unknown (None, or no repeats at two sizes): no interval, and nothing to
        quote.
      draws: redraws of the metric with that noise.

    Raises KeyError for a missing column, ValueError for an unknown `reduce` or `noise`.
    """
    if reduce not in ("mean", "min"):
        raise ValueError(f"reduce must be 'mean' or 'min', got {reduce!r}")
    if isinstance(noise, str) and noise != "seeds":
        raise ValueError(f"noise must be a number, a function, 'seeds' or None, got {noise!r}")
    decayed, undecayed = decayed_rows(table)  # a group that mixes schedule states has no minimum to speak of
    kept, excluded = usable_rows(decayed, [size, flops, budget, target])
    excluded = undecayed + excluded
    curves, _ = usable_rows(table, [size, flops, target])  # a row without a budget may still bracket one
    if isinstance(noise, str):
        estimate = seed_noise(kept, [size, budget], kept[target].to_numpy(float))
        sd = None if estimate is None else estimate.sd
        source = "unknown: no repeated seeds at two sizes" if estimate is None else "repeated seeds"
    else:
        sd, source = noise, "unknown" if noise is None else "given"
    rules = _Rules(min_sizes, edge_spacing, log_metric, points_per_interval, sd, draws)
    rng = np.random.default_rng(seed)
    groups, redrawn = [], []
    for key, rows in kept.groupby(budget, sort=True):
        level = float(cast(float, key))
        cell, dropped = _sizes_at_budget(curves, rows, level, (size, flops, target), budget_tolerance, reduce)
        excluded += dropped
        group, samples = _group_optima(level, cell, rules, rng)
        groups.append(group)
        redrawn.append(samples)
    both = list(zip(groups, redrawn, strict=True))
    akima = _allocation_law([(group.budget, group.akima, samples.get("akima")) for group, samples in both])
    parabola = _allocation_law([(group.budget, group.parabola, samples.get("parabola")) for group, samples in both])
    reasons = _quoting_reasons(akima, parabola)
    if sd is None:
        reasons.append(f"seed noise {source}, so no claim may rest on the exponents")
    settings = {
        "size": size, "flops": flops, "budget": budget, "target": target, "min_sizes": min_sizes,
        "edge_spacing": edge_spacing, "budget_tolerance": budget_tolerance, "reduce": reduce,
        "log_metric": log_metric, "points_per_interval": points_per_interval, "draws": draws, "seed": seed,
        "noise": noise if isinstance(noise, float) else source,
    }  # fmt: skip
    return Isoflop(groups, akima, parabola, not reasons, reasons, excluded, settings)


def decayed_rows(table: pd.DataFrame) -> tuple[pd.DataFrame, Excluded]:
    """Rows at the end of a decay where the table has any; a sweep that never decays is taken as it is."""
    if "decayed" not in table.columns or not table["decayed"].eq(True).any():
        return table, []
    keep = table["decayed"].eq(True)
    ids = _names(table)[~keep]
    return table[keep].reset_index(drop=True), [(name, "learning rate not decayed") for name in ids]


def _names(table: pd.DataFrame) -> pd.Series:
    """The run of each row, or its position."""
    if "run_id" in table.columns:
        return table["run_id"].astype(str)
    return pd.Series(table.index.astype(str), index=table.index)


def usable_rows(
    table: pd.DataFrame, columns: list[str], *, decayed_only: bool = False
) -> tuple[pd.DataFrame, Excluded]:
    """Finished rows with positive finite values in `columns`, and (run_id, reason) for every other row.

    `status` and `decayed` are respected where the table has them. Raises KeyError naming missing columns.
    """
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise KeyError(f"table has no column {missing}; columns: {list(table.columns)}")
    names = _names(table)
    reasons = pd.Series("", index=table.index, dtype=object)

    def exclude(mask: np.ndarray, reason: Callable[[Any], str]) -> None:
        for label in table.index[np.asarray(mask) & (reasons == "").to_numpy()]:
            reasons[label] = reason(label)

    if "status" in table.columns:
        exclude(table["status"].ne("done").to_numpy(), lambda i: f"status is {table.at[i, 'status']}")
    for column in columns:
        values = pd.to_numeric(table[column], errors="coerce").to_numpy(float)
        exclude(~np.isfinite(values), lambda i, c=column: f"{c} is missing or not a finite number")
        exclude(~(values > 0), lambda i, c=column: f"{c} is not positive: {table.at[i, c]}")
    if decayed_only and "decayed" in table.columns:
        exclude(table["decayed"].isna().to_numpy(), lambda i: "decay state is not recorded")
        exclude(~table["decayed"].eq(True).to_numpy(), lambda i: "learning rate not decayed")
    good = (reasons == "").to_numpy()
    excluded = list(zip(names[~good], reasons[~good], strict=True))
    return table[good].reset_index(drop=True), excluded


def akima_minimum(
    u: np.ndarray, values: np.ndarray, *, points_per_interval: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Position and height of the minimum of the Akima interpolant through (u, values[:, draw]).

    u: [n] ascending; values: [n, draws]; returns two arrays [draws]. Original Akima weights ("makima" shifts
    the exponent by up to .005 when the grid centre drifts). Exact minimum of the piecewise cubic, or of its
    values on points_per_interval * (n - 1) even points.
    """
    interpolant = Akima1DInterpolator(u, values, axis=0, method="akima")
    if points_per_interval is not None:
        grid = np.linspace(u[0], u[-1], points_per_interval * (len(u) - 1))
        heights = interpolant(grid)
        best = np.argmin(heights, axis=0)
        return grid[best], np.take_along_axis(heights, best[None], axis=0)[0]
    c3, c2, c1, _ = interpolant.c  # each [n - 1, draws]; cubic in t = u - u[i]
    width = np.diff(u)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        root = np.sqrt(c2**2 - 3 * c3 * c1)
        # The root with positive second derivative; the second expression is the same one, stable when c3 is
        # nearly 0.
        t = np.where(c2 > 0, -c1 / (c2 + root), (root - c2) / (3 * c3))
    inside = np.isfinite(t) & (t > 0) & (t < width)
    t = np.where(inside, t, 0.0)
    heights = np.where(inside, interpolant.c[3] + t * (c1 + t * (c2 + t * c3)), np.inf)
    places = np.concatenate([u[:-1, None] + t, np.broadcast_to(u[:, None], values.shape)])
    heights = np.concatenate([heights, values])
    best = np.argmin(heights, axis=0)[None]
    return np.take_along_axis(places, best, 0)[0], np.take_along_axis(heights, best, 0)[0]


def parabola_minimum(u: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vertex position, height and curvature [draws] of the least-squares parabola through (u, values[:,
    draw]).

    The position is NaN where the curvature is not positive.
    """
    centre = u.mean()
    quadratic, linear, constant = np.polyfit(u - centre, values, 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = np.where(quadratic > 0, -linear / (2 * quadratic), np.nan)
    return centre + shift, constant + shift * (linear + shift * quadratic), quadratic


def _turns_down(x: np.ndarray, y: np.ndarray, i: int, j: int, k: int) -> bool:
    """Whether point j lies on or above the chord from i to k."""
    return (y[j] - y[i]) * (x[k] - x[i]) >= (y[k] - y[i]) * (x[j] - x[i])


def _sizes_at_budget(
    table: pd.DataFrame,
    rows: pd.DataFrame,
    budget: float,
    columns: tuple[str, str, str],
    tolerance: float,
    reduce: str,
) -> tuple[pd.DataFrame, Excluded]:
    """One row per size (the index) at exactly `budget`: its metric value and the number of runs behind it."""
    size, flops, target = columns
    cells: dict[float, list[float]] = {}
    excluded: Excluded = []
    for _, row in rows.iterrows():
        if abs(row[flops] / budget - 1) <= tolerance:
            cells.setdefault(float(row[size]), []).append(float(row[target]))
            continue
        value = _interpolated(_own_curve(table, row, size), budget, flops, target)
        if value is None:
            off = 100 * (row[flops] / budget - 1)
            excluded.append(
                (
                    str(row.get("run_id", row.name)),
                    f"achieved {flops} is {off:+.1f}% off the budget and no row of this size and "
                    "decay state lies on its other side",
                )
            )
        else:
            cells.setdefault(float(row[size]), []).append(value)
    merge = np.mean if reduce == "mean" else np.min
    frame = pd.DataFrame(
        {"value": [float(merge(v)) for v in cells.values()], "repeats": [len(v) for v in cells.values()]},
        index=list(cells),
    )
    return frame.sort_index(), excluded


def _own_curve(table: pd.DataFrame, row: pd.Series, size: str) -> pd.DataFrame:
    """Rows of the same size, schedule state and seed: the curve an off-budget row may be moved along."""
    same = table[size] == row[size]
    for column in ("architecture", "decayed", "schedule", "seed"):
        if column in table.columns and pd.notna(row[column]):
            same &= table[column] == row[column]
    return table[same]


def _interpolated(curve: pd.DataFrame, budget: float, flops: str, target: str) -> float | None:
    means = curve.groupby(flops)[target].mean().sort_index()
    x = np.log(means.index.to_numpy(float))
    if len(x) < 2 or not x[0] <= np.log(budget) <= x[-1]:
        return None
    return float(np.exp(np.interp(np.log(budget), x, np.log(means.to_numpy(float)))))


def _group_optima(
    budget: float, cell: pd.DataFrame, rules: _Rules, rng: np.random.Generator
) -> tuple[IsoflopGroup, dict[str, np.ndarray]]:
    """Optima of one group and, with known noise, ln N_opt per redraw [draws] (NaN without a minimum)."""
    sizes, values = cell.index.to_numpy(float), cell["value"].to_numpy(float)
    if len(sizes) < rules.min_sizes:
        reason = f"{len(sizes)} sizes, at least {rules.min_sizes} needed"
        return IsoflopGroup(budget, sizes, values, None, None, {"akima": reason, "parabola": reason}), {}
    u = np.log(sizes)
    low, high = u[0] + rules.edge_spacing * (u[1] - u[0]), u[-1] - rules.edge_spacing * (u[-1] - u[-2])

    def optima(columns: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        place, height = akima_minimum(
            u, np.log(columns) if rules.log_metric else columns, points_per_interval=rules.points_per_interval
        )
        vertex, bottom, _ = parabola_minimum(u, columns)
        return {
            "akima": (place, np.exp(height) if rules.log_metric else height),
            "parabola": (vertex, bottom),
        }

    found = optima(values[:, None])
    samples: dict[str, np.ndarray] = {}
    if rules.noise is not None:
        sd = np.broadcast_to(rules.noise(values) if callable(rules.noise) else rules.noise, values.shape)
        sd = sd / np.sqrt(cell["repeats"].to_numpy(float))
        redraws = values[:, None] + sd[:, None] * rng.standard_normal((len(values), rules.draws))
        samples = {name: _interior(place, low, high) for name, (place, _) in optima(redraws).items()}
    rejected: dict[str, str] = {}
    best: dict[str, Optimum | None] = {"akima": None, "parabola": None}
    curved_up = np.isfinite(found["parabola"][0][0])
    for name, (place, height) in found.items():
        reason = _edge_reason(float(place[0]), u, low, high) if curved_up else "curvature is not positive"
        lost = float(np.isnan(samples[name]).mean()) if name in samples else 0.0
        if not reason and lost > _MOST_LOST_REDRAWS:
            reason = f"seed noise moves the minimum to an edge in {lost:.0%} of redraws"
        if reason:
            rejected[name] = reason
            samples.pop(name, None)
            continue
        sd_of_place = float(np.nanstd(samples[name])) if name in samples else None
        best[name] = Optimum(float(np.exp(place[0])), float(height[0]), sd_of_place)
    return IsoflopGroup(budget, sizes, values, best["akima"], best["parabola"], rejected), samples


def _interior(place: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.where((place > low + _EDGE_ROUNDING) & (place < high - _EDGE_ROUNDING), place, np.nan)


def _edge_reason(place: float, u: np.ndarray, low: float, high: float) -> str:
    for side, bad, edge in (
        ("smallest", place <= low + _EDGE_ROUNDING, u[0]),
        ("largest", place >= high - _EDGE_ROUNDING, u[-1]),
    ):
        if bad:
            return f"minimum at {np.exp(place):.4g} is at or too near the {side} size {np.exp(edge):.4g}"
    return ""


def _allocation_law(optima: list[tuple[float, Optimum | None, np.ndarray | None]]) -> AllocationLaw | None:
    """Weighted least squares of ln N_opt on ln C; None with fewer than 3 optima.

    optima: per budget the optimum, where there is one, and ln N_opt of its redraws, where the noise is known.
    """
    chosen = [(budget, optimum, samples) for budget, optimum, samples in optima if optimum is not None]
    if len(chosen) < 3:
        return None
    x = np.log([budget for budget, _, _ in chosen])
    y = np.log([optimum.size for _, optimum, _ in chosen])
    redrawn = [s for _, _, s in chosen if s is not None]
    noisy = len(redrawn) == len(chosen)
    sd = np.array([optimum.log_sd if noisy else 1.0 for _, optimum, _ in chosen])
    weights = np.ones_like(sd) if not noisy or np.any(sd <= 0) else sd**-2
    slope, intercept = _weighted_line(x, y[:, None], weights)
    if noisy:
        drawn = _weighted_line(x, np.stack(redrawn), weights)[0]
        drawn = drawn[np.isfinite(drawn)]
        low, high = np.quantile(drawn, [0.025, 0.975])
        interval = (float(low), float(high))
        se, source = float(drawn.std()), "seed noise"
    else:
        residual = y - intercept[0] - slope[0] * x
        se = float(np.sqrt(residual @ residual / (len(x) - 2) / ((x - x.mean()) ** 2).sum()))
        interval, source = None, "regression"
    return AllocationLaw(float(slope[0]), float(np.exp(intercept[0])), se, source, interval, len(x))


def _weighted_line(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slope and intercept per column of y [n, draws]; NaN entries of y leave that column's fit."""
    w = weights[:, None] * np.isfinite(y)
    y = np.where(np.isfinite(y), y, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_x, mean_y = (w * x[:, None]).sum(0) / w.sum(0), (w * y).sum(0) / w.sum(0)
        dx = x[:, None] - mean_x
        slope = (w * dx * (y - mean_y)).sum(0) / (w * dx**2).sum(0)
    return slope, mean_y - slope * mean_x


def _quoting_reasons(akima: AllocationLaw | None, parabola: AllocationLaw | None) -> list[str]:
    reasons = [
        f"{name}: fewer than 3 groups have an interior minimum"
        for name, law in (("akima", akima), ("parabola", parabola))
        if law is None
    ]
    if akima is not None and parabola is not None:
        se = float(np.hypot(akima.se, parabola.se))
        gap = abs(akima.exponent - parabola.exponent)
        if gap > 2 * se:
            reasons.append(
                f"akima {akima.exponent:.4f} and parabola {parabola.exponent:.4f} differ by {gap:.4f}, "
                f"more than 2 standard errors ({2 * se:.4f})"
            )
    return reasons
