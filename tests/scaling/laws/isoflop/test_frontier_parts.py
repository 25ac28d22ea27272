"""The parts of the frontier against NumPy, SciPy and small tables by hand."""

import numpy as np
import pandas as pd
import pytest
from scipy import interpolate, stats

from recscale.scaling.laws.isoflop import frontier
from recscale.scaling.laws.isoflop.frontier import AllocationLaw, Optimum


def test_the_akima_minimum_is_that_of_a_fine_grid():
    rng = np.random.default_rng(0)
    u = np.cumsum(rng.uniform(0.5, 1.5, 7))
    values = 0.2 * (u[:, None] - u[3]) ** 2 + 0.4 * rng.standard_normal((7, 40))
    values = np.column_stack([values, u, -u, (u - u[2] - 0.3) ** 2])  # ends, and a cubic that is a parabola
    place, height = frontier.akima_minimum(u, values)
    grid = np.linspace(u[0], u[-1], 20_001)
    fine = interpolate.Akima1DInterpolator(u, values, axis=0)(grid)
    np.testing.assert_allclose(height, fine.min(axis=0), atol=1e-6)
    np.testing.assert_allclose(place, grid[fine.argmin(axis=0)], atol=2e-3)
    assert (place[-3], place[-2]) == (u[0], u[-1])
    few = np.linspace(u[0], u[-1], 3 * 6)
    place, height = frontier.akima_minimum(u, values, points_per_interval=3)
    fine = interpolate.Akima1DInterpolator(u, values, axis=0)(few)
    np.testing.assert_array_equal(place, few[fine.argmin(axis=0)])
    np.testing.assert_allclose(height, fine.min(axis=0))


def test_the_vertex_of_a_parabola():
    u = np.array([1.0, 2.0, 4.0, 5.0])
    values = np.stack([3 + 2 * (u - 2.5) ** 2, 3 - 2 * (u - 2.5) ** 2], axis=1)
    place, height, curvature = frontier.parabola_minimum(u, values)
    assert (place[0], height[0]) == pytest.approx((2.5, 3.0)) and np.isnan(place[1])
    assert curvature == pytest.approx([2.0, -2.0])


def test_a_minimum_on_the_edge_is_not_inside():
    place = np.array([1.0, 1.0 + 0.9e-12, 1.0 + 4e-12, 2.0, 3.0 - 4e-12, 3.0 - 0.9e-12, 3.0])
    inside = np.array([False, False, True, True, True, False, False])
    np.testing.assert_array_equal(np.isfinite(frontier._interior(place, 1.0, 3.0)), inside)
    u = np.array([0.5, 2.0, 3.5])
    for one, fine, side in zip(place, inside, ["smallest"] * 3 + ["largest"] * 4, strict=True):
        reason = frontier._edge_reason(float(one), u, 1.0, 3.0)
        assert (reason == "") is bool(fine) and (
            fine or f"{side} size {np.exp(u[0 if side[0] == 's' else 2]):.4g}" in reason
        )


def test_lines_by_weights_with_gaps():
    rng = np.random.default_rng(1)
    x, y, weights = rng.uniform(0, 5, 6), rng.standard_normal((6, 3)), rng.uniform(0.5, 2, 6)
    y[2, 1] = np.nan
    slope, level = frontier._weighted_line(x, y, weights)
    for k in range(3):
        known = np.isfinite(y[:, k])
        expected = np.polyfit(x[known], y[known, k], 1, w=np.sqrt(weights[known]))
        assert (slope[k], level[k]) == pytest.approx(tuple(expected))


def optima(budgets, log_sizes, log_sds=None, samples=None):
    log_sds, samples = log_sds or [None] * len(budgets), samples or [None] * len(budgets)
    return [
        (budget, Optimum(float(np.exp(size)), 1.0, sd), drawn)
        for budget, size, sd, drawn in zip(budgets, log_sizes, log_sds, samples, strict=True)
    ]


def test_an_allocation_law_without_noise_is_a_plain_regression():
    budgets, sizes = [1e18, 1e19, 1e20, 1e21], [10.0, 11.3, 12.1, 13.6]
    law = frontier._allocation_law(optima(budgets, sizes))
    expected = stats.linregress(np.log(budgets), sizes)
    assert (law.exponent, np.log(law.coefficient), law.se) == pytest.approx(
        (expected.slope, expected.intercept, expected.stderr)
    )
    assert (law.se_source, law.interval, law.n_optima) == ("regression", None, 4)
    gap = [*optima(budgets, sizes), (1e22, None, None)]
    assert frontier._allocation_law(gap) == law
    assert frontier._allocation_law(gap[2:]) is None and frontier._allocation_law(gap[1:]).n_optima == 3


