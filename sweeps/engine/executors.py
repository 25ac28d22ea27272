"""Executors: what carries out the jobs of a plan. `local` is this machine's worker pool, `slurm` a cluster's scheduler.

Another distribution adds one through the entry-point group `recscale.executors`, and `package.module:attribute` names
any function. It goes through `pending_jobs(out, plan)` of `.job` and has every job trained, wherever it likes, by
`run_job(out, job.id, overrides)` of `.worker` in a process of its own that has not imported jax yet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from recscale.pallas_kernels.names import load

from .job import count, run_statuses

GROUP = "recscale.executors"
EXECUTORS = {"local": "recscale.sweeps.engine.launch:launch", "slurm": "recscale.sweeps.engine.slurm:submit"}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a launch.

    Attributes:
        statuses: number of the plan's runs by status. failed: ids of those that failed.
        interrupted: whether a signal ended the launch early. wall_s: seconds it took.
        submitted: job -> the scheduler's id, of an executor that hands jobs over and does not wait; None: it waited.
    """

    statuses: Mapping[str, int]
    interrupted: bool
    wall_s: float
    failed: tuple[str, ...]
    submitted: Mapping[str, str] | None = None

    @classmethod
    def of(cls, out: Path, plan: Sequence[dict[str, Any]], wall_s: float, **more: Any) -> Outcome:
        """As the records below `out` say; `more` are further fields."""
        found = run_statuses(out, plan)
        failed = tuple(run for run, status in found.items() if status == "failed")
        return cls(statuses=count(found.values()), failed=failed, wall_s=wall_s, **{"interrupted": False, **more})


class Executor(Protocol):
    """Trains every unfinished run of a plan, or hands them to something that will.

    It must be safe to call again at any time: finished runs are left alone, stopped ones go on from their checkpoints.
    `only_launcher(out)` of `.locks` keeps two launchers of one folder apart.
    """

    def __call__(
        self,
        out: Path,
        plan: Sequence[dict[str, Any]],
        *,
        workers: int | None,
        memory_gb: float | None,
        overrides: Sequence[str],
        options: Sequence[str],
    ) -> Outcome:
        """Runs the jobs of a plan.

        Args:
            out: folder of the sweep; results go to `out/runs`.
            plan: rows of `out/plan.jsonl`.
            workers: jobs at a time at most, None for as many as there is room for.
            memory_gb: memory that the predicted peaks of the running jobs may sum to, None for what is free.
            overrides: `key=value` settings that cannot change a result, laid over every run.
            options: `key=value` texts for this executor alone (`--slurm`).
        """
        ...


def executor(name: str) -> Executor:
    """The executor called `name`, or at the address `package.module:attribute`.

    Raises:
        ValueError: there is none; the nearest name is in the message.
    """
    return load(GROUP, name, EXECUTORS, "executor")
