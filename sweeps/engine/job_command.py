"""`recscale run-job`: one job of a plan, for any scheduler that can run a command."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from recscale.scaling.processes import AGAIN

from . import worker
from .worker import TRAINER


@click.command("run-job")
@click.argument("out", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("job")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Setting that cannot change a result.")
@click.option("--trainer", default=TRAINER, hidden=True)
@click.option("--parent", type=int, hidden=True, help="Process without which this one ends.")
def run_job(out: Path, job: str, overrides: tuple[str, ...], trainer: str, parent: int | None) -> None:
    """Train JOB of the plan in OUT, in this process, which a scheduler has started.

    Ends with code 0 when all its runs have a result, 1 when it failed, and 75 when it is to be started again: it was
    told to stop (SIGTERM), or another process trains it. It then goes on from its newest checkpoint.
    """
    if parent is not None:
        worker.die_with(parent)
    signal.signal(signal.SIGTERM, _stop)
    try:
        statuses = worker.run_job(str(out), job, overrides, trainer)
    except BlockingIOError as error:
        click.echo(f"{error}", err=True)
        sys.exit(AGAIN)
    for run, status in statuses.items():
        click.echo(f"{run} {status}")


def run_job_command(out: Path, job: str, overrides: Sequence[str], trainer: str = TRAINER) -> list[str]:
    """Arguments of a Python interpreter that run `recscale run-job`."""
    command = ["-c", "from recscale.scaling.cli import main; main()", "run-job", str(out), job]
    command += [] if trainer == TRAINER else ["--trainer", trainer]
    return command + [part for text in overrides for part in ("--set", text)]


def _stop(number: int, frame: Any) -> None:
    sys.exit(AGAIN)
