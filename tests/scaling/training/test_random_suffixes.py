"""Training on random suffixes of the histories: what changes, what does not, and what identifies such a run."""

import numpy as np
import pytest

from recscale.scaling.data import make_source
from recscale.scaling.training import get_config, run_id
from recscale.scaling.training.step import make_trainer


def config_of(alpha=0.0, beta=0.0):
    config = get_config("sum_pooling", "known_truth")
    config.data.preset, config.data.holdout_rows = "smoke", 64
    config.model.backbone.widths = (8,)
    config.training.suffix_alpha, config.training.suffix_beta = alpha, beta
    return config


@pytest.fixture(scope="module")
def source():
    return make_source({"name": "known_truth", "preset": "smoke", "holdout_rows": 64}, requests=64)


@pytest.mark.slow
def test_only_training_sees_shorter_histories(source):
    found = {}
    for alpha in (0.0, 0.5):
        trainer = make_trainer(config_of(alpha, alpha), source, [(0, 1e-3), (0, 1e-3)], warmup=1)
        state = trainer.fresh_state()
        logits = trainer.holdout_logits(state)
        losses = []
        for _ in range(2):
            state, metrics = trainer.step(state)
            losses.append(np.asarray(metrics["loss"]))
        assert np.isfinite(losses).all()
        np.testing.assert_array_equal(losses[0][0], losses[0][1])  # replicas share every batch, cuts included
        found[alpha] = (np.stack(losses), logits)
    np.testing.assert_array_equal(found[0.0][1], found[0.5][1])
    assert (found[0.0][0] != found[0.5][0]).all()


def test_runs_without_suffixes_keep_their_id():
    plain = config_of()
    with plain.unlocked():
        del plain.training.suffix_alpha, plain.training.suffix_beta
    assert run_id(plain) == run_id(config_of()) != run_id(config_of(0.5, 0.5))
    assert run_id(config_of(0.5, 0.5)) != run_id(config_of(0.5, 0.7))


def test_half_a_setting_is_refused(source):
    with pytest.raises(ValueError, match="suffix_alpha is 0.5 and suffix_beta 0.0"):
        make_trainer(config_of(0.5, 0.0), source, [(0, 1e-3)], warmup=1)
