"""Handing jobs over: what schedulers are asked for, what they say, and that nothing is queued twice."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

from recscale.scaling.records.runs import read_record, write_record
from recscale.sweeps.engine import submission
from recscale.sweeps.engine.executors import Executor, Launch
from recscale.sweeps.engine.job import Job
from recscale.sweeps.engine.job_command import run_job_command
from recscale.sweeps.engine.plan import read_plan
from recscale.sweeps.engine.resources import Resources, resources
from recscale.sweeps.engine.slurm import Slurm
from recscale.sweeps.engine.submission import carry_out, submissions

TRAINER = f"{os.path.dirname(__file__)}/fake_trainer.py:train_group"


def job(seconds, memory=1e9, mesh=""):
    predicted = {"job_seconds": seconds, "peak_memory_bytes": memory}
    return Job("a", [{"predicted": predicted, "config": {"training": {"mesh": mesh}}}])


def test_resources_are_predictions_with_a_margin_in_powers_of_two():
    assert resources(job(10)) == Resources(600.0, 2 * 2**30)
    assert resources(job(1000, 3 * 2**30)) == Resources(4800.0, 8 * 2**30)
    assert resources(job(10, mesh="data=4,fsdp=2")).cores == 8
    split = resources(job(10, mesh="data=16"), gpus_per_run=1, gpus_per_node=8)
    assert (split.devices, split.nodes) == (16, 2)
    assert resources(job(10), gpus_per_run=1).devices == 1 and resources(job(10), mesh="fsdp=4").cores == 4


def test_slurm_is_asked_for_what_the_plan_predicts_and_never_twice(call, sweep_file, tmp_path, slurm, last_json):
    out = tmp_path / "out"
    asked = ["--executor", "slurm", "--executor-option", "slurm_partition=cpu", "--executor-option", "throttle=7"]
    said = call("launch", sweep_file, "--out", out, *asked, "--json", code=1)
    jobs = list(dict.fromkeys(row["job"] for row in read_plan(out)))
    assert set(last_json(said)["submitted"]) == set(jobs) and len(slurm()) == 2
    [script] = slurm.scripts()
    for line in ("partition=cpu", "time=10", "mem=2GB", "cpus-per-task=1", "array=0-1%2", "signal=USR2@90"):
        assert line in script, script
    again = call("launch", out, *asked, "--json", code=1)
    assert last_json(again)["submitted"] == {} and len(slurm.scripts()) == 1

    # states are the scheduler's
    ids = {job: submissions(out)[job]["handle"] for job in jobs}
    slurm({ids[jobs[0]]: ["RUNNING", 0], ids[jobs[1]]: ["PENDING", 2]})
    assert last_json(call("status", out, "--json"))["statuses"] == {"requeued": 2, "running": 2}
    assert last_json(call("launch", out, *asked, "--json", code=1))["submitted"] == {}
    slurm({ids[jobs[1]]: ["PENDING", 0]})
    for row in read_plan(out):
        if row["job"] == jobs[0]:
            write_record(out / "runs" / row["run_id"], {"status": "done", "metrics": {}})
    assert last_json(call("status", out, "--json"))["statuses"] == {"done": 2, "queued": 2}
    slurm({})
    assert last_json(call("status", out, "--json"))["statuses"] == {"done": 2, "lost": 2}
    # lost jobs are submitted again, by themselves; a finished one is not
    assert set(last_json(call("launch", out, *asked, "--json", code=1))["submitted"]) == {jobs[1]}
    call("cancel", out)
    assert slurm() == {}
    for row in read_plan(out):
        write_record(out / "runs" / row["run_id"], {"status": "done", "metrics": {}})
    assert last_json(call("launch", out, *asked, "--json"))["statuses"] == {"done": 4}


def test_what_cannot_be_is_said_before_anything_is_planned(call, sweep_file, tmp_path, monkeypatch):
    out = tmp_path / "out"
    call("plan", sweep_file, "--out", out)
    assert "not key=value" in call("launch", out, "--executor", "slurm", "--slurm", "partition", code=1).err
    monkeypatch.setitem(sys.modules, "submitit.auto.auto", None)
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("slurm", "ray"):
        said = call("launch", out, "--executor", name, code=1)
        assert f"pip install 'recscale[{name}]'" in said.err and "Traceback" not in said.err
    said = call("launch", out, "--executor", "command", code=1)
    assert "submit='kubectl create -f {file}'" in said.err and "Traceback" not in said.err


def test_short_jobs_share_an_allocation_where_there_are_many(tmp_path):
    queue = Slurm(Launch(tmp_path, options=("throttle=10",)))
    jobs = [job(10)] * 100
    assert [len(pack) for pack in queue._packs(jobs, resources(jobs[0]))] == [6] * 16 + [4]
    assert [len(pack) for pack in queue._packs(jobs[:10], resources(jobs[0]))] == [1] * 10
    assert [len(pack) for pack in queue._packs(jobs, resources(job(2000)))] == [1] * 100


@pytest.mark.slow
def test_a_thousand_runs_go_out_as_arrays_with_limits(call, tmp_path, slurm, last_json):
    """A day of 1,000 runs, imagined: nothing is trained; each command within the seconds that a person waits."""
    path, out = tmp_path / "thousand.py", tmp_path / "out"
    path.write_text(
        """
