"""Runs a plan on this machine: a pool of persistent worker processes, sized to cores and memory.

Launching is idempotent. Finished runs are skipped, stopped ones resume, and killing anything at any moment loses no
more than the time since the last checkpoint: workers die with the launcher, and the kernel releases its locks.
A job whose worker dies, or gives no sign of life any more, is tried once more; then its unfinished runs are recorded
as failed and the others go on. One that raises an error is not tried again: it would raise the same.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from recscale.scaling.host_memory import huge_page_environment
from recscale.scaling.records.runs import FINISHED

from . import machine, worker
from .display import Display, for_terminal
from .executors import Executor, Launch, Outcome
from .job import Job, check_disk, mark_failed
from .resources import Resources
from .submission import carry_out

# A death may be the machine's doing (memory, a signal); twice the same is the job's own.
ATTEMPTS = 2

# Seconds a worker gets to leave after SIGTERM.
_GRACE_S = 5.0

# A worker with a job is hung after so many seconds without a beat, or of beats without computing or progress.
_SILENT_S, _IDLE_S = 60.0, 600.0

# Seconds of computing that count as such: beating takes a little.
_LEAST_CPU_S = 0.1


@dataclasses.dataclass
class _Worker:
    process: subprocess.Popen
    stdin: IO[bytes]
    stdout: IO[bytes]
    slot: int
    job: Job | None = None
    buffer: bytes = b""
    heard: float = 0.0  # when it last said anything
    moved: float = 0.0  # when its job last got on
    cpu_s: float = 0.0
    hung: str | None = None  # why it was taken for hung and killed


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Where a worker computes: on a core, wherever the kernel puts it, or on an accelerator."""

    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    core: int | None = None
    accelerator: bool = False
    devices: int = 1


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
    """Trains every unfinished run of a plan on this machine: `carry_out` with the executor `local`, for scripts.

    Args:
        out: the sweep's folder. plan: its rows; default what `out/plan.jsonl` holds. The rest: see `Launch`.
    """
    asked = Launch(Path(out), tuple(overrides), tuple(options), workers, memory_gb, trainer, display)
    return carry_out(asked, "local", plan)


class Local(Executor):
    """This machine's worker pool. Jobs that name a mesh get as many accelerators, or forced CPU devices, each."""

    def __init__(self, launch: Launch):
        super().__init__(launch)
        if launch.options:
            raise ValueError(f"the local executor takes no options, found {', '.join(launch.options)}")
        self._jobs: list[Job] = []

    def submit(self, jobs: Sequence[Job], resources: Resources) -> list[str]:
        self._jobs += jobs
        return [job.id for job in jobs]

    def wait(self, handles: Mapping[str, str], told: Callable[[str], None] = lambda text: None) -> bool:
        pool = _Pool(self.launch, sorted(self._jobs, key=lambda job: -job.seconds))
        with _signals(pool):
            pool.run()
        return pool.stopping


