"""Compute-optimal allocation in three ways, side by side: N_opt = G C^a, D_opt proportional to C^b (arXiv 2203.15556).

    1 envelope     the size with the lowest loss at each budget, read from curves of loss against compute
    2 isoFLOP      the minimum of each group of runs with one budget, by a parabola and by Akima interpolation
    3 parametric   a = beta / (alpha + beta) of the fitted y = E + A N^-alpha + B D^-beta

They fail in different ways, so that where they disagree none is to be believed. Budgets whose best size is the smallest
or the largest tried say nothing about the optimum and are left out with a reason; b is 1 - a where compute is
proportional to N D over the rows, and refused elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import pandas as pd

from recscale.scaling.laws.fitting.fit import fit
from recscale.scaling.laws.fitting.law_fit import Settings
from recscale.scaling.laws.grids import Grid, between, number
from recscale.scaling.laws.uncertainty.bootstrap import cluster_counts

from .frontier import AllocationLaw, Isoflop, decayed_rows, isoflop, usable_rows

_BUDGETS = 100  # places on the axis of compute at which the envelope is read
_MIN_SIZES, _MIN_DECADES = 5, 1.0
_PROPORTIONAL = 1.1  # C / (N D) may vary by this factor over the rows for b = 1 - a


@dataclass(frozen=True)
class Approach:
    """One estimate of a with its 95 % interval, or why it is refused. b is None where it does not follow from a."""

    name: str
    a: float | None = None
    interval: tuple[float, float] | None = None
    b: float | None = None
    rests_on: str = ""
    refused: str = ""


def approaches(
    table: pd.DataFrame,
    *,
    size: str = "dense_params",
    data: str = "examples",
    flops: str = "train_flops",
    budget: str = "flops_target",
    target: str = "logloss",
    cluster: str | None = None,
    bootstrap: int = Settings.bootstrap,
    seed: int = 0,
) -> tuple[list[Approach], Isoflop | None, list[str]]:
    """All three approaches, the isoFLOP groups where the table has budgets, and remarks on b.

    Raises KeyError for a missing column (`budget` may be missing: then approach 2 is refused).
    """
    rows, _ = usable_rows(decayed_rows(table)[0], [size, data, flops, target])
    ratio = rows[flops] / rows[size] / rows[data]
    varies = float(ratio.max() / ratio.min()) if len(rows) else 1.0
    remarks = (
        []
        if varies <= _PROPORTIONAL
        else [f"{flops} / ({size} x {data}) varies by x{varies:.2f}: b does not follow from a"]
    )
    found = [_envelope(rows, size, flops, target, bootstrap, seed)]
    groups = None
    if budget in table.columns and table[budget].notna().any():
        groups = isoflop(table, size=size, flops=flops, budget=budget, target=target, seed=seed)
        found += [
            _from_groups(groups, name, law) for name, law in (("parabola", groups.parabola), ("Akima", groups.akima))
        ]
    else:
        found.append(Approach("2 isoFLOP", refused=f"the table has no column {budget!r} of planned budgets"))
    found.append(_parametric(table, size, data, target, cluster, bootstrap, seed))
    if not remarks:
        found = [f if f.a is None else replace(f, b=1 - f.a) for f in found]
    return found, groups, remarks


def _envelope(rows: pd.DataFrame, size: str, flops: str, target: str, draws: int, seed: int) -> Approach:
    """Approach 1, its interval from resampled sizes."""
    curves = {}
    for value, group in rows.groupby(size):
        means = group.groupby(flops)[target].mean()
        if len(means) > 1:
            curves[float(cast(float, value))] = (np.log(means.index.to_numpy(float)), np.log(means.to_numpy(float)))
    name = "1 envelope"
    if len(curves) < _MIN_SIZES:
        return Approach(name, refused=f"{len(curves)} sizes were run at several budgets, fewer than {_MIN_SIZES}")
    sizes = np.log(list(curves))
    spread = np.concatenate([x for x, _ in curves.values()])
    at = np.linspace(spread.min(), spread.max(), _BUDGETS)
    losses = np.stack([np.interp(at, x, y, left=np.nan, right=np.nan) for x, y in curves.values()])
    slope, used, decades = _slope_of_envelope(sizes, losses, at)
    if slope is None:
        return Approach(
            name,
            None,
            None,
            None,
            "",
            f"the best size lies between others over {decades:.2f} decades of budgets, fewer than {_MIN_DECADES:g}",
        )
    counts = cluster_counts(len(sizes), draws, np.random.default_rng(seed)) if draws else np.zeros((0, len(sizes)))
    drawn = [_slope_of_envelope(sizes, np.where(count[:, None] > 0, losses, np.nan), at)[0] for count in counts]
    drawn = [value for value in drawn if value is not None]
    interval = None
    if len(drawn) > draws / 2 > 0:  # too few resamples with an optimum inside say nothing
        low, high = np.percentile(drawn, [2.5, 97.5])
        interval = (float(low), float(high))
    return Approach(name, slope, interval, None, f"{len(sizes)} sizes, {used} budgets over {decades:.1f} decades")


def _slope_of_envelope(sizes: np.ndarray, losses: np.ndarray, at: np.ndarray) -> tuple[float | None, int, float]:
    """Slope of ln N_opt on ln C over budgets whose best size lies between others, how many there are, and over how many
    decades. losses[k, c]: ln loss of the k-th size at the c-th budget, NaN where it was not run.
    """
    known = np.isfinite(losses)
    inside = known.sum(axis=0) >= 3
    best = np.argmin(np.where(known, losses, np.inf), axis=0)
    order = np.where(known, np.arange(len(sizes))[:, None], -1)
    smallest, largest = np.argmax(known, axis=0), order.max(axis=0)
    inside &= (best > smallest) & (best < largest)
    decades = float(np.ptp(at[inside]) / np.log(10)) if inside.any() else 0.0
    if decades < _MIN_DECADES or len(np.unique(best[inside])) < 3:
        return None, int(inside.sum()), decades
    return float(np.polyfit(at[inside], sizes[best[inside]], 1)[0]), int(inside.sum()), decades


def _from_groups(groups: Isoflop, name: str, law: AllocationLaw | None) -> Approach:
    """Approach 2 by one interpolation; refused where the two disagree or too few groups have a minimum inside."""
    title = f"2 isoFLOP, {name}"
    rejected = [
        f"{group.budget:.3g}: {group.rejected[name.lower()]}"
        for group in groups.groups
        if name.lower() in group.rejected
    ]
    if law is None or not groups.quotable:
        return Approach(title, refused="; ".join([*groups.reasons, *rejected]))
    return Approach(title, law.exponent, law.interval, None, f"{law.n_optima} of {len(groups.groups)} budgets")


def _parametric(table, size: str, data: str, target: str, cluster: str | None, bootstrap: int, seed: int) -> Approach:
    """Approach 3."""
    rows, _ = decayed_rows(table)
    law = fit(rows, "chinchilla", {"N": size, "D": data}, target, bootstrap, cluster, seed=seed)
    value = law.derived.get("a")
    if value is None:
        reasons = dict.fromkeys(law.reason(name) for name in ("alpha", "beta") if law.reason(name))
        return Approach("3 parametric", refused="; ".join(reasons))
    return Approach("3 parametric", value, law.intervals.get("a"), None, f"{len(law.rows.y)} rows, {law.form.id}")


def as_grid(found: Sequence[Approach], remarks: Sequence[str] = ()) -> Grid:
    """The exponents of compute-optimal allocation by several approaches."""
    rows = [
        (f.name, number(f.a), between(f.interval), "" if f.a is None else number(f.b), f.refused or f.rests_on)
        for f in found
    ]
    headings = ("approach", "a", "95 %", "b", "rests on, or why refused")
    return Grid("N_opt = G C^a, D_opt = G' C^b", headings, rows, remarks)
