"""Progress of training in words, and as a bar for one run: steps, rows per second, FLOP/s, time left."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn


def speed(event: Mapping[str, Any]) -> str:
    """`12,300 rows/s, 1.20 GFLOP/s, 42 s left` of a progress event, as far as it says."""
    parts = []
    if event.get("rows_per_s") is not None:
        parts.append(f"{event['rows_per_s']:,.0f} rows/s")
    if event.get("flops_per_s") is not None:
        parts.append(f"{event['flops_per_s'] / 1e9:.2f} GFLOP/s")
    if event.get("eta_s") is not None:
        parts.append(f"{clock(event['eta_s'])} left")
    return ", ".join(parts)


def clock(seconds: float) -> str:
    """Seconds as `42 s`, `3 min 20 s` or `2 h 05 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


@contextlib.contextmanager
def bar(title: str) -> Iterator[Any]:
    """Yields a function that takes the training loop's progress events."""
    done = TextColumn("{task.percentage:3.0f}%  {task.fields[text]}")
    columns = (TextColumn("{task.description}"), BarColumn(), done)
    with Progress(*columns) as progress:
        task = progress.add_task(title, total=None, text="compiling")

        def update(event: dict[str, Any]) -> None:
            progress.update(task, total=event["total_steps"], completed=event["step"], text=speed(event))

        yield update
