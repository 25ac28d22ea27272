"""The pool itself, without processes: what it makes of events, silence, deaths and memory, and how workers start."""

import io
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import types

import pytest

from recscale.sweeps.engine import launch as launching
from recscale.sweeps.engine import machine, worker
from recscale.sweeps.engine.display import Display
from recscale.sweeps.engine.executors import Launch
from recscale.sweeps.engine.job import Job
from recscale.sweeps.engine.launch import Local, _Pool, _Slot, _Worker


def job(name, memory=10, seconds=1.0, mesh=""):
    predicted = {"peak_memory_bytes": memory, "job_seconds": seconds}
    return Job(name, [{"run_id": name, "predicted": predicted, "config": {"training": {"mesh": mesh}}}])


class Recorder(Display):
    """Every call as (what, job or none, the last argument)."""

    def __init__(self):
        self.calls = []

    def __getattribute__(self, name):
        if name in ("start", "started", "progress", "done", "retried", "failed", "refresh", "stop"):
            return lambda *given: self.calls.append((name, *(getattr(each, "id", each) for each in given)))
        return super().__getattribute__(name)


class Process:
    """Ends with `code`, after `stubborn` waits that time out."""

    def __init__(self, code=0, stubborn=0):
        self.code, self.stubborn, self.calls = code, stubborn, []

    def wait(self, timeout=None):
        self.calls.append("wait" if timeout is None else round(timeout, 3))
        if timeout is not None and self.stubborn:
            self.stubborn -= 1
            raise subprocess.TimeoutExpired("worker", timeout)
        return self.code

    def terminate(self):
        self.calls.append("terminate")

    def kill(self):
        self.calls.append("kill")


@pytest.fixture
def clock(monkeypatch):
    now = types.SimpleNamespace(value=1000.0)
    monkeypatch.setattr(launching.time, "monotonic", lambda: now.value)
    return now


@pytest.fixture
def given_up(monkeypatch):
    found = []
    monkeypatch.setattr(launching, "mark_failed", lambda out, rows, reasons: found.append((rows, reasons)))
    return found


@pytest.fixture
def pool(tmp_path, monkeypatch):
    """Makes a pool of two workers and 30 bytes of memory; its workers are started without a process."""
    monkeypatch.setattr(machine, "accelerators", list)
    monkeypatch.setattr(machine, "cores", lambda: [4, 5])
    monkeypatch.setattr(machine, "free_memory_bytes", lambda: 100)

    def make(*jobs, memory_gb=30e-9, **more):
        made = _Pool(Launch(tmp_path, memory_gb=memory_gb, display=Recorder(), **more), list(jobs))
        made.starting = made._start_worker
        made._start_worker = lambda: member(made)
        return made

    return make


def member(pool, job=None, process=None):
    """A worker of a pool; it writes into a buffer and says nothing."""
    read, write = os.pipe()
    os.close(write)
    made = _Worker(
        process or Process(), io.BufferedWriter(io.BytesIO()), os.fdopen(read, "rb", 0), len(pool.workers), job
    )
    pool.selector.register(made.stdout, selectors.EVENT_READ, made)
    pool.workers.append(made)
    return made


def test_a_pool_takes_four_fifths_of_free_memory_or_what_it_is_given(pool):
    assert pool(memory_gb=None).memory == 80 and pool(memory_gb=7e-9).memory == 7
    made = pool(job("a"), job("b"))
    assert made.display.calls == [("start", made.waiting, 2)] and not made.stopping
    assert [slot.core for slot in made.slots] == [4, 5]
    assert [slot.devices for slot in pool(job("a", mesh="data=2")).slots] == [2]


def test_idle_workers_get_the_first_waiting_job_that_fits(pool, clock):
    jobs = [job("large", 20), job("middle", 15), job("small", 10), job("tiny", 1)]
    made = pool(*jobs)
    made._assign()
    assert [each.job.id for each in made.workers] == ["large", "small"]  # 20 and 10 of 30: it just fits
    assert [each.stdin.raw.getvalue() for each in made.workers] == [b"large\n", b"small\n"]
    assert [left.id for left in made.waiting] == ["middle", "tiny"] and [each.attempts for each in jobs] == [1, 0, 1, 0]
    assert {(each.heard, each.moved) for each in made.workers} == {(1000.0, 1000.0)}
    made.workers[1].job = None
    made._assign()
    assert made.workers[1].job.id == "tiny" and len(made.workers) == 2  # the idle one, not a third
    made.workers[1].job = None
    made.memory, made.waiting = 35, [job("last", 15)]
    made._assign()
    assert made.workers[1].job.id == "last" and not made.waiting
    made.waiting = [job("waits", 0)]
    made._assign()
    assert [left.id for left in made.waiting] == ["waits"]  # memory for it, and no worker


