"""Published orderings judged on made-up run tables whose answers are known."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from recscale.scaling.report.orderings import Ordering, against_one, as_option, in_a_row, judge, lines, orderings_table


def table(losses, **columns):
    """Arm -> logloss per seed; every run finished, its rate inside those tried."""
    rows = [
        {"arm": arm, "seed": seed, "data_seed": 0, "match_id": None, "status": "done", "lr_bracketed": True}
        | {"logloss": loss, "auc": 1 - loss}
        for arm, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    return pd.DataFrame(rows).assign(**columns)


def verdict(rows, better="a", worse="b", **fields):
    fields = {"published": 0.1, "source": "table 1", "at": "1e9 parameters"} | fields
    (found,) = judge(rows, as_option([Ordering("x", better, worse, **fields)]))
    return found


def test_held_failed_and_noise_by_the_interval_of_paired_differences():
    noise = np.array([0.0, 0.3, 0.1, 0.2, 0.5])  # shared by the arms, so it cancels in pairs
    saved = np.array([0.010, 0.012, 0.009, 0.011, 0.008])
    rows = table({"a": 0.4 + noise, "b": 0.4 + noise + saved})
    found = verdict(rows)
    exact = stats.ttest_1samp(saved, 0).confidence_interval(0.95)
    assert found.outcome == "held" and found.pairs == 5
    np.testing.assert_allclose(found.interval, (exact.low, exact.high), rtol=1e-9)
    np.testing.assert_allclose((found.difference, found.auc), (saved.mean(), 100 * saved.mean()), rtol=1e-9)
    assert verdict(rows, "b", "a").outcome == "failed"
    assert verdict(table({"a": 0.4 + noise, "b": 0.4 + noise + saved - saved.mean()})).outcome == "inside noise"


def test_pairs_are_of_one_seed_whatever_the_order_of_rows():
    rows = table({"a": [0.1, 0.2, 0.3, 0.4], "b": [0.11, 0.21, 0.31, 0.41]})
    assert verdict(rows.sample(frac=1, random_state=1)).outcome == "held"
    fewer = rows[~((rows["arm"] == "b") & (rows["seed"] > 1))]
    assert verdict(fewer).outcome == "not judged" and "2 paired seeds, 3 are needed" in verdict(fewer).why


def test_an_ordering_may_name_the_loss_that_decides():
    rows = table({"a": [0.1, 0.2, 0.3], "b": [0.2, 0.3, 0.41]}).assign(rare=lambda t: -t["logloss"])
    assert verdict(rows).outcome == "held" and verdict(rows, metric="rare").outcome == "failed"
    gained = verdict(rows, metric="-rare")
    assert gained.outcome == "held" and gained.interval == pytest.approx(verdict(rows).interval)


def test_a_study_has_seeds_and_figures_alone():
    rows = table({"a": [0.1, 0.2, 0.3], "b": [0.2, 0.3, 0.41]})
    found = verdict(rows[["arm", "seed", "logloss"]])
    assert found.outcome == "held" and found.auc is None and found.pairs == 3
    assert lines([found])[1].endswith(", held") and "(+" not in lines([found])[1]


@pytest.mark.parametrize(
    "change, why",
    [
        ({"lr_bracketed": False}, "the rate of a was best at the lowest or highest tried"),
        ({"lr_bracketed": None}, "the rate of a was best at the lowest or highest tried"),
        ({"status": "diverged"}, "4 of 4 runs of a diverged"),
    ],
)
def test_an_unfair_or_unfinished_comparison_is_not_made(change, why):
    assert verdict(table({"a": [0.1, 0.2, 0.3, 0.4], "b": [0.2, 0.3, 0.4, 0.5]}, **change)).why == why


def test_what_cannot_be_compared_says_why():
    rows = table({"a": [0.1, 0.2, 0.3]})
    assert verdict(rows).why == "no run of b"
    lacking = verdict(rows, lacking="no convolutions here")
    assert lacking.outcome == "cannot be built" and lacking.why == "no convolutions here"
    with pytest.raises(ValueError, match="no column `arm`"):
        judge(rows.drop(columns="arm"), [])


def test_rankings_become_pairs_of_neighbours():
    row = in_a_row("r", {"a": 0.94, "b": 0.84, "c": 0.44}, "table 2", "5e8")
    assert [(o.better, o.worse, o.published) for o in row] == [("a", "b", 0.1), ("b", "c", 0.4)]
    above = against_one("x", "a", {"b": 0.2, "c": None}, "table 5", "4e9")
    assert [(o.id, o.better, o.published) for o in above] == [("x.b", "a", 0.2), ("x.c", "a", None)]


def test_the_lines_and_the_table_count_every_ordering():
    rows = table({"a": [0.1, 0.2, 0.3], "b": [0.2, 0.3, 0.41]})
    given = [*against_one("x", "a", {"b": 0.2, "c": None}, "table 5", "4e9"), Ordering("y", "b", "a", 0.1, "s", "t")]
    judged = judge(rows, as_option(given))
    shown = lines(judged)
    assert shown[-1] == "3 published orderings: 1 held, 1 not judged, 1 failed"
    assert "a above b" in shown[1] and "+0.2" in shown[1] and "direction" in shown[2]
    assert list(orderings_table(judged)["outcome"]) == ["held", "not judged", "failed"]
