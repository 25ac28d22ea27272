"""Refits that are laid out by hand: profiles of a straight line, resamples, redrawn metrics, noise between seeds."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import special

from recscale.scaling.laws.fitting.problem import make_problem, residuals
from recscale.scaling.laws.fitting.solver import Batch, Solution
from recscale.scaling.laws.forms.registry import get
from recscale.scaling.laws.uncertainty import bootstrap, profile, streams
from recscale.scaling.laws.uncertainty.curvature import Grouping, Spread
from recscale.scaling.laws.uncertainty.seed_noise import SeedNoise, seed_noise

U = np.linspace(-2, 3, 15)


def line(noise=0.02, seed=0):
    """y = .5 - .1 u with noise, as a problem of plain residuals."""
    y = 0.5 - 0.1 * U + noise * np.random.default_rng(seed).standard_normal(15)
    return make_problem(get("log_linear", real=True), U[:, None], y, kind="plain", unit=0.5), y


def exact(problem, starts, *, free=None, control=None):
    """Refits of a straight line as least squares has them: free entries are solved, held ones stay."""
    scale = problem.unit / np.sqrt(problem.weights)
    design = np.stack([np.ones_like(U), -U], axis=1) / scale[:, None]
    target, ends, objective = problem.y / scale, [], []
    for start, own in zip(starts, np.ones_like(starts) if free is None else free, strict=True):
        phi, open_ = start.copy(), own > 0
        phi[open_] = np.linalg.lstsq(design[:, open_], target - design[:, ~open_] @ phi[~open_], rcond=None)[0]
        ends.append(phi)
        objective.append(0.5 * np.sum((design @ phi - target) ** 2))
    none = np.zeros(len(starts))
    return Batch(np.array(ends), np.array(objective), none.astype(int), none)


GROUP = [Grouping(np.arange(15), np.ones(2, bool), True)]


def solution_at(phi, ends=None):
    phi = np.asarray(phi, float)
    ends = np.atleast_2d(phi if ends is None else np.asarray(ends, float))
    none = np.zeros(len(ends))
    return Solution(phi, 1.0, 1, 0.0, 1.0, Batch(ends, none, none.astype(int), none))


def test_profiles_of_a_straight_line_are_its_regression(monkeypatch):
    monkeypatch.setattr(profile, "refine", exact)
    problem, y = line()
    weights = np.linspace(0.5, 1.5, 15)
    problem = replace(problem, weights=weights)
    told, squares = profile.profiles(problem, solution_at([0.5, 0.1]), ["b", "a"], GROUP)
    slope, level = np.polyfit(U, y, 1, w=np.sqrt(weights))
    assert squares.phi == pytest.approx([level, -slope])
    left = (y - level - slope * U) / 0.5 * np.sqrt(weights)
    assert squares.rss == pytest.approx(np.sum(left**2)) and squares.spread.variance == pytest.approx(squares.rss / 13)
    assert np.all(np.isinf(squares.problem.delta))
    design = np.stack([np.ones(15), -U], axis=1) / 0.5 * np.sqrt(weights)[:, None]
    inverse = np.linalg.inv(design.T @ design)
    for name, at in (("a", 0), ("b", 1)):
        found = told[name]
        # The objective is quadratic: its roots are half-widths of the curvature.
        half = np.sqrt(squares.spread.squared_reach(np.eye(2)[at]))
        assert found.interval == pytest.approx((squares.phi[at] - half, squares.phi[at] + half), rel=1e-6)
        assert found.cut == pytest.approx(half**2 / inverse[at, at]) and found.best == pytest.approx(squares.phi[at])
        away = np.array([0.4, 0.75, 0.95, 1.1, 1.3, 1.7, 2.5, 4.0, 8.0, 20.0])
        away = np.concatenate([-away[::-1], away])
        np.testing.assert_allclose(found.values, squares.phi[at] + half * away)
        np.testing.assert_allclose(found.rise, found.cut * away**2, rtol=1e-6)
        assert found.closed and found.name == name


def test_priors_add_to_the_curvature_of_a_fit():
    """Of a parameter searched in the logarithm, a normal prior bends by the square of its value."""
    y = 0.4 + 0.1 * np.exp(-0.3 * U)
    pull = np.array([[3.0, 0.0, 5.0], [0.5, 0.2, 0.7], [1.0, 0.0, 0.0]])
    problem = replace(make_problem(get("power_offset"), U[:, None], y), pull=pull)
    phi, groups = np.log([0.4, 0.1, 0.3]), [Grouping(np.arange(15), np.ones(3, bool), True)]
    found = profile._squares(problem, phi, 0.01, groups)
    slopes = profile.jacobian(problem, phi)
    expected = np.linalg.inv(slopes.T @ slopes + np.diag([3.0 * 0.16, 0.0, 5.0]))
    np.testing.assert_allclose(found.spread.inverse, expected, rtol=1e-6)
    assert found.rss == 0.01 and found.phi is phi


def test_an_end_beyond_the_search_is_open(monkeypatch):
    monkeypatch.setattr(profile, "refine", exact)
    problem, _ = line()
    best = profile.least_squares(problem, np.array([[0.5, 0.1]]), GROUP).phi[1]
    for side, ends in ((-1, (-np.inf, None)), (1, (None, np.inf))):
        bound = {"low" if side < 0 else "high": np.array([side * 1e6, best + side * 1e-4])}
        told, _ = profile.profiles(replace(problem, **bound), solution_at([0.5, 0.1]), ["b"], GROUP)
        found = told["b"]
        assert (
            not found.closed and [a == b or b is None for a, b in zip(found.interval, ends, strict=True)] == [True] * 2
        )
        assert (
            np.isfinite(found.interval).sum() == 1 and np.abs(found.values - best)[:: 19 if side < 0 else -19][0] < 2e-4
        )
    for interval, closed in (((0.0, 1.0), False), ((0.1, np.inf), False), ((-np.inf, 1.0), False), ((-0.1, 1.0), True)):
        nothing = np.zeros(0)
        assert profile.Profile("b", nothing, nothing, 4.0, interval, 1.0).closed == closed


def test_profiles_of_logarithms_are_told_in_natural_values(monkeypatch):
    """y = A x^-alpha, fitted by a straight line in the logarithm with alpha = e^phi."""
    rng = np.random.default_rng(0)
    form, y = get("power"), 0.5 * np.exp(-0.3 * U + 0.01 * rng.standard_normal(15))
    problem = make_problem(form, U[:, None], y)

    def refine(which, starts, *, free=None, control=None):
        ends = []
        for start, own in zip(starts, np.ones_like(starts) if free is None else free, strict=True):
            slope = np.exp(start[1]) if own[1] == 0 else None
            level = start[0] if own[0] == 0 else None
            if slope is None:
                slope = -(np.polyfit(U, np.log(y), 1)[0] if level is None else U @ (np.log(y) - level) / (U @ U))
            if level is None:
                level = np.mean(np.log(y) + slope * U)
            ends.append([level, np.log(slope)])
        objective = [0.5 * np.sum(residuals(which, np.array(phi)) ** 2) for phi in ends]
        none = np.zeros(len(ends))
        return Batch(np.array(ends), np.array(objective), none.astype(int), none)

    monkeypatch.setattr(profile, "refine", refine)
    told, squares = profile.profiles(problem, solution_at(np.log([0.5, 0.3])), ["alpha"], GROUP)
    slope = -np.polyfit(U, np.log(y), 1)[0]
    # The rise of the sum is quadratic in alpha itself.
    half = np.sqrt(told["alpha"].cut / np.sum((U - U.mean()) ** 2))
    assert told["alpha"].best == pytest.approx(slope)
    assert told["alpha"].interval == pytest.approx((slope - half, slope + half), rel=1e-4)
    far = replace(problem, low=np.array([-20.0, np.log(slope) - 1e-3]))
    assert profile.profiles(far, solution_at(np.log([0.5, 0.3])), ["alpha"], GROUP)[0]["alpha"].interval[0] == 0.0


def test_points_are_refitted_from_their_neighbours_until_none_gains(monkeypatch):
    """A solver that only finds the basin in which it starts: of two, told by the sign of the level's entry."""

    def two_basins(problem, starts, *, free=None, control=None):
        found = exact(problem, starts, free=free, control=control)
        # Far above the optimum of the slope, only starts that were marked there reach the lower objective.
        far = starts[:, 1] > 0.105
        marked = starts[:, 0] > 0.505
        lucky = far & (starts[:, 1] < 0.107)
        phi = found.phi.copy()
        phi[far, 0] = np.where(marked | lucky, 0.51, 0.5)[far]
        objective = found.objective * np.where(far & ~marked & ~lucky, 1.5, 1.0)
        return Batch(phi, objective, found.iterations, found.gradient)

    monkeypatch.setattr(profile, "refine", two_basins)
    problem, _ = line(noise=0.001)
    squares = profile.least_squares(problem, np.array([[0.5, 0.1]]), GROUP)
    cuts = np.array([squares.spread.cut(1) * 400])
    values, phi, rise = profile._evaluated(squares, np.array([1]), cuts)
    expected = exact(problem, np.column_stack([np.full(20, 0.5), values[0]]), free=np.tile([1.0, 0.0], (20, 1)))
    reached = values[0] > 0.107
    assert reached.any() and np.any((values[0] > 0.105) & (values[0] < 0.107))
    np.testing.assert_allclose(rise[0], 2 * expected.objective - squares.rss, rtol=1e-9, atol=1e-15)
    assert np.all(phi[0, reached, 0] == 0.51) and phi.shape == (1, 20, 2)


