"""The comparison of budget policies: exact regret, paired differences, and a table that says what was run."""

import jax.numpy as jnp
import numpy as np
import pytest

from recscale.models.domains.budget import DecisionOptions, Response
from recscale.scaling.acceptance.budgets import PolicyTraining, compare_budgets, judge, train_policy
from recscale.scaling.data.budget_trial import BudgetTrialConfig, Scaling, draw_trial


def test_the_truth_has_no_regret_and_noise_has():
    trial = draw_trial(BudgetTrialConfig(), 3000, 0)
    budget = 0.2 * float(trial.true_cost[:, -1].sum())
    truth = judge(Response(trial.true_reward, trial.true_cost), trial, budget)
    assert 0 <= truth["regret"] < 1e-3 and truth["lost_share"] < 0.01
    noise = np.random.default_rng(0).uniform(size=trial.true_reward.shape)
    worse = judge(Response(noise, trial.true_cost), trial, budget)
    assert worse["regret"] > 10 * truth["regret"] and worse["aucc"] < truth["aucc"]


def test_training_learns_and_is_reproducible():
    config = BudgetTrialConfig()
    train, test = draw_trial(config, 4000, 0), draw_trial(config, 3000, 1)
    scaling, budget = Scaling.of(train.x), 0.2 * float(test.true_cost[:, -1].sum())
    training = PolicyTraining(epochs=8, warm=6, rate=1e-2)

    def run(estimator):
        model = train_policy(train, scaling, config.spend, DecisionOptions(estimator=estimator), training, seed=3)
        found = model.response(jnp.asarray(scaling(test.x)), jnp.asarray(config.spend))
        return judge(Response(*map(np.asarray, found)), test, budget)

    first = run("margin")
    assert first == run("margin") and first["lost_share"] < 0.5
    assert run(None)["regret"] != first["regret"]


@pytest.mark.slow
def test_the_table_has_every_method_beside_two_stages():
    found = compare_budgets(seeds=2, hidden=(4,), train_rows=1000, test_rows=1000,
                            training=PolicyTraining(epochs=3, warm=2))  # fmt: skip
    assert [row["method"] for row in found["rows"]] == ["two_stage", "nes", "margin", "softmax"]
    assert found["rows"][0]["minus_two_stage"] == 0
    for row in found["rows"]:
        assert row["regret"] >= 0 and row["low"] <= row["minus_two_stage"] <= row["high"]


def test_one_seed_has_no_interval():
    with pytest.raises(ValueError, match="2 or more for its interval"):
        compare_budgets(seeds=1)
