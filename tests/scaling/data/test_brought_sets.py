"""A data set that this package does not have: forty lines of somebody's module, named by address or by entry point."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from recscale.scaling.data import Source, list_sources, make_source

COINS = '''
"""Biased coins: a click is likelier for even items. Endless rows, drawn by number."""

import numpy as np

from recscale.models.inputs import Batch, CandidateSide, Field, Schema, Task, UserSide
from recscale.scaling.data.metrics import evaluate_binary

HOLDOUT = 2**40  # batches from here on are never trained on


class Coins:
    on_device, total_rows, batches = False, None, None

    def __init__(self, asked):
        self.requests, self.candidates, self.seed = asked.requests, asked.candidates, asked.config.log_seed
        self.held = -(-(asked.config.holdout_rows or 512) // (self.requests * self.candidates))
        self.gap = asked.config.overrides.get("gap", 0.3)
        fields = (Field("user", "user", 4, vocabulary=10), Field("item", "candidate", 4, vocabulary=20))
        self.schema = Schema(fields=fields, tasks=(Task("heads"),))

    def batch(self, index):
        rng, shape = np.random.default_rng([self.seed, int(index)]), (self.requests, self.candidates)
        item = rng.integers(20, size=shape, dtype=np.int32)
        labels = (rng.random(shape) < 0.5 + self.gap * (0.5 - item % 2)).astype(np.float32)[..., None]
        user = UserSide({"user": rng.integers(10, size=self.requests, dtype=np.int32)}, {}, {})
        return Batch(user, CandidateSide({"item": item}, {}), labels, np.ones_like(labels), np.ones(shape, bool))

    def iterate(self, start):
        while True:
            yield self.batch(start)
            start += 1

    def holdout(self):
        return (self.batch(HOLDOUT + index) for index in range(self.held))

    def evaluate(self, logits):
        held = list(self.holdout())
        users = np.stack([np.broadcast_to(batch.user.ids["user"][:, None], batch.valid.shape) for batch in held])
        return evaluate_binary(logits[..., 0], np.stack([batch.labels for batch in held])[..., 0], groups=users)

    def facts(self):
        return {"name": "coins", "seed": self.seed, "gap": self.gap, "rejected": {}}


def unfinished(asked):
    return object()
'''
METADATA = "Metadata-Version: 2.1\nName: coins\nVersion: 3.1\n"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder on the import path with the module, and the environment of a process that sees it."""
    (tmp_path / "coins_for_recscale.py").write_text(COINS)
    monkeypatch.syspath_prepend(tmp_path)
    return os.environ | {"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}


def test_a_set_named_by_its_address(elsewhere):
    config = {"name": "coins_for_recscale:Coins", "overrides": {"gap": 0.8}, "log_seed": 5, "holdout_rows": 1024}
    source = make_source(config, requests=64, candidates=2)
    assert isinstance(source, Source) and source.facts() == {"name": "coins", "seed": 5, "gap": 0.8, "rejected": {}}
    stream = source.iterate(7)
    np.testing.assert_array_equal(next(stream).labels, source.batch(7).labels)
    held = list(source.holdout())
    assert len(held) == 8
    even = np.stack([batch.candidates.ids["item"] % 2 == 0 for batch in held])[..., None]
    assert source.evaluate(np.where(even, 1.0, -1.0))["auc"] > 0.85


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("coins_for_recscale:Dice", ValueError, "data set 'coins_for_recscale:Dice': .* has no attribute 'Dice'"),
        ("coins_for_nobody:Coins", ValueError, "there is no module 'coins_for_nobody'"),
        ("coins_for_recscale:unfinished", ValueError, "an object of type object, no Source: it lacks schema, req"),
        ("coins_for_recscale", KeyError, "unknown data set 'coins_for_recscale'"),
    ],
)
def test_a_wrong_address_is_explained(elsewhere, name, error, text):
    with pytest.raises(error, match=text):
        make_source({"name": name}, requests=8)


def test_a_set_that_a_distribution_brings(elsewhere, tmp_path):
    """Its name is known in every process: nothing is registered by hand."""
    (tmp_path / "coins-3.1.dist-info").mkdir()
    (tmp_path / "coins-3.1.dist-info" / "METADATA").write_text(METADATA)
    text = "[recscale.datasets]\ncoins = coins_for_recscale:Coins\nknown_truth = coins_for_recscale:Coins\n"
    (tmp_path / "coins-3.1.dist-info" / "entry_points.txt").write_text(text)
    script = "from recscale.scaling.data import list_sources, make_source as make\n"
    script += "print(list_sources(), [type(make({'name': n}, requests=8)).__name__ for n in ('coins', 'known_truth')])"
    done = subprocess.run([sys.executable, "-c", script], env=elsewhere, capture_output=True, text=True)
    assert done.stdout.strip() == f"{[*list_sources(), 'coins']} ['Coins', 'KnownTruthSource']", done.stderr


def test_a_model_is_trained_on_it(elsewhere, tmp_path):
    command = [sys.executable, "-c", "from recscale.scaling.cli import main; main()", "train", "dlrm_mlp"]
    command += ["--out", str(tmp_path / "run"), "--dataset", "coins_for_recscale:Coins", "--json"]
    for assignment in ("data.holdout_rows=512", "training.requests=64", "training.examples=6400"):
        command += ["--set", assignment]
    done = subprocess.run(command, env=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["status"] == "done" and found["rows"] == 512 and 0.5 < found["logloss"] < 0.72
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"]["name"] == "coins"