class Refits:
    """Stands in for the solver: notes its calls; ends are the starts plus what was laid out, with these objectives."""

    def __init__(self, monkeypatch, *objectives):
        self.calls, self.objectives = [], list(objectives)
        monkeypatch.setattr(bootstrap, "refine", self)

    def __call__(self, problem, starts, **options):
        objective = self.objectives.pop(0) if self.objectives else np.ones(len(starts))
        self.calls.append({"starts": starts, **options})
        return Batch(starts + 1.0, np.asarray(objective, float), np.zeros(len(starts), int), np.zeros(len(starts)))


def test_resamples_weigh_whole_clusters_and_the_better_refit_counts(monkeypatch):
    problem, codes = replace(line()[0], weights=np.linspace(1, 2, 15)), np.repeat(np.arange(5), 3)
    solution = solution_at([0.5, 0.1], [[5.0, 5.0], [9.0, 9.0]])
    refits = Refits(monkeypatch, [1.0, 2.0, 3.0, 4.0], [1.0, 1.9, np.nan, 5.0])
    found = bootstrap.bootstrap(problem, solution, codes, 4, 7)
    warm, other = refits.calls
    np.testing.assert_array_equal(warm["starts"], np.tile(solution.phi, (4, 1)))
    away = np.abs(other["starts"][:, :1] - [5.0, 9.0]).min(axis=1)
    assert np.all(away < 1.5) and np.all(away > 0)
    expected = np.where([[False], [True], [False], [False]], other["starts"], warm["starts"]) + 1
    np.testing.assert_array_equal(found, expected)
    for call in refits.calls:
        counts = call["weights"] / problem.weights
        assert np.allclose(counts, counts.round()) and np.allclose(counts.sum(axis=1), 15)
        assert np.allclose(counts[:, ::3], counts[:, 1::3]) and call["control"] is bootstrap.WARM
    own = np.arange(10).reshape(2, 5)
    refits = Refits(monkeypatch)
    found = bootstrap.bootstrap(problem, solution, codes, 99, 7, counts=own, weights=np.full(15, 2.0), restart=False)
    (only,) = refits.calls
    np.testing.assert_array_equal(only["weights"], 2.0 * own[:, codes])
    np.testing.assert_array_equal(found, np.tile(solution.phi + 1, (2, 1)))
    assert only["control"] is bootstrap.WARM


