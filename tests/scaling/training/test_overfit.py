"""Every architecture, trained by the real step, learns 100 rows of the known-truth log by heart.

On fixed rows the lowest logloss is 0, so all of the initial loss is excess; below a tenth of it within 300 steps.
"""

import functools

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

    def __init__(self, preset):
        inner = make_source({"name": "known_truth", "preset": preset}, requests=100)
        self.schema, self.requests, self.candidates = inner.schema, 100, 1
        self.only = jax.jit(inner.batch)(0)


@pytest.fixture(scope="module")
def source_of():
    """The function that makes one of a preset, once."""
    return functools.cache(OneBatch)


def small(name: str) -> ConfigDict:
    config = get_config(name)
    sizes = {
        "rankmixer": dict(width=32, hidden=64),
        "ug_rankmixer": dict(width=32, hidden=64),
        "ug_tokenmixer_large": dict(width=32, hidden=32, layers=2),
        "msn": dict(width=32, hidden=64),
        "lmn": dict(widths=(64, 32), din_hidden=(16, 8)),
        "dlrm_mlp": dict(widths=(64, 32)),
        "wukong": dict(width=16, fm_tokens=4, linear_tokens=4, rank=4, hidden=32),
        "hiformer": dict(width=16, key_width=4, value_width=8, key_rank=8, value_rank=16, hidden=32),
        "autoint": dict(width=16, attention=32, layers=2),
        "dhen_lite": dict(width=16, rank=16, projections=2),
        "mmoe": dict(experts=4, hidden=32, expert_width=16, tower=(16,)),
        "mdl": dict(width=32, hidden=64),
        "domain_heads": dict(width=32, hidden=64, expert_width=16),
        "lemur": dict(tokens=8, width=32, hidden=64, layers=1, content_width=16, query_layers=1, document_layers=1),
        "hyformer": dict(width=32, hidden=64, keep=8, layers=1),
        "mixformer": dict(tokens=4, width=16, layers=1),
        "ui_mixformer": dict(tokens=4, width=16, layers=1),
    }
    backbone = config.model.backbone if "backbone" in config.model else config.model
    for key, value in sizes.get(name.split("+")[-1], {}).items():
        backbone[key] = value
    config.training.optimizer = "adam"
    return config


# At every run those of the quickstart; the others, and one with a history, in the slow stage.
QUICK = ("rankmixer", "dlrm_mlp")
NAMES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in [*models.list_models(), "din+rankmixer"]
]


@pytest.mark.parametrize("name", NAMES)
def test_overfits_a_hundred_rows(name, source_of):
    source = source_of("content" if name == "lemur" else "smoke")
    trainer = make_trainer(small(name), source, [(0, RATE)], warmup=1)
    state = trainer.fresh_state()
    losses = []
    for _ in range(STEPS):
        state, metrics = trainer.step(state, source.only)
        losses.append(float(metrics["logloss"][0, 0]))
        if losses[-1] < 0.1 * losses[0]:
            break
    assert min(losses) < 0.1 * losses[0], f"{name}: {losses[0]:.4f} -> {min(losses):.4f}"
