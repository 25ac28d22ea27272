"""8 forced host devices equal 1: loss, parameters, moments, tables and banks after 3 steps, in a process of its own."""

import json
import subprocess
import sys

import forced_devices
import pytest

SCRIPT = """
import json, sys
import jax, numpy as np
from recscale.models.domains.promo import BEST, COLD, ITEM, NETWORK, USER, WORST, PromoConfig, promo_schema
from recscale.models.inputs import Batch, CandidateSide, UserSide
from recscale.scaling.data import make_source
from recscale.scaling.parallel import run_mesh
from recscale.scaling.training import get_config
from recscale.scaling.training.step import make_trainer

assert jax.device_count() == 8

class Handed:
    "A batch of vectors and lists, as PROMO is handed them."
    on_device, total_rows, batches, requests, candidates = False, None, None, 64, 2
    schema = promo_schema(8, 40, PromoConfig(users=2))

    def __init__(self):
        rng, shape = np.random.default_rng(0), (64, 2)
        widths = {ITEM: 8, BEST: 16, WORST: 16}
        dense = {name: rng.standard_normal((*shape, width), np.float32) for name, width in widths.items()}
        dense[COLD] = np.asarray([[1.0], [0.0]], np.float32) * np.ones((64, 1, 1), np.float32)
        side = UserSide({}, {USER: rng.standard_normal((64, 8), np.float32)}, {})
        items = CandidateSide({NETWORK: rng.integers(0, 40, shape).astype(np.int32)}, dense)
        labels = rng.integers(0, 2, (*shape, 1)).astype(np.float32)
        self.only = Batch(side, items, labels, np.ones_like(labels), np.ones(shape, bool))

    def holdout(self):
        return [self.only]

architecture, model, world = json.loads(sys.argv[1])
states = []
for parallel in (False, True):
    config = get_config(architecture, "known_truth")
    config.training.requests = 64
    if architecture == "lemur":
        # The gradient of its attention's key biases is rounding alone, and Adam would make steps of it.
        config.training.eps = 1e-4
    if world is None:
        source = Handed()
    else:
        config.data.preset = "smoke"
        config.data.holdout_rows = 128
        config.data.overrides = world
        model = dict(width=16, hidden=32, layers=1) | model
        source = make_source(config.data.to_dict(), requests=64, candidates=1)
    config.model.update(model)
    batch = getattr(source, "only", None)
    mesh = run_mesh("data=8", 64) if parallel else None
    trainer = make_trainer(config, source, [(0, 3e-3), (1, 1e-3)], warmup=1, mesh=mesh)
    state, batch = trainer.fresh_state(), batch and trainer.put(batch)
    with jax.transfer_guard("disallow"):
        for _ in range(3):
            state, metrics = trainer.step(state, batch)
    logits = trainer.holdout_logits(state)
    states.append((jax.device_get(state), jax.device_get(metrics), logits))
    if parallel:
        text = trainer.compiled.as_text()
        assert "all-reduce" in text, "gradients must be reduced over the devices"
one, eight = states
for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(eight), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5, err_msg=jax.tree_util.keystr(path))
print("equal", len(jax.tree.leaves(one)))
"""


_LEMUR = dict(tokens=8, content_width=8, encoder_heads=2, query_layers=1, document_layers=1, bank_dtype="float32")
CASES = [
    ("rankmixer", dict(tokens=4), {}),
    ("mdl", dict(tokens=4, active_only=True), dict(domains=3, tasks=2)),
    ("lemur", _LEMUR, dict(content_tokens=3, query_tokens=2, history_max=4)),
    ("recscale.models.domains.promo:PROMO", dict(users=2), None),
]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=c[0].rpartition(":")[2].lower(), marks=pytest.mark.slow if i else ())
        for i, c in enumerate(CASES)
    ],
)
def test_eight_devices_equal_one(case):
    env = forced_devices.environment(8)
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(case)], env=env, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "equal" in result.stdout
