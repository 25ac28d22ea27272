"""`recscale bench device`: within a budget of seconds, whether the kernels are right on a device, and how fast.

Five stages, most valuable first; each job in a process of its own, so that a kernel that hangs or ends its process
costs one row:

    1 check     every operation at its small shapes against the reference in float32 on the CPU
    2 measure   what the device can copy and multiply, then the headline shapes beside XLA and public rivals
    3 train     training steps on XLA and on our kernels, and the same RankMixer under `torch.compile`
    4 tune      block sizes of the kernels that lost in 2
    5 sweep     a sweep of sizes

    OUT/results.jsonl    one line a result, written as it comes; what stands there is not done again
    OUT/summary.md       at the end, at the end of the budget, and when the process is told to stop
    OUT/tuned            block sizes found; `recscale bench device --adopt` copies them into the package
    OUT/cache, OUT/sweep compiled programs; the sweep

A row has `id` and `stage`; "right", "measured" and "done" are the good ends of `status`. A row whose id ends at a job
says that the job is over.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from recscale.scaling.records.files import write_atomically
from recscale.scaling.records.provenance import command, cores

from . import device_plan, device_summary
from .device_plan import Job
from .results_log import ResultsLog

_COMMAND = (sys.executable, "-c", "from recscale.scaling.bench.device_work import serve; serve()")
# What a process may take to start, before its first item.
_START_S = 60.0
# Of the budget, for what this process took to start and for the summary; of a small one a tenth.
_RESERVE_S = 3.0
# Of what a process said on its error stream, in a row.
_SAID = 600


class Stopped(Exception):
    """The process was told to end."""


def measure_device(
    *,
    out: Path,
    budget: float = 480.0,
    cpu: bool = False,
    operations: Sequence[str] = (),
    stages: Sequence[str] = (),
    dry_run: bool = False,
    adopt: bool = False,
    show: Callable[[str], None] = click.echo,
) -> dict[str, Any]:
    """Runs what stands in no row of `out` yet, until it is done or the budget is spent.

    Args:
        out: the folder. budget: seconds. cpu: small shapes, kernels interpreted, no accelerator.
        operations, stages: only these; none given is all.
        dry_run: show the schedule and do nothing. adopt: copy the block sizes of `out` into the package, no more.
        show: receives every line.

    Returns:
        rows, of this call and of those before; counts: status -> how many; seconds.

    Raises:
        ValueError: no such operation or stage. SystemExit: the process was told to end; rows and summary are there.
    """
    if adopt:
        from recscale.pallas_kernels import blocks

        for path in blocks.adopt(out / "tuned"):
            show(f"{path}")
        return _result([], 0.0)
    jobs = device_plan.jobs(cpu=cpu, operations=operations, stages=stages)
    if dry_run:
        for line in device_plan.schedule(jobs, budget):
            show(line)
        return _result([], 0.0)
    begun = time.monotonic()
    log = ResultsLog(out / "results.jsonl")
    run = _Run(log, out, begun + budget - min(_RESERVE_S, budget / 10), cpu, show)
    with _ends_when_told():
        try:
            for stage in device_plan.STAGES:
                run.stage([job for job in jobs if job.stage == stage], device_plan.limit_s(stage, budget))
            code = None
        except (Stopped, KeyboardInterrupt):
            code = 128 + signal.SIGTERM
        finally:
            run.end()
            log.close()
        seconds = time.monotonic() - begun
        write_atomically(out / "summary.md", device_summary.text(log.rows, run.unreached, seconds))
        show(f"{out / 'summary.md'}")
        if code is not None:
            raise SystemExit(code)
    return _result(log.rows, seconds)


def _result(rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    statuses = [row["status"] for row in rows]
    # Asking this process for its device would take the device's memory; the processes of the jobs say where they ran.
    where = next((row["environment"] for row in rows if "environment" in row), None)
    return {
        "rows": rows,
        "environment": where,
        "counts": {name: statuses.count(name) for name in sorted(set(statuses))},
        "seconds": seconds,
    }


@contextlib.contextmanager
def _ends_when_told() -> Iterator[None]:
    """Within it SIGTERM raises `Stopped` in the main thread."""

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Stopped

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclasses.dataclass
class _Run:
    """One call: its log, folder and last moment."""

    log: ResultsLog
    out: Path
    deadline: float
    cpu: bool
    show: Callable[[str], None]
    unreached: list[str] = dataclasses.field(default_factory=list)
    _processes: set[subprocess.Popen] = dataclasses.field(default_factory=set)
    _over: bool = False

    def stage(self, jobs: list[Job], limit_s: float) -> None:
        """The jobs of a stage, until its limit or the deadline."""
        end = min(time.monotonic() + limit_s, self.deadline)
        jobs = [job for job in jobs if job.id not in self.log.ids()]
        together = min(len(cores()), len(jobs)) if jobs and jobs[0].together else 1
        with concurrent.futures.ThreadPoolExecutor(max(together, 1)) as pool:
            try:
                for future in [pool.submit(self._job, job, end) for job in jobs]:
                    future.result()
            except BaseException:
                self.end()
                raise

    def end(self) -> None:
        """Ends every process that is left."""
        self._over = True
        for process in list(self._processes):
            _kill(process)

    def _job(self, job: Job, end: float) -> None:
        task = job.task | {"stage": job.stage, "name": job.name, "cpu": self.cpu, "out": str(self.out)}
        task["command"] = command()
        while True:
            if self._over or time.monotonic() + job.least_s > end:
                self.unreached.append(job.id)
                return
            if job.stage == "tune":
                task["lost"] = device_summary.lost(self.log.rows, task["operation"])
                if not task["lost"]:
                    self._keep({"status": "done", "reason": "no kernel of it lost"}, job, job.id)
                    return
            begun = time.monotonic()
            outcome = self._once(job, task | {"done": sorted(self.log.ids())}, end)
            if outcome == "out of time":
                self.unreached.append(job.id)
            elif outcome == "over":
                self._keep({"status": "done", "seconds": time.monotonic() - begun}, job, job.id)
            if outcome != "again":
                return

    def _once(self, job: Job, task: dict[str, Any], end: float) -> str:
        """One process of a job: "over", "out of time", "again" after an item that ended it, or "failed" before any."""
        messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=self._environment(), start_new_session=True,
            )  # fmt: skip
            self._processes.add(process)
            if self._over:
                _kill(process)
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(task) + "\n")
                process.stdin.flush()  # it stays open: its end tells the process that this one is gone
            threading.Thread(target=_listen, args=(process, messages), daemon=True).start()
            item, late, patience = job.id, False, _START_S + job.item_s
            while True:
                left = end - time.monotonic()
                try:
                    message = messages.get(timeout=max(min(left, patience), 0.01))
                except queue.Empty:
                    late = True
                    break
                patience = job.item_s
                if message is None:
                    break
                if "begun" in message:
                    item = message["begun"]
                else:
                    self._keep(message, job, message["id"])
                    item = job.id
            if late:
                _kill(process)
            code = process.wait()
            self._processes.discard(process)
            errors.seek(0)
            said = " ".join(errors.read().split())[-_SAID:]
        if self._over or time.monotonic() >= end:
            return "over" if code == 0 and not late else "out of time"
        if late:
            self._keep({"status": "timed out", "reason": f"no result within {job.item_s:g} s"}, job, item)
        elif code != 0:
            self._keep({"status": "crashed", "reason": f"its process ended with code {code}: {said}"}, job, item)
        else:
            return "over"
        return "again" if item != job.id else "failed"

    def _keep(self, row: dict[str, Any], job: Job, name: str) -> None:
        row = {"id": name, "stage": job.stage} | row
        self.log.add(row)
        if not self._over:
            self.show(device_summary.line(row))

    def _environment(self) -> dict[str, str]:
        settings = {
            "JAX_COMPILATION_CACHE_DIR": str(self.out.absolute() / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "TORCHINDUCTOR_CACHE_DIR": str(self.out.absolute() / "cache" / "torch"),
            # Rivals in PyTorch, and processes side by side, need memory too.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        if self.cpu:
            # Warpgroups of an interpreted kernel are threads that wait for each other; fewer would wait for ever.
            settings |= {"JAX_PLATFORMS": "cpu", "NPROC": str(max(8, len(cores())))}
        return {**os.environ, **settings}


def _listen(process: subprocess.Popen, messages: queue.SimpleQueue) -> None:
    """Hands on what a process writes, then None."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith('{"'):  # a compiler's own remarks do not
            with contextlib.suppress(json.JSONDecodeError):  # cut off with its process
                messages.put(json.loads(line))
    messages.put(None)


def _kill(process: subprocess.Popen) -> None:
    """Ends a process and those it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
