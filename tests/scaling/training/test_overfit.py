"""Every architecture, trained by the real step, learns 100 rows of the known-truth log by heart.

On fixed rows the lowest logloss is 0, so all of the initial loss is excess; below a tenth of it within 300 steps.
"""

import jax
import pytest
from ml_collections import ConfigDict

from recscale import models
from recscale.scaling.data import make_source
from recscale.scaling.training import get_config
from recscale.scaling.training.step import make_trainer

STEPS, RATE = 300, 1e-2


class OneBatch:
    """The first 100 requests, again and again."""

    on_device, total_rows, batches = False, 100, STEPS

    def __init__(self):
        inner = make_source({"name": "known_truth", "preset": "smoke"}, requests=100)
        self.schema, self.requests, self.candidates = inner.schema, 100, 1
        self.only = jax.jit(inner.batch)(0)


@pytest.fixture(scope="module")
def source():
    return OneBatch()


def small(name: str) -> ConfigDict:
    config = get_config(name)
    sizes = {"rankmixer": dict(width=32, hidden=64), "dlrm_mlp": dict(widths=(64, 32)), "dcnv2": {}}
    backbone = config.model.backbone if "backbone" in config.model else config.model
    for key, value in sizes.get(name.split("+")[-1], {}).items():
        backbone[key] = value
    config.training.optimizer = "adam"
    return config


@pytest.mark.parametrize("name", [*models.list_models(), "din+rankmixer"])
def test_overfits_a_hundred_rows(name, source):
    trainer = make_trainer(small(name), source, [(0, RATE)], warmup=1)
    state = trainer.fresh_state()
    losses = []
    for _ in range(STEPS):
        state, metrics = trainer.step(state, source.only)
        losses.append(metrics["logloss"][0, 0])
    losses = jax.device_get(losses)
    assert min(losses) < 0.1 * losses[0], f"{name}: {losses[0]:.4f} -> {min(losses):.4f}"
