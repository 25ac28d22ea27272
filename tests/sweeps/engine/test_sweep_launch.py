"""The worker pool: idempotent, alone on its folder, and unimpressed by crashes, kills and orphans."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from recscale.scaling.records.planned import write_rows
from recscale.scaling.records.runs import read_metrics, read_record, write_record
from recscale.scaling.training import get_config, group_id, run_id, shape_id
from recscale.sweeps.engine import launch as launching
from recscale.sweeps.engine import machine, worker
from recscale.sweeps.engine.display import Display
from recscale.sweeps.engine.launch import launch
from recscale.sweeps.engine.locks import Busy, has_launcher, hold, only_launcher
from recscale.sweeps.engine.tables import run_states

TRAINER = f"{Path(__file__).with_name('fake_trainer.py')}:train_group"
STEPS = 10


def starts(out):
    path = out / "starts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def planned(tmp_path):
    """Writes a plan of `jobs` jobs with `seeds` runs each; returns the jobs' ids and the rows."""

    def write(jobs=3, seeds=2, memory=1e6):
        rows = []
        for job in range(jobs):
            for seed in range(seeds):
                config = get_config()
                config.seed, config.model.layers = seed, job + 1
                rows.append(
                    {
                        "run_id": run_id(config),
                        "group_id": group_id(config),
                        "job": group_id(config),
                        "shape_id": shape_id(config),
                        "trunk_id": f"t{job}-{seed}",
                        "sweep": "fake",
                        "stage": 0,
                        "part": "p",
                        "config": config.to_dict(),
                        "counts": {"dense_params": 100 * (job + 1), "embedding_params": 0},
                        "targets": {"dense_params": None, "train_flops": 1e9},
                        "target_error": None,
                        "predicted": {
                            "examples": 10 * STEPS,
                            "train_flops": 1e9,
                            "peak_memory_bytes": memory,
                            "job_seconds": float(job),
                            "seconds": 1.0,
                        },
                    }
                )
        write_rows(tmp_path, rows)
        return list(dict.fromkeys(row["job"] for row in rows)), rows

    return write


class Recorder(Display):
    def __init__(self):
        self.events = []

    def started(self, job):
        self.events.append(("started", job.id))

    def progress(self, job, event):
        self.events.append(("progress", job.id))

    def done(self, job, statuses):
        self.events.append(("done", job.id))

    def retried(self, job, reason):
        self.events.append(("retried", job.id))

    def failed(self, job, reason, log):
        self.events.append(("failed", job.id))


def test_every_run_is_trained_once_on_pinned_single_threads(planned, tmp_path, monkeypatch):
    jobs, rows = planned()
    own = machine.cores()[:2]  # of more, two workers would leave some free and not be pinned
    monkeypatch.setattr(machine, "cores", lambda: own)
    recorder = Recorder()
    outcome = launch(tmp_path, trainer=TRAINER, workers=2, display=recorder)
    assert outcome.statuses == {"done": 6} and not outcome.interrupted and outcome.failed == ()
    assert sorted(start["job"] for start in starts(tmp_path)) == sorted(jobs)
    assert len({start["pid"] for start in starts(tmp_path)}) <= 2
    for start in starts(tmp_path):
        assert "--xla_cpu_multi_thread_eigen=false" in start["xla"]
        assert len(start["cores"]) == 1 or sys.platform != "linux"
    # the longest predicted job starts first; labels reach the records; noise goes to the job's log
    assert starts(tmp_path)[0]["job"] in jobs[1:]
    record = read_record(tmp_path / "runs" / rows[0]["run_id"])
    assert record["labels"]["flops_target"] == 1e9 and record["sweep"] == "fake"
    assert "noise on standard output" in (tmp_path / "groups" / jobs[0] / "log.txt").read_text()
    assert [event for event in recorder.events if event[0] == "done"] and ("failed", jobs[0]) not in recorder.events

    again = launch(tmp_path, trainer=TRAINER)
    assert again.statuses == {"done": 6} and len(starts(tmp_path)) == 3


