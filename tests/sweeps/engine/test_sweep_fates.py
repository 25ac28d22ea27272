"""A sweep some of whose runs cannot succeed, with the real trainer: the others are done, and those have reasons."""

import json
import subprocess
import sys

import pandas as pd
import pytest

from recscale.scaling.records.runs import TABLE, read_record
from recscale.sweeps.engine.plan import read_plan

SWEEP = """
from recscale.scaling.training import get_config as base_config
from recscale.sweeps import axis, chain, product, seeds
def get_config():
    config = base_config("dlrm_mlp", "known_truth")
    config.data.preset, config.data.holdout_rows = "smoke", 512
    config.training.requests, config.training.examples = 64, 640
    return config
def get_sweep():
    return chain(
        product(axis("training.lr", [1e-3, 3e-3]), seeds(2)),
        [{"training.lr": 1e38}],  # diverges, in one program with those above
        [{"model.widths": (8,)}],
        [{"model.widths": (200_000, 200_000)}],  # some 500 GB
        [{"data.name": "unreadable:log"}],
    )
"""

# A log that can be planned, and read until a batch to train on is asked for.
LOG = """
from dataclasses import replace
from recscale.scaling.data.known_truth.source import known_truth
class Unreadable:
    on_device = False
    def __init__(self, whole):
        self.whole = whole
    def __getattr__(self, name):
        return getattr(self.whole, name)
    def iterate(self, start):
        raise OSError("the disk of the log is gone")
        yield
def log(asked):
    return Unreadable(known_truth(replace(asked, config=replace(asked.config, name="known_truth"))))
"""


@pytest.mark.slow
def test_five_of_eight_runs_are_done_and_three_have_their_reasons(tmp_path):
    (tmp_path / "eight.py").write_text(SWEEP)
    (tmp_path / "unreadable.py").write_text(LOG)
    out = tmp_path / "out"
    command = ["sweep", str(tmp_path / "eight.py"), "--out", str(out), "--no-report", "--workers", "2"]
    done = subprocess.run(
        [sys.executable, "-c", "from recscale.scaling.cli import main; main()", *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "1 diverged, 5 done, 2 failed" in done.stdout
    table = pd.read_parquet(out / TABLE)
    assert dict(table["status"].value_counts()) == {"done": 5, "failed": 2, "diverged": 1}
    reasons = dict(zip(table["run_id"], table["reasons"], strict=True))
    told = {"1e+38": "loss was not finite at step", "200000": "predicted peak memory", "unreadable": "disk of the log"}
    for row in read_plan(out):
        kind = next((mark for mark in told if mark in json.dumps(row["config"])), None)
        assert told.get(kind, "") in reasons[row["run_id"]] and bool(kind) == bool(reasons[row["run_id"]])
        tries = out / "groups" / row["job"] / "attempts.jsonl"
        assert len(tries.read_text().splitlines()) == 1 if kind == "unreadable" else not tries.exists()
    lost = next(row["run_id"] for row in read_plan(out) if row["config"]["training"]["lr"] == 1e38)
    assert 0 < read_record(out / "runs" / lost)["work"]["examples_seen"] <= 640
    assert "Traceback" not in done.stderr and "retry" not in done.stderr
