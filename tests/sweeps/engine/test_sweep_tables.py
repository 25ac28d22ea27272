"""What a person reads before and after a launch, to the character, and what becomes of every run's record."""

import types

import pytest

from recscale.sweeps.engine import tables


def planned(run, job, error=None, examples=1000, seconds=10.0, seed=0, lr=0.003):
    return {
        "run_id": run,
        "job": job,
        "config": {"architecture": "din", "seed": seed, "training": {"lr": lr}, "data": {"history_length": 16}},
        "counts": {"dense_params": 12_345, "embedding_params": 1_000_000},
        "target_error": error,
        "predicted": {
            "examples": examples,
            "train_flops": 1.8e12,
            "peak_memory_bytes": 1.25e9,
            "job_seconds": seconds,
            "seconds": 5.4,
        },
    }


JOB = "abcdef123456"


def test_a_plan_as_a_table():
    rows = [planned("r1", JOB, -0.0123), planned("r2", f"{JOB}-2", examples=20_000, seed=1)]
    assert tables.plan_table(rows).splitlines() == [
        "run  job       architecture   dense     off  embedding  examples  train FLOPs     lr  seed  memory (est.)"
        "  time (est.)",
        "r1   abcdef    din           12,345  -1.2 %  1,000,000     1,000      1.8e+12  0.003     0        1.25 GB"
        "          5 s",
        "r2   abcdef-2  din           12,345          1,000,000    20,000      1.8e+12  0.003     1        1.25 GB"
        "          5 s",
    ]


def test_a_bill_counts_jobs_once_and_prices_cores_or_devices(monkeypatch):
    tracking = {"usd_per_device_hour": 3.0, "watts_per_device": 500.0}
    monkeypatch.setattr(tables, "run_config", lambda row, overrides: types.SimpleNamespace(tracking=tracking))
    rows = [planned("r1", "a", seconds=1800.0), planned("r2", "a", seconds=1800.0), planned("r3", "b", seconds=5400.0)]
    found = {name: each["value"] for name, each in tables.bill(rows).items()}
    assert found["train_flops"] == 5.4e12 and found["core_hours"] == 2.0 and found["device_hours"] is None
    assert found["cost_usd"] == 6.0 and found["energy_kwh"] == 1.0
    assert found["usd_per_million_rows"] == pytest.approx(1e6 * 6.0 / 3000)
    priced = tables.bill(rows, (), 3e8)
    assert priced["device_hours"]["value"] == 5.0 and priced["cost_usd"]["value"] == 15.0
    assert tables.bill_line(priced) == (
        "bill (estimated but for FLOPs): 5.4e+12 training FLOPs, 2 core-hours, 5 device-hours, 2.5 kWh, 15 $"
    )


@pytest.fixture
def folder(monkeypatch):
    """Four planned runs of two jobs: their records, metrics, what a scheduler says, and whether a launcher is there."""
    found = types.SimpleNamespace(records={}, metrics={}, handed={}, busy=False, checked=[])
    rows = [planned(run, job) for run, job in (("r1", "a"), ("r2", "a"), ("r3", "b"), ("r4", "b"))]
    monkeypatch.setattr(tables, "read_plan", lambda out: rows)
    monkeypatch.setattr(tables, "read_record", lambda place: found.records.get(place.name))
    monkeypatch.setattr(tables, "check_metrics", lambda place, record: found.checked.append((place.name, record)))
    monkeypatch.setattr(tables, "read_metrics", lambda place: found.metrics.get(place.name, []))
    monkeypatch.setattr(tables, "job_states", lambda out: found.handed)
    monkeypatch.setattr(tables, "has_launcher", lambda out: found.busy)
    return found


def test_states_are_the_records_the_launchers_and_the_schedulers(folder, tmp_path):
    def states():
        return [state["state"] for state in tables.run_states(tmp_path)]

    folder.records = {"r1": {"status": "done", "metrics": {"logloss": 0.4}}, "r2": {"status": "running"}}
    folder.records["r3"] = {"status": "failed", "reasons": ["no memory", "log: x"], "metrics": None}
    folder.metrics = {
        "r1": [{"examples": 10, "logloss": 9.0}, {"examples": 1024, "logloss": 0.5}],
        "r2": [{"examples": 10, "logloss": 9.0}, {"examples": 250, "logloss": 0.5}],
        "r3": [{"logloss": 0.7}],
    }
    told = tables.run_states(str(tmp_path))
    assert [(each["state"], each["trained"], each["logloss"], each["reasons"]) for each in told] == [
        ("done", 1.0, 0.4, []),
        ("stopped", 0.25, 0.5, []),
        ("failed", 0.0, 0.7, ["no memory", "log: x"]),
        ("planned", 0.0, None, []),
    ]
    assert {key: told[0][key] for key in ("run_id", "job", "architecture", "dense_params", "lr", "seed")} == {
        "run_id": "r1", "job": "a", "architecture": "din", "dense_params": 12_345, "lr": 0.003, "seed": 0,
    }  # fmt: skip
    assert folder.checked[0] == ("r1", folder.records["r1"]) and len(folder.checked) == 4
    folder.busy = True
    assert states() == ["done", "running", "failed", "planned"]
    folder.handed = {"a": "requeued"}
    assert states() == ["done", "requeued", "failed", "planned"] and tables.waiting_runs(tmp_path) == ["r1", "r2"]
    folder.handed, folder.busy = {"b": "lost"}, False
    assert states() == ["done", "stopped", "lost", "lost"] and tables.waiting_runs(tmp_path) == []
    folder.handed = {"b": "queued"}
    assert tables.waiting_runs(str(tmp_path)) == ["r3", "r4"]
    folder.handed = {}
    assert tables.waiting_runs(tmp_path) == []


def test_states_as_a_table():
    state = {"run_id": "r1", "job": JOB, "architecture": "din", "dense_params": 12_345, "lr": 0.003, "seed": 11}
    states = [
        state | {"state": "done", "trained": 1.0, "logloss": 0.4, "reasons": []},
        state | {"job": f"{JOB}-2", "state": "failed", "trained": 0.256, "logloss": None, "reasons": ["a", "b"]},
    ]
    assert tables.status_table(states).splitlines() == [
        "run  job       architecture   dense     lr  seed  state   trained  logloss  reasons",
        "r1   abcdef    din           12,345  0.003    11  done      100 %  0.40000",
        "r1   abcdef-2  din           12,345  0.003    11  failed     26 %           a; b",
    ]
