"""The synthetic trial of spends: what is drawn has the chances that are kept, and nothing leaks into features."""

import numpy as np
import pytest
from scipy.special import logit

from recscale.scaling.data.budget_trial import BudgetTrialConfig, Scaling, draw_trial, feature_columns


def test_what_is_drawn_has_the_chances_that_are_kept():
    config = BudgetTrialConfig(hidden=3)
    trial, rows = draw_trial(config, 50_000, 0), np.arange(50_000)
    assert trial.x.shape == (50_000, 5)
    for drawn, true in ((trial.reward, trial.true_reward), (trial.cost, trial.true_cost)):
        error = drawn - true[rows, trial.arm]
        assert abs(error.mean()) < 4 * error.std() / np.sqrt(50_000)
    assert not trial.true_cost[:, 0].any() and (np.diff(trial.true_cost, n=2, axis=1) > 0).all()
    assert (np.diff(trial.true_reward.mean(axis=0), n=2) < 0).all()
    np.testing.assert_allclose(trial.propensity, 0.25, atol=0.01)
    again = draw_trial(config, 50_000, 0)
    np.testing.assert_array_equal(again.arm, trial.arm)
    assert (draw_trial(config, 50_000, 1).arm != trial.arm).any()


def test_curvature_bends_a_trial_that_is_straight_without_it():
    straight, bent = (draw_trial(BudgetTrialConfig(curvature=c), 20_000, 0) for c in (0.0, 1.0))
    np.testing.assert_array_equal(straight.x, bent.x)
    np.testing.assert_array_equal(straight.arm, bent.arm)

    def left(trial):
        """Share of the variance of what the dearest arm adds to the logit that no line in x explains."""
        lift = logit(trial.true_reward[:, -1]) - logit(trial.true_reward[:, 0])
        x = np.c_[trial.x, np.ones(len(lift))]
        return (lift - x @ np.linalg.lstsq(x, lift)[0]).var() / lift.var()

    assert left(straight) < 1e-9 and left(bent) == pytest.approx(0.5, abs=0.05)


def test_scaling_knows_training_rows_alone():
    train, test = draw_trial(BudgetTrialConfig(), 100, 0).x, draw_trial(BudgetTrialConfig(), 50, 1).x
    before = Scaling.of(train)
    test += 100.0
    np.testing.assert_array_equal(Scaling.of(train).mean, before.mean)
    np.testing.assert_allclose(before(train).mean(axis=0), 0, atol=1e-6)
    assert before(test).mean() > 50


def test_what_happens_after_the_treatment_is_no_feature():
    columns = ["f0", "f1", "treatment", "exposure", "visit", "conversion"]
    assert feature_columns(columns) == ["f0", "f1"]
    with pytest.raises(ValueError, match="exposure happens after the treatment"):
        feature_columns(columns, ["f0", "exposure"])
    with pytest.raises(ValueError, match="no column f9"):
        feature_columns(columns, ["f9"])
    with pytest.raises(ValueError, match="expected a shown feature and two arms"):
        BudgetTrialConfig(features=2, hidden=2)