def test_an_allocation_law_with_noise_weighs_groups_and_quotes_redraws():
    budgets, sizes, sds = [1e18, 1e19, 1e20, 1e21], [10.0, 11.3, 12.1, 13.6], [0.1, 0.2, 0.4, 0.1]
    rng = np.random.default_rng(2)
    drawn = [size + sd * rng.standard_normal(500) for size, sd in zip(sizes, sds, strict=True)]
    law = frontier._allocation_law(optima(budgets, sizes, sds, drawn))
    x, w = np.log(budgets), 1 / np.array(sds)
    slope, level = np.polyfit(x, sizes, 1, w=w)
    slopes = np.polyfit(x, np.stack(drawn), 1, w=w)[0]
    assert (law.exponent, np.log(law.coefficient)) == pytest.approx((slope, level))
    assert law.se_source == "seed noise" and law.se == pytest.approx(slopes.std())
    assert law.interval == pytest.approx(tuple(np.quantile(slopes, [0.025, 0.975])))
    # Where one group has no redraws, or no scatter, groups count alike.
    part = frontier._allocation_law(optima(budgets, sizes, sds, [*drawn[:3], None]))
    assert part == frontier._allocation_law(optima(budgets, sizes))
    still = frontier._allocation_law(optima(budgets, sizes, [*sds[:3], 0.0], drawn))
    assert still.exponent == pytest.approx(np.polyfit(x, sizes, 1)[0]) and still.se_source == "seed noise"


@pytest.mark.parametrize(("gap", "quoted"), [(0.99, True), (1.01, False)])
def test_exponents_two_standard_errors_apart_are_not_quoted(gap, quoted):
    one = AllocationLaw(0.5, 1.0, 0.03, "seed noise", None, 4)
    other = AllocationLaw(0.5 + gap * 2 * 0.05, 1.0, 0.04, "seed noise", None, 4)
    assert (frontier._quoting_reasons(one, other) == []) is quoted is (frontier._quoting_reasons(other, one) == [])
    assert [r[:8] for r in frontier._quoting_reasons(None, one)] == ["akima: f"]
    assert [r[:8] for r in frontier._quoting_reasons(one, None)] == ["parabola"]


def test_rows_of_one_budget_become_one_row_a_size():
    rows = pd.DataFrame(
        {
            "run_id": list("abcdefg"),
            "size": [2.0, 1.0, 1.0, 3.0, 4.0, 5.0, 6.0],
            "flops": [100.0, 102.0, 98.0, 110.0, 110.0, 90.0, 90.0],
            "loss": [0.5, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0],
            "seed": [0, 0, 1, 0, 0, 0, 0],
        }
    )
    # Of size 3 there is a run below the budget, of 4 one of another seed, of 5 one above it.
    more = pd.DataFrame(
        {"run_id": list("xyz"), "size": [3.0, 4.0, 5.0], "flops": [90.0, 90.0, 120.0], "loss": [0.9, 0.9, 0.7]}
    ).assign(seed=[0, 1, 0])
    table = pd.concat([rows, more], ignore_index=True)
    columns = ("size", "flops", "loss")
    cell, excluded = frontier._sizes_at_budget(table, rows, 100.0, columns, 0.0200001, "mean")
    assert list(cell.index) == [1, 2, 3, 5] and list(cell["repeats"]) == [2, 1, 1, 1]

    def between(low, high, y_low, y_high):
        share = np.log(100 / low) / np.log(high / low)
        return y_low ** (1 - share) * y_high**share

    expected = [0.5, 0.5, between(90, 110, 0.9, 0.7), between(90, 120, 0.9, 0.7)]
    assert list(cell["value"]) == pytest.approx(expected)
    assert [name for name, _ in excluded] == ["e", "g"]
    assert "is +10.0% off" in excluded[0][1] and "is -10.0% off" in excluded[1][1]
    least, _ = frontier._sizes_at_budget(table, rows, 100.0, columns, 0.0200001, "min")
    assert least["value"][1.0] == 0.4
    narrow, _ = frontier._sizes_at_budget(table, rows, 100.0, columns, 0.0199, "mean")
    assert narrow["repeats"].get(1.0, 0) == 0  # each of its seeds has a run on one side alone


