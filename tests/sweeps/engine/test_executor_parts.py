"""What each executor asks of its scheduler and makes of the answer, with the scheduler replaced."""

import contextlib
import json
import signal
import subprocess
import sys
import types

import pytest
from click.testing import CliRunner

from recscale.sweeps.engine import executors, job_command, manifests, ray_tasks, slurm, slurm_jobs, submission, worker
from recscale.sweeps.engine.executors import Executor, Launch, Outcome
from recscale.sweeps.engine.job import Job
from recscale.sweeps.engine.plan import write_plan
from recscale.sweeps.engine.resources import Resources, resources
from recscale.sweeps.engine.submission import carry_out, submissions

GIB = 2**30


def job(name, seconds=10.0, memory=1e9, mesh=""):
    predicted = {"job_seconds": seconds, "peak_memory_bytes": memory}
    return Job(name, [{"run_id": name, "predicted": predicted, "config": {"training": {"mesh": mesh}}}])


@pytest.mark.parametrize(
    ("mesh", "options", "asked"),
    [
        ("data=2", {}, (2, 0, 1)),
        ("data=2", {"mesh": "data=4"}, (4, 0, 1)),
        ("", {"gpus_per_run": 1}, (1, 1, 1)),
        ("data=2", {"gpus_per_run": 4}, (4, 4, 1)),
        ("data=16", {"gpus_per_run": 1, "gpus_per_node": 8}, (16, 16, 2)),
        ("data=5", {"gpus_per_run": 1, "gpus_per_node": 4}, (5, 5, 2)),
    ],
)
def test_a_mesh_takes_cores_or_devices(mesh, options, asked):
    cores, devices, nodes = asked
    assert resources(job("a", mesh=mesh), **options) == Resources(600.0, 2 * GIB, cores, devices, nodes)


def test_time_and_memory_are_rounded_up_to_powers_of_two():
    assert [resources(job("a", seconds)).seconds for seconds in (150, 151, 300, 301)] == [600, 1200, 1200, 2400]
    found = [resources(job("a", memory=memory * GIB / 3)).memory_bytes for memory in (4, 4.1, 8, 8.1)]
    assert found == [2 * GIB, 4 * GIB, 4 * GIB, 8 * GIB]


class Scheduler(Executor):
    """Notes what it is given; `over` ends its wait."""

    hands_over = True

    def __init__(self, launch):
        super().__init__(launch)
        self.given, self.waited = [], []
        made.append(self)

    def submit(self, jobs, resources):
        self.given.append((jobs, resources))
        return [f"h-{each.id}" for each in jobs[: self.launch.workers]]

    def wait(self, handles, told=None):
        self.waited.append(dict(handles))
        told("all queued")
        return True


made: list[Scheduler] = []


def test_jobs_are_handed_over_once_and_waited_for_if_asked(one_run_plan, tmp_path, monkeypatch):
    [row], _ = write_plan(tmp_path, one_run_plan)
    made.clear()
    checked, name, told = [], row["job"], []
    monkeypatch.setattr(submission, "executor_class", lambda name: Scheduler)
    monkeypatch.setattr(submission, "check_disk", lambda out, jobs: checked.append([each.id for each in jobs]))
    launch = Launch(tmp_path, ("data.root=/x", "training.mesh=data=4"), ("q=1",))
    outcome = carry_out(launch, "mine")
    [([given], asked)] = made[0].given
    assert given.id == name and asked.cores == 4 and checked == [[name]] and made[0].waited == []
    assert outcome.submitted == {name: f"h-{name}"} and not outcome.interrupted and 0 <= outcome.wall_s < 60
    line = submissions(tmp_path)[name]
    assert line.pop("submitted") and line == {
        "job": name, "handle": f"h-{name}", "executor": "mine", "options": ["q=1"],
    }  # fmt: skip
    # still queued: not again, and waited for with those that are new
    made.clear()
    outcome = carry_out(launch, "mine", wait=True, told=told.append)
    last = made[0]
    assert not last.given and last.waited == [{name: f"h-{name}"}] and told == ["all queued"]
    assert outcome.interrupted and outcome.submitted is None
    # one that stays is waited for in any case; the pool of this machine checks the disk itself
    (tmp_path / submission.SUBMITTED).unlink()
    monkeypatch.setattr(Scheduler, "hands_over", False)
    checked.clear()
    made.clear()
    outcome = carry_out(launch, "local", [row], told=told.append)
    assert checked == [] and made[0].waited == [{name: f"h-{name}"}] and outcome.submitted is None
    assert submissions(tmp_path) == {}
    assert carry_out(launch, "local", [], told=told.append).statuses == {}
    with pytest.raises(ValueError, match="zip"):  # an executor that loses a handle
        carry_out(Launch(tmp_path, workers=0), "mine")


