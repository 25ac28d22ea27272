"""`recscale optimum`: how to split a budget of compute between size and data, from a fitted law."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from recscale.scaling.laws.commands import fit_options, leave, read_and_tell, refuse, say, show, table_command
from recscale.scaling.laws.fitting.fit import fit
from recscale.scaling.laws.fitting.law_fit import Refused
from recscale.scaling.laws.forms.registry import SEVERAL_AXES
from recscale.scaling.laws.tables.axes import over_floor, parse_axes

from .allocation import as_grid, exponents_line, per_unit_of, splits


@table_command(
    click.option("--budget", "budgets", type=float, multiple=True, required=True, help="Compute to spend; repeatable."),
    click.option(
        "--per-unit",
        type=float,
        help="Compute of one unit of every axis, the k of k N D [default: median of train_flops / (N D) in the rows].",
    ),
    fit_options(SEVERAL_AXES),
)
def optimum(
    table: Path, budgets: tuple[float, ...], per_unit: float | None, form: str, axes: str | None, target: str | None,
    over: str | None, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Size and data that minimise the law fitted to TABLE at each --budget, with intervals, and the exponents a and b.

    A budget whose best split lies further beyond the fitted rows than a forecast may go is refused.
    """
    frame = read_and_tell(table)
    if over is not None:
        frame, target = over_floor(frame, target, over)
    law = fit(frame, form, parse_axes(axes), target, **options)
    per_unit, remark = (per_unit, "") if per_unit is not None else per_unit_of(law)
    try:
        found = splits(law, budgets, per_unit)
    except Refused as refusal:
        return refuse(Refused(f"{law.form.id} on {law.rows.target}: {refusal}"), as_json)
    say(law.headline(), *([remark] if remark else []))
    show(as_grid(law, found, exponents_line(law)))
    a = law.derived.get("a")
    exponents = {} if a is None else {"a": a, "b": 1 - a, "a_interval": law.intervals.get("a")}
    told = {"splits": found, "per_unit": per_unit, "exponents": exponents, "law": law.headline()}
    leave(granted=any(split["metric"] is not None for split in found), told=told if as_json else None)
