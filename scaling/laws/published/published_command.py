"""`recscale published`: what papers print, and whether a fitted exponent lies inside theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from recscale.scaling.laws.commands import (
    AXES,
    BOOTSTRAP,
    CLUSTER,
    KNOWN,
    TARGET,
    WHERE,
    leave,
    read_and_tell,
    refuse,
    say,
    show,
    table_command,
)
from recscale.scaling.laws.fitting.fit import fit
from recscale.scaling.laws.fitting.law_fit import Refused
from recscale.scaling.laws.grids import Grid
from recscale.scaling.laws.tables.axes import parse_axes
from recscale.scaling.laws.tables.conditions import rows_where

from . import catalogue
from .beside import as_grid, beside


@table_command(
    click.argument("table", type=click.Path(path_type=Path), required=False),
    AXES,
    TARGET,
    click.option("--metric", help="What the target is called in the published law [default: the target]."),
    click.option("--convention", multiple=True, help="What one unit of an axis counts, as the published law says it."),
    click.option("--collection", type=click.Choice(catalogue.RESULT_SETS), help="List result cells of papers instead."),
    CLUSTER,
    WHERE,
    BOOTSTRAP,
    *KNOWN,
    table=click.argument("law_id", required=False),
)
def published(
    law_id: str | None, table: Path | None, metric: str | None, convention: tuple[str, ...], collection: str | None,
    axes: str | None, target: str | None, where: str | None, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """List published laws, show LAW_ID, or fit its form to TABLE and put the exponents side by side.

    They are compared only where axis, metric and convention are the same; --axes, --metric and --convention say what
    the columns of TABLE are in the words of the published law.
    """
    if collection is not None:
        cells = catalogue.results(collection)
        cells = cells if where is None else cells[rows_where(cells, where)]
        told = cells.dropna(axis=1, how="all").astype(object)
        rows = told.where(told.notna(), "").astype(str).itertuples(index=False)
        show(Grid(f"{collection}: {len(cells)} cells", list(told.columns), list(rows)))
        leave(granted=True, told={"cells": cells.to_dict("records")} if as_json else None)
    elif law_id is None:
        laws = [catalogue.load(name) for name in catalogue.ids()]
        rows = [
            (law.id, law.form, ", ".join(law.axes), ", ".join(law.metric_ids), law.grade, law.label) for law in laws
        ]
        show(Grid("Published laws", ("id", "form", "axes", "metric", "grade", "source"), rows))
        leave(granted=True, told={"laws": [vars(law) for law in laws]} if as_json else None)
    elif table is None:
        law = catalogue.load(law_id)
        say(*(f"{name}: {value}" for name, value in vars(law).items() if value not in (None, "", ())))
        leave(granted=True, told=vars(law) if as_json else None)
    else:
        law = catalogue.load(law_id)
        chosen = parse_axes(axes) or list(law.axes)
        own = fit(read_and_tell(table), law.form, chosen, target, where=where, **options)
        # Columns that the call names stand for the axes of the published law.
        stated = list(law.axes) if axes else list(own.rows.columns.values())
        try:
            _, found = beside(law_id, own, metric=metric or own.rows.target, axes=stated, convention=convention or None)
        except (Refused, catalogue.OverlayRefused) as refusal:
            return refuse(refusal, as_json)
        given = [f"given: {name} {told}" for name, told in own.given.items()]
        show(as_grid(law.label, found, [own.headline(), *given, *([law.caution] if law.caution else [])]))
        leave(granted=any(f.fitted is not None for f in found), told={"beside": found} if as_json else None)
