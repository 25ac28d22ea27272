"""`recscale plot`: from finished runs to a fitted law, figures and a page; or one figure of one or several studies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from recscale.scaling.laws.commands import BOOTSTRAP, CLUSTER, TARGET
from recscale.scaling.laws.forms.registry import ONE_AXIS
from recscale.scaling.laws.tables.axes import parse_axes, usual_target

_FIGURES = ("law", "study", "isoflop", "frontier", "recovery", "usage", "resources", "reach", "experts", "curves")
_STYLES = ("report", "column", "page", "talk")


@click.command()
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="OUT...")
@click.option("--form", default=ONE_AXIS, show_default=True, help="Law to fit; of several axes: fitted jointly.")
@click.option(
    "--axes",
    default="",
    metavar="COLUMNS",
    help="Columns to draw, e.g. dense_params,train_flops; or N=dense_params,D=examples. One figure has one.",
)
@TARGET
@BOOTSTRAP
@CLUSTER
@click.option("--published", "law_id", metavar="LAW", help="Draw a published law too; ids: recscale published.")
@click.option("--metric", help="What the target is called in the published law [default: the target].")
@click.option("--convention", multiple=True, help="What one unit of the axis counts, as the published law says it.")
@click.option("--no-hold-out", is_flag=True, help="Fit the largest value of each axis too instead of predicting it.")
@click.option(
    "--figure",
    "kind",
    type=click.Choice(_FIGURES),
    help="One figure instead of the report [default: law]; study: the law and its excess side by side.",
)
@click.option("--excess", is_flag=True, help="Of a law: metric minus the floor.")
@click.option("--at", type=float, help="Of reach: the value of the target [default: the best that all reach].")
@click.option("--style", type=click.Choice(_STYLES), default="report", show_default=True, help="Width and type size.")
@click.option("--save", type=click.Path(path_type=Path), help="File of the figure: .pdf, .svg or .png.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object, last.")
def plot(
    sources: tuple[Path, ...],
    form: str,
    axes: str,
    target: str | None,
    bootstrap: int,
    cluster: str | None,
    law_id: str | None,
    metric: str | None,
    convention: tuple[str, ...],
    no_hold_out: bool,
    kind: str | None,
    excess: bool,
    at: float | None,
    style: str,
    save: Path | None,
    as_json: bool,
) -> None:
    """Fit and draw runs: OUT is the folder of a sweep, of a run, or a run table (.parquet, .csv, ...).

    One folder alone is reported: OUT/report/ gets fit.json, loss.png and report.html. Of several, of a file, or with
    --figure or --save, one figure is drawn: several studies stand in it side by side. Fitted is the best learning rate
    of every size, and the largest size is predicted; recscale fit takes every row.
    """
    fit: dict[str, Any] = {"form": form, "bootstrap": bootstrap, "hold_out_largest": not no_hold_out}
    fit |= {} if cluster is None else {"cluster": cluster}
    first, *others = sources
    if others or first.is_file() or kind or save:
        asked = parse_axes(axes) or []
        if len(asked) > 1:
            raise click.UsageError(f"a figure has one axis, --axes names {len(asked)}: {axes}")
        columns = list(asked.values() if isinstance(asked, dict) else asked)
        options = {"x": next(iter(columns), None), "y": target, "style": style, "excess": excess}
        if at is not None and kind != "reach":
            raise click.UsageError("--at says which value is reached, so it goes with --figure reach")
        options |= {} if at is None else {"at": at}
        path = _draw(kind or "law", sources, save, options, fit)
        click.echo(f"{kind or 'law'}  {path}")
        return
    from .questions import Published
    from .report import make_report, print_summary

    published = None if law_id is None else Published(law_id, metric, convention)
    summary = make_report(first, axes=parse_axes(axes), target=target, published=published, **fit)
    print_summary(summary)
    if as_json:
        click.echo(json.dumps(summary))


def _draw(kind: str, sources: Sequence[Path], save: Path | None, options: dict[str, Any], fit: dict[str, Any]) -> Path:
    """Draws one figure of these studies and returns its file."""
    from recscale.scaling.laws.tables.read import read

    from . import figures, study_figures, truth, views
    from .report import FOLDER, named

    first, *others = sources
    alone = None if others or not first.is_dir() else first
    path = save or (alone / FOLDER if alone else Path()) / f"{kind}.png"
    if kind in study_figures.OF_FOLDERS:
        drawn = study_figures.OF_FOLDERS[kind](sources, **options)
    else:
        table = study_figures.study_table(
            {name: views.with_rows_of_a_pass(read(source)) for name, source in named(sources).items()}
        )
        options["y"] = options["y"] or usual_target(table)
        if kind == "law":
            drawn = figures.law_figure(table, **options, **fit)
        elif kind == "study":
            view = figures.view_of(table, options["x"], options["y"], fit)
            drawn = figures.study_figure(view, truth=truth.find(table), style=options["style"])
        else:
            drawn = study_figures.OF_TABLES[kind](table, **options)
    return figures.save(drawn, path)