def test_a_budget_at_the_end_of_a_curve_is_on_it():
    curve = pd.DataFrame({"flops": [10.0, 100.0, 100.0], "loss": [0.8, 0.4, 0.6]})
    for budget, value in (
        (10.0, 0.8),
        (100.0, 0.5),
        (99.9999 / 10**0.5, 0.8**0.5 * 0.5**0.5),
        (9.9, None),
        (101.0, None),
    ):
        found = frontier._interpolated(curve, budget, "flops", "loss")
        assert found == (None if value is None else pytest.approx(value, rel=1e-5))
    assert frontier._interpolated(curve[1:], 100.0, "flops", "loss") is None  # one value is no curve


RULES = dict(min_sizes=5, edge_spacing=0.5, log_metric=True, points_per_interval=None, noise=None, draws=400)


def group(values, repeats=1, **rules):
    u = np.arange(len(values)) * 0.5
    cell = pd.DataFrame({"value": values, "repeats": repeats}, index=np.exp(u))
    found = frontier._group_optima(1e18, cell, frontier._Rules(**{**RULES, **rules}), np.random.default_rng(0))
    return (*found, u)


def test_optima_of_a_group_with_and_without_noise():
    at = np.arange(7) * 0.5
    values = 0.5 + 0.05 * (at - 1.6) ** 2
    plain, none, u = group(values)
    place, height = frontier.akima_minimum(u, np.log(values)[:, None])
    assert (np.log(plain.akima.size), plain.akima.value) == pytest.approx((place[0], np.exp(height[0])))
    assert (np.log(plain.parabola.size), plain.parabola.value) == pytest.approx((1.6, 0.5))
    assert none == {} and plain.akima.log_sd is None and plain.rejected == {} and plain.budget == 1e18
    direct, _, _ = group(values, log_metric=False)
    place, height = frontier.akima_minimum(u, values[:, None])
    assert (np.log(direct.akima.size), direct.akima.value) == pytest.approx((place[0], height[0]))
    single, drawn, _ = group(values, noise=1e-4, draws=300)
    for name in ("akima", "parabola"):
        assert drawn[name].shape == (300,) and getattr(single, name).log_sd == pytest.approx(np.nanstd(drawn[name]))
    # The scatter of a parabola's vertex follows from the noise: d place / d values, at its centre.
    move = np.array(
        [frontier.parabola_minimum(u, (values + 1e-6 * (np.arange(7) == i))[:, None])[0][0] for i in range(7)]
    )
    expected = 1e-4 * np.linalg.norm((move - 1.6) / 1e-6)
    assert single.parabola.log_sd == pytest.approx(expected, rel=0.15)
    four, _, _ = group(values, repeats=4, noise=lambda y: 1e-4 * np.ones_like(y), draws=300)
    assert four.parabola.log_sd == pytest.approx(single.parabola.log_sd / 2, rel=0.02)


def test_a_group_is_rejected_where_noise_moves_its_minimum_to_an_edge():
    at = np.arange(7) * 0.5
    near, drawn, _ = group(0.5 + 0.05 * (at[:5] - 0.27) ** 2, noise=0.1, log_metric=False)
    assert near.parabola is None and near.rejected["parabola"].startswith("seed noise moves")
    assert near.akima is not None and set(drawn) == {"akima"} and 0.3 < np.isnan(drawn["akima"]).mean() <= 0.5
    far, drawn, _ = group(0.5 + 0.05 * (at - 1.5) ** 2, noise=0.01)
    assert far.akima is not None and np.isnan(drawn["akima"]).mean() < 0.5
    # Half a spacing from either end is too near; the spacings at the two ends differ.
    u = np.array([0.0, 0.5, 1.0, 1.5, 2.5])
    for place, side in ((0.24, "smallest"), (0.26, ""), (1.99, ""), (2.01, "largest")):
        cell = pd.DataFrame({"value": 0.5 + 0.05 * (u - place) ** 2, "repeats": 1}, index=np.exp(u))
        found, _ = frontier._group_optima(1e18, cell, frontier._Rules(**RULES), np.random.default_rng(0))
        assert (found.parabola is None) is bool(side) and side in found.rejected.get("parabola", "")
    for sizes, enough in ((4, False), (5, True)):
        found, _, _ = group(0.5 + 0.05 * (at[:sizes] - 0.9) ** 2)
        assert (found.akima is not None) is enough and len(found.sizes) == len(found.values) == sizes


