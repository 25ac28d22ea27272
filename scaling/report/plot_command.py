"""`recscale plot`: from a folder of finished runs to a fitted law, figures and a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from recscale.scaling.laws.tables.axes import parse_axes


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--form", default="power_offset", show_default=True, help="Law to fit; of several axes: fitted jointly.")
@click.option(
    "--axes",
    default="",
    metavar="COLUMNS",
    help="Columns to draw, e.g. dense_params,train_flops; or N=dense_params,D=examples.",
)
@click.option("--target", default="logloss", show_default=True, help="Metric column.")
@click.option("--bootstrap", default=1000, show_default=True, help="Resampled refits behind the intervals; 0 for none.")
@click.option("--cluster", default=None, help="Column whose rows are resampled together; default shape_id.")
@click.option("--published", "law_id", metavar="LAW", help="Draw a published law too; ids: recscale published.")
@click.option("--metric", help="What the target is called in the published law [default: the target].")
@click.option("--convention", multiple=True, help="What one unit of the axis counts, as the published law says it.")
@click.option("--no-hold-out", is_flag=True, help="Fit the largest value of each axis too instead of predicting it.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object, last.")
def plot(
    out: Path, form: str, axes: str, target: str, bootstrap: int, cluster: str | None, law_id: str | None,
    metric: str | None, convention: tuple[str, ...], no_hold_out: bool, as_json: bool,
) -> None:  # fmt: skip
    """Fit and draw the runs of OUT (runs.parquet, or run folders) into OUT/report/: fit.json, loss.png, report.html."""
    from .questions import Published
    from .report import make_report, print_summary

    options: dict[str, Any] = {} if cluster is None else {"cluster": cluster}
    summary = make_report(
        out,
        form=form,
        axes=parse_axes(axes),
        target=target,
        bootstrap=bootstrap,
        hold_out_largest=not no_hold_out,
        published=None if law_id is None else Published(law_id, metric, convention),
        **options,
    )
    print_summary(summary)
    if as_json:
        click.echo(json.dumps(summary))
