"""The commands: what they print, what they refuse, and how they end."""

import pytest

from recscale.scaling.records.runs import write_record
from recscale.sweeps.engine.executors import Outcome
from recscale.sweeps.engine.plan import read_plan, read_sweep


def test_plan_prints_every_run_and_launches_nothing(call, sweep_file, tmp_path, last_json):
    out = tmp_path / "out"
    result = call("plan", sweep_file, "--out", out, "--set", "training.lr=0.01", "--json")
    assert last_json(result)["runs"] == 4 and last_json(result)["new"] == 4
    for row in read_plan(out):
        assert row["run_id"] in result.out and row["config"]["training"]["lr"] == 0.01
    assert not (out / "runs").exists()
    foreseen = last_json(result)["foreseen"]
    assert "bill (estimated but for FLOPs): " in result.out
    assert foreseen and all(f"foreseen: {line}\n" in result.out for line in foreseen)
    bill = last_json(result)["bill"]
    assert bill["core_hours"]["source"] == "estimated" and bill["core_hours"]["value"] > 0
    assert {bill[name]["source"] for name in ("device_hours", "energy_kwh", "cost_usd")} == {"absent"}
    priced = ["--set", "tracking.usd_per_device_hour=2.0", "--set", "training.lr=0.01", "--device-flops", "1e12"]
    priced = last_json(call("plan", sweep_file, "--out", out, *priced, "--json"))["bill"]
    assert priced["cost_usd"]["value"] == pytest.approx(2 * priced["device_hours"]["value"])
    assert read_sweep(out) == {
        "name": "tiny",
        "arguments": [[sweep_file, "--set", "training.lr=0.01"]],
        "report": {"form": "power_offset"},
    }
    again = call("plan", sweep_file, "--out", out, "--set", "training.lr=0.01").out
    assert f"4 runs in {out / 'plan.jsonl'} (0 new); launch them with `recscale launch {out}`" in again


def test_mistakes_are_one_line(call, sweep_file, tmp_path):
    out = tmp_path / "out"
    result = call("plan", sweep_file, "--out", out, "--set", "training.lrr=1", code=1)
    assert "the nearest key is 'training.lr'" in result.err and "Traceback" not in result.err
    assert not out.exists() or not (out / "plan.jsonl").exists()
    assert "nearest installed name is 'smoke'" in call("plan", "smok", "--out", out, code=1).err
    assert "--executor" in call("sweep", sweep_file, "--out", out, "--executor", "slurmm", code=2).err
    assert not (out / "plan.jsonl").exists()
    call("plan", sweep_file, "--out", out)
    result = call("plan", sweep_file, "--out", out, "--set", "training.lr=1", code=1)
    assert "holds another sweep" in result.err and "--extend" in result.err
    assert "go with a sweep file" in call("launch", out, "--set", "seed=1", code=2).err
    (tmp_path / "empty").mkdir()
    assert "launch the sweep first" in call("collect", tmp_path / "empty", code=1).err
    assert "plan a sweep first" in call("status", tmp_path / "empty", code=1).err


def test_settings_that_change_no_result_may_differ_between_launches(call, sweep_file, tmp_path, monkeypatch):
    from recscale.sweeps.engine import submission

    asked, out = [], tmp_path / "out"
    monkeypatch.setattr(
        submission,
        "carry_out",
        lambda launch, *_, **more: asked.append(launch.overrides) or Outcome({}, False, 0.0, ()),
    )
    call("plan", sweep_file, "--out", out)
    call("launch", out, "--set", "tracking.wandb=offline")
    call("launch", out, "--set", "tracking.project=mine", "--data", "/elsewhere")
    told = call("launch", sweep_file, "--out", out, "--data", "/elsewhere", code=1).err
    assert "data.root would be ignored: the known-truth log has no files" in told
    assert asked == [("tracking.wandb=offline",), ("data.root=/elsewhere", "tracking.project=mine")]


STEPS = ("plan.make_plan", "plan.write_plan", "submission.carry_out", "sweep_commands._report")


@pytest.mark.parametrize("step", [*STEPS, "recscale.scaling.records.runs.collect"])
def test_a_sweep_interrupted_anywhere_ends_with_130(call, sweep_file, tmp_path, monkeypatch, step):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    _all_done(monkeypatch, Outcome({"done": 4}, False, 0.0, ()))
    monkeypatch.setattr(step if step.startswith("recscale") else f"{ENGINE}.{step}", interrupt)
    call("sweep", sweep_file, "--out", tmp_path / "out", code=130)


