"""`recscale train`: one run from the command line."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

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
@click.option(
    "--mesh", default="", help="Devices that share the run: data=4,fsdp=2; axes data, fsdp, tensor, token, expert."
)
@click.option("--coordinator", metavar="HOST:PORT", help="Of process 0, where no scheduler says (Slurm, MPI, TPU do).")
@click.option("--processes", type=click.IntRange(1), help="Processes that share the run; all start this command.")
@click.option("--process-id", type=click.IntRange(0), help="Which of them this is, from 0.")
@click.option("--json", "as_json", is_flag=True, help="Print the record's figures as one JSON object, last.")
def train(
    architecture: str,
    out: Path,
    root: str,
    dataset: str,
    assignments: tuple[str, ...],
    mesh: str,
    as_json: bool,
    **others: Any,
) -> None:
    """Train one run of ARCHITECTURE and print its metrics.

    The run goes on with other devices and processes than it began with.
    """
    from recscale.scaling.host_memory import keep_freed_memory, restart_with_huge_pages

    restart_with_huge_pages()
    keep_freed_memory()  # before anything computes
    from recscale.scaling.processes import connect, is_first

    connect(**others)
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
    config = apply(config, parse(config, assignments) | ({"training.mesh": mesh} if mesh else {}))
    assigned = [text.partition("=")[0].strip() for text in assignments] + (["data.root"] if root else [])
    with bar(f"{architecture} on {dataset}") if is_first() else contextlib.nullcontext() as progress:
        record = run(config, out, progress=progress, assigned=assigned)
    if not is_first():
        return
    metrics = record.get("metrics") or {}
    for name, value in metrics.items():
        if isinstance(value, int | float):
            click.echo(f"{name:28s} {value:.6g}")
    click.echo(f"status {record['status']}; record in {out / 'run.json'}")
    if as_json:
        click.echo(json.dumps({"run_id": record["run_id"], "status": record["status"], **metrics}))
