"""What a Slurm job does: planned jobs, one after the other. It is unpickled before jax is imported, so it imports
nothing that does."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

from .worker import run_job


class JobsInTurn:
    """Trains planned jobs in this allocation; queued again at its end, it goes on where it was.

    A job that fails, or that another process trains, does not keep the next one from its turn.
    """

    def __init__(self, out: str, jobs: Sequence[str], overrides: Sequence[str], trainer: str):
        self.out, self.jobs, self.overrides, self.trainer = out, list(jobs), tuple(overrides), trainer

    def __call__(self) -> dict[str, str]:
        """Statuses by run id.

        Raises:
            RuntimeError: some jobs failed or were held; names them.
        """
        statuses: dict[str, str] = {}
        failed = []
        for job in self.jobs:
            try:
                statuses |= run_job(self.out, job, self.overrides, self.trainer)
            except Exception as error:
                traceback.print_exc()
                failed.append(f"{job}: {type(error).__name__}: {error}")
        if failed:
            raise RuntimeError("; ".join(failed))
        return statuses

    def checkpoint(self) -> Any:
        """What submitit queues again when the time is up or the job is pre-empted: the same, for checkpoints are on
        disk."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)