def test_a_sweep_that_is_not_through_says_so_and_never_ends_with_0(call, sweep_file, tmp_path, monkeypatch):
    _all_done(monkeypatch, Outcome({"done": 3, "running": 1}, True, 0.0, ()))
    said = call("sweep", sweep_file, "--out", tmp_path / "out", code=130).out
    assert "stopped: 3 done, 1 running" in said and "run table" not in said
    _all_done(monkeypatch, Outcome({"done": 3, "failed": 1}, False, 0.0, ("a",)))
    assert "the table is PARTIAL: 1 of its 4 runs" in call("sweep", sweep_file, "--out", tmp_path / "out", code=1).out


@pytest.mark.parametrize("command", ["sweep", "launch"])
def test_what_a_command_prints_of_what_came_of_it(call, sweep_file, tmp_path, last_json, monkeypatch, command):
    out = tmp_path / "out"
    done, lost = {"done": 4}, {"done": 3, "failed": 1}
    handed = {"a": "7", "b": "8"}
    again, look = f"`recscale launch {out}`", f"`recscale status {out}`"
    for outcome, code, line in (
        (Outcome(done, False, 3.4, ()), 0, "4 done in 3 s"),
        (Outcome(lost, False, 0.0, ("x",)), 1, f"3 done, 1 failed in 0 s; the reasons of the failed runs: {look}"),
        (Outcome({"done": 3, "running": 1}, False, 0.0, ()), 1, f"3 done, 1 running in 0 s; go on with {again}"),
        (Outcome(lost, True, 0.0, ("x",)), 130, f"stopped: 3 done, 1 failed in 0 s; go on with {again}"),
        (Outcome({"queued": 4}, False, 0.0, (), handed), 1, f"2 jobs submitted; follow them with {look}"),
        (Outcome(done, False, 0.0, (), {}), 0, f"0 jobs submitted; follow them with {look}"),
    ):
        _all_done(monkeypatch, outcome)
        said = call(command, sweep_file, "--out", out, "--json", code=code)
        lines = said.out.splitlines()
        assert lines[0] == line
        if command == "sweep":
            seconds = sum({row["job"]: row["predicted"]["job_seconds"] for row in read_plan(out)}.values())
            assert f"4 runs planned, about {seconds:.0f} core-seconds (estimated)" in said.err
        if outcome.interrupted:
            assert len(lines) == (1 if command == "sweep" else 2)
            continue
        told, given = last_json(said), {"out": str(out), "statuses": outcome.statuses}
        if outcome.submitted is not None:
            assert told == given | {"submitted": outcome.submitted} and len(lines) == 2
        elif command == "launch":
            assert told == given | {"wall_s": outcome.wall_s} and len(lines) == 2
        else:
            assert lines[1] == f"run table: {out / 'runs.parquet'}"
            assert told.pop("wall_s") >= 0 and told == given | {"runs": 4, "report": {}}


ENGINE = "recscale.sweeps.engine"


def _all_done(monkeypatch, outcome):
    """Nothing is trained, collected or fitted."""
    monkeypatch.setattr(f"{ENGINE}.submission.carry_out", lambda *_, **__: outcome)
    monkeypatch.setattr("recscale.scaling.records.runs.collect", lambda *_: [None] * 4)
    monkeypatch.setattr(f"{ENGINE}.sweep_commands._report", lambda out: {})


def test_status_tells_states_apart(call, sweep_file, tmp_path, last_json):
    out = tmp_path / "out"
    call("plan", sweep_file, "--out", out)
    runs = [row["run_id"] for row in read_plan(out)]
    write_record(out / "runs" / runs[0], {"status": "done", "metrics": {"logloss": 0.4321}})
    write_record(out / "runs" / runs[1], {"status": "running"})
    write_record(out / "runs" / runs[2], {"status": "failed", "reasons": ["no memory"]})
    result = call("status", out, "--json")
    assert last_json(result)["statuses"] == {"done": 1, "failed": 1, "planned": 1, "stopped": 1}
    assert "1 done, 1 failed, 1 planned, 1 stopped" in result.out.splitlines()
    assert "0 jobs cancelled" in call("cancel", out).out
    assert "0.43210" in result.out and "no memory" in result.out