def test_usable_rows_name_the_first_thing_wrong():
    table = pd.DataFrame(
        {
            "run_id": list("abcdefg"),
            "status": ["done", "failed", "done", "done", "done", "done", "done"],
            "decayed": [True, True, True, True, None, False, True],
            "x": [1.0, np.nan, np.nan, 0.0, 1.0, 1.0, "2"],
            "y": [1.0, 1.0, 1.0, -1.0, 1.0, np.inf, 1.0],
        }
    )
    kept, excluded = frontier.usable_rows(table, ["x", "y"], decayed_only=True)
    assert list(kept["run_id"]) == ["a", "g"] and list(kept.index) == [0, 1]
    assert dict(excluded) == {
        "b": "status is failed", "c": "x is missing or not a finite number", "d": "x is not positive: 0.0",
        "e": "decay state is not recorded", "f": "y is missing or not a finite number",
    }  # fmt: skip
    kept, excluded = frontier.usable_rows(table.drop(columns=["run_id", "status", "decayed"]), ["x"], decayed_only=True)
    assert len(kept) == 4 and [name for name, _ in excluded] == ["1", "2", "3"]
    rows, out = frontier.decayed_rows(table)
    assert list(rows["run_id"]) == ["a", "b", "c", "d", "g"] and list(rows.index) == [0, 1, 2, 3, 4]
    assert out == [("e", "learning rate not decayed"), ("f", "learning rate not decayed")]
    for never in (table.assign(decayed=False), table.drop(columns="decayed")):
        rows, out = frontier.decayed_rows(never)
        assert rows is never and out == []


def test_of_one_budget_the_lower_row_is_on_the_frontier():
    table = pd.DataFrame({"train_flops": [1e3, 1e1, 1e2, 1e2, 1e1, 1e4], "logloss": [0.3, 0.6, 0.5, 0.45, 0.5, 0.3]})
    # At 1e2 the row of .45 lies on no chord: .5 to .3 passes .4 there; equal metrics later are no gain.
    assert frontier.efficient_frontier(table).rows.index.tolist() == [4, 0]
    lower = table.assign(logloss=[0.3, 0.6, 0.5, 0.35, 0.5, 0.3])
    assert frontier.efficient_frontier(lower).rows.index.tolist() == [4, 3, 0]
    with pytest.raises(ValueError, match="no row can be on the frontier"):
        frontier.efficient_frontier(table.assign(logloss=np.nan))


def test_the_settings_say_how_it_was_done():
    u = np.arange(7) * 0.5
    table = pd.concat(
        [
            pd.DataFrame({"dense_params": np.exp(u + k), "logloss": 0.5 + 0.05 * (u - 1.6) ** 2}).assign(
                train_flops=10.0**k, flops_target=10.0**k
            )
            for k in range(3)
        ]
    )
    found = frontier.isoflop(table)
    assert found.settings == {
        "size": "dense_params", "flops": "train_flops", "budget": "flops_target", "target": "logloss", "min_sizes": 5,
        "edge_spacing": 0.5, "budget_tolerance": 0.02, "reduce": "mean", "log_metric": True,
        "points_per_interval": None, "draws": 400, "seed": 0, "noise": "unknown: no repeated seeds at two sizes",
    }  # fmt: skip
    assert not found.quotable and len(found.reasons) == 1 and "no repeated seeds" in found.reasons[0]
    assert found.parabola.exponent == pytest.approx(1 / np.log(10))
    given = frontier.isoflop(table, noise=1e-5, draws=50)
    assert given.settings["noise"] == 1e-5 and given.quotable and given.reasons == []
    assert [group.akima.log_sd is not None for group in given.groups] == [True] * 3
    for noise, told in ((None, "unknown"), (lambda y: 1e-5 * y, "given")):
        assert frontier.isoflop(table, noise=noise, draws=20).settings["noise"] == told
    with pytest.raises(ValueError, match="'median'"):
        frontier.isoflop(table, reduce="median")
