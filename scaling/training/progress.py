"""A progress bar for one run: steps, rows per second, FLOP/s, time left."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn


def figures(event: dict[str, Any]) -> str:
    """`12,300 rows/s  1.2 GFLOP/s  0:42 left` of a progress event."""
    minutes, seconds = divmod(round(event["eta_s"]), 60)
    return f"{event['rows_per_s']:,.0f} rows/s  {event['flops_per_s'] / 1e9:.2f} GFLOP/s  {minutes}:{seconds:02d} left"


@contextlib.contextmanager
def bar(title: str) -> Iterator[Any]:
    """Yields a function that takes the training loop's progress events."""
    done = TextColumn("{task.percentage:3.0f}%  {task.fields[text]}")
    columns = (TextColumn("{task.description}"), BarColumn(), done)
    with Progress(*columns) as progress:
        task = progress.add_task(title, total=None, text="compiling")

        def update(event: dict[str, Any]) -> None:
            progress.update(task, total=event["total_steps"], completed=event["step"], text=figures(event))

        yield update
