"""A worker by itself: what it says on its stream, what it hands to the trainer, and how it settles on a machine."""

import io
import json
import os
import queue
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

from recscale.scaling.records.locks import EXPIRES_S
from recscale.sweeps.engine import brought, machine, worker
from recscale.sweeps.engine.plan import write_plan

TRAINER = f"{Path(__file__).with_name('fake_trainer.py')}:train_group"


@pytest.fixture
def planned(one_run_plan, tmp_path):
    """The folder of a plan of one run, its job and the run's id."""
    [row], _ = write_plan(tmp_path, one_run_plan)
    return tmp_path, row["job"], row["run_id"]


def test_the_stream_of_a_worker_from_ready_to_the_end_of_its_input(planned):
    out, job, run = planned
    (out / "fake.json").write_text(json.dumps({"*": {"step_s": 0.06}}))
    command = [sys.executable, "-m", "recscale.sweeps.engine.worker", str(out), "--beat", "0.1"]
    command += ["--parent", str(os.getpid()), "--trainer", TRAINER, "--set", "data.root=/elsewhere", "--devices", "2"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, **pipes)
    late = threading.Timer(120, process.kill)  # else a worker that says nothing is waited for
    late.daemon = True
    late.start()
    said = [json.loads(process.stdout.readline())]
    process.stdin.write(f"\n {job} \n")
    process.stdin.flush()
    while said[-1]["event"] not in ("done", "failed", "held"):
        said.append(json.loads(process.stdout.readline()))
    rest, errors = process.communicate(timeout=30)  # closes its input
    late.cancel()
    assert process.returncode == 0 and rest == "" and "noise" not in errors
    log = out / "groups" / job / "log.txt"
    assert said[:2] == [{"event": "ready"}, {"event": "started", "job": job}]
    assert said[-1] == {"event": "done", "job": job, "log": str(log), "runs": {run: "done"}}
    beats, steps = ([each for each in said if each["event"] == kind] for kind in ("beat", "progress"))
    assert 2 <= len(beats) <= 60 and all(each["job"] == job and 0 < each["cpu_s"] < 60 for each in beats)
    assert 1 <= len(steps) <= 5 and steps[0] == {
        "event": "progress", "job": job, "step": 1,
        "total_steps": 10, "rows_per_s": 10.0, "flops_per_s": 1e9, "eta_s": 1.0,
    }  # fmt: skip
    assert "noise on standard output\n" in log.read_text() and "noise on standard error\n" in log.read_text()
    assert "device_count=2" in json.loads((out / "starts.jsonl").read_text())["xla"]
    assert json.loads((out / "runs" / run / "run.json").read_text())["config"]["data"]["root"] == "/elsewhere"


