"""A trainer for the launcher's tests: it counts to `STEPS` instead of learning, and misbehaves when told to.

`out/fake.json` maps a job (or "*") to {"step_s", "crashes", "errors", "hangs", "diverge"}. Every start leaves a line in
`out/starts.jsonl` with its process id and what the process looked like; progress survives a kill in `step.txt`.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from recscale.scaling.records.files import write_atomically
from recscale.scaling.records.runs import (
    FINISHED,
    append_metrics,
    read_record,
    truncate_metrics,
    write_record,
)
from recscale.scaling.training import run_id

STEPS = 10


def train_group(specs, group_dir, *, progress, cache_dir):
    out = Path(group_dir).parent.parent
    job = Path(group_dir).name
    orders = json.loads((out / "fake.json").read_text()) if (out / "fake.json").exists() else {}
    orders = {**orders.get("*", {}), **orders.get(job, {})}
    starts = [start for start in started(out) if start["job"] == job]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    with open(out / "starts.jsonl", "a") as handle:
        start = {"job": job, "pid": os.getpid(), "cores": cores, "xla": os.environ.get("XLA_FLAGS", "")}
        handle.write(json.dumps(start) + "\n")
    print("noise on standard output", flush=True)
    print("noise on standard error", file=sys.stderr, flush=True)
    if len(starts) < orders.get("errors", 0):
        raise ValueError(f"told to fail in {job}")
    if len(starts) < orders.get("hangs", 0):
        os.kill(os.getpid(), signal.SIGSTOP)
    position = Path(group_dir) / "step.txt"
    first = int(position.read_text()) if position.exists() else 0
    for spec in specs:
        record = {"run_id": run_id(spec.config), "status": "running", "reasons": [], "labels": spec.labels}
        record |= {"config": spec.config.to_dict(), "sweep": spec.labels["sweep"], "work": spec.labels}
        if (read_record(spec.run_dir) or {"status": ""})["status"] not in FINISHED:
            spec.run_dir.mkdir(parents=True, exist_ok=True)
            write_record(spec.run_dir, record)
            truncate_metrics(spec.run_dir, first)
    for step in range(first + 1, STEPS + 1):
        time.sleep(orders.get("step_s", 0.0))
        for spec in specs:
            append_metrics(
                spec.run_dir, {"step": step, "logloss": 1.0 / step + spec.config.seed, "examples": 10 * step}
            )
        write_atomically(position, str(step))
        progress({"step": step, "total_steps": STEPS, "rows_per_s": 10.0, "flops_per_s": 1e9, "eta_s": 1.0})
        if step >= STEPS // 2 and len(starts) < orders.get("crashes", 0):
            os.kill(os.getpid(), signal.SIGKILL)
    for spec in specs:
        record = read_record(spec.run_dir)
        record |= {"status": "diverged" if orders.get("diverge") else "done", "metrics": {"logloss": 1.0 / STEPS}}
        write_record(spec.run_dir, record)
    return [read_record(spec.run_dir) for spec in specs]


def started(out):
    path = Path(out) / "starts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
