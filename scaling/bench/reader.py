"""Rows per second of the reader alone: a packed log of 20 id fields and histories of 64 events, batches of
4,096 rows.

One process, no model and no device: `GrainSource.iterate` from start to end of a pass, with the page cache
cold (pages dropped first) and warm, read in the caller and by two threads, in time order and shuffled.
Training consumes 6 dense_params FLOP per row, so a reader is fast enough if it delivers several times what
the device can train on.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from recscale.models.inputs import Field, Schema, Sequence, Task
from recscale.scaling.data.source import ORDERS, Order
from recscale.scaling.data.stored_log.card import ReadReport
from recscale.scaling.data.stored_log.histories import history_ends
from recscale.scaling.data.stored_log.packed import EventStore, LogArrays, PackedLog, write_packed
from recscale.scaling.data.stored_log.source import GrainSource

FIELDS = 20
HISTORY_LENGTH = 64
BATCH = 4096
_VOCABULARY = 100_000
_USERS = 5_000


def measure_reader(
    *,
    rows: int = 400_000,
    fields: int = FIELDS,
    history_length: int = HISTORY_LENGTH,
    batch: int = BATCH,
    threads: tuple[int, ...] = (0, 2),
    train_rows_per_s: float | None = None,
) -> dict[str, Any]:
    """Measures the reader on a made-up log of `rows` rows and returns rows per second by condition.

    Args:
        train_rows_per_s: rows per second of the training step on this machine; gives `ratio`, the slowest
            condition over it (5 or more is the goal).

    Returns:
        rows_per_s: {"time|shuffle, cold|warm, <n> threads": rows/s}; slowest_rows_per_s; ratio, None without a
        training rate; and the sizes and the machine it was measured on.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = write_packed(_made_up_log(rows, fields, history_length), Path(folder) / "log")
        files = [log.folder / name for name in log.meta["files"]]
        speeds: dict[str, float] = {}
        # Not every system lets a process drop pages; without that there is no cold measurement to report.
        caches = ("cold", "warm") if hasattr(os, "posix_fadvise") else ("warm",)
        for order in ORDERS:
            for count in threads:
                for cache in caches:  # warm follows cold, so its pages are there
                    if cache == "cold":
                        _drop_pages(files)
                    speeds[f"{order}, {cache}, {count} threads"] = _speed(log, batch, order, count)
        stored = sum(path.stat().st_size for path in files)
    slowest = min(speeds.values())
    return {
        "rows_per_s": speeds,
        "slowest_rows_per_s": slowest,
        "train_rows_per_s": train_rows_per_s,
        "ratio": None if train_rows_per_s is None else slowest / train_rows_per_s,
        "rows": rows,
        "fields": fields,
        "history_length": history_length,
        "batch": batch,
        "stored_bytes_per_row": stored / rows,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
    }


def _made_up_log(rows: int, fields: int, history_length: int) -> LogArrays:
    """Random ids, every row also an event of its user, all rows but two in the training split."""
    generator = np.random.default_rng(0)
    users = generator.integers(0, _USERS, rows)
    times = np.sort(generator.integers(0, 10**7, rows))
    order = np.lexsort((times, users))
    offsets = np.r_[0, np.cumsum(np.bincount(users, minlength=_USERS))]
    names = [f"f{i:02d}" for i in range(fields)]
    columns = {name: generator.integers(2, _VOCABULARY, rows, dtype=np.int32) for name in names}
    item = names[-1]
    rating = generator.integers(2, 7, rows, dtype=np.int32)
    half = fields // 2
    schema = Schema(
        fields=tuple(Field(n, "user" if i < half else "candidate", 16, _VOCABULARY) for i, n in enumerate(names)),
        sequences=(
            Sequence(
                "history",
                history_length,
                (Field(item, "user", 16, _VOCABULARY), Field("rating", "user", 16, 7)),
                timestamps=True,
            ),
        ),
        tasks=(Task("click"),),
    )
    return LogArrays(
        name="made-up",
        schema=schema,
        splits={"train": (0, rows - 2), "valid": (rows - 2, rows - 1), "test": (rows - 1, rows)},
        rows=columns,
        labels=generator.integers(0, 2, (rows, 1), dtype=np.uint8),
        label_mask=np.ones((rows, 1), np.uint8),
        users=users,
        times=times,
        events={"history": EventStore(offsets, times[order], {item: columns[item][order], "rating": rating[order]})},
        ends={"history": history_ends(offsets, times[order], users, times)},
        vocabularies={},
        report=ReadReport(rows_read=rows),
        facts={},
    )


def _drop_pages(files: list[Path]) -> None:
    """Asks the kernel to forget the files' pages; only pages already on disk can go, hence the sync."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _speed(log: PackedLog, batch: int, order: Order, threads: int) -> float:
    # A fresh log per measurement: pages that a live memory map holds cannot be dropped.
    fresh = PackedLog(log.folder)
    source = GrainSource(fresh, requests=batch, order=order, threads=threads)
    start, rows = time.perf_counter(), 0
    for piece in source.iterate(0):
        rows += int(piece.valid.sum())
    return rows / (time.perf_counter() - start)