def test_states_are_asked_of_the_executor_that_has_the_job(tmp_path, monkeypatch):
    lines = [("a", "1", "x", []), ("b", "2", "x", ["q=1"]), ("c", "3", "y", []), ("a", "4", "x", [])]
    (tmp_path / submission.SUBMITTED).write_text(
        "".join(json.dumps(dict(zip(("job", "handle", "executor", "options"), line, strict=True))) + "\n"
                for line in lines)
    )  # fmt: skip
    asked, cancelled = [], []

    class Named:
        def __init__(self, name, launch):
            self.name, self.options = name, launch.options

        def states(self, handles):
            asked.append((self.name, self.options, handles))
            return {each: {"a": "running", "b": "done", "c": "queued"}[each] for each in handles}

        def cancel(self, handle):
            cancelled.append((self.name, self.options, handle))

    monkeypatch.setattr(submission, "executor_class", lambda name: lambda launch: Named(name, launch))
    assert submission.job_states(tmp_path) == {"a": "running", "b": "done", "c": "queued"}
    assert asked == [("x", (), {"a": "4"}), ("x", ("q=1",), {"b": "2"}), ("y", (), {"c": "3"})]
    assert submission.job_states(tmp_path, ["b", "never"]) == {"b": "done"}
    assert submission.active_jobs(tmp_path, ["a", "b"]) == {"a": "4"}
    assert submission.cancel_jobs(tmp_path) == {"a": "4", "c": "3"} and cancelled == [("x", (), "4"), ("y", (), "3")]


def test_waiting_ends_when_nothing_is_queued_or_running(tmp_path, monkeypatch):
    one, slept, told = Executor(Launch(tmp_path)), [], []
    looks = iter([{"a": "queued", "b": "queued"}] * 2 + [{"a": "done", "b": "requeued"}, {"a": "done", "b": "lost"}])
    monkeypatch.setattr(one, "states", lambda handles: next(looks))
    monkeypatch.setattr(executors.time, "sleep", slept.append)
    assert one.wait({"a": "1", "b": "2"}, told.append) is False
    assert told == ["2 queued", "1 done, 1 requeued", "1 done, 1 lost"]
    assert len(slept) == 3 and 1 <= slept[0] <= 5 and not one.hands_over

    def interrupt(handles):
        raise KeyboardInterrupt

    monkeypatch.setattr(one, "states", interrupt)
    assert one.wait({}) is True


def test_an_outcome_counts_runs_by_status(tmp_path, monkeypatch):
    found = {"a": "done", "b": "failed", "c": "running", "d": "planned", "e": "planned", "f": "diverged"}
    monkeypatch.setattr(executors, "run_statuses", lambda out, plan: found)
    outcome = Outcome.of(tmp_path, [], 2.5)
    counts = {"diverged": 1, "done": 1, "failed": 1, "planned": 2, "running": 1}
    assert outcome == Outcome(counts, False, 2.5, ("b",)) and outcome.unfinished == 4
    assert Outcome.of(tmp_path, [], 0.0, interrupted=True, submitted={}).interrupted
    assert Launch(tmp_path, options=("a=1", "b=x=2", "c=[1]")).values() == {"a": 1, "b": "x=2", "c": [1]}