from recscale.scaling.training import get_config as base_config
from recscale.sweeps import axis, product, seeds
def get_config():
    config = base_config("rankmixer", "known_truth")
    config.data.preset = "smoke"
    config.data.holdout_rows = 512
    return config
def get_sweep():
    widths = axis("model.hidden", [8 * (i + 1) for i in range(40)])
    return product(widths, axis("training.examples", [100_000, 300_000]), axis("training.lr", [1e-3, 3e-3, 1e-2]), seeds(4)) + product(
        widths, axis("training.embedding_lr", [.1]))
"""  # noqa: E501
    )
    took = {}

    def timed(name, *arguments, code=0):
        began = time.monotonic()
        said = call(name, *arguments, "--json", code=code)
        took[name] = time.monotonic() - began
        return last_json(said)

    assert timed("plan", path, "--out", out)["runs"] == 1000
    submitted = timed("launch", out, "--executor", "slurm", code=1)["submitted"]
    assert len(submitted) == 80 and timed("status", out)["statuses"] == {"queued": 1000}
    for row in read_plan(out)[:999]:
        record = {name: row[name] for name in ("run_id", "group_id", "config", "counts")}
        write_record(out / "runs" / row["run_id"], record | {"status": "done", "metrics": {"logloss": 0.5}})
    assert timed("collect", out)["statuses"] == {"done": 999, "planned": 1}
    print({name: round(seconds, 2) for name, seconds in took.items()})
    scripts = slurm.scripts()
    limits = [tuple(re.search(rf"--{name}=(\w+)", script)[1] for name in ("time", "mem")) for script in scripts]
    assert len(limits) == len(set(limits)) <= 8  # an array for every power of two of time and memory
    sizes = [[int(n) for n in re.search(r"--array=0-(\d+)%(\d+)", script).groups()] for script in scripts]
    assert sum(last + 1 for last, _ in sizes) == 80 and all(at_a_time == min(last + 1, 64) for last, at_a_time in sizes)
    longest = max(row["predicted"]["job_seconds"] for row in read_plan(out))
    assert 4 * longest / 60 <= max(int(time) for time, _ in limits) < 24 * 60


class Fake(Executor):
    hands_over = True
    sent: list = []

    def submit(self, jobs, resources):
        self.sent.extend(job.id for job in jobs)
        return [f"h-{job.id}" for job in jobs]


def test_a_submission_cut_short_keeps_what_was_handed_over(call, sweep_file, tmp_path, monkeypatch):
    out = tmp_path / "out"
    call("plan", sweep_file, "--out", out)
    monkeypatch.setattr(submission, "executor_class", lambda name: Fake)
    different = iter([Resources(1.0, 1), Resources(2.0, 1)])
    monkeypatch.setattr(submission, "resources", lambda *_: next(different))
    real = Fake.submit

    def second_fails(self, jobs, resources):
        if resources.seconds == 2.0:
            raise OSError("sbatch is not there")
        return real(self, jobs, resources)

    monkeypatch.setattr(Fake, "submit", second_fails)
    with pytest.raises(OSError, match="sbatch"):
        carry_out(Launch(out), "fake")
    monkeypatch.setattr(Fake, "submit", real)
    monkeypatch.setattr(submission, "resources", lambda *_: Resources(1.0, 1))
    outcome = carry_out(Launch(out), "fake")
    assert len(outcome.submitted) == 1 and len(Fake.sent) == len(set(Fake.sent)) == 2 and outcome.unfinished == 4


@pytest.mark.parametrize("template", ["kubernetes", "skypilot"])
def test_manifests_are_what_their_readers_take(call, sweep_file, tmp_path, template):
    out = tmp_path / "out"
    call("plan", sweep_file, "--out", out)
    options = {"submit": f"cat {{file}} >> {tmp_path}/sent", "template": template}
    options |= {"kubernetes": {"image": "me/recscale:1", "claim": "sweeps"}, "skypilot": {"bucket": "s3://mine"}}[
        template
    ]
    texts = tuple(f"{key}={value}" for key, value in options.items())
    with pytest.raises(ValueError, match="the template needs another option"):
        carry_out(Launch(out, options=texts[:2]), "command", gpus_per_run=2)
    carry_out(Launch(out, options=texts), "command", gpus_per_run=2)
    files = sorted((out / "manifests").iterdir())
    assert len(files) == 2 and (tmp_path / "sent").read_text() == "".join(map(lambda f: f.read_text(), files))
    found = yaml.safe_load(files[0].read_text())
    command = ["recscale", "run-job", str(out), files[0].stem]
    if template == "skypilot":
        assert found["run"].split() == command and found["resources"]["accelerators"] == "H100:2"
        assert found["num_nodes"] == 1 and found["resources"]["memory"] == "2+"
        return
    pod = found["spec"]["template"]["spec"]
    assert (found["apiVersion"], found["kind"], pod["restartPolicy"]) == ("batch/v1", "Job", "Never")
    [container] = pod["containers"]
    assert container["command"] == command and container["image"] == "me/recscale:1"
    assert container["resources"]["limits"] == {"memory": "2048Mi", "nvidia.com/gpu": "2"}
    assert pod["activeDeadlineSeconds"] == 600 and pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "sweeps"}
    codes = {rule["action"]: rule["onExitCodes"]["values"] for rule in found["spec"]["podFailurePolicy"]["rules"][:2]}
    assert codes == {"FailJob": [1], "Ignore": [75]}


@pytest.mark.slow
def test_a_sweep_goes_over_several_devices(call, sweep_file, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    call("launch", sweep_file, "--out", one)
    call("launch", sweep_file, "--out", two, "--set", "training.mesh=data=2")
    for row in read_plan(one):
        a, b = (read_record(out / "runs" / row["run_id"]) for out in (one, two))
        assert (a["placement"]["devices"], b["placement"]["devices"]) == (1, 2)
        assert a["metrics"]["logloss"] == pytest.approx(b["metrics"]["logloss"], abs=1e-5)
        sent = b["resources"]["communication_bytes"]
        assert sent["source"] == "counted" and sent["value"] > 0


def test_run_job_ends_with_0_1_or_75(call, sweep_file, tmp_path):
    out = tmp_path / "out"
    call("plan", sweep_file, "--out", out)
    fine, bad = dict.fromkeys(row["job"] for row in read_plan(out))
    (out / "fake.json").write_text(json.dumps({fine: {"step_s": 0.5}, bad: {"errors": 1}}))
    begun = {job: subprocess.Popen([sys.executable, *run_job_command(out, job, (), TRAINER)]) for job in (fine, bad)}
    while not (out / "groups" / fine / "step.txt").exists():
        time.sleep(0.02)
    begun[fine].send_signal(signal.SIGTERM)
    assert begun[fine].wait(60) == 75 and begun[bad].wait(60) == 1
    (out / "fake.json").unlink()
    assert subprocess.run([sys.executable, *run_job_command(out, fine, (), TRAINER)]).returncode == 0
    assert "no job" in call("run-job", out, "nothing", code=1).err
