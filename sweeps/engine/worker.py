"""A worker process: trains one job after the other, on one thread, and reports in JSON lines.

    python -m recscale.sweeps.engine.worker OUT [--accelerator | --core N] [--devices N] [--parent PID] [--beat SECONDS]
                                                [--trainer MODULE:FUNCTION] [--set K=V ...]

Standard input carries job ids, one a line; the end of input ends the worker at once, whatever it is doing (training is
resumable at any instant, so nothing is lost). Standard output carries one JSON event a line:

    {"event": "ready"}
    {"event": "started" | "progress" | "done" | "failed" | "held" by another process, "job": id, ...}
    {"event": "beat", "job": id, "cpu_s": seconds this process has computed}    every few seconds of a job

Everything else a job prints goes to `groups/<job>/log.txt`. The number of threads is fixed *before* jax is imported, so
results do not depend on how many workers there are or on the machine's core count.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import importlib.util
import json
import math
import os
import queue
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from recscale.scaling.host_memory import keep_freed_memory
from recscale.scaling.processes import ONE_THREAD, connect, is_first, scheduled
from recscale.scaling.records.locks import EXPIRES_S, hold
from recscale.scaling.records.planned import read_plan

from . import machine
from .job import job_lease, labels, mark_failed

TRAINER = "recscale.scaling.training:train_group"

# Seconds between two progress events of a job.
_EVENT_EVERY_S = 0.25

# A predecessor killed a moment ago may still be dying, one on another machine until its lease expires; after this long
# somebody else really holds the job.
_LOCK_WAIT_S, _REMOTE_WAIT_S = 20.0, 1.5 * EXPIRES_S

_PR_SET_PDEATHSIG = 1


def train_job(
    out: Path,
    job: str,
    trainer: Callable[..., list[dict[str, Any]]],
    progress: Callable[[dict[str, Any]], None],
    overrides: Sequence[str] = (),
    wait_s: float = _LOCK_WAIT_S,
) -> list[dict[str, Any]]:
    """Trains the runs of one planned job and returns their records; waits so long for another process to let it go.

    Raises:
        Busy: another process holds the job.
        Whatever the trainer raises.
    """
    from recscale.scaling.training import RunSpec

    from .brought import make_importable
    from .plan import run_config

    rows = _planned(out, job)
    make_importable(rows)
    specs = [
        RunSpec(config=run_config(row, overrides), run_dir=out / "runs" / row["run_id"], labels=labels(row))
        for row in rows
    ]
    lease = job_lease(out, job)
    with hold(lease, wait_s=wait_s) if is_first() else contextlib.nullcontext():
        return trainer(specs, lease.parent, progress=progress, cache_dir=out / "cache")


def run_job(out: str, job: str, overrides: Sequence[str] = (), trainer: str = TRAINER) -> dict[str, str]:
    """One planned job in this process, which has not imported jax, or has run another job before; {run id: status}.

    One thread unless there is an accelerator or a mesh, on whatever core a scheduler gives: several jobs of a node see
    the same cores and would all take the first. Processes that a scheduler started together train it together.
    """
    rows = _planned(Path(out), job)
    if "jax" not in sys.modules:
        settle(bool(machine.accelerators()), devices=mesh_devices(rows, overrides) // scheduled())
        connect()
    try:
        records = train_job(Path(out), job, resolve(trainer), lambda progress: None, overrides, _REMOTE_WAIT_S)
    except BlockingIOError:
        raise  # somebody else is training these runs: they have not failed
    except Exception as error:
        mark_failed(Path(out), rows, [f"{type(error).__name__}: {error}"])
        raise
    finally:
        _forget_programs()
    return {record["run_id"]: record["status"] for record in records}


def mesh_devices(rows: Sequence[dict[str, Any]], overrides: Sequence[str]) -> int:
    """Devices that the mesh of planned rows, or of the launch, takes; 1 without a mesh."""
    asked = [text.partition("=")[2] for text in overrides if text.startswith("training.mesh=")]
    asked = asked or [row["config"]["training"].get("mesh", "") for row in rows]
    return max((math.prod(map(int, re.findall(r"\d+", text))) for text in asked), default=1)


def resolve(trainer: str) -> Callable[..., list[dict[str, Any]]]:
    """The function named `module:function` or `file.py:function`."""
    place, _, name = trainer.rpartition(":")
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        if spec is None or spec.loader is None:
            raise ValueError(f"trainer {trainer!r}: {place} cannot be imported")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    return getattr(module, name)


def environment(accelerator: bool, devices: int = 1) -> dict[str, str]:
    """Variables a worker must be started with: one thread for XLA and BLAS, and as many CPU devices as a mesh takes.
    Nothing where an accelerator computes."""
    if accelerator:
        return {}
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_cpu_multi_thread_eigen=false"]
    flags += [f"--xla_force_host_platform_device_count={devices}"] if devices > 1 else []
    return ONE_THREAD | {"XLA_FLAGS": " ".join(flags).strip()}


def settle(accelerator: bool, core: int | None = None, devices: int = 1) -> None:
    """Fixes this process's threads, its core if one is given, and how it keeps memory; call before anything imports
    jax."""
    if "jax" in sys.modules:
        raise RuntimeError("jax was imported before the worker fixed its threads")
    keep_freed_memory()
    os.environ.update(environment(accelerator, devices))
    if core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})


@click.command(help=__doc__)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--accelerator", is_flag=True)
@click.option("--core", type=int)
@click.option("--devices", type=int, default=1)
@click.option("--parent", type=int)
@click.option("--beat", type=float, default=5.0, help="Seconds between two signs of life.")
@click.option("--trainer", default=TRAINER)
@click.option("--set", "overrides", multiple=True)
def main(
    out: Path,
    accelerator: bool,
    core: int | None,
    devices: int,
    parent: int | None,
    beat: float,
    trainer: str,
    overrides: tuple[str, ...],
) -> None:
    settle(accelerator, core, devices)
    die_with(parent)
    events = _Events(beat)
    jobs: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    events.send(event="ready")
    while True:
        job = jobs.get()
        events.job = job
        _run_job(out, job, trainer, overrides, events)
        events.job = None


def _run_job(out: Path, job: str, trainer: str, overrides: tuple[str, ...], events: _Events) -> None:
    """One job, its output in its own log. Every error is reported: the launcher decides what to do about it."""
    log = out / "groups" / job / "log.txt"
    events.send(event="started", job=job)
    with events.into(log):
        try:
            records = train_job(out, job, resolve(trainer), _Throttle(events, job), overrides)
            message = {"event": "done", "runs": {record["run_id"]: record["status"] for record in records}}
        except BlockingIOError as error:
            message = {"event": "held", "reason": str(error)}
        except Exception as error:
            traceback.print_exc()
            message = {"event": "failed", "reason": f"{type(error).__name__}: {error}"}
        _forget_programs()
    events.send(job=job, log=str(log), **message)


class _Events:
    """The event stream: standard output, taken away from everything else that prints."""

    def __init__(self, beat_s: float):
        self._beat_s = beat_s
        self._stream, self._one = os.fdopen(os.dup(1), "w"), threading.Lock()
        self.job: str | None = None
        os.dup2(2, 1)
        threading.Thread(target=self._beat, daemon=True).start()

    def send(self, **event: Any) -> None:
        with self._one:
            self._stream.write(json.dumps(event) + "\n")
            self._stream.flush()

    def _beat(self) -> None:
        while True:
            time.sleep(self._beat_s)
            if self.job is not None:
                self.send(event="beat", job=self.job, cpu_s=time.process_time())

    @contextlib.contextmanager
    def into(self, log: Path) -> Iterator[None]:
        """Sends what is printed (by C++ as well) to a log file."""
        log.parent.mkdir(parents=True, exist_ok=True)
        saved = os.dup(2)
        with open(log, "a") as handle:
            os.dup2(handle.fileno(), 1)
            os.dup2(handle.fileno(), 2)
            faulthandler.enable(handle)  # a crash leaves its stack in the log
            try:
                yield
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                faulthandler.disable()
                os.dup2(saved, 1)
                os.dup2(saved, 2)
                os.close(saved)


class _Throttle:
    """Progress of one job, at most one event in `_EVENT_EVERY_S`."""

    def __init__(self, events: _Events, job: str):
        self._events, self._job, self._last = events, job, 0.0

    def __call__(self, progress: dict[str, Any]) -> None:
        now = time.monotonic()
        if now - self._last >= _EVENT_EVERY_S:
            self._last = now
            self._events.send(event="progress", job=self._job, **progress)


def _planned(out: Path, job: str) -> list[dict[str, Any]]:
    """The plan's rows of a job.

    Raises:
        ValueError: it has none.
    """
    rows = [row for row in read_plan(out) if row["job"] == job]
    if not rows:
        raise ValueError(f"the plan in {out} has no job {job!r}; `recscale status {out}` lists them")
    return rows


def _listen(jobs: queue.Queue[str]) -> None:
    for line in sys.stdin:
        if line.strip():
            jobs.put(line.strip())
    os._exit(0)


def die_with(parent: int | None) -> None:
    """Asks the kernel to kill this process when its parent dies, and checks that it has not already."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the launcher, which stops its workers
    if parent is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the launcher died before its worker started")


def _forget_programs() -> None:
    """Frees the compiled programs of a finished job: a persistent worker would keep them all."""
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


if __name__ == "__main__":
    main()
