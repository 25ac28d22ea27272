"""The commands: what they print, what they refuse, and how they end."""

import json
import sys
import types

import pytest

from recscale.scaling.cli import main
from recscale.scaling.records.runs import write_record
from recscale.sweeps.engine.executors import Outcome
from recscale.sweeps.engine.plan import read_plan, read_sweep
from recscale.sweeps.engine.slurm import MissingExtra, submit

SWEEP = """
from recscale.scaling.training import get_config as base_config
from recscale.sweeps import axis, product, seeds
def get_config():
    config = base_config("rankmixer", "known_truth")
    config.data.preset = "smoke"
    config.data.holdout_rows = 512
    config.training.requests = 64
    config.training.examples = 640
    return config
def get_sweep():
    return product(axis("model.layers", [1, 2]), seeds(2))
def get_report():
    return {"form": "power_offset"}
"""


@pytest.fixture
def sweep_file(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(SWEEP)
    return str(path)


@pytest.fixture
def call(capsys):
    """Runs `recscale COMMAND ARGUMENTS`, checks its exit code, and returns (standard output, standard error)."""

    def run(*arguments, code=0):
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert left.value.code == code, printed
        return printed

    return run


def last_json(printed):
    return json.loads(printed.out.splitlines()[-1])


def test_plan_prints_every_run_and_launches_nothing(call, sweep_file, tmp_path):
    out = tmp_path / "out"
    result = call("plan", sweep_file, "--out", out, "--set", "training.lr=0.01", "--json")
    assert last_json(result)["runs"] == 4 and last_json(result)["new"] == 4
    for row in read_plan(out):
        assert row["run_id"] in result.out and row["config"]["training"]["lr"] == 0.01
    assert not (out / "runs").exists()
    assert read_sweep(out) == {
        "name": "tiny",
        "arguments": [[sweep_file, "--set", "training.lr=0.01"]],
        "report": {"form": "power_offset"},
    }
    assert "(0 new)" in call("plan", sweep_file, "--out", out, "--set", "training.lr=0.01").out


def test_mistakes_are_one_line(call, sweep_file, tmp_path):
    out = tmp_path / "out"
    result = call("plan", sweep_file, "--out", out, "--set", "training.lrr=1", code=1)
    assert "the nearest key is 'training.lr'" in result.err and "Traceback" not in result.err
    assert not out.exists() or not (out / "plan.jsonl").exists()
    assert "nearest installed name is 'smoke'" in call("plan", "smok", "--out", out, code=1).err
    call("plan", sweep_file, "--out", out)
    result = call("plan", sweep_file, "--out", out, "--set", "training.lr=1", code=1)
    assert "holds another sweep" in result.err and "--extend" in result.err
    assert "go with a sweep file" in call("launch", out, "--set", "seed=1", code=2).err
    (tmp_path / "empty").mkdir()
    assert "launch the sweep first" in call("collect", tmp_path / "empty", code=1).err
    assert "plan a sweep first" in call("status", tmp_path / "empty", code=1).err


def test_settings_that_change_no_result_may_differ_between_launches(call, sweep_file, tmp_path, monkeypatch):
    from recscale.sweeps.engine import launch

    asked, out = [], tmp_path / "out"
    monkeypatch.setattr(
        launch,
        "launch",
        lambda out, plan, **options: asked.append(options["overrides"]) or Outcome({}, False, 0.0, ()),
    )
    call("plan", sweep_file, "--out", out)
    call("launch", out, "--set", "tracking.wandb=offline")
    call("launch", sweep_file, "--out", out, "--set", "tracking.project=mine", "--data", "/elsewhere")
    assert asked == [("tracking.wandb=offline",), ("data.root=/elsewhere", "tracking.project=mine")]


def test_status_tells_states_apart(call, sweep_file, tmp_path):
    out = tmp_path / "out"
    call("plan", sweep_file, "--out", out)
    runs = [row["run_id"] for row in read_plan(out)]
    write_record(out / "runs" / runs[0], {"status": "done", "metrics": {"logloss": 0.4321}})
    write_record(out / "runs" / runs[1], {"status": "running"})
    write_record(out / "runs" / runs[2], {"status": "failed", "reasons": ["no memory"]})
    result = call("status", out, "--json")
    assert last_json(result)["statuses"] == {"done": 1, "failed": 1, "planned": 1, "stopped": 1}
    assert "0.43210" in result.out and "no memory" in result.out


def test_slurm_without_submitit_says_how_to_get_it(call, sweep_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    result = call("launch", sweep_file, "--out", tmp_path / "out", "--backend", "slurm", code=1)
    assert "pip install 'recscale[slurm]'" in result.err and "Traceback" not in result.err
    with pytest.raises(MissingExtra):
        submit(tmp_path / "out")


def test_slurm_submits_one_job_a_group_and_skips_finished_ones(call, sweep_file, tmp_path, monkeypatch):
    out, sent = tmp_path / "out", []

    class Executor:
        def __init__(self, folder, cluster):
            assert cluster == "slurm"

        def update_parameters(self, **parameters):
            sent.append(parameters)

        def submit(self, function, *arguments):
            sent.append((function.__module__, function.__name__, *arguments))
            return types.SimpleNamespace(job_id=str(len(sent)))

    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace(AutoExecutor=Executor))
    options = ["--backend", "slurm", "--slurm", "slurm_partition=cpu", "--slurm", "timeout_min=60", "--json"]
    result = call("launch", sweep_file, "--out", out, *options)
    jobs = list(dict.fromkeys(row["job"] for row in read_plan(out)))
    assert sent[0] == {"name": "out", "cpus_per_task": 1, "slurm_partition": "cpu", "timeout_min": 60}
    assert sorted(entry[3] for entry in sent[1:]) == sorted(jobs) and set(last_json(result)["submitted"]) == set(jobs)
    assert sent[1][:2] == ("recscale.sweeps.engine.worker", "run_job")
    for row in read_plan(out):
        if row["job"] == jobs[0]:
            write_record(out / "runs" / row["run_id"], {"status": "done"})
    assert set(submit(out).submitted) == {jobs[1]}
    with pytest.raises(ValueError, match="not key=value"):
        submit(out, options=["partition"])
