"""`recscale specification`: how much a fitted number depends on choices that could have been made otherwise."""

from __future__ import annotations

from pathlib import Path

import click

from recscale.scaling.laws.commands import (
    AXES,
    CLUSTER,
    EXIT_CODES,
    JSON,
    SEED,
    TABLE,
    leave,
    number,
    read_and_tell,
    say,
    show,
)
from recscale.scaling.laws.forms import registry
from recscale.scaling.laws.tables.axes import parse_axes, parse_point, resolve_axes

from .specification import DIMENSIONS, SpecificationCurve, specification_curve


@click.command(epilog=EXIT_CODES)
@TABLE
@click.option("--form", default="power_offset", show_default=True, help="Form of the headline.")
@AXES
@click.option("--target", default="logloss", show_default=True, help="Metric column.")
@click.option("--quantity", default="alpha", show_default=True, help="A parameter, a, or forecast (with --at).")
@click.option("--at", help="Where to forecast: SLOT=VALUE pairs, as in x=1e7.")
@click.option("--freeze", "frozen", multiple=True, metavar="CHOICE", help=f"Do not vary it: {', '.join(DIMENSIONS)}.")
@click.option("--limit", default=200, show_default=True, help="At most this many refits.")
@CLUSTER
@SEED
@JSON
def specification(
    table: Path, form: str, axes: str | None, target: str, quantity: str, at: str | None, frozen: tuple[str, ...],
    limit: int, cluster: str | None, seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Refit one number of the law of TABLE under every defensible choice of form, rows, outliers, size and weights."""
    columns = resolve_axes(registry.get(form), parse_axes(axes))
    place = parse_point(at) if at else None
    curve = specification_curve(
        read_and_tell(table), form, columns, target=target, quantity=quantity, at=place, cluster=cluster,
        freeze=dict.fromkeys(frozen), limit=limit, seed=seed,
    )  # fmt: skip
    _print(curve)
    told = {**curve.summary(), "rows": curve.rows.to_dict("records")} if as_json else None
    leave(granted=curve.count > 0, told=told)


def _print(curve: SpecificationCurve) -> None:
    if curve.median is None or curve.low is None or curve.high is None:
        say(f"{curve.quantity}: refused under all {len(curve.rows)} specifications")
    else:
        own = "refused" if curve.headline is None else f"{curve.headline:.4g}, rank {curve.rank} of {curve.count}"
        say(
            f"{curve.quantity}: median {curve.median:.4g}, from {curve.low:.4g} to {curve.high:.4g} (5 to 95 %) over "
            f"{curve.count} specifications of {curve.possible}; headline {own}"
        )
    varied = [name for name in DIMENSIONS if curve.rows[name].nunique(dropna=False) > 1]
    groups = [
        (name, str(choice), f"{len(part)}", number(part["value"].median() if part["value"].notna().any() else None))
        for name in varied
        for choice, part in curve.rows.groupby(name, dropna=False, sort=False)
    ]
    show("Median by choice", ("choice", "taken", "specifications", curve.quantity), groups)
    say(*(f"form {name} not tried: {reason}" for name, reason in curve.inadmissible_forms.items()))
