"""The comparison of budget policies: exact regret, paired differences, and a table that says what was run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.models.domains.budget import Response
from recscale.scaling.acceptance.budgets import (
    METHODS,
    Policies,
    PolicyTraining,
    compare_budgets,
    judge,
    rows_of,
)
from recscale.scaling.data.budget_trial import BudgetTrialConfig, Scaling, draw_trial


def test_the_truth_has_no_regret_and_noise_has():
    trial = draw_trial(BudgetTrialConfig(curvature=0.5), 3000, 0)
    budget = 0.2 * float(trial.true_cost[:, -1].sum())
    truth = judge(Response(trial.true_reward, trial.true_cost), trial, budget)
    assert 0 <= truth["regret"] < 1e-3 and truth["lost_share"] < 0.01
    assert truth["aucc_low"] < truth["aucc"] < truth["aucc_high"]
    noise = np.random.default_rng(0).uniform(size=trial.true_reward.shape)
    worse = judge(Response(noise, trial.true_cost), trial, budget)
    assert worse["regret"] > 10 * truth["regret"] and worse["aucc"] < truth["aucc"]


def test_seeds_and_weights_train_side_by_side_as_they_would_alone():
    config, training = BudgetTrialConfig(), PolicyTraining(epochs=3, warm=2, rate=1e-2)
    trials = [draw_trial(config, 1000, seed) for seed in (0, 1)]
    rows = [rows_of(trial, Scaling.of(trial.x)) for trial in trials]
    together = Policies(rows, config.spend, training, (0, 1)).train(METHODS["margin"], (0.0, 2.0))
    alone = Policies(rows[1:], config.spend, training, (1,)).train(METHODS["margin"], (2.0,))
    for both, one in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(both[1, 1], one[0, 0], rtol=1e-4, atol=1e-5)
        assert np.abs(both[1, 0] - both[1, 1]).max() > 1e-3


@pytest.mark.slow
def test_prediction_alone_learns():
    config, training = BudgetTrialConfig(), PolicyTraining(epochs=8, warm=6, rate=1e-2)
    train, test = draw_trial(config, 4000, 0), draw_trial(config, 3000, 1)
    scaling = Scaling.of(train.x)
    policies = Policies([rows_of(train, scaling)], config.spend, training, (3,))
    params = policies.train(METHODS["two_stage"], (0.0,))
    late = jax.tree.map(lambda x: jnp.asarray(x)[None], rows_of(test, scaling))
    response = jax.tree.map(lambda x: np.asarray(x[0, 0]), policies.responses(params, late)[1])
    assert judge(response, test, 0.2 * float(test.true_cost[:, -1].sum()))["lost_share"] < 0.5


@pytest.mark.slow
def test_the_table_has_every_method_beside_two_stages():
    rows, training = dict(train_rows=1000, test_rows=1000, choice_rows=1000), PolicyTraining(epochs=3, warm=2)
    found = compare_budgets(seeds=2, truths=((0.0, 4),), alphas=(1.0,), training=training, **rows)
    assert [row["method"] for row in found["rows"]] == list(METHODS)
    assert found["rows"][0]["saved"] == 0
    for row in found["rows"]:
        assert row["regret"] >= 0 and row["low"] <= row["saved"] <= row["high"]


def test_one_seed_has_no_interval():
    with pytest.raises(ValueError, match="2 or more for its interval"):
        compare_budgets(seeds=1)