def test_crashes_errors_and_divergence_stay_with_their_own_job(planned, tmp_path):
    jobs, rows = planned(jobs=4, seeds=1)
    fine, crashing, erring, diverging = jobs
    orders = {fine: {"crashes": 1}, crashing: {"crashes": 9}, erring: {"errors": 9}, diverging: {"diverge": True}}
    (tmp_path / "fake.json").write_text(json.dumps(orders))
    runs = {row["job"]: row["run_id"] for row in rows}
    outcome = launch(tmp_path, trainer=TRAINER, workers=1)
    assert outcome.statuses == {"done": 1, "diverged": 1, "failed": 2}
    assert sorted(outcome.failed) == sorted([runs[crashing], runs[erring]])
    tried = [start["job"] for start in starts(tmp_path)]
    assert [tried.count(job) for job in jobs] == [2, 2, 1, 1]  # an error would come again

    # one crash is retried, resumes where it was, and leaves its mark
    steps = [line["step"] for line in read_metrics(tmp_path / "runs" / runs[fine])]
    assert steps == list(range(1, STEPS + 1))
    attempt = json.loads((tmp_path / "groups" / fine / "attempts.jsonl").read_text())
    assert attempt["attempt"] == 1 and "killed by SIGKILL" in attempt["reason"]

    # the last failure is the record's reason, with the log beside it
    for job, reason in [(crashing, "killed by SIGKILL"), (erring, "ValueError: told to fail")]:
        record = read_record(tmp_path / "runs" / runs[job])
        assert record["status"] == "failed" and reason in record["reasons"][0]
        assert "noise" in Path(record["reasons"][1].removeprefix("log: ")).read_text()
    assert "Traceback" in (tmp_path / "groups" / erring / "log.txt").read_text()

    # mended, the next launch takes up the failed jobs and leaves the diverged run, which is a result, alone
    (tmp_path / "fake.json").unlink()
    assert launch(tmp_path, trainer=TRAINER, workers=1).statuses == {"done": 3, "diverged": 1}
    assert sorted(start["job"] for start in starts(tmp_path)[len(tried) :]) == sorted([crashing, erring])


def test_a_hung_worker_is_noticed_and_its_job_tried_again(planned, tmp_path, monkeypatch):
    (job,), _ = planned(jobs=1, seeds=1)
    (tmp_path / "fake.json").write_text(json.dumps({job: {"hangs": 1}}))
    monkeypatch.setattr(launching, "_SILENT_S", 4.0)
    assert launch(tmp_path, trainer=TRAINER, workers=1).statuses == {"done": 1}
    attempt = json.loads((tmp_path / "groups" / job / "attempts.jsonl").read_text())
    assert "hung and was killed (it said nothing for" in attempt["reason"]


def test_jobs_on_a_mesh_get_the_devices_it_takes(monkeypatch):
    assert (
        worker.mesh_devices([{"config": {"training": {"mesh": "data=4,expert=2"}}}, {"config": {"training": {}}}], ())
        == 8
    )
    assert worker.mesh_devices([{"config": {"training": {"mesh": "data=4"}}}], ("training.mesh=2x2",)) == 4
    assert worker.mesh_devices([{"config": {"training": {"mesh": ""}}}], ()) == 1
    assert "device_count=8" in worker.environment(False, 8)["XLA_FLAGS"] and worker.environment(True, 8) == {}
    monkeypatch.setattr(machine, "accelerators", lambda: [{"CUDA_VISIBLE_DEVICES": str(i)} for i in range(4)])
    found = [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in launching._slots(None, 2)]
    assert found == ["0,1", "2,3"]
    with pytest.raises(ValueError, match="training.mesh takes 8 devices, this machine has 4 accelerators"):
        launching._slots(None, 8)
    monkeypatch.setattr(machine, "accelerators", list)
    monkeypatch.setattr(machine, "cores", lambda: [0, 1, 2, 3])
    assert [(slot.core, slot.devices) for slot in launching._slots(None, 2)] == [(None, 2)] * 2
    assert [slot.core for slot in launching._slots(None)] == [0, 1, 2, 3]
    assert [slot.core for slot in launching._slots(6)] == [0, 1, 2, 3, 0, 1]
    assert [slot.core for slot in launching._slots(3)] == [None] * 3  # or two sweeps would share cores beside idle ones


