"""8 forced host devices equal 1: loss, parameters, moments and tables after 3 steps, in a process of its own."""

import os
import subprocess
import sys

SCRIPT = """
import jax, numpy as np
from recscale.scaling.data import make_source
from recscale.scaling.training import get_config
from recscale.scaling.training.step import make_trainer

assert jax.device_count() == 8
states = []
for parallel in (False, True):
    config = get_config("rankmixer", "known_truth")
    config.data.preset = "smoke"
    config.data.holdout_rows = 128
    config.model.tokens, config.model.width, config.model.hidden, config.model.layers = 4, 16, 32, 1
    config.training.requests = 64
    config.training.data_parallel = parallel
    source = make_source(config.data.to_dict(), requests=64, candidates=1)
    trainer = make_trainer(config, source, [(0, 3e-3), (1, 1e-3)], warmup=1)
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


def test_eight_devices_equal_one():
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "equal" in result.stdout
