"""Noise between seeds: a slope in the metric from three sizes on, no less."""

import numpy as np
import pandas as pd
import pytest

from recscale.scaling.laws.uncertainty.seed_noise import seed_noise


def found(means, sds):
    """Of sizes with three seeds each, whose values have exactly these means and standard deviations."""
    rows = [(size, seed) for size in range(len(means)) for seed in range(3)]
    y = np.array([means[size] + sds[size] * (seed - 1.0) for size, seed in rows])
    return seed_noise(pd.DataFrame(rows, columns=["size", "seed"]), ["size"], y)


def test_the_noise_follows_the_metric_from_three_sizes_on():
    noise = found([0.4, 0.5, 0.8], [0.04, 0.05, 0.08])
    assert noise is not None and (noise.sizes, noise.repeats) == (3, 9) and noise.slope == pytest.approx(1.0)
    assert noise.sd(np.array([1.0])) / noise.sd(np.array([0.5])) == pytest.approx(2.0)


def test_two_sizes_give_one_level_and_one_gives_none():
    noise = found([0.4, 0.8], [0.04, 0.08])
    assert noise is not None and noise.slope == 0.0 and noise.sd(np.array([0.1])) == noise.sd(np.array([9.0]))
    assert found([0.4], [0.04]) is None


def test_sizes_of_equal_metrics_have_one_level():
    noise = found([0.5, 0.5, 0.5], [1 / 32, 1 / 16, 1 / 8])
    assert noise is not None and noise.slope == 0.0