class _Pool:
    """The workers, the jobs they hold and the events they send."""

    def __init__(self, launch: Launch, jobs: list[Job]):
        self.out, self.trainer, self.overrides = launch.out, launch.trainer, launch.overrides
        self.display = launch.display or for_terminal()
        self.waiting = jobs
        rows = [row for job in jobs for row in job.rows]
        self.slots = _slots(launch.workers, worker.mesh_devices(rows, launch.overrides))
        free = machine.MEMORY_SHARE * machine.free_memory_bytes()
        self.memory = free if launch.memory_gb is None else round(1e9 * launch.memory_gb)
        self.workers: list[_Worker] = []
        self.selector = selectors.DefaultSelector()
        self.stopping = False
        self.display.start(self.waiting, len(self.slots))

    def run(self) -> None:
        try:
            self._refuse_too_large()
            check_disk(self.out, self.waiting)
            while (self.waiting or any(w.job for w in self.workers)) and not self.stopping:
                self._assign()
                for key, _ in self.selector.select(timeout=0.2):
                    self._read(key.data)
                self._kill_hung()
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
            idle.heard = idle.moved = time.monotonic()
            try:
                idle.stdin.write(f"{job.id}\n".encode())
                idle.stdin.flush()
            except BrokenPipeError:
                self._worker_ended(idle)

    def _start_worker(self) -> _Worker:
        slot = min(set(range(len(self.slots))) - {w.slot for w in self.workers})
        place = self.slots[slot]
        command = [sys.executable, "-m", "recscale.sweeps.engine.worker", str(self.out), "--trainer", self.trainer]
        command += ["--parent", str(os.getpid()), "--beat", str(_SILENT_S / 12)]
        command += ["--accelerator"] if place.accelerator else ["--devices", str(place.devices)]
        command += [] if place.core is None else ["--core", str(place.core)]
        command += [part for text in self.overrides for part in ("--set", text)]
        log = _worker_log(self.out, slot)
        log.parent.mkdir(exist_ok=True)
        with open(log, "ab") as stderr:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=os.environ
                | worker.environment(place.accelerator, place.devices)
                | huge_page_environment()
                | place.environment,
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
        source.heard = now = time.monotonic()
        if kind == "ready" or job is None or event.pop("job") != job.id:
            return
        if kind == "beat":
            if event["cpu_s"] > source.cpu_s + _LEAST_CPU_S:
                source.cpu_s, source.moved = event["cpu_s"], now
        elif kind == "started":
            self.display.started(job)
        elif kind == "progress":
            source.moved = now
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

    def _kill_hung(self) -> None:
        """Kills workers whose job gives no sign of life, or does not get on: a disk that is gone, a stopped process."""
        now = time.monotonic()
        for each in self.workers:
            if each.job is None or each.hung:
                continue
            if now - each.heard > _SILENT_S:
                each.hung = f"it said nothing for {now - each.heard:.0f} s"
            elif now - each.moved > _IDLE_S:
                each.hung = f"it computed nothing for {now - each.moved:.0f} s"
            if each.hung:
                each.process.kill()

    def _worker_ended(self, ended: _Worker) -> None:
        """A worker's output closed: it is dead or dying. Its job, if it had one, has lost an attempt."""
        self.selector.unregister(ended.stdout)
        self.workers.remove(ended)
        ended.stdin.close()
        ended.stdout.close()
        code = ended.process.wait()
        if ended.job is not None:
            log = _worker_log(self.out, ended.slot)
            what = f"hung and was killed ({ended.hung}" if ended.hung else f"died ({_ending(code)}"
            self._attempt_failed(ended.job, f"the worker process {what}; its own messages: {log})")

    def _attempt_failed(self, job: Job, reason: str, *, again: bool = True) -> None:
        if self.stopping:
            return
        path = self.out / "groups" / job.id / "attempts.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as handle:
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


def _slots(workers: int | None, devices: int = 1) -> list[_Slot]:
    """Where each worker computes: a core each, or an accelerator each where there are any; of jobs on a mesh so many
    accelerators, or a process of so many forced CPU devices. Workers that leave cores free are not tied to theirs:
    another sweep on this machine would take the same ones, and the kernel knows which are idle.

    Raises:
        ValueError: this machine has fewer accelerators than a mesh takes.
    """
    found = machine.accelerators()
    if found and devices > 1:
        if devices > len(found) and found != [{}]:  # a process takes all TPU chips, however many there are
            raise ValueError(f"training.mesh takes {devices} devices, this machine has {len(found)} accelerators")
        groups = [found[i : i + devices] for i in range(0, len(found) - devices + 1, devices)] or [found]
        joined = [
            {name: ",".join(one[name] for one in group) for name in group[0]} for group in groups[: workers or None]
        ]
        return [_Slot(environment, accelerator=True, devices=devices) for environment in joined]
    if found:
        count = workers or len(found)
        sharing = -(-count // len(found))
        part = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / sharing:.3f}"} if sharing > 1 else {}
        return [_Slot(found[i % len(found)] | part, accelerator=True) for i in range(count)]
    cores = machine.cores()
    if devices > 1:
        return [_Slot(devices=devices) for _ in range(workers or max(len(cores) // devices, 1))]
    count = workers or len(cores)
    return [_Slot(core=cores[i % len(cores)] if count >= len(cores) else None) for i in range(count)]


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