def test_metrics_are_redrawn_with_the_noise_of_seeds(monkeypatch):
    noise = SeedNoise(np.log(0.02), 0.0, 3, 9)
    solution = solution_at([0.5, 0.1])
    refits = Refits(monkeypatch)
    problem, _ = line()
    bootstrap.seed_bootstrap(problem, solution, noise, 4000, 3)
    fitted = 0.5 - 0.1 * U
    left = refits.calls[0]["targets"] - fitted
    assert left.shape == (4000, 15) and left.std() == pytest.approx(0.02, rel=0.02) and abs(left.mean()) < 1e-3
    np.testing.assert_array_equal(refits.calls[1]["targets"], refits.calls[0]["targets"])
    refits = Refits(monkeypatch)
    logs = make_problem(get("power"), U[:, None], np.exp(-U))
    bootstrap.seed_bootstrap(logs, solution_at(np.log([1.0, 1.0])), replace(noise, intercept=np.log(9.0)), 400, 3)
    redrawn = refits.calls[0]["targets"] + U
    assert redrawn.min() == pytest.approx(np.log(1e-3)) and redrawn.max() > np.log(9.0)


def test_every_cluster_is_left_out_once(monkeypatch):
    refits, codes = Refits(monkeypatch), np.repeat(np.arange(5), 3)
    problem = replace(line()[0], weights=np.linspace(1, 2, 15))
    found = bootstrap.jackknife(problem, solution_at([0.5, 0.1]), codes)
    np.testing.assert_array_equal(refits.calls[0]["weights"], problem.weights * (codes != np.arange(5)[:, None]))
    np.testing.assert_array_equal(found, np.tile([1.5, 1.1], (5, 1)))
    assert refits.calls[0]["control"] is bootstrap.WARM


