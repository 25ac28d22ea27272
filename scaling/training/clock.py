"""Time of a run: wall seconds over all its restarts, and step time without compilation, evaluation and checkpoints."""

from __future__ import annotations

import contextlib
import time
from typing import Any


class Clock:
    """Times a program of `total_steps` steps.

    Args:
        total_steps: steps of the whole program, for the time left.
        rows: rows one step trains, all replicas together. flops_per_row: training FLOPs of one row.
    """

    def __init__(self, total_steps: int, rows: int, flops_per_row: float):
        self._total, self._rows, self._flops = total_steps, rows, flops_per_row
        self._began = time.monotonic()
        self._earlier_s = 0.0
        self._paused_s = 0.0
        self._waited_s = 0.0
        self.evaluating_s = 0.0
        self.step_seconds: list[float] = []  # mean of every interval but the first
        # Steps done, seconds of the clock, and those waited for batches.
        self._first: tuple[int, float, float] | None = None
        self._last: tuple[int, float, float] | None = None

    def resume_from(self, wall_s: float) -> None:
        """Counts the seconds of earlier processes in."""
        self._earlier_s = wall_s

    @property
    def wall_s(self) -> float:
        return self._earlier_s + time.monotonic() - self._began

    @property
    def step_s(self) -> float | None:
        """Seconds a step takes, from the end of the first interval (which holds compilation) on; None before."""
        if self._first is None or self._last is None or self._last[0] == self._first[0]:
            return None
        return max(self._last[1] - self._first[1], 0.0) / (self._last[0] - self._first[0])

    @property
    def input_wait_share(self) -> float | None:
        """Share of the time of steps in which the device had nothing to do until a batch came; None before `step_s`."""
        if self._first is None or self._last is None or not self.step_s:
            return None
        return (self._last[2] - self._first[2]) / (self._last[1] - self._first[1])

    def waited(self, seconds: float) -> None:
        """Notes a wait for a batch."""
        self._waited_s += seconds

    @contextlib.contextmanager
    def pause(self, *, evaluation: bool = False):
        """Leaves a stretch (evaluation, a checkpoint) out of the step time."""
        start = time.monotonic()
        try:
            yield
        finally:
            took = time.monotonic() - start
            self._paused_s += took
            self.evaluating_s += took if evaluation else 0.0

    def tick(self, done: int) -> dict[str, Any] | None:
        """Notes that `done` steps of the program are through; returns a progress event once a speed is known."""
        before, self._last = self._last, (done, time.monotonic() - self._paused_s, self._waited_s)
        if before is not None and done > before[0]:
            self.step_seconds.append((self._last[1] - before[1]) / (done - before[0]))
        self._first = self._first or self._last
        if not self.step_s:
            return None
        rows_per_s = self._rows / self.step_s
        return {
            "step": done,
            "total_steps": self._total,
            "rows_per_s": rows_per_s,
            "flops_per_s": rows_per_s * self._flops,
            "eta_s": self.step_s * (self._total - done),
        }
