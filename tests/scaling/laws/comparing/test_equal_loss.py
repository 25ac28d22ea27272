"""What one architecture needs of another's parameters for the same loss: the known share, and when nothing is said."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from recscale.scaling.laws import compare
from recscale.scaling.laws.comparing.compare import Interval
from recscale.scaling.laws.comparing.equal_loss import equal_loss


def ladder(share, noise=0.03, seeds=5, **columns):
    """Two architectures at seven matched sizes; the first needs `share` of the second's parameters."""
    rng = np.random.default_rng(3)
    rows = [
        dict(
            run_id=f"{name}-{k}-{s}", architecture=name, shape_id=f"{name}-{k}", match_id=str(k), seed=s, data_seed=0,
            status="done", dense_params=x, logloss=0.01 * (x / needed / 1e3) ** -0.7 * np.exp(noise * rng.normal()),
            decayed=True, dataset="known_truth", lr_bracketed=True, lr_trials=3,
        )
        for name, needed in (("thrifty", share), ("plain", 1.0))
        for k, x in enumerate(np.geomspace(1e3, 1e5, 7))
        for s in range(seeds)
    ]  # fmt: skip
    return pd.DataFrame(rows).assign(**columns)


def verdict(table):
    return equal_loss(compare(table, "thrifty", "plain", axis="dense_params", bootstrap=200))


@pytest.mark.parametrize(("share", "answer"), [(0.6, "yes"), (1.7, "no"), (1.0, "cannot tell")])
def test_the_share_is_found_and_decides(share, answer):
    found = verdict(ladder(share))
    assert found.answer == answer and found.middle.interval.low <= share <= found.middle.interval.high
    assert len(found.shares) == 3 and found.middle.value == pytest.approx(share, rel=0.1)


def test_nothing_is_said_on_what_it_does_not_rest_on():
    assert "paired seeds" in verdict(ladder(0.6, seeds=3)).reasons[0]
    found = verdict(ladder(0.6, lr_bracketed=None))
    assert found.answer == "cannot tell" and any("learning-rate" in reason for reason in found.reasons)


def test_an_interval_that_reaches_down_to_zero_leaves_the_share_open():
    found = compare(ladder(1.0), "thrifty", "plain", axis="dense_params", bootstrap=200)
    wide = [dataclasses.replace(one, interval=Interval(0.0, 2.0, "made up")) for one in found.multipliers]
    verdict = equal_loss(dataclasses.replace(found, multipliers=wide))
    assert verdict.answer == "cannot tell" and verdict.middle.interval.high == np.inf