def test_slurm_parameters_are_per_node_and_per_allocation(tmp_path, monkeypatch):
    queue = slurm.Slurm(Launch(tmp_path))
    asked = queue._parameters(Resources(610.0, 3 * GIB + 1, 9, 5, 2), 3)
    assert asked == {
        "name": f"recscale-{tmp_path.name}", "timeout_min": 31, "mem_gb": 4, "cpus_per_task": 5, "nodes": 2,
        "tasks_per_node": 1, "slurm_array_parallelism": 64, "gpus_per_node": 3,
    }  # fmt: skip
    own = slurm.Slurm(Launch(tmp_path, options=("throttle=2", "pack_minutes=30", "nodes=7", "qos=night")))
    asked = own._parameters(Resources(60.0, GIB), 1)
    assert "gpus_per_node" not in asked and asked["timeout_min"] == asked["mem_gb"] == asked["cpus_per_task"] == 1
    assert (asked["slurm_array_parallelism"], asked["nodes"], asked["qos"]) == (2, 7, "night")
    jobs = [job(str(n)) for n in range(7)]
    for made, needed, sizes in (
        (own, Resources(600.0, 1), [3, 3, 1]),  # three of ten minutes in half an hour
        (own, Resources(450.0, 1), [4, 3]),  # as few as keep two allocations busy
        (own, Resources(600.0, 1, nodes=2), [1] * 7),
        (queue, Resources(600.0, 1), [1] * 7),
    ):
        packs = made._packs(jobs, needed)
        assert [len(pack) for pack in packs] == sizes and [each for pack in packs for each in pack] == jobs
    assert [len(pack) for pack in queue._packs(jobs * 100, Resources(600.0, 1))] == [6] * 116 + [4]  # an hour each


def test_slurm_gets_an_array_of_jobs_in_turn(tmp_path, monkeypatch):
    from submitit.auto import auto

    queues = []

    class Queue:
        def __init__(self, **options):
            self.options, self.sent = options, []
            queues.append(self)

        def update_parameters(self, **asked):
            self.asked = asked

        def batch(self):
            return contextlib.nullcontext()

        def submit(self, work):
            self.sent.append(work)
            return types.SimpleNamespace(job_id=f"9_{len(self.sent) - 1}")

    monkeypatch.setattr(auto, "AutoExecutor", Queue)
    one = slurm.Slurm(Launch(tmp_path, ("data.root=/x",), ("throttle=2",), trainer="t:t"))
    assert one.hands_over
    assert one.submit([job(name) for name in "abc"], Resources(600.0, GIB)) == ["9_0", "9_0", "9_1"]
    [queue] = queues
    assert queue.options == {"folder": tmp_path / "slurm", "cluster": "slurm", "slurm_max_num_timeout": 1000}
    assert queue.asked["timeout_min"] == 20  # two jobs in turn
    assert [vars(work) for work in queue.sent] == [
        {"out": str(tmp_path), "jobs": list(jobs), "overrides": ("data.root=/x",), "trainer": "t:t"}
        for jobs in ("ab", "c")
    ]


def test_states_of_slurm_are_the_queues_before_the_records(tmp_path, monkeypatch):
    one, ran = slurm.Slurm(Launch(tmp_path)), []
    recorded = {"a": "running", "b": "queued", "c": "done", "d": "running", "e": "failed"}
    monkeypatch.setattr(slurm, "job_statuses", lambda out, jobs: {each: recorded[each] for each in jobs})
    said = types.SimpleNamespace(returncode=0, stdout="1 PENDING 2\n2 PENDING 0\n4 RUNNING 0\n\nodd line\n", stderr="")

    def run(command, **options):
        ran.append((command, options))
        return said

    monkeypatch.setattr(slurm.subprocess, "run", run)
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    handles = dict(zip("abcde", "12345", strict=True))
    assert one.states(handles) == recorded and not ran  # no Slurm on this machine
    monkeypatch.setattr(slurm.shutil, "which", lambda name: f"/bin/{name}")
    found = one.states(handles | {"d": "9"})
    assert found == {"a": "requeued", "b": "queued", "c": "done", "d": "lost", "e": "failed"}
    assert one.states({"d": "4"}) == {"d": "running"}
    command, options = ran[0]
    assert command[0] == "squeue" and command[-2:] == ["--Format", "JobArrayID:60,State:30,RestartCnt:12"]
    assert options == {"capture_output": True, "text": True, "check": False}
    said.returncode, said.stderr = 1, "no controller\n"
    with pytest.raises(OSError, match="squeue says: no controller;"):
        one.states(handles)
    one.cancel("7")
    assert ran[-1] == (["scancel", "7"], {"check": True})


