"""Trainers for the proofs: real training with pauses, which lasts and computes little, and one that only spins."""

import time
from pathlib import Path

from recscale.scaling.records.runs import write_record
from recscale.scaling.training import run_id, train_group

PAUSE_S, SPIN_S = 2.5, 3.0


def slow(specs, folder, *, progress, cache_dir):
    """`train_group`, seconds longer for every logging interval; the numbers are the same."""

    def told(event):
        time.sleep(PAUSE_S)
        progress(event)

    return train_group(specs, folder, progress=told, cache_dir=cache_dir)


def spin(specs, folder, *, progress, cache_dir):
    """Keeps a core busy and records how much of one it had, as the runs' logloss, and which."""
    began, computed, cores = time.monotonic(), time.process_time(), set()
    while time.monotonic() < began + SPIN_S:
        sum(range(100_000))
        cores.add(int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[36]))
    share = (time.process_time() - computed) / SPIN_S
    records = []
    for spec in specs:
        record = {
            "run_id": run_id(spec.config),
            "status": "done",
            "reasons": [],
            "metrics": {"logloss": share, "cores": sorted(cores)},
        }
        records.append(write_record(spec.run_dir, record))
    return records
