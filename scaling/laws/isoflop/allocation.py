"""Budgets of compute split by a fitted law, with intervals and refusals, and what a unit of the axes costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recscale.scaling.laws.fitting.law_fit import LawFit
from recscale.scaling.laws.fitting.optimum import optimum
from recscale.scaling.laws.grids import Grid, between, number
from recscale.scaling.laws.judgement import gates


def per_unit_of(law: LawFit) -> tuple[float, str]:
    """Compute per unit of all axes from the fitted rows, and a remark on how it varies."""
    if "train_flops" not in law.rows.frame or not len(law.rows.y):
        return 1.0, "no column train_flops: the budget counts the plain product of the axes"
    ratios = law.rows.frame["train_flops"].to_numpy(float) / law.rows.stacked.prod(axis=1)
    told = f"train_flops = {np.median(ratios):.3g} x {' x '.join(law.rows.columns.values())} over the rows"
    return float(np.median(ratios)), f"{told} (from {ratios.min():.3g} to {ratios.max():.3g})"


def splits(law: LawFit, budgets: Sequence[float], per_unit: float) -> list[dict[str, Any]]:
    """One entry a budget: axis values with intervals and the predicted metric, None where the split is too far out.

    Raises Refused for a law of which a parameter is refused.
    """

    def cost(*amounts: np.ndarray) -> np.ndarray:
        return per_unit * np.prod(np.stack([np.asarray(a, float) for a in amounts]), axis=0)

    result = optimum(law, list(budgets), cost, interval=law.draws is not None)
    found = []
    for i, budget in enumerate(budgets):
        at = {slot: result[slot][i] for slot in law.form.axes}
        entry: dict[str, Any] = {"budget": budget, "metric": None, "refused": ""}
        if gates.forecast(law.rows.axes, {slot: np.array([x]) for slot, x in at.items()}).any():
            entry["refused"] = "range: the best split lies too far beyond the largest fitted values"
        else:
            ends = {slot: result.get(f"{slot}_interval") for slot in at}
            entry |= {"metric": float(result["metric"][i])} | {slot: float(x) for slot, x in at.items()}
            entry |= {
                f"{slot}_interval": [float(v[i]) for v in pair] for slot, pair in ends.items() if pair is not None
            }
        found.append(entry)
    return found


def exponents_line(law: LawFit) -> list[str]:
    """The exponents a and b in words; nothing where they are refused or the form has none."""
    a, interval = law.derived.get("a"), law.intervals.get("a")
    if a is None:
        return []
    ends = "" if interval is None else f" [{interval[0]:.4g} to {interval[1]:.4g}]"
    return [f"N_opt = G C^a with a = {a:.4g}{ends}, D_opt = G' C^b with b = {1 - a:.4g}"]


def as_grid(law: LawFit, found: Sequence[Mapping[str, Any]], remarks: Sequence[str] = ()) -> Grid:
    """Budgets with their best split."""
    headings, rows = ["budget"], [[f"{entry['budget']:.4g}"] for entry in found]
    for slot in law.form.axes:
        headings += [law.rows.columns[slot], "95 %"]
        for row, entry in zip(rows, found, strict=True):
            row += [number(entry.get(slot)), between(entry.get(f"{slot}_interval"))]
    for row, entry in zip(rows, found, strict=True):
        row += [number(entry["metric"], ".5g"), entry["refused"]]
    return Grid("Best split of a budget", [*headings, law.rows.target, ""], rows, remarks)
