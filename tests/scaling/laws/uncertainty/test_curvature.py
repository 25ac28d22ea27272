"""Variances from curvature against closed forms: a mean of rows in equal groups, and a line through group means."""

import numpy as np
import pytest
from scipy import stats

from recscale.scaling.laws.uncertainty.curvature import Grouping, Spread, axis_levels, groupings

GROUPS, EACH = 6, 4
CODES = np.repeat(np.arange(GROUPS), EACH)
N = GROUPS * EACH


@pytest.fixture(scope="module")
def residual():
    rng = np.random.default_rng(0)
    found = rng.standard_normal(N) + np.repeat(rng.standard_normal(GROUPS), EACH)
    return found - found.mean()


def f95(spare):
    return stats.f.ppf(0.95, 1, spare)


@pytest.mark.parametrize("between", [False, True])
def test_of_a_mean(residual, between):
    """Rows independent; means of clusters independent; and the sandwich of group sums with leverage EACH / N."""
    spread = Spread(np.ones((N, 1)), residual, [Grouping(CODES, np.asarray([between]), True)])
    variance = residual @ residual / (N - 1)
    sums = residual.reshape(GROUPS, EACH).sum(axis=1)
    means = sums @ sums / EACH / (GROUPS - 1)
    sandwich = np.sum(sums**2) * (1 - EACH / N) ** -1.5 / N**2
    assert spread.variance == pytest.approx(variance)
    assert spread.noise == pytest.approx(max(variance, means) if between else variance)
    options = [variance / N * f95(N - 1), sandwich * f95(GROUPS - 1)] + [means / N * f95(GROUPS - 1)] * between
    assert spread.squared_reach(np.ones(1)) == pytest.approx(max(options))
    assert spread.cut(0) == pytest.approx(max(options) * N)
    assert spread.squared_reach(np.asarray([2.0])) == pytest.approx(4 * max(options))


def test_each_of_the_three_variances_can_be_the_widest():
    alternating = np.tile([1.0, -1.0], N // 2)  # sums of groups vanish: rows decide
    groups = [Grouping(CODES, np.asarray([True]), True)]
    rows = Spread(np.ones((N, 1)), alternating, groups)
    assert rows.squared_reach(np.ones(1)) == pytest.approx(N / (N - 1) / N * f95(N - 1))
    shared = np.repeat([1.0, -1.0], N // 2)  # groups say the same in all their rows
    spread = Spread(np.ones((N, 1)), shared, groups)
    sandwich = GROUPS * EACH**2 * (1 - EACH / N) ** -1.5 / N**2
    means = EACH * GROUPS / (GROUPS - 1) / N
    assert spread.squared_reach(np.ones(1)) == pytest.approx(max(sandwich, means) * f95(GROUPS - 1))


def test_a_line_spends_as_many_groups_as_it_has_parameters_between_them(residual):
    x = np.repeat(np.linspace(-1, 1, GROUPS), EACH)
    design = np.column_stack([np.ones(N), x])
    residual = residual - design @ np.linalg.lstsq(design, residual, rcond=None)[0]
    group = Grouping(CODES, np.asarray([True, True]), True)
    assert group.count == GROUPS and group.spare(np.asarray([0.0, 1.0])) == GROUPS - 2
    assert Grouping(CODES, np.asarray([True, False]), True).spare(np.asarray([0.0, 1.0])) == GROUPS - 1
    spread = Spread(design, residual, [group])
    assert spread.variance == pytest.approx(residual @ residual / (N - 2))
    inverse = np.linalg.inv(design.T @ design)
    np.testing.assert_allclose(spread.inverse, inverse, rtol=1e-9, atol=1e-12)
    sums = residual.reshape(GROUPS, EACH).sum(axis=1)
    means = sums @ sums / EACH / (GROUPS - 2)
    scores = []
    for g in range(GROUPS):
        own = design[CODES == g]
        value, basis = np.linalg.eigh(np.eye(EACH) - own @ inverse @ own.T)
        scores.append(own.T @ (basis @ (value**-0.75 * (basis.T @ residual[CODES == g]))))
    slope = np.asarray([0.0, 1.0])
    sandwich = np.sum((np.asarray(scores) @ inverse @ slope) ** 2)
    own = slope @ inverse @ slope
    expected = max(own * spread.variance * f95(N - 2), sandwich * f95(GROUPS - 2), own * means * f95(GROUPS - 2))
    assert spread.squared_reach(slope) == pytest.approx(expected, rel=1e-6)


def test_a_prior_adds_to_the_curvature(residual):
    spread = Spread(np.ones((N, 1)), residual, [Grouping(CODES, np.asarray([False]), True)], np.asarray([12.0]))
    assert spread.inverse[0, 0] == pytest.approx(1 / (N + 12))


def test_levels_shared_by_clusters_are_a_grouping_of_their_own():
    """Sizes are constant in a cluster; amounts of data are shared by all of them."""
    sizes, data = (part.ravel() for part in np.meshgrid(np.arange(4.0), np.arange(3.0), indexing="ij"))
    axes, codes = np.column_stack([sizes, data]), sizes.astype(int)
    clusters, shared = groupings(("N", "D"), (("N",), ("D",), ("N", "D"), ()), axes, codes)
    assert clusters.clusters and clusters.between.tolist() == [True, False, False, True]
    assert not shared.clusters and shared.count == 3 and shared.between.tolist() == [False, True, False, True]
    np.testing.assert_array_equal(shared.codes, data)
    (alone,) = groupings(("N",), (("N",), ()), sizes[:, None], codes)
    assert alone.clusters and alone.between.all()
    np.testing.assert_array_equal(axis_levels(np.asarray([3.0, 1.0, 3.0 + 1e-12, 2.0])), [2, 0, 2, 1])
