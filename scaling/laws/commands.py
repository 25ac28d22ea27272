"""What the commands on run tables share: options, the notes of a table, grids on a screen, and how they end."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recscale.scaling.laws.fitting.law_fit import Settings
from recscale.scaling.laws.forms.registry import ONE_AXIS, SEVERAL_AXES
from recscale.scaling.laws.grids import Grid
from recscale.scaling.laws.tables.read import notes, read
from recscale.scaling.records.plain import plain

REFUSED = 3
EXIT_CODES = "Exit codes: 0 something was fitted and printed, 1 wrong input, 2 wrong usage, 3 all of it was refused."

TABLE = click.argument("table", type=click.Path(path_type=Path))
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line.")
TARGET = click.option("--target", help="Metric column [default: logloss, or loss].")
CLUSTER = click.option("--cluster", help="Column whose rows are resampled together [default: shape_id, or the trunk].")
OVER = click.option("--over", metavar="COLUMN", help="Take what the target exceeds this column of known floors by.")
BOOTSTRAP = click.option(
    "--bootstrap", default=Settings.bootstrap, show_default=True, help="Resampled refits for the intervals; 0 for none."
)
SEED = click.option("--seed", default=Settings.seed, show_default=True, help="Seed of the resampling.")
AXES = click.option(
    "--axes", help="SLOT=COLUMN pairs (N=dense_params,D=examples) or columns in order [default: the form's]."
)
WHERE = click.option(
    "--where",
    help="Keep rows that meet a condition, as in \"decayed and `data set` in ['a', 'b']\" (odd names in back-ticks).",
)


def _given(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE texts of an option as the mapping `fit` takes. Raises UsageError naming what is wrong."""
    option, found = parameter.opts[0], {}
    for text in texts:
        name, _, value = text.partition("=")
        parts = value.split(",")
        kind = parts.pop(0) if option == "--prior" else ""
        try:
            numbers = [] if value.startswith("@") and option == "--fix" else [float(part) for part in parts]
        except ValueError:
            numbers = [float("nan")]
        wanted = 1 if option == "--fix" else 2
        if not name or any(n != n for n in numbers) or (numbers and len(numbers) != wanted):
            shapes = {"--fix": "E=.42 or E=@asymptote", "--bound": "alpha=0,2", "--prior": "alpha=normal,.3,.1"}
            raise click.UsageError(f"{option} {text!r} cannot be read; write it as {shapes[option]}")
        found[name] = value if not numbers else numbers[0] if wanted == 1 else (*([kind] if kind else []), *numbers)
    return found


KNOWN = (
    click.option(
        "--fix", "fixed", multiple=True, callback=_given, metavar="NAME=VALUE",
        help="A known parameter: E=.42, or E=@COLUMN row by row.",
    ),
    click.option(
        "--bound", "bounds", multiple=True, callback=_given, metavar="NAME=LOW,HIGH",
        help="Where a parameter may lie, as in alpha=0,2.",
    ),
    click.option(
        "--prior", "priors", multiple=True, callback=_given, metavar="NAME=normal,MEAN,SD",
        help="What is believed of a parameter; lognormal,MEDIAN,SD of the logarithm.",
    ),
)  # fmt: skip


def fit_options(form: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Options of a command that fits a law: form (by default this one, or the usual one), axes, metric, rows, clusters,
    resampling, and what is known of parameters.
    """
    usual = form or f"{ONE_AXIS} of one axis, {SEVERAL_AXES} otherwise"
    own = click.option("--form", default=form, help=f"Form id or alias; see recscale fit --forms [default: {usual}].")
    options = (own, AXES, TARGET, OVER, CLUSTER, WHERE, BOOTSTRAP, SEED, *KNOWN)
    return lambda command: functools.reduce(lambda function, option: option(function), reversed(options), command)


def table_command(
    *options: Callable[[Any], Any], table: Callable[[Any], Any] = TABLE
) -> Callable[[Any], click.Command]:
    """A command on a run table: the table, its own options, --json, and the exit codes below its help."""

    def command(function: Callable[..., None]) -> click.Command:
        decorated = functools.reduce(lambda inner, option: option(inner), (JSON, *reversed(options), table), function)
        return click.command(epilog=EXIT_CODES)(decorated)

    return command


def read_and_tell(path: Path) -> pd.DataFrame:
    """The table, with what was decided in reading it on standard error."""
    table = read(path)
    for note in notes(table):
        click.echo(f"note: {note}", err=True)
    return table


def show(grid: Grid, console: Console | None = None) -> None:
    """Prints a grid of texts and its remarks."""
    console = console or Console()
    table = Table(box=box.SIMPLE, title=escape(grid.title), title_justify="left")
    for heading in grid.headings:
        table.add_column(heading, overflow="fold")
    for row in grid.rows:
        table.add_row(*map(escape, row))
    console.print(table)
    say(*grid.remarks, console=console)


def say(*lines: str, console: Console | None = None) -> None:
    """Prints lines as they are."""
    for line in lines:
        (console or Console()).print(escape(line), highlight=False)


def leave(*, granted: bool, told: Mapping[str, Any] | None = None) -> None:
    """Ends the running command: `told` as one line of JSON where there is any, and the exit code."""
    if told is not None:
        click.echo(json.dumps(plain(told)))
    if not granted:
        click.get_current_context().exit(REFUSED)


def refuse(refusal: Exception, as_json: bool) -> None:
    """Ends the running command where nothing may be read: the reason, and the exit code of a refusal."""
    say(str(refusal))
    leave(granted=False, told={"refused": str(refusal)} if as_json else None)