def test_a_trainer_that_is_not_there_is_named(planned, tmp_path):
    planned(jobs=1)
    outcome = launch(tmp_path, trainer="recscale.nowhere:train_group", workers=1)
    assert outcome.statuses == {"failed": 2}
    record = read_record(tmp_path / "runs" / outcome.failed[0])
    assert "No module named 'recscale.nowhere'" in record["reasons"][0]


def test_memory_bounds_what_runs_at_once(planned, tmp_path):
    planned(jobs=3, seeds=1, memory=1000)
    (tmp_path / "fake.json").write_text(json.dumps({"*": {"step_s": 0.02}}))
    recorder = Recorder()
    outcome = launch(tmp_path, trainer=TRAINER, workers=2, memory_gb=1999e-9, display=recorder)
    assert outcome.statuses == {"done": 3}
    assert len({start["pid"] for start in starts(tmp_path)}) == 1  # never two at once, so never a second worker
    order = [event for event in recorder.events if event[0] in ("started", "done")]
    assert [kind for kind, _ in order] == ["started", "done"] * 3


def test_a_job_too_large_for_the_machine_is_refused_by_name(planned, tmp_path):
    planned(jobs=1, memory=10**12)
    outcome = launch(tmp_path, trainer=TRAINER, workers=1, memory_gb=1.0)
    assert outcome.statuses == {"failed": 2} and starts(tmp_path) == []
    reasons = read_record(tmp_path / "runs" / outcome.failed[0])["reasons"]
    assert "predicted peak memory 1000.0 GB (estimated) exceeds the 1.0 GB" in reasons[0]
    assert launch(tmp_path, trainer=TRAINER, workers=1, memory_gb=1000.0).statuses == {"done": 2}  # it just fits


def test_two_launchers_do_not_share_a_folder(planned, tmp_path):
    planned(jobs=1)
    assert not has_launcher(tmp_path)
    with only_launcher(tmp_path):
        assert has_launcher(tmp_path)
        with pytest.raises(Busy, match=rf"another launcher \(process {os.getpid()} on .*\) is working on"):
            launch(tmp_path, trainer=TRAINER)
    assert not has_launcher(tmp_path) and starts(tmp_path) == []


def test_a_job_that_another_process_trains_is_left_to_it(planned, tmp_path, monkeypatch):
    """A second Slurm submission finds the lock held: it ends with an error, and the runs go on being what they are."""
    (job,), rows = planned(jobs=1, seeds=1)
    folder = tmp_path / "runs" / rows[0]["run_id"]
    write_record(folder, {"status": "running", "reasons": []})
    monkeypatch.setattr(worker, "_REMOTE_WAIT_S", 0.0)
    with hold(tmp_path / "groups" / job / "lock"), pytest.raises(BlockingIOError, match="held by another"):
        worker.run_job(str(tmp_path), job, (), TRAINER)
    assert read_record(folder)["status"] == "running"
    assert worker.run_job(str(tmp_path), job, (), TRAINER) == {rows[0]["run_id"]: "done"}


@pytest.mark.slow
def test_a_launcher_leaves_a_held_job_alone(planned, tmp_path):
    (job,), rows = planned(jobs=1, seeds=1)
    folder = tmp_path / "runs" / rows[0]["run_id"]
    write_record(folder, {"status": "running", "reasons": []})
    with hold(tmp_path / "groups" / job / "lock"):
        assert launch(tmp_path, trainer=TRAINER, workers=1).statuses == {"running": 1}
    assert launch(tmp_path, trainer=TRAINER, workers=1).statuses == {"done": 1}


