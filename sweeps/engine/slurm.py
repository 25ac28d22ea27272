"""Runs a plan on a Slurm cluster through submitit: one Slurm job a planned job. Nothing here re-invents a scheduler."""

from __future__ import annotations

import ast
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import worker
from .executors import Outcome
from .job import pending_jobs
from .locks import only_launcher
from .plan import read_plan


class MissingExtra(RuntimeError):
    """An optional dependency that is not installed."""


def submit(
    out: Path | str,
    plan: Sequence[dict[str, Any]] | None = None,
    *,
    workers: int | None = None,
    memory_gb: float | None = None,
    overrides: Sequence[str] = (),
    options: Sequence[str] = (),
    cluster: str = "slurm",
) -> Outcome:
    """Submits every unfinished job of a plan and does not wait: the executor `slurm`. The folder must be on a disk that
    all machines share.

    Submitting again is safe: a job whose runs are finished is not submitted, one that is running holds a lock that
    makes its double stop, and one that was stopped resumes.

    Args:
        out: the sweep's folder. plan: its rows; default what `out/plan.jsonl` holds.
        workers, memory_gb: not used: how much runs at a time is the cluster's matter.
        overrides: `key=value` settings that cannot change a result.
        options: `key=value` texts for submitit (`slurm_partition=cpu`, `timeout_min=600`).
        cluster: submitit's name of the executor.

    Raises:
        MissingExtra: submitit is not installed; the message says how to install it.
        ValueError: an option that is not key=value.
    """
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise MissingExtra("the slurm backend needs submitit: pip install 'recscale[slurm]'") from error
    out, began = Path(out).resolve(), time.monotonic()
    executor = submitit.AutoExecutor(folder=out / "slurm", cluster=cluster)
    executor.update_parameters(**{"name": out.name, "cpus_per_task": 1, **_options(options)})
    rows = read_plan(out) if plan is None else plan
    with only_launcher(out):
        jobs = {
            job.id: executor.submit(worker.run_job, str(out), job.id, tuple(overrides)).job_id
            for job in pending_jobs(out, rows)
        }
        return Outcome.of(out, rows, time.monotonic() - began, submitted=jobs)


def _options(texts: Sequence[str]) -> dict[str, object]:
    options: dict[str, object] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--slurm {text!r} is not key=value, for example --slurm slurm_partition=cpu")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return options
