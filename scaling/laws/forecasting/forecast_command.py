"""`recscale forecast`: larger runs predicted from smaller ones, with the doubt about the form in the interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pandas as pd

from recscale.scaling.laws.commands import (
    AXES,
    CLUSTER,
    OVER,
    SEED,
    WHERE,
    leave,
    read_and_tell,
    refuse,
    say,
    show,
    table_command,
)
from recscale.scaling.laws.fitting.law_fit import Refused
from recscale.scaling.laws.forms import registry
from recscale.scaling.laws.grids import Grid, number
from recscale.scaling.laws.judgement.specification import FORMS
from recscale.scaling.laws.tables.axes import parse_axes, parse_point, resolve_axes

from .forecast import Forecast
from .forecast import forecast as predict
from .second_stage import to_auc

_SHOWN = 20
_NO_AXES = ("ratio", "predicted", "low", "high", "wide_low", "wide_high")


@table_command(
    click.option(
        "--cut", type=float, help="Hold out what lies above it [default: the upper third of the axis, in logs]."
    ),
    click.option("--axis", help="Column of the cut [default: the first axis]."),
    click.option("--at", "points", multiple=True, metavar="SLOT=VALUE,...", help="A point to forecast; repeatable."),
    click.option("--form", "forms", multiple=True, help="Repeatable [default: the usual ones of one or two axes]."),
    AXES,
    click.option("--target", default="logloss", show_default=True, help="Metric column."),
    OVER,
    click.option("--auc", metavar="COLUMN", help="Go on from the loss to this AUC, in two stages."),
    click.option("--draws", default=200, show_default=True, help="Resampled refits for the bands."),
    CLUSTER,
    WHERE,
    SEED,
)
def forecast(
    table: Path, points: tuple[str, ...], forms: tuple[str, ...], axes: str | None, auc: str | None, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Fit TABLE below a cut, predict what lies above it and every --at, and say how often such intervals hold.

    Several forms are fitted; those that rolling origin does not reject are stacked. Where its cuts show that intervals
    so far out miss too often, a wider one stands beside.
    """
    if auc is not None and options["over"] is not None:
        raise click.UsageError("--auc goes on from the loss itself: leave --over out")
    frame = read_and_tell(table)
    given = parse_axes(axes)
    count = len(given) if given else 1
    forms = forms or FORMS[min(count, 2)]
    columns = resolve_axes(registry.get(forms[0]), given)
    try:
        found = predict(frame, forms, columns, at=[parse_point(text) for text in points], **options)
        told = _plain(found)
        if auc is not None:
            told["auc"] = to_auc(found, frame, auc, seed=options["seed"]).to_dict("records")
    except Refused as refusal:
        return refuse(refusal, as_json)
    _print(found, told)
    leave(granted=found.granted, told=told if as_json else None)


def _plain(found: Forecast) -> dict[str, Any]:
    tables = {name: getattr(found, name).to_dict("records") for name in ("held_out", "points", "calibration")}
    same = {name: getattr(found, name) for name in ("axis", "cut", "target", "weights", "rejected")}
    return same | tables


def _print(found: Forecast, told: dict[str, Any]) -> None:
    forms = ", ".join(f"{name} ({weight:.2f})" for name, weight in found.weights.items())
    say(f"{found.target} below {found.axis} = {found.cut:.4g}, stacked over {forms}")
    say(*(f"{name} rejected: {reason}" for name, reason in found.rejected.items()))
    rows = told.get("auc") or [*told["held_out"], *told["points"]]
    if rows:
        columns = [c for c in found.points.columns if c not in _NO_AXES]
        columns = columns or [found.axis]
        headings = [
            *columns,
            "beyond",
            "predicted",
            "95 %",
            "widened",
            "measured",
            *(["AUC", "95 %"] if "auc" in told else []),
        ]
        show(Grid("Forecast", headings, [_row(row, columns, "auc" in told) for row in rows[-_SHOWN:]]))
        if len(rows) > _SHOWN:
            say(f"and {len(rows) - _SHOWN} more rows (all are in the JSON)")
    shares = [
        (r["ratio"], _share(r["rolling_inside"], r["rolling_rows"]), _share(r["held_out_inside"], r["held_out_rows"]),
         "too few rows" if pd.isna(r["widening"]) else f"x{r['widening']:.2f}")
        for r in told["calibration"]
    ]  # fmt: skip
    headings = ("beyond the fitted rows", "rolling cuts", "above the cut", "widened")
    show(Grid("Share inside the 95 % intervals", headings, shares))


def _row(row: dict[str, Any], columns: list[str], auc: bool) -> list[str]:
    def cell(name: str, spec: str = ".5g") -> str:
        value = row.get(name)
        return "" if value is None or pd.isna(value) else format(value, spec)

    low, high, wide = cell("low"), cell("high"), f"{cell('wide_low')} to {cell('wide_high')}"
    refused = row["predicted"] is None or pd.isna(row["predicted"])
    told = [
        *(cell(c, ".4g") for c in columns),
        f"x{cell('ratio', '.3g')}",
        number(None) if refused else cell("predicted"),
    ]
    told += [f"{low} to {high}" if low else "", wide if cell("wide_low") else "", cell("actual")]
    if auc:
        told += [cell("auc"), f"{cell('auc_low')} to {cell('auc_high')}" if cell("auc_low") else ""]
    return told


def _share(share: float | None, rows: int) -> str:
    return "no rows" if not rows else f"{share:.2f} of {rows}"
