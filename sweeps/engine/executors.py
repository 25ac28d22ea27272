"""Executors: what carries out the jobs of a plan. Plans, records and the jobs themselves know nothing of them.

    local      this machine's worker pool          slurm     arrays of a Slurm cluster, through submitit
    ray        tasks of a Ray cluster              command   a manifest per job for Kubernetes, SkyPilot, ...

Another distribution adds one through the entry-point group `recscale.executors`, and `package.module:attribute` names
any class: an `Executor` with its own `submit`, `states` and `cancel`. It has a job trained wherever it likes, by the
command `recscale run-job OUT JOB` or by `run_job(out, job.id, overrides)` of `.worker` in a process that has not
imported jax.
"""

from __future__ import annotations

import ast
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from recscale.pallas_kernels.names import load
from recscale.scaling.records.runs import FINISHED

from .display import Display
from .job import Job, count, job_statuses, run_statuses
from .resources import Resources
from .worker import TRAINER

GROUP = "recscale.executors"
EXECUTORS = {
    "local": "recscale.sweeps.engine.launch:Local",
    "slurm": "recscale.sweeps.engine.slurm:Slurm",
    "ray": "recscale.sweeps.engine.ray_tasks:Ray",
    "command": "recscale.sweeps.engine.manifests:Manifests",
}

# Of a job that was handed over. requeued: it ran, was stopped, and waits to go on. lost: nothing knows it any more.
State = Literal["queued", "running", "requeued", "done", "failed", "lost"]
ACTIVE: tuple[State, ...] = ("queued", "running", "requeued")

# Seconds between two looks at a scheduler.
_LOOK_EVERY_S = 5.0


class MissingExtra(RuntimeError):
    """An optional dependency that is not installed."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """What an executor is made with.

    Attributes:
        out: folder of the sweep; results go to `out/runs`.
        overrides: `key=value` settings that cannot change a result, laid over every run.
        options: `key=value` texts for this executor alone.
        workers: jobs at a time at most, None for as many as there is room for.
        memory_gb: memory that the predicted peaks of the running jobs may sum to, None for what is free.
        trainer: `module:function` called as `train_group`. display: where progress goes, None for the terminal.
    """

    out: Path
    overrides: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    workers: int | None = None
    memory_gb: float | None = None
    trainer: str = TRAINER
    display: Display | None = None

    def values(self) -> dict[str, Any]:
        """The options as a dictionary, values read as Python literals where they are some.

        Raises:
            ValueError: an option that is not key=value.
        """
        values: dict[str, Any] = {}
        for text in self.options:
            key, equals, value = text.partition("=")
            if not equals:
                raise ValueError(f"option {text!r} of the executor is not key=value, such as slurm_partition=cpu")
            try:
                values[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                values[key] = value
        return values


class Executor:
    """Has the jobs of a plan trained.

    Attributes:
        hands_over: whether submitted jobs go on when this process has ended.

    Submitting is safe at any time: a job's lease makes its double stop, and one that was stopped goes on from its
    newest checkpoint.
    """

    hands_over = False

    def __init__(self, launch: Launch):
        self.launch = launch

    def submit(self, jobs: Sequence[Job], resources: Resources) -> list[str]:
        """Queues jobs that need the same resources; returns a handle for each, which must mean something to another
        process, too."""
        raise NotImplementedError

    def states(self, handles: Mapping[str, str]) -> dict[str, State]:
        """{job: state} of {job: handle}; by default as their records and leases say."""
        return job_statuses(self.launch.out, list(handles))

    def cancel(self, handle: str) -> None:
        """Takes a job from the queue, or stops it."""
        raise NotImplementedError

    def wait(self, handles: Mapping[str, str], told: Callable[[str], None] = lambda text: None) -> bool:
        """Returns when no job is queued or running any more; whether it was interrupted before. `told` gets a line
        whenever states change."""
        before = None
        try:
            while True:
                states = self.states(handles)
                if states != before:
                    told(", ".join(f"{number} {state}" for state, number in count(states.values()).items()))
                if not any(state in ACTIVE for state in states.values()):
                    return False
                before = states
                time.sleep(_LOOK_EVERY_S)
        except KeyboardInterrupt:
            return True


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a launch.

    Attributes:
        statuses: number of the plan's runs by status. failed: ids of those that failed.
        interrupted: whether a signal ended the launch early. wall_s: seconds it took.
        submitted: job -> handle of those handed over to something that goes on; None: the launch waited.
    """

    statuses: Mapping[str, int]
    interrupted: bool
    wall_s: float
    failed: tuple[str, ...]
    submitted: Mapping[str, str] | None = None

    @property
    def unfinished(self) -> int:
        """Runs of the plan that have no result yet."""
        return sum(number for status, number in self.statuses.items() if status not in FINISHED)

    @classmethod
    def of(cls, out: Path, plan: Sequence[dict[str, Any]], wall_s: float, **more: Any) -> Outcome:
        """As the records below `out` say; `more` are further fields."""
        found = run_statuses(out, plan)
        failed = tuple(run for run, status in found.items() if status == "failed")
        return cls(statuses=count(found.values()), failed=failed, wall_s=wall_s, **{"interrupted": False, **more})


def executor_class(name: str) -> Callable[[Launch], Executor]:
    """The executor called `name`, or at the address `package.module:attribute`.

    Raises:
        ValueError: there is none; the nearest name is in the message.
    """
    return load(GROUP, name, EXECUTORS, "executor")
