"""A model with a bank in the real step: written once a step, restored to the same bits, updated in place."""

import jax
import numpy as np
import pytest

from recscale.scaling.data import make_source
from recscale.scaling.training import get_config
from recscale.scaling.training.checkpoints import Checkpoints
from recscale.scaling.training.step import make_trainer

# A step of this model takes half a minute to compile. What it does is checked fast in tests/models/domains.
pytestmark = pytest.mark.slow

SMALL = dict(tokens=8, width=8, hidden=8, layers=1, content_width=8, encoder_heads=2, encoder_hidden=8,
             query_layers=1, document_layers=1, reader_layers=1)  # fmt: skip


def trainer_of(blocks=2, **flags):
    config = get_config("lemur", "known_truth")
    config.data.preset, config.data.holdout_rows = "smoke", 16
    config.data.overrides = dict(content_tokens=3, query_tokens=2, blocks=blocks, history_max=4, quanta=8)
    config.model.update(SMALL | flags)
    source = make_source(config.data.to_dict(), requests=16)
    return make_trainer(config, source, [(0, 1e-2)], warmup=1)


@pytest.fixture(scope="module")
def trainer():
    return trainer_of()


def run(trainer, state, steps):
    for _ in range(steps):
        state, metrics = trainer.step(state)
    return state, metrics


def test_every_step_writes_a_sample_and_evaluation_nothing(trainer):
    state, metrics = run(trainer, trainer.fresh_state(), 3)
    bank = state.other["bank"]
    steps = np.asarray(bank["steps"][...])[0]
    assert set(steps) <= {-1, 0, 1, 2} and (steps == 2).sum() == 4 and state.other["now"][...].tolist() == [3]
    assert np.isfinite(float(metrics["stats"]["bank/coverage_history"][0]))
    before = jax.tree.map(np.array, state.other)
    trainer.holdout_logits(state)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, state.other))


def test_a_stopped_run_goes_on_to_the_same_bits(trainer, tmp_path):
    whole, _ = run(trainer, trainer.fresh_state(), 4)
    half, _ = run(trainer, trainer.fresh_state(), 2)
    first = Checkpoints(tmp_path)
    first.save(2, {"step": 2, "has_trunk": False}, half, None)
    first.close()
    _, restored, _ = Checkpoints(tmp_path).restore(trainer.fresh_state())
    again, _ = run(trainer, restored, 2)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole), jax.device_get(again))


@pytest.mark.parametrize("predictor", ["none", "lstm"])
def test_the_whole_step_needs_no_more_memory_for_more_rows(predictor):
    def needed(blocks):
        trainer = trainer_of(blocks, predictor=predictor)
        return trainer.program.lower(trainer.state_shapes(), None).compile().memory_analysis().temp_size_in_bytes

    assert needed(2048) <= needed(64) + 4096