def test_a_setting_that_does_not_fit_stops_the_launch_at_once(planned, tmp_path):
    planned(jobs=1, seeds=1)
    with pytest.raises(ValueError, match="'training.lr' changes the runs"):
        launch(tmp_path, trainer=TRAINER, overrides=["training.lr=1.0"])
    assert starts(tmp_path) == [] and not (tmp_path / "runs").exists()


LAUNCHER = """
import sys
from recscale.sweeps.engine.launch import launch
outcome = launch(sys.argv[1], trainer=sys.argv[2], workers=2)
print(outcome.statuses, outcome.interrupted)
"""


def _launcher(out):
    command = [sys.executable, "-c", LAUNCHER, str(out), TRAINER]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def _wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.02)


def _alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_no_worker_outlives_its_launcher_and_the_next_launch_finishes(planned, tmp_path, number):
    _, rows = planned(jobs=1, seeds=2)
    (tmp_path / "fake.json").write_text(json.dumps({"*": {"step_s": 0.3}}))
    process = _launcher(tmp_path)
    _wait_for(lambda: list(tmp_path.glob("groups/*/step.txt")))
    pids = [start["pid"] for start in starts(tmp_path)]
    assert all(_alive(pid) for pid in pids)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=30)
    _wait_for(lambda: not any(_alive(pid) for pid in pids), seconds=5)
    if number != signal.SIGKILL:
        assert printed.strip() == "{'running': 2} True" and process.returncode == 0
    assert {state["state"] for state in run_states(tmp_path)} == {"stopped"}

    (tmp_path / "fake.json").unlink()
    assert launch(tmp_path, trainer=TRAINER, workers=1).statuses == {"done": 2}
    for row in rows:
        steps = [line["step"] for line in read_metrics(tmp_path / "runs" / row["run_id"])]
        assert steps == list(range(1, STEPS + 1))
    assert {state["state"] for state in run_states(tmp_path)} == {"done"}


@pytest.mark.skipif(sys.platform != "linux", reason="a request to Linux")
def test_a_worker_asks_the_kernel_to_die_with_its_launcher():
    call, found = ctypes.CDLL(None).prctl, ctypes.c_int(-1)
    ask, read, before = 1, 2, signal.getsignal(signal.SIGINT)  # PR_SET_PDEATHSIG, PR_GET_PDEATHSIG
    try:
        worker.die_with(os.getppid())
        call(read, ctypes.byref(found))
        assert found.value == signal.SIGKILL and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        with pytest.raises(SystemExit, match="the launcher died before"):
            worker.die_with(os.getpid())
    finally:
        call(ask, 0)
        signal.signal(signal.SIGINT, before)


def test_states_before_and_while_training(planned, tmp_path):
    planned(jobs=1, seeds=1)
    assert [(s["state"], s["trained"], s["logloss"]) for s in run_states(tmp_path)] == [("planned", 0.0, None)]
    (tmp_path / "fake.json").write_text(json.dumps({"*": {"step_s": 0.2}}))
    thread = threading.Thread(target=launch, args=(tmp_path,), kwargs={"trainer": TRAINER, "workers": 1})
    thread.start()
    _wait_for(lambda: any(0 < state["trained"] < 1 for state in run_states(tmp_path)))
    state = run_states(tmp_path)[0]
    assert state["state"] == "running" and state["logloss"] is not None
    thread.join()
    assert [(s["state"], s["trained"]) for s in run_states(tmp_path)] == [("done", 1.0)]


def test_the_machine_is_known(monkeypatch):
    assert machine.cores() and machine.free_memory_bytes() > 2**20 and machine.core_flops() > 1e8
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert machine.accelerators() == []
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: name == "jax_cuda12_plugin" or None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    assert machine.accelerators() == [{"CUDA_VISIBLE_DEVICES": "2"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert machine.accelerators() == []
