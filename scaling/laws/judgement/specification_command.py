"""`recscale specification`: how much a fitted number depends on choices that could have been made otherwise."""

from __future__ import annotations

from pathlib import Path

import click

from recscale.scaling.laws.commands import AXES, CLUSTER, SEED, leave, read_and_tell, refuse, show, table_command
from recscale.scaling.laws.fitting.law_fit import Refused
from recscale.scaling.laws.forms import registry
from recscale.scaling.laws.tables.axes import parse_axes, parse_point, resolve_axes

from .specification import DIMENSIONS, as_grid, specification_curve


@table_command(
    click.option("--form", default="power_offset", show_default=True, help="Form of the headline."),
    AXES,
    click.option("--target", default="logloss", show_default=True, help="Metric column."),
    click.option("--quantity", default="alpha", show_default=True, help="A parameter, a, or forecast (with --at)."),
    click.option("--at", help="Where to forecast: SLOT=VALUE pairs, as in x=1e7."),
    click.option("--freeze", "frozen", multiple=True, metavar="CHOICE", help=f"Not varied: {', '.join(DIMENSIONS)}."),
    click.option("--limit", default=200, show_default=True, help="At most this many refits."),
    CLUSTER,
    SEED,
)
def specification(
    table: Path, form: str, axes: str | None, target: str, quantity: str, at: str | None, frozen: tuple[str, ...],
    limit: int, cluster: str | None, seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Refit one number of the law of TABLE under every defensible choice of form, rows, outliers, size and weights."""
    columns = resolve_axes(registry.get(form), parse_axes(axes))
    place = parse_point(at) if at else None
    try:
        curve = specification_curve(
            read_and_tell(table), form, columns, target=target, quantity=quantity, at=place, cluster=cluster,
            freeze=dict.fromkeys(frozen), limit=limit, seed=seed,
        )  # fmt: skip
    except Refused as refusal:
        return refuse(refusal, as_json)
    show(as_grid(curve))
    told = {**curve.summary(), "rows": curve.rows.to_dict("records")} if as_json else None
    leave(granted=curve.count > 0, told=told)