def test_what_is_printed_during_a_job_goes_to_its_log_and_nothing_else_does(tmp_path):
    """In a process of its own, for it takes the standard streams."""
    code = """
import faulthandler, os, sys
from pathlib import Path
from recscale.sweeps.engine.worker import _Events
events = _Events(60.0)
os.write(1, b"before ")
with events.into(Path(sys.argv[1])):
    print("inside", end=" ")
    print("wrong", end=" ", file=sys.stderr)
    assert faulthandler.is_enabled()
assert not faulthandler.is_enabled()
print("after")
with events.into(Path(sys.argv[1])):
    os.write(2, b"again ")
    os.write(1, b"and again")
sys.stdout.flush()
os.write(2, b"end")
events.send(event="ready", n=1)
free = os.dup(0)
os.close(free)
with events.into(Path(sys.argv[1])):
    pass
assert os.dup(0) == free
os._exit(0)  # what was sent is through
"""
    log = tmp_path / "groups" / "a" / "log.txt"
    done = subprocess.run([sys.executable, "-c", code, str(log)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"event": "ready", "n": 1}
    assert done.stderr == "before after\nend" and sorted(log.read_text().split()) == sorted(
        "inside wrong again and again".split()
    )


def test_the_trainer_gets_the_runs_of_its_job(planned, monkeypatch):
    out, job, run = planned
    held, importable, told = [], [], lambda progress: None
    monkeypatch.setattr(worker, "hold", lambda lease, wait_s: held.append((lease, wait_s)) or io.StringIO())
    monkeypatch.setattr(brought, "make_importable", importable.append)

    def trainer(specs, folder, *, progress, cache_dir):
        return specs, folder, progress, cache_dir

    [spec], folder, progress, cache = worker.train_job(out, job, trainer, told, ("data.root=/x",), 7.0)
    assert (folder, progress, cache) == (out / "groups" / job, told, out / "cache")
    assert spec.run_dir == out / "runs" / run and spec.config.data.root == "/x" and spec.labels["sweep"] == "test"
    assert held == [(folder / "lock", 7.0)] and [row["run_id"] for row in importable[0]] == [run]
    worker.train_job(out, job, trainer, told)
    assert 0 < held[-1][1] <= 30  # a predecessor that is dying, no longer
    monkeypatch.setattr(worker, "is_first", lambda: False)
    worker.train_job(out, job, trainer, told)
    assert len(held) == 2  # the first of several processes holds it for all
    with pytest.raises(ValueError, match="has no job 'other'"):
        worker.train_job(out, "other", trainer, told)


def test_a_scheduled_job_settles_connects_and_records_its_failure(planned, monkeypatch):
    out, job, run = planned
    calls, failed = [], []
    monkeypatch.delitem(sys.modules, "jax")
    monkeypatch.setattr(machine, "accelerators", lambda: [{}])
    monkeypatch.setattr(worker, "mesh_devices", lambda rows, overrides: 8)
    monkeypatch.setattr(worker, "scheduled", lambda: 4)
    monkeypatch.setattr(worker, "settle", lambda accelerator, devices: calls.append((accelerator, devices)))
    monkeypatch.setattr(worker, "connect", lambda: calls.append("connect"))
    monkeypatch.setattr(worker, "_forget_programs", lambda: calls.append("forget"))
    monkeypatch.setattr(worker, "mark_failed", lambda out, rows, reasons: failed.append((rows[0]["run_id"], reasons)))

    def train(*given):
        calls.append(given[4:])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(worker, "train_job", train)
    outcome = [{"run_id": run, "status": "done", "more": 1}]
    assert worker.run_job(str(out), job, ("a=1",), TRAINER) == {run: "done"}
    wait = calls[2][1]
    assert calls == [(True, 2), "connect", (("a=1",), wait), "forget"] and EXPIRES_S < wait <= 2 * EXPIRES_S
    calls.clear()
    monkeypatch.setitem(sys.modules, "jax", types.ModuleType("jax"))  # another job before this one
    for outcome, reasons in ((OSError("no disk"), [(run, ["OSError: no disk"])]), (BlockingIOError("held"), [])):
        with pytest.raises(type(outcome)):
            worker.run_job(str(out), job, (), TRAINER)
        assert failed == reasons and calls == [((), wait), "forget"]
        failed.clear()
        calls.clear()


def test_events_of_one_job(monkeypatch, tmp_path):
    sent, forgotten = [], []
    events = types.SimpleNamespace(send=lambda **event: sent.append(event), into=lambda log: io.StringIO())
    monkeypatch.setattr(worker, "_forget_programs", lambda: forgotten.append(1))
    log = str(tmp_path / "groups" / "j" / "log.txt")
    for outcome, message in (
        ([{"run_id": "r", "status": "done"}], {"event": "done", "runs": {"r": "done"}}),
        (BlockingIOError("by 7"), {"event": "held", "reason": "by 7"}),
        (ValueError("too wide"), {"event": "failed", "reason": "ValueError: too wide"}),
    ):

        def train(*given, outcome=outcome):
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(worker, "train_job", train)
        worker._run_job(tmp_path, "j", TRAINER, (), events)
        assert sent == [{"event": "started", "job": "j"}, {"job": "j", "log": log} | message]
        sent.clear()
    assert len(forgotten) == 3


def test_progress_is_told_four_times_a_second(monkeypatch):
    sent, now = [], types.SimpleNamespace(value=100.0)
    monkeypatch.setattr(worker.time, "monotonic", lambda: now.value)
    throttle = worker._Throttle(types.SimpleNamespace(send=lambda **event: sent.append(event)), "j")
    for step, at in enumerate([100.0, 100.125, 100.25, 100.375, 100.75]):
        now.value = at
        throttle({"step": step})
    assert sent == [{"event": "progress", "job": "j", "step": step} for step in (0, 2, 4)]


def test_a_worker_settles_on_a_core_with_one_thread(monkeypatch):
    plain = {**worker.ONE_THREAD, "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert worker.environment(False) == worker.environment(False, 1) == plain and worker.environment(True, 2) == {}
    monkeypatch.setenv("XLA_FLAGS", "--a=1")
    two = "--a=1 --xla_cpu_multi_thread_eigen=false --xla_force_host_platform_device_count=2"
    assert worker.environment(False, 2) == plain | {"XLA_FLAGS": two}
    monkeypatch.delitem(sys.modules, "jax")
    monkeypatch.setattr(os, "environ", {})
    calls = []
    monkeypatch.setattr(worker, "keep_freed_memory", lambda: calls.append("kept"))
    monkeypatch.setattr(os, "sched_setaffinity", lambda *given: calls.append(given), raising=False)
    worker.settle(False)
    assert calls == ["kept"] and os.environ == plain
    worker.settle(False, 3, 2)
    assert calls[2:] == [(0, {3})] and os.environ["XLA_FLAGS"].endswith("device_count=2")
    monkeypatch.delattr(os, "sched_setaffinity")
    worker.settle(True, 3)
    monkeypatch.setitem(sys.modules, "jax", types.ModuleType("jax"))
    with pytest.raises(RuntimeError, match="jax was imported before"):
        worker.settle(False)


def test_devices_of_a_mesh():
    rows = [{"config": {"training": training}} for training in ({"mesh": "data=4,expert=2"}, {"mesh": "data=3"}, {})]
    assert worker.mesh_devices(rows, ()) == 8 and worker.mesh_devices([], ()) == worker.mesh_devices(rows[2:], ()) == 1
    assert worker.mesh_devices(rows, ("data.root=9", "training.mesh=data=5")) == 5


def test_job_ids_come_one_a_line_until_the_input_ends(monkeypatch):
    jobs, codes = queue.Queue(), []
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n\n b \n"))
    monkeypatch.setattr(os, "_exit", codes.append)
    worker._listen(jobs)
    assert [jobs.get_nowait(), jobs.get_nowait()] == ["a", "b"] and jobs.empty() and codes == [0]


def test_programs_of_a_finished_job_are_freed(monkeypatch):
    cleared = []
    monkeypatch.setitem(sys.modules, "jax", types.SimpleNamespace(clear_caches=lambda: cleared.append(1)))
    worker._forget_programs()
    monkeypatch.delitem(sys.modules, "jax")
    worker._forget_programs()
    assert cleared == [1]


def test_trainers_by_module_and_by_file(tmp_path):
    assert worker.resolve("json:loads") is json.loads
    (tmp_path / "own.py").write_text("def train(): return 7\n")
    assert worker.resolve(f"{tmp_path / 'own.py'}:train")() == 7
