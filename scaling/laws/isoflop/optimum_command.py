"""`recscale optimum`: how to split a budget of compute between size and data, from a fitted law."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np

from recscale.scaling.laws.commands import (
    EXIT_CODES,
    JSON,
    TABLE,
    between,
    fit_options,
    leave,
    number,
    read_and_tell,
    say,
    show,
)
from recscale.scaling.laws.fitting.fit import fit
from recscale.scaling.laws.fitting.law_fit import LawFit, Refused
from recscale.scaling.laws.fitting.optimum import optimum as allocation
from recscale.scaling.laws.judgement import gates
from recscale.scaling.laws.tables.axes import parse_axes


@click.command(epilog=EXIT_CODES)
@TABLE
@click.option("--budget", "budgets", type=float, multiple=True, required=True, help="Compute to spend; repeatable.")
@click.option(
    "--per-unit",
    type=float,
    help="Compute of one unit of every axis, the k of k N D [default: median of train_flops / (N D) over the rows].",
)
@fit_options("chinchilla")
@JSON
def optimum(
    table: Path, budgets: tuple[float, ...], per_unit: float | None, form: str, axes: str | None, target: str | None,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Size and data that minimise the law fitted to TABLE at each --budget, with intervals, and the exponents a and b.

    A budget whose best split lies further beyond the fitted rows than a forecast may go is refused.
    """
    frame = read_and_tell(table)
    law = fit(frame, form, parse_axes(axes), target, **options)
    per_unit, remark = (per_unit, "") if per_unit is not None else _per_unit(law)
    try:
        found = _splits(law, budgets, per_unit)
    except Refused as refusal:
        say(f"{law.form.id} on {law.rows.target}: {refusal}")
        leave(granted=False, told={"refused": str(refusal)} if as_json else None)
        return
    say(law.headline(), *([remark] if remark else []))
    _print(law, found)
    a = law.derived.get("a")
    exponents = {} if a is None else {"a": a, "b": 1 - a, "a_interval": law.intervals.get("a")}
    if a is not None:
        say(f"N_opt = G C^a with a = {a:.4g} [{between(law.intervals.get('a'))}], D_opt = G' C^b with b = {1 - a:.4g}")
    told = {"splits": found, "per_unit": per_unit, "exponents": exponents, "law": law.headline()}
    leave(granted=any(split["metric"] is not None for split in found), told=told if as_json else None)


def _per_unit(law: LawFit) -> tuple[float, str]:
    """Compute per unit of all axes from the fitted rows, and a remark on how it varies."""
    if "train_flops" not in law.rows.frame or not len(law.rows.y):
        return 1.0, "no column train_flops: the budget counts the plain product of the axes"
    ratios = law.rows.frame["train_flops"].to_numpy(float) / law.rows.stacked.prod(axis=1)
    told = f"train_flops = {np.median(ratios):.3g} x {' x '.join(law.rows.columns.values())} over the rows"
    return float(np.median(ratios)), f"{told} (from {ratios.min():.3g} to {ratios.max():.3g})"


def _splits(law: LawFit, budgets: tuple[float, ...], per_unit: float) -> list[dict[str, Any]]:
    """One entry a budget: axis values with intervals and the predicted metric, None where the split is too far out."""

    def cost(*amounts: np.ndarray) -> np.ndarray:
        return per_unit * np.prod(np.stack([np.asarray(a, float) for a in amounts]), axis=0)

    result = allocation(law, list(budgets), cost, interval=law.draws is not None)
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


def _print(law: LawFit, found: list[dict[str, Any]]) -> None:
    headings, rows = ["budget"], [[f"{entry['budget']:.4g}"] for entry in found]
    for slot in law.form.axes:
        headings += [law.rows.columns[slot], "95 %"]
        for row, entry in zip(rows, found, strict=True):
            row += [number(entry.get(slot)), between(entry.get(f"{slot}_interval"))]
    for row, entry in zip(rows, found, strict=True):
        row += [number(entry["metric"], ".5g"), entry["refused"]]
    show("Best split of a budget", [*headings, law.rows.target, ""], rows)
