"""`kill -9` of a sweep at any moment, then the same command again: the results are those of a sweep never killed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from recscale.scaling.records.runs import MEASURED, METRICS, TABLE, collect
from recscale.sweeps.engine.launch import launch
from recscale.sweeps.engine.loading import load
from recscale.sweeps.engine.plan import make_plan, read_plan, write_plan

SWEEP = """
from recscale.scaling.training import get_config as base_config
from recscale.sweeps import axis, by_dense_params, product, seeds
def get_config():
    config = base_config("rankmixer", "known_truth")
    config.data.preset = "dense"
    config.data.holdout_rows = 1024
    config.training.requests = 128
    config.training.warmup_examples = 1280
    config.training.log_every_examples = LOG_EVERY
    config.training.checkpoint_every_s = 0.0  # every logging interval: a kill may find any of them half written
    return config
def get_sweep():
    # two branches of one trunk and two seeds: the checkpoint holds replicas, a waiting trunk and finished runs
    budgets = axis("training.examples", BUDGETS)
    return product(axis("architecture", ARCHITECTURES), by_dense_params([6e3]), budgets, seeds(2))
"""


def _command(file, out):
    command = ["sweep", str(file), "--out", str(out), "--no-report", "--workers", "2"]
    return [sys.executable, "-c", "from recscale.scaling.cli import main; main()", *command]


def _finish(file, out):
    done = subprocess.run(_command(file, out), capture_output=True, text=True, env=_environment(), check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def _kill_at(file, out, lines, seconds):
    """Starts the sweep and kills it some seconds after so many metrics lines are written; False if it got through."""
    process = subprocess.Popen(
        _command(file, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=_environment()
    )
    while process.poll() is None and _lines(out) < lines:
        time.sleep(0.05)
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True


def _environment():
    return os.environ | {"JAX_PLATFORMS": "cpu"}


def _assert_identical(whole, killed):
    pd.testing.assert_frame_equal(
        pd.read_parquet(whole / TABLE).drop(columns=list(MEASURED)),
        pd.read_parquet(killed / TABLE).drop(columns=list(MEASURED)),
        check_exact=True,
    )
    losses = pd.read_parquet(whole / TABLE)[["logloss", "excess_logloss", "progressive_logloss"]]
    assert losses.notna().all().all() and losses["logloss"].nunique() == len(losses)
    for row in read_plan(whole):
        metrics = [(out / "runs" / row["run_id"] / METRICS).read_bytes() for out in (whole, killed)]
        assert metrics[0] == metrics[1] and len(metrics[0].splitlines()) >= 5


def _sweep(tmp_path, architectures, budgets):
    file, text = tmp_path / "killed.py", SWEEP
    for name, value in [("BUDGETS", budgets), ("ARCHITECTURES", architectures), ("LOG_EVERY", budgets[0] // 5)]:
        text = text.replace(name, repr(value))
    file.write_text(text)
    return file


def _lines(out):
    return sum(len(path.read_bytes().splitlines()) for path in out.glob(f"runs/*/{METRICS}"))


def test_a_killed_worker_is_replaced_and_ends_with_the_same_bytes(tmp_path, monkeypatch):
    # compiling is what takes time: once for all three workers here, afresh after every kill in the slow test below
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    loaded = load(_sweep(tmp_path, ["dlrm_mlp"], [6_400, 12_800]))
    planned = make_plan(loaded.config(), loaded.points(), sweep="killed")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    trainers = Path(__file__).with_name("killed_trainer.py")
    for out, trainer in [(whole, f"{trainers}:undisturbed"), (killed, f"{trainers}:train_group")]:
        write_plan(out, planned)
        assert launch(out, workers=1, trainer=trainer).statuses == {"done": 4}
        collect(out)
    attempt = next(killed.glob("groups/*/attempts.jsonl")).read_text()
    assert "killed by SIGKILL" in attempt and not list(whole.glob("groups/*/attempts.jsonl"))
    _assert_identical(whole, killed)


@pytest.mark.slow
def test_killed_five_times_at_random_moments(tmp_path):
    file = _sweep(tmp_path, ["rankmixer", "dlrm_mlp"], [256_000, 512_000])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _finish(file, whole)
    dice = random.Random(0)
    # Moments by progress, not by the clock, so that a busy machine does not decide how many kills hit.
    for share in sorted(dice.uniform(0.0, 0.7) for _ in range(5)):
        assert _kill_at(file, killed, share * _lines(whole), dice.uniform(0.0, 0.5))
    _finish(file, killed)
    _assert_identical(whole, killed)