def test_noise_between_seeds_is_unbiased_in_the_logarithm():
    """Sizes of 2, 3 and 5 seeds, and rows of one seed that count once."""
    rng, rows = np.random.default_rng(0), []
    counts, levels = (2, 3, 5, 1), (0.4, 0.5, 0.8, 0.9)
    for size, (count, level) in enumerate(zip(counts, levels, strict=True)):
        rows += [(size, s, level + 0.05 * rng.standard_normal()) for s in range(count)]
    frame = pd.DataFrame(rows, columns=["size", "seed", "y"])
    found = seed_noise(frame, ["size"], frame.y.to_numpy())
    groups = [frame.y[frame["size"] == k].to_numpy() for k in range(3)]
    free = np.array([1.0, 2.0, 4.0])
    means, variances = (np.array([f(g) for g in groups]) for f in (np.mean, lambda g: g.var(ddof=1)))
    log_sd = 0.5 * (np.log(variances) - special.digamma(free / 2) + np.log(free / 2))
    slope, level = np.polyfit(np.log(means), log_sd, 1, w=np.sqrt(free))
    assert (found.slope, found.intercept) == pytest.approx((slope, level)) and (found.sizes, found.repeats) == (3, 10)
    assert found.sd(np.array([-0.5])) == pytest.approx(np.exp(level + slope * np.log(0.5)))
    twice = pd.concat([frame, frame.iloc[:2]])
    assert seed_noise(twice, ["size"], twice.y.to_numpy()) == found
    assert seed_noise(frame.drop(columns="seed"), ["size"], frame.y.to_numpy()) is None
    two = frame[frame["size"] < 2]
    flat = seed_noise(two, ["size"], two.y.to_numpy())
    assert flat.slope == 0.0 and flat.intercept == pytest.approx(np.average(log_sd[:2], weights=free[:2]))
    same = frame.assign(y=np.where(frame["size"] == 2, 0.8 * (1 + 1e-13 * frame.seed), frame.y))
    assert seed_noise(same, ["size"], same.y.to_numpy()) == flat  # scatter of rounding is none


