"""Whether a metric moves along an axis at all, in tables where another axis moves it too."""

import numpy as np
import pytest

from recscale.scaling.laws.judgement.diagnostics import trend


def grid(draw, fall, levels, missing=0.2, jitter=0.1):
    """Logarithms of seven sizes by `levels` amounts, sizes not met exactly, a share of the runs missing; a metric that
    falls with the size and by `fall` with the amount."""
    amounts, sizes = np.meshgrid(np.linspace(0, 4, levels), np.linspace(0, 6, 7), indexing="ij")
    kept = draw.permutation(amounts.size)[: round(amounts.size * (1 - missing))]
    axes = np.stack([sizes + jitter * draw.standard_normal(sizes.shape), amounts], axis=-1).reshape(-1, 2)[kept]
    noise = 0.02 * draw.standard_normal(len(axes))
    return axes, np.exp(-0.5 * axes[:, 0]) + fall * np.exp(-0.6 * axes[:, 1]) + noise


@pytest.mark.parametrize("levels", [5, 7])
def test_a_fall_is_seen_on_a_grid_with_runs_missing_and_noise_is_not(levels):
    draw = np.random.default_rng(levels)
    seen = {fall: np.zeros(2) for fall in (0.0, 1.0)}
    for _ in range(40):
        for fall, count in seen.items():
            axes, target = grid(draw, fall, levels)
            weights = draw.uniform(0.5, 1.0, len(target))
            count += [trend(axes, target, weights, at) < 0.05 for at in (0, 1)]
    assert seen[1.0].min() >= 38 and seen[0.0][0] == 40
    assert seen[0.0][1] <= 6  # of 40 at 5 %: more in one of 295 tries


def test_an_axis_that_moves_with_another_alone_has_no_trend_of_its_own():
    draw = np.random.default_rng(0)
    size = np.linspace(0, 6, 12)
    axes = np.stack([size, size + 0.01 * draw.standard_normal(12)], axis=1)
    target = 2 - 0.3 * size + 0.01 * draw.standard_normal(12)
    assert all(trend(axes, target, np.ones(12), at) > 0.05 for at in (0, 1))
    assert trend(axes[:, :1], target, np.ones(12), 0) < 0.01


def test_whole_grids_with_equal_weights_are_judged_by_level_means_alone():
    draw = np.random.default_rng(1)
    axes, target = grid(draw, 0.02, 6, missing=0.0, jitter=0.0)
    means = [target[axes[:, 1] == amount].mean() for amount in np.unique(axes[:, 1])]
    alone = trend(np.unique(axes[:, 1])[:, None], np.array(means), np.ones(6), 0)
    assert trend(axes, target, np.ones(len(target)), 1) == pytest.approx(alone, abs=1e-12)
