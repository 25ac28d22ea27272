"""Hands the jobs of a plan to a Slurm cluster through submitit: arrays of like jobs. Nothing re-invents a scheduler.

Time and memory come from the plan. A job that reaches its limit or is pre-empted queues itself again and goes on from
its newest checkpoint. Where there are more short jobs than run at a time, several share an allocation, one after the
other. The folder must be on a disk that all machines share.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .executors import Executor, Launch, MissingExtra, State
from .job import Job, job_statuses
from .resources import Resources
from .slurm_jobs import JobsInTurn

# Jobs that run at a time, where `throttle` does not say, and seconds of an allocation that short jobs share.
_THROTTLE, _PACKED_S = 64, 3600.0

# Times that submitit queues a job again which reached its limit.
_TIMEOUTS = 1000

# States of Slurm in which a job waits. All others that `squeue` shows by itself have begun and not ended.
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")


class Slurm(Executor):
    """Options are submitit's (`slurm_partition=cpu`, `timeout_min=600`, which overrides the plan's), and

    throttle: jobs of an array at a time. pack_minutes: of an allocation that short jobs share, 0 = none do.
    """

    hands_over = True

    def __init__(self, launch: Launch):
        super().__init__(launch)
        self._options = launch.values()
        self._throttle = int(self._options.pop("throttle", _THROTTLE))
        self._packed_s = 60.0 * float(self._options.pop("pack_minutes", _PACKED_S / 60))

    def submit(self, jobs: Sequence[Job], resources: Resources) -> list[str]:
        try:
            from submitit.auto.auto import AutoExecutor
        except ModuleNotFoundError as error:
            raise MissingExtra("the slurm executor needs submitit: pip install 'recscale[slurm]'") from error
        out = self.launch.out.resolve()
        packs = self._packs(jobs, resources)
        queue: Any = AutoExecutor(folder=out / "slurm", cluster="slurm", slurm_max_num_timeout=_TIMEOUTS)
        queue.update_parameters(**self._parameters(resources, max(map(len, packs))))
        with queue.batch():
            overrides, trainer = self.launch.overrides, self.launch.trainer
            asked = [queue.submit(JobsInTurn(str(out), [job.id for job in pack], overrides, trainer)) for pack in packs]
        return [queued.job_id for queued, pack in zip(asked, packs, strict=True) for _ in pack]

    def states(self, handles: Mapping[str, str]) -> dict[str, State]:
        known = _queue(self.launch.out)  # before the records: a job that ends in between is done, not lost
        recorded = job_statuses(self.launch.out, list(handles))
        if known is None:  # no Slurm here: what the folder says
            return recorded
        return {job: _state(recorded[job], known.get(handle)) for job, handle in handles.items()}

    def cancel(self, handle: str) -> None:
        subprocess.run(["scancel", handle], check=True)

    def _packs(self, jobs: Sequence[Job], resources: Resources) -> list[Sequence[Job]]:
        """Jobs that share an allocation: as few as keep all allocations that run at a time busy."""
        fitting = int(self._packed_s // resources.seconds) if resources.nodes == 1 else 1
        size = max(min(fitting, math.ceil(len(jobs) / self._throttle)), 1)
        return [jobs[start : start + size] for start in range(0, len(jobs), size)]

    def _parameters(self, resources: Resources, jobs: int) -> dict[str, Any]:
        """What submitit asks Slurm for, for so many jobs in turn."""
        devices = {"gpus_per_node": math.ceil(resources.devices / resources.nodes)} if resources.devices else {}
        asked = {
            "name": f"recscale-{self.launch.out.resolve().name}",
            "timeout_min": math.ceil(jobs * resources.seconds / 60),
            "mem_gb": math.ceil(resources.memory_bytes / 2**30),
            "cpus_per_task": math.ceil(resources.cores / resources.nodes),
            "nodes": resources.nodes,
            "tasks_per_node": 1,
            "slurm_array_parallelism": self._throttle,
            **devices,
        }
        return asked | self._options


def _queue(out: Path) -> dict[str, tuple[str, int]] | None:
    """{id: (state, restarts)} of what this user has in Slurm's queue; None where there is no Slurm."""
    if shutil.which("squeue") is None:
        return None
    asked = ["squeue", "--noheader", "--array", "--user", str(os.getuid())]
    asked += ["--Format", "JobArrayID:60,State:30,RestartCnt:12"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"squeue says: {done.stderr.strip()}; what has become of the jobs of {out} is not known")
    found = (line.split() for line in done.stdout.splitlines())
    return {words[0]: (words[1], int(words[2])) for words in found if len(words) == 3}


def _state(recorded: State, queued: tuple[str, int] | None) -> State:
    if recorded in ("done", "failed"):
        return recorded
    if queued is None:
        return "lost"
    state, restarts = queued
    if state in _WAITING:
        return "requeued" if restarts else "queued"
    return "running"
