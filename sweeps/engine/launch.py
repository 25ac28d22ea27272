"""Runs a plan on this machine: a pool of persistent worker processes, sized to cores and memory.

Launching is idempotent. Finished runs are skipped, stopped ones resume, and killing anything at any moment loses no
more than the time since the last checkpoint: workers die with the launcher, and the kernel releases its locks.
A job whose worker dies is tried once more; then its unfinished runs are recorded as failed and the others go on. One
that raises an error is not tried again: it would raise the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from recscale.scaling.host_memory import huge_page_environment
from recscale.scaling.records.runs import FINISHED

from . import machine, worker
from .display import Display, for_terminal
from .executors import Outcome
from .job import Job, check_disk, mark_failed, pending_jobs
from .locks import only_launcher
from .plan import read_plan, run_config

# A death may be the machine's doing (memory, a signal); twice the same is the job's own.
ATTEMPTS = 2

# Seconds a worker gets to leave after SIGTERM.
_GRACE_S = 5.0


@dataclasses.dataclass
class _Worker:
    process: subprocess.Popen
    stdin: IO[bytes]
    stdout: IO[bytes]
    slot: int
    job: Job | None = None
    buffer: bytes = b""


def launch(
    out: Path | str,
    plan: Sequence[dict[str, Any]] | None = None,
    *,
    workers: int | None = None,
    memory_gb: float | None = None,
    overrides: Sequence[str] = (),
    options: Sequence[str] = (),
    trainer: str = worker.TRAINER,
    display: Display | None = None,
) -> Outcome:
    """Trains every unfinished run of a plan and returns what became of them: the executor `local`.

    Args:
        out: the sweep's folder. plan: its rows; default what `out/plan.jsonl` holds.
        workers: worker processes; default one a core (one an accelerator where there are any).
        memory_gb: memory the predicted peaks of the running jobs may sum to; default most of what is free.
        overrides: `key=value` settings that cannot change a result (data.root, tracking), laid over every run.
        options: of executors that have any; none are taken here.
        trainer: `module:function` called as `train_group`.
        display: where progress goes; default the terminal.

    Raises:
        Busy: another launcher holds the folder.
        FileNotFoundError: there is no plan.
        PlanError: the plan is another version's. OverrideError: a setting that would change the runs.
        ValueError: there are options, or the disk has no room for the checkpoints.
    """
    out = Path(out)
    if options:
        raise ValueError(f"the local executor takes no options, found {', '.join(options)}")
    rows = read_plan(out) if plan is None else plan
    if rows:
        run_config(rows[0], overrides)  # what does not fit is told here, once, and not by every worker
    with only_launcher(out):
        began = time.monotonic()
        pool = _Pool(out, rows, workers, memory_gb, trainer, overrides, display or for_terminal())
        with _signals(pool):
            pool.run()
        return Outcome.of(out, rows, time.monotonic() - began, interrupted=pool.stopping)


class _Pool:
    """The workers, the jobs they hold and the events they send."""

    def __init__(
        self,
        out: Path,
        rows: Sequence[dict[str, Any]],
        workers: int | None,
        memory_gb: float | None,
        trainer: str,
        overrides: Sequence[str],
        display: Display,
    ):
        self.out, self.trainer, self.overrides, self.display = out, trainer, overrides, display
        self.waiting = pending_jobs(out, rows)
        self.slots = _slots(workers)
        free = machine.MEMORY_SHARE * machine.free_memory_bytes()
        self.memory = free if memory_gb is None else round(1e9 * memory_gb)
        self.workers: list[_Worker] = []
        self.selector = selectors.DefaultSelector()
        self.stopping = False
        display.start(self.waiting, len(rows), len(self.slots))

    def run(self) -> None:
        try:
            self._refuse_too_large()
            check_disk(self.out, self.waiting)
            while (self.waiting or any(w.job for w in self.workers)) and not self.stopping:
                self._assign()
                for key, _ in self.selector.select(timeout=0.2):
                    self._read(key.data)
                self.display.refresh()
        finally:
            self._stop_workers()
            self.display.stop()

    def _refuse_too_large(self) -> None:
        for job in [job for job in self.waiting if job.memory_bytes > self.memory]:
            self.waiting.remove(job)
            needed, given = job.memory_bytes / 1e9, self.memory / 1e9
            self._give_up(
                job,
                f"predicted peak memory {needed:.1f} GB (estimated) exceeds the {given:.1f} GB this launch may use; "
                "raise --memory-gb, or use a larger machine",
            )

    def _assign(self) -> None:
        """Gives every idle worker the longest waiting job whose predicted memory fits beside the running ones."""
        while self.waiting:
            free = self.memory - sum(w.job.memory_bytes for w in self.workers if w.job)
            job = next((job for job in self.waiting if job.memory_bytes <= free), None)
            idle = next((w for w in self.workers if w.job is None), None)
            if job is None or (idle is None and len(self.workers) == len(self.slots)):
                return
            idle = idle or self._start_worker()
            self.waiting.remove(job)
            idle.job = job
            job.attempts += 1
            try:
                idle.stdin.write(f"{job.id}\n".encode())
                idle.stdin.flush()
            except BrokenPipeError:
                self._worker_ended(idle)

    def _start_worker(self) -> _Worker:
        slot = min(set(range(len(self.slots))) - {w.slot for w in self.workers})
        core, extra = self.slots[slot]
        command = [sys.executable, "-m", "recscale.sweeps.engine.worker", str(self.out), "--trainer", self.trainer]
        command += ["--parent", str(os.getpid())]
        command += [] if core is None else ["--core", str(core)]
        command += [part for text in self.overrides for part in ("--set", text)]
        log = _worker_log(self.out, slot)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as stderr:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=os.environ | worker.environment(core) | huge_page_environment() | extra,
                start_new_session=True,  # a terminal's Ctrl-C reaches the launcher alone
            )
        assert process.stdin is not None and process.stdout is not None  # both are pipes
        started = _Worker(process, process.stdin, process.stdout, slot)
        os.set_blocking(started.stdout.fileno(), False)
        self.selector.register(started.stdout, selectors.EVENT_READ, started)
        self.workers.append(started)
        return started

    def _read(self, source: _Worker) -> None:
        data = source.stdout.read()
        if data is None:
            return
        if not data:
            self._worker_ended(source)
            return
        *lines, source.buffer = (source.buffer + data).split(b"\n")
        for line in lines:
            self._event(source, json.loads(line))

    def _event(self, source: _Worker, event: dict[str, Any]) -> None:
        kind, job = event.pop("event"), source.job
        if kind == "ready" or job is None or event.pop("job") != job.id:
            return
        if kind == "started":
            self.display.started(job)
        elif kind == "progress":
            self.display.progress(job, event)
        elif kind == "failed":
            source.job = None
            self._attempt_failed(job, event["reason"], again=False)
        elif kind == "held":
            # Another process (a Slurm job) is training these runs: their records are its own.
            source.job = None
            self.display.failed(job, event["reason"], job.log(self.out))
        elif kind == "done":
            source.job = None
            unfinished = {run: status for run, status in event["runs"].items() if status not in FINISHED}
            if unfinished:
                self._attempt_failed(job, f"the trainer returned with unfinished runs {unfinished}", again=False)
            else:
                self.display.done(job, event["runs"])

    def _worker_ended(self, ended: _Worker) -> None:
        """A worker's output closed: it is dead or dying. Its job, if it had one, has lost an attempt."""
        self.selector.unregister(ended.stdout)
        self.workers.remove(ended)
        ended.stdin.close()
        ended.stdout.close()
        code = ended.process.wait()
        if ended.job is not None:
            log = _worker_log(self.out, ended.slot)
            self._attempt_failed(ended.job, f"the worker process died ({_ending(code)}; its own messages: {log})")

    def _attempt_failed(self, job: Job, reason: str, *, again: bool = True) -> None:
        if self.stopping:
            return
        path = self.out / "groups" / job.id / "attempts.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps({"attempt": job.attempts, "reason": reason, "log": str(job.log(self.out))}) + "\n")
        if again and job.attempts < ATTEMPTS:
            self.display.retried(job, reason)
            self.waiting.insert(0, job)
        else:
            self._give_up(job, reason)

    def _give_up(self, job: Job, reason: str) -> None:
        """Records a job's unfinished runs as failed, with the reason and where to read more."""
        log = job.log(self.out)
        reasons = [reason, *([f"log: {log}"] if log.exists() else [])]
        mark_failed(self.out, job.rows, reasons)
        self.display.failed(job, reason, log)

    def _stop_workers(self) -> None:
        """Ends every worker: idle ones by the end of input, busy ones by SIGTERM, stubborn ones by SIGKILL."""
        for each in self.workers:
            if each.job is not None:
                each.process.terminate()
            with contextlib.suppress(BrokenPipeError):
                each.stdin.close()
        deadline = time.monotonic() + _GRACE_S
        for each in self.workers:
            try:
                each.process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                each.process.kill()
                each.process.wait()
            each.stdout.close()
        self.workers.clear()
        self.selector.close()


def _slots(workers: int | None) -> list[tuple[int | None, dict[str, str]]]:
    """(core, extra environment) of every worker: a core each, or an accelerator each where there are any."""
    devices = machine.accelerators()
    if devices:
        count = workers or len(devices)
        sharing = -(-count // len(devices))
        part = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / sharing:.3f}"} if sharing > 1 else {}
        return [(None, devices[i % len(devices)] | part) for i in range(count)]
    cores = machine.cores()
    return [(cores[i % len(cores)], {}) for i in range(workers or len(cores))]


def _worker_log(out: Path, slot: int) -> Path:
    return out / "logs" / f"worker-{slot}.txt"


def _ending(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


@contextlib.contextmanager
def _signals(pool: _Pool) -> Iterator[None]:
    """SIGINT and SIGTERM ask the pool to stop; the previous handlers come back afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        pool.stopping = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