def test_a_worker_that_died_before_its_job_reached_it_costs_an_attempt(pool, given_up):
    class Broken(io.BytesIO):
        def write(self, data):
            raise BrokenPipeError

    made = pool(job("a"))
    dead = member(made)
    dead.stdin = Broken()
    made._assign()
    assert [call[:2] for call in made.display.calls[1:]] == [("retried", "a")]
    assert [each.job and each.job.id for each in made.workers] == ["a"] and not given_up and not made.waiting


def test_events_move_the_display_and_the_worker(pool, clock, tmp_path, given_up):
    made, own = pool(), job("a")
    one = member(made, own)
    assert one.heard == one.moved == one.cpu_s == 0

    def send(kind, **more):
        made.display.calls.clear()
        clock.value += 1
        made._event(one, {"event": kind, **more})
        assert one.heard == clock.value
        return made.display.calls

    assert send("ready") == [] and send("started", job="b") == [] and send("done", job="b", runs={}) == []
    assert one.job is own and one.moved == 0.0
    assert send("started", job="a") == [("started", "a")] and one.moved == 0.0
    assert send("progress", job="a", step=3) == [("progress", "a", {"step": 3})] and one.moved == clock.value
    for computed, moves in ((0.1, False), (0.125, True), (0.2, False), (0.25, True)):
        before = one.moved
        one.cpu_s = 0.0 if computed < 0.2 else 0.125
        assert send("beat", job="a", cpu_s=computed) == [] and (one.moved == clock.value) == moves
        assert one.cpu_s == computed if moves else one.moved == before
    assert send("done", job="a", runs={"r": "diverged"}) == [("done", "a", {"r": "diverged"})] and one.job is None
    assert send("started", job="a") == []
    one.job = own
    log = tmp_path / "groups" / "a" / "log.txt"
    assert send("held", job="a", reason="by 7") == [("failed", "a", "by 7", log)]
    assert one.job is None and not given_up
    own.attempts = 1
    for kind, more, reason in (
        ("failed", {"reason": "no disk"}, "no disk"),
        ("done", {"runs": {"r": "done", "s": "running"}}, "the trainer returned with unfinished runs {'s': 'running'}"),
    ):
        one.job = own
        assert send(kind, job="a", **more) == [("failed", "a", reason, log)] and one.job is None
        assert given_up.pop() == (own.rows, [reason]) and not made.waiting
    lines = (tmp_path / "groups" / "a" / "attempts.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines][0] == {"attempt": 1, "reason": "no disk", "log": str(log)}
    assert len(lines) == 2


def test_lines_are_read_however_they_arrive(pool, monkeypatch):
    made, got = pool(), []
    one = member(made, job("a"))
    monkeypatch.setattr(made, "_event", lambda source, event: got.append(event))
    pieces = iter([None, b'{"n": 1}\n{"n"', b": 2}\n", b""])
    one.stdout = types.SimpleNamespace(read=lambda: next(pieces))
    for expected in (0, 1, 2):
        made._read(one)
        assert got == [{"n": n + 1} for n in range(expected)]
    ended = []
    monkeypatch.setattr(made, "_worker_ended", ended.append)
    made._read(one)
    assert ended == [one]


def test_a_worker_is_hung_after_a_minute_of_silence_or_ten_without_work(pool, clock):
    made = pool()
    cases = [  # seconds since it was heard, since it moved; why it is killed
        (60.0, 600.0, None),
        (61.0, 0.0, "it said nothing for 61 s"),
        (0.0, 601.0, "it computed nothing for 601 s"),
    ]
    for heard, moved, why in cases:
        one = member(made, job("a"))
        one.heard, one.moved = clock.value - heard, clock.value - moved
        idle = member(made)
        made._kill_hung()
        made._kill_hung()
        assert one.hung == why and one.process.calls == ([] if why is None else ["kill"])
        assert idle.hung is None and idle.process.calls == []


def test_a_death_is_forgiven_once(pool, given_up, tmp_path):
    own, other = job("a"), job("b")
    made = pool(other)
    log = tmp_path / "logs" / "worker-0.txt"
    for attempt, (process, hung, what) in enumerate(
        [(Process(-9), None, "died (killed by SIGKILL"), (Process(-9), "it slept", "hung and was killed (it slept")]
    ):
        own.attempts = attempt + 1
        one = member(made, own, process)
        one.hung = hung
        made._worker_ended(one)
        reason = f"the worker process {what}; its own messages: {log})"
        assert one.stdin.closed and one.stdout.closed and made.workers == [] and not made.selector.get_map()
        if attempt == 0:
            assert made.display.calls[-1] == ("retried", "a", reason)
            assert [left.id for left in made.waiting] == ["a", "b"] and not given_up
            made.waiting.remove(own)
    assert [left.id for left in made.waiting] == ["b"] and given_up == [(own.rows, [reason])]
    made._worker_ended(member(made, None, Process(0)))
    made.stopping = True
    made._worker_ended(member(made, other, Process(-15)))  # told to stop: no attempt
    assert len(given_up) == 1 and len((tmp_path / "groups/a/attempts.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "groups/b").exists()
    own.log(tmp_path).write_text("noise")
    made._give_up(own, "why")
    assert given_up[-1] == (own.rows, ["why", f"log: {own.log(tmp_path)}"])
    assert [launching._ending(code) for code in (-9, 0, 1)] == ["killed by SIGKILL", "exit code 0", "exit code 1"]


def test_workers_are_asked_to_leave_before_they_are_killed(pool, clock):
    made = pool()
    idle, busy, stubborn = (member(made, own, process) for own, process in (
        (None, Process()), (job("a"), Process()), (job("b"), Process(stubborn=1)),
    ))  # fmt: skip
    members, steps = list(made.workers), iter([0.0, 1.0, 3.0, 9.0])
    launching.time.monotonic = lambda: 1000.0 + next(steps)
    made._stop_workers()
    assert idle.process.calls == [4.0] and busy.process.calls == ["terminate", 2.0]
    assert stubborn.process.calls == ["terminate", 0.1, "kill", "wait"]  # its time was up, it gets a tenth
    assert all(each.stdin.closed and each.stdout.closed for each in members) and made.workers == []
    assert made.selector.get_map() is None  # closed


def test_the_loop_refuses_assigns_reads_and_ends(pool, given_up, monkeypatch):
    made = pool(job("large", 31e9), job("fits", 30e9), memory_gb=30.0)
    member(made)
    member(made)  # stays idle
    checked, order = [], []
    monkeypatch.setattr(launching, "check_disk", lambda out, jobs: checked.append([each.id for each in jobs]))
    monkeypatch.setattr(made, "_kill_hung", lambda: order.append("hung"))
    monkeypatch.setattr(made, "_read", lambda source: order.append(source) or setattr(made.workers[0], "job", None))
    looks = iter([[], [(types.SimpleNamespace(data="it"), 1)]])
    made.selector.close()
    made.selector = types.SimpleNamespace(
        select=lambda timeout: order.append(timeout) or next(looks), register=lambda *_: None, close=lambda: None
    )
    made.run()
    assert checked == [["fits"]] and order == [order[0], "hung", order[0], "it", "hung"] and 0 < order[0] <= 1
    names = [call[0] for call in made.display.calls]
    assert names == ["start", "failed", "refresh", "refresh", "stop"] and made.workers == []
    assert given_up[0][1][0].startswith("predicted peak memory 31.0 GB (estimated) exceeds the 30.0 GB")
    stopped = pool(job("never"))
    stopped.stopping = True
    stopped.run()
    assert [left.id for left in stopped.waiting] == ["never"] and stopped.display.calls[-1] == ("stop",)


def test_a_worker_is_started_where_its_slot_says(pool, monkeypatch, tmp_path):
    made, started = pool(overrides=("data.root=/x", "tracking.wandb=offline"), trainer="a:b"), []

    def popen(command, **options):
        read, write = os.pipe()
        os.close(write)
        started.append((command, options))
        return types.SimpleNamespace(stdin=io.BytesIO(), stdout=os.fdopen(read, "rb", 0))

    monkeypatch.setattr(launching.subprocess, "Popen", popen)
    monkeypatch.setattr(launching, "huge_page_environment", lambda: {"PAGES": "huge"})
    made.slots = [_Slot(core=7), _Slot(), _Slot(devices=3), _Slot({"CUDA_VISIBLE_DEVICES": "2"}, accelerator=True)]
    places = [["--devices", "1", "--core", "7"], ["--devices", "1"], ["--devices", "3"], ["--accelerator"]]
    settings = ["--set", "data.root=/x", "--set", "tracking.wandb=offline"]
    for number, place in enumerate(places):
        one = made.starting()
        command, options = started[-1]
        assert command[:3] == [sys.executable, "-m", "recscale.sweeps.engine.worker"]
        beat = ["--parent", str(os.getpid()), "--beat", "5.0"]  # a dozen in the time after which it counts as silent
        assert command[3:] == [str(tmp_path), "--trainer", "a:b", *beat, *place, *settings]
        assert options["start_new_session"] and options["stdin"] == options["stdout"] == subprocess.PIPE
        assert options["stderr"].name == str(tmp_path / "logs" / f"worker-{number}.txt")
        slot, told = made.slots[number], options["env"]
        asked = worker.environment(slot.accelerator, slot.devices) | slot.environment | {"PAGES": "huge"}
        assert asked.items() <= told.items() and told["PATH"] == os.environ["PATH"]
        assert not os.get_blocking(one.stdout.fileno()) and made.selector.get_key(one.stdout).data is one
        assert one.slot == number and made.workers[-1] is one
    made.workers.pop(1)
    assert made.starting().slot == 1  # the place that became free


def cuda(*names):
    return [{"CUDA_VISIBLE_DEVICES": name} for name in names]


@pytest.mark.parametrize(
    ("accelerators", "workers", "devices", "slots"),
    [
        (cuda("0", "1"), None, 1, [_Slot(one, accelerator=True) for one in cuda("0", "1")]),
        (cuda("0", "1"), 1, 1, [_Slot(cuda("0")[0], accelerator=True)]),
        (
            cuda("0", "1"), 3, 1,
            [_Slot(cuda(i)[0] | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.450"}, accelerator=True) for i in "010"],
        ),
        (cuda("0", "1", "2", "3", "4"), None, 2,
         [_Slot(one, accelerator=True, devices=2) for one in cuda("0,1", "2,3")]),
        (cuda("0", "1", "2", "3"), 1, 2, [_Slot(cuda("0,1")[0], accelerator=True, devices=2)]),
        (cuda("0", "1"), None, 2, [_Slot(cuda("0,1")[0], accelerator=True, devices=2)]),
        ([{}], None, 4, [_Slot(accelerator=True, devices=4)]),
        ([{}], None, 1, [_Slot(accelerator=True)]),
        ([], None, 4, [_Slot(devices=4)]),
        ([], None, 8, [_Slot(devices=8)]),
        ([], 3, 2, [_Slot(devices=2)] * 3),
        ([], 1, 1, [_Slot()]),
    ],
)  # fmt: skip
def test_slots_are_cores_accelerators_or_as_many_devices_as_a_mesh_takes(
    monkeypatch, accelerators, workers, devices, slots
):
    monkeypatch.setattr(machine, "accelerators", lambda: accelerators)
    monkeypatch.setattr(machine, "cores", lambda: [0, 1, 2, 3])
    assert launching._slots(workers, devices) == slots
    if devices == 1:
        assert launching._slots(workers) == slots
    assert _Slot() == _Slot({}, None, False, 1)


def test_the_local_executor_trains_the_longest_job_first(monkeypatch, tmp_path):
    made = []

    class Pool:
        def __init__(self, launch, jobs):
            self.jobs, self.stopping, self.ran = [each.id for each in jobs], True, False
            made.append(self)

        def run(self):
            self.ran = True

    monkeypatch.setattr(launching, "_Pool", Pool)
    local = Local(Launch(tmp_path))
    assert local.submit([job("a", seconds=1), job("b", seconds=3)], None) == ["a", "b"]
    assert local.submit([job("c", seconds=2)], None) == ["c"]
    assert local.wait({}) is True and made[0].ran and made[0].jobs == ["b", "c", "a"]
    assert not local.hands_over and local.launch.out == tmp_path


def test_signals_stop_the_pool_and_the_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number in (signal.SIGINT, signal.SIGTERM):
        made = types.SimpleNamespace(stopping=False)
        with launching._signals(made):
            signal.raise_signal(number)
        assert made.stopping
        assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    reached = []

    def elsewhere():
        with launching._signals(made):  # another thread may not set handlers
            reached.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert reached == before[:1]