def test_jobs_in_turn_go_on_past_a_failure(tmp_path, monkeypatch, capsys):
    def run_job(out, name, overrides, trainer):
        assert (out, overrides, trainer) == ("/out", ("o=1",), "t:t")
        if name == "b":
            raise OSError("no disk")
        return {f"run-{name}": "done"}

    monkeypatch.setattr(slurm_jobs, "run_job", run_job)
    work = slurm_jobs.JobsInTurn("/out", "ac", ["o=1"], "t:t")
    assert work() == {"run-a": "done", "run-c": "done"} and capsys.readouterr().err == ""
    work.jobs = list("abc")
    with pytest.raises(RuntimeError, match="^b: OSError: no disk$"):
        work()
    assert "Traceback" in capsys.readouterr().err
    assert work.checkpoint().function is work


TEMPLATE = (
    "{{ name }} {{ seconds }} {{ memory_mib }} {{ memory_gib }} {{ cores }} {{ devices }} {{ nodes }} {{ kind }}\n"
)


def test_a_manifest_of_ones_own_template(tmp_path):
    (tmp_path / "own.j2").write_text(TEMPLATE + "{{ command | json }}\n{{ shell }}\n")
    out, options = tmp_path / "my out", [f"template={tmp_path / 'own.j2'}", "kind=x"]
    options += [f"submit=cp {{file}} {tmp_path}/sent", f"cancel=mv {{file}} {tmp_path}/gone"]
    one = manifests.Manifests(Launch(out, ("a=b c",), tuple(options)))
    needed = Resources(90.5, 3 * GIB + 1, 4, 2, 3)
    [handle] = one.submit([job("j")], needed)
    command = ["recscale", "run-job", str(out), "j", "--set", "a=b c"]
    text = f"recscale-j 91 3073 4 4 2 3 x\n{json.dumps(command)}\nrecscale run-job '{out}' j --set 'a=b c'\n"
    assert handle == str(out / "manifests" / "j.yaml") and (tmp_path / "sent").read_text() == text
    one.cancel(handle)
    assert (tmp_path / "gone").read_text() == text and one.hands_over
    with pytest.raises(subprocess.CalledProcessError):
        one.cancel(handle)  # it is gone
    with pytest.raises(ValueError, match="without --executor-option 'cancel="):
        manifests.Manifests(Launch(out, (), ("submit=true",))).cancel(handle)
    with pytest.raises(ValueError, match="there is no template 'nomad'"):
        manifests.Manifests(Launch(out, (), ("submit=true", "template=nomad")))
    lacking = manifests.Manifests(Launch(out, (), tuple(each for each in options if each != "kind=x")))
    with pytest.raises(ValueError, match="needs another option: 'kind' is undefined"):
        lacking.submit([job("j")], needed)


@pytest.fixture
def ray(monkeypatch):
    """A cluster that runs nothing."""

    def remote(**options):
        module.asked.append(options)
        return lambda function: types.SimpleNamespace(remote=lambda command: (function, tuple(command)))

    def wait(tasks, num_returns, timeout):
        assert (num_returns, timeout) == (len(tasks), 0)
        return [task for task in tasks if task in module.over], []

    module = types.SimpleNamespace(asked=[], over=[], calls=[], remote=remote, wait=wait, there=False)
    module.is_initialized = lambda: module.there
    module.init = lambda **options: module.calls.append(options)
    module.cancel = lambda task: module.calls.append(("cancel", task))
    module.shutdown = lambda: module.calls.append("shutdown")
    monkeypatch.setitem(sys.modules, "ray", module)
    return module


