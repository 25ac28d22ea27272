"""Trains the jobs of a plan as tasks of a Ray cluster, its own or one that is there; Ray tries again what died."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from recscale.scaling.processes import AGAIN

from .executors import Executor, Launch, MissingExtra, State
from .job import Job, job_statuses
from .job_command import run_job_command
from .resources import Resources

# Times that a task is tried again after its machine was lost or its job was stopped.
_RETRIES = 3


class StoppedEarly(RuntimeError):
    """A job that ends well when it is started again."""


class Ray(Executor):
    """Options are those of `ray.init` (`address=auto`, `num_cpus=2`). Machines share the folder of the sweep."""

    def __init__(self, launch: Launch):
        super().__init__(launch)
        try:
            import ray
        except ModuleNotFoundError as error:
            raise MissingExtra("the ray executor needs ray: pip install 'recscale[ray]'") from error
        self._ray, self._tasks = ray, {}
        if not ray.is_initialized():
            ray.init(**{"log_to_driver": False, "include_dashboard": False, **launch.values()})

    def submit(self, jobs: Sequence[Job], resources: Resources) -> list[str]:
        task = self._ray.remote(
            num_cpus=resources.cores,
            num_gpus=resources.devices,
            memory=resources.memory_bytes,
            max_retries=_RETRIES,
            retry_exceptions=[StoppedEarly],
        )(_train)
        for job in jobs:
            command = run_job_command(self.launch.out.resolve(), job.id, self.launch.overrides, self.launch.trainer)
            self._tasks[job.id] = task.remote(command)
        return [job.id for job in jobs]

    def states(self, handles: Mapping[str, str]) -> dict[str, State]:
        tasks = list(self._tasks.values())
        over = self._ray.wait(tasks, num_returns=len(tasks), timeout=0)[0] if tasks else []
        ended = {job for job, task in self._tasks.items() if task in over}
        recorded = job_statuses(self.launch.out, list(handles))
        # A job that has ended without a result was stopped more often than it is tried again.
        return {job: "lost" if job in ended and state not in ("done", "failed") else state
                for job, state in recorded.items()}  # fmt: skip

    def cancel(self, handle: str) -> None:
        self._ray.cancel(self._tasks[handle])

    def wait(self, handles: Mapping[str, str], told: Callable[[str], None] = lambda text: None) -> bool:
        interrupted = super().wait(handles, told)
        for task in self._tasks.values() if interrupted else ():
            self._ray.cancel(task)
        self._ray.shutdown()
        return interrupted


def _train(command: list[str]) -> Any:
    """One job, in a process that has not imported jax."""
    command = [sys.executable, *command, "--parent", str(os.getpid())]
    code = subprocess.run(command, check=False).returncode
    if code == AGAIN or code < 0:
        raise StoppedEarly(f"the job ended with code {code}")
    return code
