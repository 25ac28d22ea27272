"""Progress of a launch: bars on a terminal, a few plain lines anywhere else. The base class shows nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from recscale.scaling.training.progress import clock, speed

from .job import Job

# Seconds between two summary lines where there is no terminal.
_LINE_EVERY_S = 30.0
# Share of the time a job has been silent that it is given beyond its own estimate.
_OVERDUE = 0.1


class Display:
    """Receives what happens during a launch.

    `progress` events carry step, total_steps, rows_per_s, flops_per_s and eta_s.
    """

    def start(self, jobs: Sequence[Job], workers: int) -> None: ...
    def started(self, job: Job) -> None: ...
    def progress(self, job: Job, event: dict[str, Any]) -> None: ...
    def done(self, job: Job, statuses: dict[str, str]) -> None: ...
    def retried(self, job: Job, reason: str) -> None: ...
    def failed(self, job: Job, reason: str, log: Path) -> None: ...
    def refresh(self) -> None: ...
    def stop(self) -> None: ...


class Lines(Display):
    """One line when a job ends, and a summary every half minute, on standard error."""

    def start(self, jobs, workers):
        self._meter = Meter(jobs, workers)
        self._last = time.monotonic()
        runs = sum(len(job.rows) for job in jobs)
        workers = min(workers, max(len(jobs), 1))
        self._say(f"{runs} runs to train, in {len(jobs)} jobs on {workers} workers")

    def started(self, job):
        self._meter.started(job)

    def progress(self, job, event):
        self._meter.progress(job, event)

    def done(self, job, statuses):
        seconds = self._meter.ended(job)
        diverged = sum(status == "diverged" for status in statuses.values())
        note = f", {diverged} diverged" if diverged else ""
        self._say(f"done    {job.label}: {len(statuses)} runs{note} in {seconds:.0f} s  [{self._meter.summary()}]")

    def retried(self, job, reason):
        self._meter.started(job)
        self._say(f"retry   {job.label}: {reason}")

    def failed(self, job, reason, log):
        self._meter.ended(job)
        self._say(f"FAILED  {job.label}: {reason}\n        log: {log}")

    def refresh(self):
        if time.monotonic() - self._last > _LINE_EVERY_S:
            self._say(f"running {self._meter.summary()}")

    def _say(self, text: str) -> None:
        self._last = time.monotonic()
        click.echo(text, err=True)


class Bars(Lines):
    """A bar for each running job and one for the whole launch."""

    def start(self, jobs, workers):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[speed]}"),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, Any] = {}
        self._bars.start()
        super().start(jobs, workers)
        self._overall = self._bars.add_task("all jobs", total=1.0, speed="")

    def started(self, job):
        super().started(job)
        self._drop(job)
        self._tasks[job.id] = self._bars.add_task(job.label, total=1.0, speed="compiling")

    def progress(self, job, event):
        super().progress(job, event)
        share = event["step"] / max(event["total_steps"], 1)
        if job.id in self._tasks:
            self._bars.update(self._tasks[job.id], completed=share, speed=speed(event))
        self._bars.update(self._overall, completed=self._meter.share(), speed=self._meter.summary())

    def done(self, job, statuses):
        self._drop(job)
        super().done(job, statuses)
        self._bars.update(self._overall, completed=self._meter.share(), speed=self._meter.summary())

    def failed(self, job, reason, log):
        self._drop(job)
        super().failed(job, reason, log)

    def refresh(self): ...

    def stop(self):
        self._bars.stop()

    def _drop(self, job) -> None:
        if job.id in self._tasks:
            self._bars.remove_task(self._tasks.pop(job.id))

    def _say(self, text: str) -> None:
        self._bars.console.print(text, markup=False, highlight=False)


class Meter:
    """Share of the launch's work that is done, its speed, and the time left; work is weighted by predicted seconds."""

    def __init__(self, jobs: Sequence[Job], workers: int):
        self._left = {job.id: max(job.seconds, 1e-9) for job in jobs}
        self._total = sum(self._left.values())
        self._done = self._took = 0.0  # predicted and real seconds of the jobs that ended
        self._workers = max(workers, 1)
        self._running: dict[str, dict[str, Any]] = {}
        self._began: dict[str, float] = {}
        self._heard: dict[str, float] = {}  # when a running job began or last said how far it is

    def started(self, job: Job) -> None:
        self._began[job.id] = self._heard[job.id] = time.monotonic()
        self._running[job.id] = {}

    def progress(self, job: Job, event: dict[str, Any]) -> None:
        self._heard[job.id] = time.monotonic()
        self._running[job.id] = event

    def ended(self, job: Job) -> float:
        """Forgets a job; returns the seconds it took."""
        self._running.pop(job.id, None)
        self._done += self._left.pop(job.id, 0.0)
        now = time.monotonic()
        seconds = now - self._began.pop(job.id, now)
        self._took += seconds
        return seconds

    def share(self) -> float:
        if not self._total:
            return 1.0
        return (self._done + sum(self._left[job] * _share(event) for job, event in self._running.items())) / self._total

    def left_s(self) -> float:
        """What running jobs say they need, and what the others are predicted to take, spread over the workers.

        Predictions are corrected by how long the finished jobs really took, and what a job said or was predicted to
        need is less the time that has passed since.
        """
        factor = self._took / self._done if self._done and self._took else 1.0
        now = time.monotonic()
        each = []
        for job, seconds in self._left.items():
            event = self._running.get(job, {})
            said = event.get("eta_s")
            needs = factor * seconds * (1.0 - _share(event)) if said is None else said
            passed = now - self._heard[job] if job in self._running else 0.0
            # One that takes longer than it should is not done, and nobody knows by how much.
            each.append(max(needs - passed, _OVERDUE * passed))
        return max([*each, sum(each) / self._workers])

    def summary(self) -> str:
        rows = sum(event.get("rows_per_s") or 0 for event in self._running.values())
        flops = sum(event.get("flops_per_s") or 0 for event in self._running.values())
        speed = f", {rows:,.0f} rows/s, {flops / 1e9:.2f} GFLOP/s" if rows else ""
        left = f", about {clock(self.left_s())} left" if self._left else ""
        return f"{100 * self.share():.0f}% done{speed}{left}"


def for_terminal() -> Display:
    """Bars if standard error is a terminal, lines otherwise."""
    return Bars() if sys.stderr.isatty() else Lines()


def _share(event: dict[str, Any]) -> float:
    return event["step"] / max(event["total_steps"], 1) if event else 0.0