def test_ray_gets_a_task_a_job_and_says_what_was_lost(ray, tmp_path, monkeypatch):
    one = ray_tasks.Ray(Launch(tmp_path, ("a=1",), ("num_cpus=2", "log_to_driver=True")))
    assert ray.calls == [{"log_to_driver": True, "include_dashboard": False, "num_cpus": 2}]
    monkeypatch.setattr(ray_tasks, "job_statuses", lambda out, jobs: {each: recorded[each] for each in jobs})
    recorded = dict(a="running", b="done", c="failed", d="queued")
    handles = {each: each for each in recorded}
    assert one.states(handles) == recorded
    assert one.submit([job(name) for name in recorded], Resources(1.0, 5, 3, 2)) == list(recorded)
    assert ray.asked == [{
        "num_cpus": 3, "num_gpus": 2, "memory": 5, "max_retries": 3, "retry_exceptions": [ray_tasks.StoppedEarly],
    }]  # fmt: skip
    tasks = one._tasks
    function, command = tasks["a"]
    assert function is ray_tasks._train and command[2:] == ("run-job", str(tmp_path), "a", "--set", "a=1")
    ray.over = [tasks[each] for each in "abc"]
    assert one.states(handles) == recorded | {"a": "lost"}
    ray.calls.clear()
    one.cancel("d")
    assert ray.calls == [("cancel", tasks["d"])]
    for interrupted, cancelled in ((False, []), (True, [("cancel", task) for task in tasks.values()])):
        ray.calls.clear()
        monkeypatch.setattr(Executor, "wait", lambda self, handles, told, answer=interrupted: answer)
        assert one.wait(handles) is interrupted and ray.calls == [*cancelled, "shutdown"]
    ray.calls.clear()
    ray.there = True
    ray_tasks.Ray(Launch(tmp_path))
    assert ray.calls == [] and one.launch.out == tmp_path
    ray.there = False
    ray_tasks.Ray(Launch(tmp_path))
    assert ray.calls == [{"log_to_driver": False, "include_dashboard": False}]


@pytest.mark.parametrize(("code", "again"), [(0, False), (1, False), (2, False), (75, True), (-9, True)])
def test_a_task_is_tried_again_when_its_job_was_stopped(monkeypatch, code, again):
    ran = []

    def run(command, check):
        ran.append((command, check))
        return types.SimpleNamespace(returncode=code)

    monkeypatch.setattr(ray_tasks.subprocess, "run", run)
    monkeypatch.setattr(ray_tasks.os, "getpid", lambda: 7)
    if again:
        with pytest.raises(ray_tasks.StoppedEarly, match=f"code {code}"):
            ray_tasks._train(["-c", "x"])
    else:
        assert ray_tasks._train(["-c", "x"]) == code
    assert ran == [([sys.executable, "-c", "x", "--parent", "7"], False)]


def test_run_job_answers_a_scheduler(tmp_path, monkeypatch):
    asked, parents, before = [], [], signal.getsignal(signal.SIGTERM)

    def run_job(*given):
        asked.append(given)
        if isinstance(answer, Exception):
            raise answer
        return answer or signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(worker, "run_job", run_job)
    monkeypatch.setattr(worker, "die_with", parents.append)
    try:
        answer = {"r1": "done", "r2": "diverged"}
        command = job_command.run_job_command(tmp_path, "j", ["a=1", "b=2"], "t:t")
        done = CliRunner().invoke(job_command.run_job, command[3:])
        assert (done.exit_code, done.stdout) == (0, "r1 done\nr2 diverged\n") and parents == []
        assert asked.pop() == (str(tmp_path), "j", ("a=1", "b=2"), "t:t")
        command = job_command.run_job_command(tmp_path, "j", [])
        assert "--trainer" not in command
        answer = BlockingIOError("held by another process")
        done = CliRunner().invoke(job_command.run_job, [*command[3:], "--parent", "5"])
        assert (done.exit_code, done.stdout, done.stderr) == (75, "", "held by another process\n") and parents == [5]
        assert asked.pop() == (str(tmp_path), "j", (), worker.TRAINER)
        answer = None  # SIGTERM while it trains
        assert CliRunner().invoke(job_command.run_job, command[3:]).exit_code == 75
    finally:
        signal.signal(signal.SIGTERM, before)
