"""Rows per second of the reader, alone and beside the training of a small model: batches of 4,096 rows of 20 id fields,
without a history and with one of 64 events.

Alone: one process, no model and no device, `GrainSource.iterate` from start to end of a pass, with the page cache
cold (pages dropped first) and warm, read in the caller and by two threads, in time order and shuffled.

Beside training: one shuffled pass of a model of few parameters, and the share of its time that it waited for batches.
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
from recscale.scaling.training import get_config, train

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
) -> dict[str, Any]:
    """Measures the reader on a made-up log of `rows` rows.

    Args:
        history_length: events of a history; 0 for a log without one.

    Returns:
        reading: {"time|shuffle, cold|warm, <n> threads": {rows_per_s, rows_per_cpu_s}}; slowest of each; training:
        rows_per_s and input_wait_share of a small model; and the sizes and the machine it was measured on.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = write_packed(_made_up_log(rows, fields, history_length), Path(folder) / "log")
        files = [log.folder / name for name in log.meta["files"]]
        speeds: dict[str, dict[str, float]] = {}
        # Not every system lets a process drop pages; without that there is no cold measurement to report.
        caches = ("cold", "warm") if hasattr(os, "posix_fadvise") else ("warm",)
        for order in ORDERS:
            for count in threads:
                for cache in caches:  # warm follows cold, so its pages are there
                    if cache == "cold":
                        _drop_pages(files)
                    speeds[f"{order}, {cache}, {count} threads"] = _speed(log, batch, order, count)
        stored = sum(path.stat().st_size for path in files)
        training = _train(log, batch, Path(folder) / "run")
    return {
        "reading": speeds,
        "slowest_rows_per_s": min(found["rows_per_s"] for found in speeds.values()),
        "slowest_rows_per_cpu_s": min(found["rows_per_cpu_s"] for found in speeds.values()),
        "training": training,
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
        )
        if history_length
        else (),
        tasks=(Task("click"),),
    )
    store = EventStore(offsets, times[order], {item: columns[item][order], "rating": rating[order]})
    return LogArrays(
        name="made-up",
        schema=schema,
        splits={"train": (0, rows - 2), "valid": (rows - 2, rows - 1), "test": (rows - 1, rows)},
        rows=columns,
        labels=generator.integers(0, 2, (rows, 1), dtype=np.uint8),
        label_mask=np.ones((rows, 1), np.uint8),
        users=users,
        times=times,
        events={sequence.name: store for sequence in schema.sequences},
        ends={sequence.name: history_ends(offsets, times[order], users, times) for sequence in schema.sequences},
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


def _speed(log: PackedLog, batch: int, order: Order, threads: int) -> dict[str, float]:
    # A fresh log per measurement: pages that a live memory map holds cannot be dropped.
    fresh = PackedLog(log.folder)
    source = GrainSource(fresh, requests=batch, order=order, threads=threads)
    start, start_cpu, rows = time.perf_counter(), time.process_time(), 0
    for piece in source.iterate(0):
        rows += int(piece.valid.sum())
    taken, taken_cpu = time.perf_counter() - start, time.process_time() - start_cpu
    return {"rows_per_s": rows / taken, "rows_per_cpu_s": rows / taken_cpu}


def _train(log: PackedLog, batch: int, folder: Path) -> dict[str, Any]:
    """One shuffled pass of a small MLP over the log."""
    config = get_config("dlrm_mlp", "stored")
    config.model.widths, config.data.root = (64, 32), str(log.folder)
    config.training.requests, config.training.passes, config.training.keep_model = batch, 0, False
    record = train(config, folder)
    return {name: record["cost"][name] for name in ("rows_per_s", "input_wait_share")} | {
        "architecture": "dlrm_mlp",
        "dense_params": record["counts"]["dense_params"],
    }