def test_residuals_of_rounding_still_leave_a_variance():
    spread = Spread(np.ones((6, 1)), np.full(6, 1e-12), [Grouping(np.arange(6), np.array([False]), True)])
    assert spread.variance == 1e-18 == spread.noise and spread.rows_spare == 5
    assert Spread(np.ones((1, 1)), np.ones(1), []).rows_spare == 1
    # A parameter that the rows say nothing about keeps a large variance.
    blind = Spread(np.column_stack([np.ones(6), np.zeros(6)]), np.ones(6), [])
    assert blind.inverse[0, 0] == pytest.approx(1 / 6) and blind.inverse[1, 1] > 1e15


@pytest.mark.parametrize(("ratio", "warned"), [(0.79, True), (0.8, False), (1.6, False), (1.61, True)])
def test_a_fitted_variance_far_from_the_measured_one_is_told(ratio, warned):
    assert bool(streams.v_warning(ratio * 0.5, 0.5)) is warned and streams.v_warning(9.0, None) == ()
    if warned:
        assert f"is {ratio:.2f} times" in streams.v_warning(ratio * 0.5, 0.5)[0]


def test_two_streams_are_stacked_with_units_of_their_own():
    rows = SimpleNamespace(
        y=np.array([0.4, 0.5, 0.6]), second=np.array([1.0, 1.2, 1.7]), weights=np.array([1.0, 2.0, 3.0])
    )
    problem = streams.stream_problem(get("joint"), [np.array([-1.0, 0.0, 1.0])], rows, 0.02)
    np.testing.assert_array_equal(problem.axes, [[-1, 0], [0, 0], [1, 0], [-1, 1], [0, 1], [1, 1]])
    np.testing.assert_array_equal(problem.y, [0.4, 0.5, 0.6, 1.0, 1.2, 1.7])
    np.testing.assert_array_equal(problem.unit, [0.5] * 3 + [1.2] * 3)
    np.testing.assert_array_equal(problem.weights, [1, 2, 3, 1, 2, 3])
    assert np.all(problem.delta == 0.02) and problem.kind == "plain"


def test_units_of_streams_are_set_to_their_noise(monkeypatch):
    """The second stream has residuals five times as large: its unit becomes five times the first's."""
    form, u = get("joint"), np.linspace(-1, 1, 8)
    phi = np.log([0.4, 0.2, 1.1, 0.3, 0.5])
    axes = np.column_stack([np.tile(u, 2), np.repeat([0.0, 1.0], 8)])
    off = 0.01 * np.tile((-1.0) ** np.arange(8), 2) * np.repeat([1.0, 5.0], 8)
    problem = make_problem(form, axes, form.value(phi, axes) + off, kind="plain", unit=np.repeat([0.5, 0.9], 8))
    refits = []

    def refine(which, starts):
        refits.append(which.unit)
        return Batch(starts, np.array([0.125]), np.zeros(1, int), np.zeros(1))

    @dataclass
    class Solved:
        phi: np.ndarray
        objective: float = 9.0

    solved = []
    monkeypatch.setattr(streams, "refine", refine)
    monkeypatch.setattr(streams, "solve", lambda which: solved.append(which) or Solved(phi))
    final, found = streams.solve_streams(problem)
    np.testing.assert_allclose(final.unit, np.repeat([0.5, 2.5], 8))
    assert len(refits) == 2 and solved[-1] is final and len(solved) == 2 and found.objective == 9.0
