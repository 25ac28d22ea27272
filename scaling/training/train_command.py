"""`recscale train`: one run from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("architecture")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run; a stopped run goes on.")
@click.option("--data", "root", default="", help="Folder of an imported log (sets data.root).")
@click.option(
    "--dataset",
    default="known_truth",
    show_default=True,
    help="Data set: folder of an imported log, name, or package.module:attribute.",
)
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Override, e.g. training.lr=1e-3.")
@click.option("--json", "as_json", is_flag=True, help="Print the record's figures as one JSON object, last.")
def train(architecture: str, out: Path, root: str, dataset: str, assignments: tuple[str, ...], as_json: bool) -> None:
    """Train one run of ARCHITECTURE and print its metrics."""
    from recscale.scaling.host_memory import keep_freed_memory, restart_with_huge_pages

    restart_with_huge_pages()
    keep_freed_memory()  # before anything computes
    from recscale.scaling.data.sources import STORED, use_log
    from recscale.scaling.records.overrides import apply, parse

    from . import get_config
    from . import train as run
    from .progress import bar

    if Path(dataset).is_dir():
        dataset, root = STORED, dataset
    config = get_config(architecture, dataset)
    if root:
        use_log(config, root)
    config = apply(config, parse(config, assignments))
    assigned = [text.partition("=")[0].strip() for text in assignments] + (["data.root"] if root else [])
    with bar(f"{architecture} on {dataset}") as progress:
        record = run(config, out, progress=progress, assigned=assigned)
    metrics = record.get("metrics") or {}
    for name, value in metrics.items():
        if isinstance(value, int | float):
            click.echo(f"{name:28s} {value:.6g}")
    click.echo(f"status {record['status']}; record in {out / 'run.json'}")
    if as_json:
        click.echo(json.dumps({"run_id": record["run_id"], "status": record["status"], **metrics}))
