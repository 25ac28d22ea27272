"""What the gates weigh, restated: F tests by adding a column, rivals by least squares, and what speaks for a floor."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from recscale.scaling.laws.fitting.problem import make_problem
from recscale.scaling.laws.forms.registry import get
from recscale.scaling.laws.judgement import diagnostics
from recscale.scaling.laws.uncertainty.curvature import Grouping, Spread
from recscale.scaling.laws.uncertainty.profile import Squares


def left_over(design, response):
    solved = np.linalg.lstsq(design, response, rcond=None)[0]
    return float(np.sum((response - design @ solved) ** 2))


def test_slopes_are_a_weighted_regression_on_all_axes():
    rng = np.random.default_rng(0)
    a, b, y, weights = np.exp(rng.normal(size=12)), np.exp(rng.normal(size=12)), rng.normal(size=12), np.ones(12)
    weights[:4] = 3.0
    design = np.column_stack([np.log(a), np.log(b), np.ones(12)]) * np.sqrt(weights)[:, None]
    expected = np.linalg.lstsq(design, y * np.sqrt(weights), rcond=None)[0]
    assert diagnostics.slopes({"a": a, "b": b}, y, weights) == pytest.approx({"a": expected[0], "b": expected[1]})
    alone = diagnostics.slopes({"a": a, "zero": a * 0, "same": a * 0 + 2, "signed": a - a.mean()}, y, np.ones(12))
    assert alone == pytest.approx({"a": np.polyfit(np.log(a), y, 1)[0]})
    assert diagnostics.slopes({"same": np.full(12, 2.0)}, y, np.ones(12)) == {}


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(1)
    design = np.column_stack([np.ones(14), rng.normal(size=14)])
    return design, rng.normal(size=14), rng.normal(size=(14, 4))


def test_the_largest_f_of_one_column_is_an_f_test(rows):
    design, response, directions = rows
    for k in range(4):
        column = directions[:, k : k + 1]
        p, explained = diagnostics.largest_f(design, response, column)
        full = left_over(np.hstack([design, column]), response)
        assert explained == pytest.approx(left_over(design, response) - full)
        assert p == pytest.approx(stats.f.sf(explained / (full / 11), 1, 11), abs=0.05)


def test_the_largest_of_several_counts_and_none_counts_for_nothing(rows):
    design, response, directions = rows
    alone = [diagnostics.largest_f(design, response, directions[:, [k]]) for k in range(4)]
    p, explained = diagnostics.largest_f(design, response, directions)
    assert explained == pytest.approx(max(one[1] for one in alone)) and p > min(one[0] for one in alone)
    # A column twice in the design is one; what lies in the design is no direction.
    twice = np.hstack([design, design[:, 1:]])
    assert diagnostics.largest_f(twice, response, directions) == pytest.approx((p, explained))
    inside = design @ np.array([[1.0], [2.0]])
    assert diagnostics.largest_f(design, response, inside) == (1.0, 0.0)
    assert diagnostics.largest_f(design, response, inside + 1e-7 * directions[:, :1]) == (1.0, 0.0)
    near = diagnostics.largest_f(design, response, inside + 1e-5 * directions[:, :1])
    assert near == pytest.approx(alone[0], rel=1e-3)
    assert diagnostics.largest_f(design, directions[:, 0], directions)[0] == 0.001  # one in a thousand is the least
    assert diagnostics.largest_f(design, design[:, 1], directions)[0] == 1.0  # rounding alone is left
    for count, told in ((3, False), (4, True)):  # a residual degree of freedom is needed besides the column's
        few = diagnostics.largest_f(design[:count], response[:count], directions[:count, :1])
        assert (few != (1.0, 0.0)) is told


def test_means_of_levels_weigh_as_much_as_their_rows():
    levels, weights = np.array([0, 1, 0, 1, 1]), np.array([1.0, 2.0, 3.0, 1.0, 1.0])
    column = np.array([1.0, 2.0, 5.0, 3.0, 4.0])
    one, two = diagnostics._level_means(levels, weights, column, np.column_stack([column, column**2]))
    means = np.array([16 / 4, 11 / 4]) * np.sqrt(4)
    assert one == pytest.approx(means) and two[:, 0] == pytest.approx(means)
    assert two[:, 1] == pytest.approx(np.array([76 / 4, 33 / 4]) * 2)


def test_steps_stand_between_the_values_of_an_axis():
    np.testing.assert_array_equal(diagnostics._steps(np.array([2.0, 0.0, 1.0, 2.0])), [[1, 1], [0, 0], [1, 0], [1, 1]])
    many = diagnostics._steps(np.arange(40.0))
    heights = many.sum(axis=0)
    assert many.shape == (40, 15) and heights[0] == 39 and heights[-1] == 1 and np.all(np.diff(heights) < 0)


def test_a_trend_is_seen_whatever_the_other_axis_does():
    rng = np.random.default_rng(2)
    n, d = (part.ravel() for part in np.meshgrid(np.linspace(-3, 3, 8), np.linspace(-2, 2, 6), indexing="ij"))
    axes, noise, weights = np.column_stack([n, d]), 0.02 * rng.normal(size=48), np.ones(48)
    along_d = 0.3 * d - 0.1 * d**2 + noise
    assert diagnostics.trend(axes, along_d, weights, 0) > 0.05 and diagnostics.trend(axes, along_d, weights, 1) < 0.01
    for curve in (0.05 * n, 0.3 * np.exp(-2.0 * (n + 3)), -0.3 * np.exp(-(n + 3))):
        assert diagnostics.trend(axes, along_d + curve, weights, 0) < 0.01
    still = axes * [0.0, 1.0]
    assert diagnostics.trend(still, along_d, weights, 0) == 1.0


def squares_of(form, axes, y, phi, weights=None, codes=None, kind="log", unit=1.0):
    problem = make_problem(form, axes, y, weights=weights, kind=kind, unit=unit)
    fitted = form.value(phi, axes)
    r = np.log(fitted / y) if kind == "log" else (fitted - y) / unit
    weight = problem.weights
    step, slopes = 1e-6, []
    for k in range(len(phi)):
        move = step * (np.arange(len(phi)) == k)
        ends = [form.value(phi + side * move, axes) for side in (1, -1)]
        slopes.append(np.log(ends[0] / ends[1]) / 2e-6 if kind == "log" else (ends[0] - ends[1]) / unit / 2e-6)
    design = np.stack(slopes, axis=1)
    codes = np.arange(len(y)) if codes is None else codes
    group = Grouping(codes, np.ones(len(phi), bool), True)
    spread = Spread(design * np.sqrt(weight)[:, None], r * np.sqrt(weight), [group])
    return Squares(problem, np.asarray(phi), float(np.sum(weight * r**2)), spread), design, r


@pytest.mark.parametrize("kind", ["log", "plain"])
def test_lack_of_fit_is_what_a_bend_or_a_step_would_explain(kind):
    rng = np.random.default_rng(3)
    u = np.repeat(np.linspace(-3, 3, 10), 2)
    weights = rng.uniform(0.5, 2.0, 20)
    phi = np.array([np.log(0.4), np.log(0.1), np.log(0.5)])
    y = (0.4 + 0.1 * np.exp(-0.5 * u)) * np.exp(0.01 * rng.normal(size=20) + 0.1 * (u > 1))
    unit = 1.0 if kind == "log" else 0.3
    found, design, r = squares_of(get("power_offset"), u[:, None], y, phi, weights, kind=kind, unit=unit)
    p, share = diagnostics.lack_of_fit(found, 0)
    levels = np.unique(u, return_inverse=True)[1]

    def means(column):
        total = np.bincount(levels, weights)
        return np.bincount(levels, weights * column) / total * np.sqrt(total)

    base = np.stack([means(column) for column in design.T], axis=1)
    left = means(r)
    columns = [u**2, *(levels >= gap for gap in range(1, 10))]
    gained = [left_over(base, left) - left_over(np.column_stack([base, means(c)]), left) for c in columns]
    target = np.log(y) if kind == "log" else y / 0.3
    varies = np.sum(means(target - np.average(target, weights=weights)) ** 2)
    assert share == pytest.approx(max(gained) / varies, rel=1e-4) and p < 0.2


def test_rivals_are_a_line_and_the_best_step_on_relative_residuals():
    rng = np.random.default_rng(4)
    n, d = (part.ravel() for part in np.meshgrid(np.linspace(-3, 3, 5), np.linspace(-2, 2, 4), indexing="ij"))
    axes, weights = np.column_stack([n, d]), rng.uniform(0.5, 2.0, 20)
    y = (0.5 + 0.1 * (n > 1) + 0.05 * (d > 0)) * np.exp(0.01 * rng.normal(size=20))
    phi = np.array([np.log(0.4), np.log(0.1), np.log(0.5), np.log(0.1), np.log(0.5)])
    for kind, unit in (("log", 1.0), ("plain", 0.3)):
        found, _, _ = squares_of(get("chinchilla"), axes, y, phi, weights, kind=kind, unit=unit)
        scale = y if kind == "log" else np.full(20, unit)
        root = np.sqrt(weights) / scale

        def rss(*columns, root=root):
            return left_over(np.column_stack([np.ones(20), *columns]) * root[:, None], y * root)

        told = diagnostics.rivals(found)
        assert told["a straight line in ln x"] == (pytest.approx(rss(n, d)), 3)
        steps = [rss(n > a, d > b) for a in np.unique(n)[:-1] for b in np.unique(d)[:-1]]
        assert told["a single step"] == (pytest.approx(min(steps)), 5)
    one, _, _ = squares_of(get("power_offset"), axes[:, :1], y, phi[:3])
    told = diagnostics.rivals(one)
    assert told["a single step"][1] == 3 and told["a straight line in ln x"][1] == 2


def test_a_law_is_better_than_a_rival_by_an_f_test():
    rng = np.random.default_rng(5)
    u = np.linspace(-3, 3, 12)
    phi = np.array([np.log(0.4), np.log(0.1), np.log(0.5)])
    y = (0.4 + 0.1 * np.exp(-0.5 * u)) * np.exp(0.01 * rng.normal(size=12))
    found, _, _ = squares_of(get("power_offset"), u[:, None], y, phi)
    statistic = (0.01 - found.rss) / found.spread.noise
    assert diagnostics.beaten(found, (0.01, 2)) == pytest.approx(statistic / stats.f.ppf(0.95, 1, 9))
    assert diagnostics.beaten(found, (0.01, 1)) == pytest.approx(statistic / 2 / stats.f.ppf(0.95, 2, 9))
    assert diagnostics.beaten(found, (0.01, 3)) == pytest.approx(statistic / stats.f.ppf(0.95, 1, 9))
    few, _, _ = squares_of(get("power_offset"), u[:, None], y, phi, codes=np.arange(12) % 3)
    assert diagnostics.beaten(few, (0.01, 2)) == pytest.approx(
        (0.01 - few.rss) / few.spread.noise / stats.f.ppf(0.95, 1, 1)
    )


@pytest.mark.parametrize(("distinct", "held"), [(3, 1), (6, 1), (7, 1), (10, 1), (14, 2), (20, 3), (2, None)])
def test_the_largest_values_of_an_axis_are_held_out(distinct, held):
    column = np.repeat(np.arange(distinct, dtype=float), 2)
    masks = diagnostics.held_out_masks(np.column_stack([column, column * 0]))
    assert masks.shape == ((0 if held is None else 1), 2 * distinct)
    if held is not None:
        np.testing.assert_array_equal(masks[0], column >= distinct - held)


def test_evidence_for_a_floor_is_the_excess_and_the_largest_rows(monkeypatch):
    form, u = get("power_offset"), np.linspace(-3, 3, 14)
    y = 0.4 + 0.1 * np.exp(-0.5 * u) + 0.002 * (-1.0) ** np.arange(14)
    problem = make_problem(form, u[:, None], y, weights=np.full(14, 2.0))
    phi, bare = np.log([0.4, 0.1, 0.5]), np.log([0.5, 0.1])
    calls = []

    def solve(rival):
        calls.append(rival)
        return SimpleNamespace(phi=bare)

    def refine(which, starts, weights):
        calls.append((which.delta, weights))
        return SimpleNamespace(phi=starts + 0.01)

    monkeypatch.setattr(diagnostics, "solve", solve)
    monkeypatch.setattr(diagnostics, "refine", refine)
    told, rival = diagnostics.floor_evidence(problem, SimpleNamespace(phi=phi))
    np.testing.assert_array_equal(rival.phi, bare)
    assert told["ratio"] == pytest.approx(np.exp(0.5 * 6))
    # The largest seventh of the values is held out: the last two.
    with_floor = np.exp(phi[0] + 0.01) + np.exp(phi[1] + 0.01 - np.exp(phi[2] + 0.01) * u[-2:])
    without = np.exp(bare[0] + 0.01 - np.exp(bare[1] + 0.01) * u[-2:])
    errors = [np.sqrt(np.mean(np.log(value / y[-2:]) ** 2)) for value in (with_floor, without)]
    assert told["held_out_ratio"] == pytest.approx(errors[0] / errors[1])
    alone, first, second = calls
    assert alone.form.names == ("A", "alpha") and len(alone.low) == len(alone.high) == 2 == alone.pull.shape[1]
    assert alone.low[1] == problem.low[2]
    for delta, weights in (first, second):
        assert np.all(np.isinf(delta))
        np.testing.assert_array_equal(weights, [[2.0] * 12 + [0.0] * 2])
    two = make_problem(form, u[:2, None], y[:2])
    assert diagnostics.floor_evidence(two, SimpleNamespace(phi=phi))[0]["held_out_ratio"] == 1.0


def test_the_excess_above_a_floor_is_that_of_its_stream():
    u = np.linspace(-1, 1, 4)
    for form, floor in ((get("power_offset"), np.log(0.4)), (get("power_offset", real_floor=True), -0.4)):
        phi = np.array([floor, np.log(0.1), np.log(0.5)])
        assert diagnostics.excess(form, phi, u[:, None]) == pytest.approx(0.1 * np.exp(-0.5 * u))
    joint = get("joint")
    phi = np.log([0.4, 0.2, 1.1, 0.3, 0.5])
    axes = np.column_stack([np.tile(u, 2), np.repeat([0.0, 1.0], 4)])
    assert diagnostics.excess(joint, phi, axes) == pytest.approx(0.1 * 0.3 * np.exp(-0.5 * u))
