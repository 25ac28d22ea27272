"""Which settings of a run table had their learning rate bracketed."""

import pandas as pd
import pytest

from recscale.scaling.records.runs import with_tuning


def runs(losses, status="done", group="a", examples=1000):
    """Two seeds for every rate: {rate: mean logloss}."""
    rows = [(rate, seed, loss) for rate, loss in losses.items() for seed in (0, 1)]
    return pd.DataFrame(
        {
            "group_id": group,
            "examples": examples,
            "lr_dense": [rate for rate, _, _ in rows],
            "seed": [seed for _, seed, _ in rows],
            "logloss": [loss + 0.01 * (2 * seed - 1) for _, seed, loss in rows],
            "status": status,
            "lr_trials": None,
            "lr_bracketed": None,
        }
    )


@pytest.mark.parametrize(
    ("losses", "bracketed"),
    [
        ({1e-3: 0.5, 3e-3: 0.4, 1e-2: 0.45}, True),
        ({1e-3: 0.4, 3e-3: 0.45, 1e-2: 0.5}, False),
        ({1e-3: 0.5, 3e-3: 0.45, 1e-2: 0.4}, False),
        ({1e-3: 0.5, 3e-3: 0.4}, False),
    ],
)
def test_the_best_rate_must_lie_inside(losses, bracketed):
    found = with_tuning(runs(losses))
    assert (found["lr_trials"] == len(losses)).all()
    assert (found["lr_bracketed"] == bracketed).all()


def test_settings_are_judged_one_by_one():
    inside, edge = {1e-3: 0.5, 3e-3: 0.4, 1e-2: 0.45}, {1e-3: 0.4, 3e-3: 0.41, 1e-2: 0.45}
    parts = [runs(inside), runs(edge, group="b"), runs(edge, examples=2000), runs({3e-3: 0.4}, group="c")]
    found = with_tuning(pd.concat(parts, ignore_index=True))
    assert found["lr_bracketed"].tolist() == [True] * 6 + [False] * 12 + [None] * 2
    assert found["lr_trials"].tolist() == [3] * 18 + [None] * 2


def test_a_rate_with_a_diverged_seed_was_tried_and_lost():
    table = runs({1e-3: 0.5, 3e-3: 0.4, 1e-2: 0.3})
    table.loc[5, ["status", "logloss"]] = ["diverged", None]
    assert with_tuning(table)["lr_bracketed"].all()


def test_nothing_is_said_while_runs_are_missing_or_without_a_metric():
    table = runs({1e-3: 0.5, 3e-3: 0.4, 1e-2: 0.45})
    table.loc[0, "status"] = "running"
    assert with_tuning(table)["lr_bracketed"].isna().all()
    pd.testing.assert_frame_equal(with_tuning(table, target="absent"), table)
