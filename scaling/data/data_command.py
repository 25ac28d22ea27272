"""`recscale data`: the explicit download of a public data set, verified, converted and described."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from recscale.pallas_kernels.names import nearest

from .importing import movielens, movielens_files
from .importing.download import DownloadError, copy_source, download_movielens_100k
from .stored_log.card import DEFAULT_MAX_DROPPED


@click.command()
@click.argument("name")
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder to put it in.")
@click.option(
    "--source",
    type=click.Path(exists=True, path_type=Path),
    help="A copy you already have (wheel, zip or folder); nothing is downloaded.",
)
@click.option("--max-dropped", default=DEFAULT_MAX_DROPPED, show_default=True, help="Largest share of rejected rows.")
@click.option("--allow-modified", is_flag=True, help="Accept files whose checksum is not the published one.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on the last line.")
def data(name: str, out: Path, source: Path | None, max_dropped: float, allow_modified: bool, as_json: bool) -> None:
    """Gets the data set NAME (movielens-100k), verifies it and converts it for training.

    The set stays yours: this project ships no data and loading never downloads. Then:

        recscale sweep movielens --data DIR
    """
    if name != movielens_files.NAME:
        known = nearest(name, [movielens_files.NAME])
        raise click.BadParameter(f"unknown data set {name!r}{known}", param_hint="NAME")
    try:
        path = copy_source(source, out) if source else download_movielens_100k(out)
        log = movielens.load(path, max_dropped=max_dropped, allow_modified=allow_modified, cache_dir=out / "packed")
    except (DownloadError, OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    splits = {split: end - start for split, (start, end) in log.splits.items()}
    result: dict[str, Any] = {
        "name": name,
        "root": str(out),
        "path": str(path),
        "packed": str(log.folder),
        "splits": splits,
        "base_rates": {
            split: float(log.labels[slice(*bounds)].mean()) if splits[split] else None
            for split, bounds in log.splits.items()
        },
        "report": log.report.to_dict(),
        **log.meta["facts"],
    }
    click.echo(f"{name}: {path}")
    click.echo("rows      " + ", ".join(f"{split} {rows:,}" for split, rows in splits.items()))
    for warning in result["warnings"]:
        click.echo(f"warning   {warning}")
    click.echo(log.report.summary())
    click.echo(f"licence   {result['licence']}")
    click.echo(f"cite      {result['citation']}")
    click.echo(f"use       recscale sweep movielens --data {out}")
    if as_json:
        click.echo(json.dumps(result))
