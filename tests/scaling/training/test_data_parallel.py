"""8 forced host devices equal 1: loss, parameters, moments, tables and banks after 3 steps, in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys
import jax, numpy as np
from recscale.scaling.data import make_source
from recscale.scaling.parallel import run_mesh
from recscale.scaling.training import get_config
from recscale.scaling.training.step import make_trainer

assert jax.device_count() == 8
architecture, model, world = json.loads(sys.argv[1])
states = []
for parallel in (False, True):
    config = get_config(architecture, "known_truth")
    config.data.preset = "smoke"
    config.data.holdout_rows = 128
    config.data.overrides = world
    config.model.update(dict(width=16, hidden=32, layers=1) | model)
    config.training.requests = 64
    source = make_source(config.data.to_dict(), requests=64, candidates=1)
    mesh = run_mesh("data=8", 64) if parallel else None
    trainer = make_trainer(config, source, [(0, 3e-3), (1, 1e-3)], warmup=1, mesh=mesh)
    state = trainer.fresh_state()
    with jax.transfer_guard("disallow"):
        for _ in range(3):
            state, metrics = trainer.step(state)
    logits = trainer.holdout_logits(state)
    states.append((jax.device_get(state), jax.device_get(metrics), logits))
    if parallel:
        text = trainer._step.lower(state, None).compile().as_text()
        assert "all-reduce" in text, "gradients must be reduced over the devices"
one, eight = states
for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)
print("equal", len(jax.tree.leaves(one)))
"""


_LEMUR = dict(tokens=8, content_width=8, encoder_heads=2, query_layers=1, document_layers=1, bank_dtype="float32")
CASES = [
    ("rankmixer", dict(tokens=4), {}),
    ("mdl", dict(tokens=4, active_only=True), dict(domains=3, tasks=2)),
    ("lemur", _LEMUR, dict(content_tokens=3, query_tokens=2, history_max=4)),
]


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c[0], marks=pytest.mark.slow if i else ()) for i, c in enumerate(CASES)]
)
def test_eight_devices_equal_one(case):
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(case)], env=env, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "equal" in result.stdout
