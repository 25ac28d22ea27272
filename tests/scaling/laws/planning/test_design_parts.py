"""The parts of a design by hand: information, widths, gains, candidates, noise, prices, and the choice of runs."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from recscale.scaling.laws.fitting.problem import make_problem
from recscale.scaling.laws.forms.registry import get
from recscale.scaling.laws.planning import design
from recscale.scaling.laws.planning.design import Design

PHI = np.log([0.4, 0.05, 0.5])
SIZES = np.geomspace(0.1, 10, 7)


def slopes_of(x):
    """d ln y / d (ln E, ln A, ln alpha) of y = .4 + .05 x^-.5."""
    term = 0.05 * x**-0.5
    return np.stack([0.4 + 0 * x, term, -term * 0.5 * np.log(x)], axis=1) / (0.4 + term)[:, None]


def law_of(y=None, kind="log"):
    y = 0.4 + 0.05 * SIZES**-0.5 if y is None else y
    problem = make_problem(get("power_offset"), np.log(SIZES)[:, None], y, kind=kind, unit=0.2)
    solved = problem, SimpleNamespace(phi=PHI)
    return SimpleNamespace(form=get("power_offset"), solved=lambda: solved, centre={"x": 0.0})


def design_of(counts=(2, 2, 2, 2, 2, 2, 0), between=1e-6, within=4e-6, law=None, hours=None):
    hours = SIZES if hours is None else hours
    return Design("a", law or law_of(), between, within, SIZES[:, None], np.array(counts), hours, slopes_of(SIZES))


def covariance(counts, between=1e-6, within=4e-6):
    counts = np.asarray(counts, float)
    weights = np.where(counts > 0, 1 / (between + within / np.maximum(counts, 1)), 0)
    j = slopes_of(SIZES)
    return np.linalg.inv(j.T @ (j * weights[:, None]))


def test_slopes_are_derivatives_of_the_law():
    np.testing.assert_allclose(design._slopes(law_of(), SIZES[:, None]), slopes_of(SIZES), rtol=1e-6, atol=1e-9)
    plain = design._slopes(law_of(kind="plain"), SIZES[:, None])
    y = 0.4 + 0.05 * SIZES**-0.5
    np.testing.assert_allclose(plain, slopes_of(SIZES) * y[:, None] / 0.2, rtol=1e-6, atol=1e-9)


def test_widths_are_those_of_the_fisher_information():
    one = design_of()
    sd = np.sqrt(np.diag(covariance(one.counts)))
    t = stats.t.ppf(0.975, 3)  # six cells that were run less three parameters
    assert one.widths() == pytest.approx({"E": 0.4 * t * sd[0], "alpha": 0.5 * t * sd[2]})
    more = one.with_run(6)
    assert list(more.counts) == [2] * 6 + [1] and list(one.counts) == [2] * 6 + [0]
    assert more.widths()["alpha"] == pytest.approx(0.5 * stats.t.ppf(0.975, 4) * np.sqrt(covariance(more.counts)[2, 2]))
    none = design_of((2, 0, 2, 0, 2, 0, 0))
    assert set(none.widths().values()) == {np.inf} and none.likely_width("alpha") == np.inf
    assert design.differences([one, design_of((1,) * 7)])["a", "a"] == pytest.approx(
        np.hypot(one.widths()["alpha"], design_of((1,) * 7).widths()["alpha"])
    )


def test_gains_are_the_rise_of_the_determinant_or_the_fall_of_a_width():
    one = design_of((4, 3, 2, 1, 1, 1, 0))
    worth, towards = one.gains(), one.gains("alpha")
    assert worth[0] == 0 == towards[0]  # it has its four seeds
    for run in range(1, 7):
        more = one.with_run(run)
        before, after = covariance(one.counts), covariance(more.counts)
        rise = np.log(np.linalg.det(before) / np.linalg.det(after))
        assert worth[run] == pytest.approx(rise, rel=1e-6)
        fall = 2 * np.log(one.widths()["alpha"] / more.widths()["alpha"])
        assert towards[run] == pytest.approx(fall if fall > 1e-3 else 0.0, rel=1e-6)
    exhausted = design_of((4, 3, 2, 1, 1, 1, 0), between=1.0, within=1e-6)
    assert np.all(exhausted.gains()[:6] == 0) and exhausted.gains()[6] > 0  # seeds tell nothing new
    # Without degrees of freedom a goal has no width yet: the determinant counts.
    few = design_of((1, 0, 1, 0, 1, 0, 0))
    np.testing.assert_allclose(few.gains("alpha"), few.gains())


def test_a_likely_width_is_the_fourth_fifth_of_simulated_tables():
    """A mean of cells: the spread of its interval follows from the chi-square of the cells' variance."""
    one = design_of((1,) * 7, between=4e-6, within=1e-12)
    likely, expected = one.likely_width("alpha"), one.widths()["alpha"]
    chi = np.sqrt(stats.chi2.ppf(0.8, 4) / 4)
    assert likely >= 0.85 * chi * expected and likely <= 2.5 * expected
    assert one.reaches("alpha", 1.001 * max(likely, expected))
    assert not one.reaches("alpha", 0.999 * max(likely, expected))
    assert design_of((1,) * 7, between=16e-6, within=4e-12).likely_width("alpha") == pytest.approx(2 * likely)
    assert design_of((1,) * 7, between=1e-12, within=4e-6).likely_width("alpha") == pytest.approx(likely, rel=0.3)


def test_noise_is_split_by_analysis_of_variance():
    cells = np.repeat(np.arange(5), 3)
    rng = np.random.default_rng(0)
    r = rng.normal(size=5)[cells] * 0.02 + 0.01 * rng.normal(size=15)
    law = law_of()
    problem = make_problem(law.form, np.zeros((15, 1)), 0.45 * np.exp(-r))
    between, within = design._noise(problem, PHI, cells, 3)
    means = r.reshape(5, 3).mean(axis=1)
    pure = np.sum((r.reshape(5, 3) - means[:, None]) ** 2) / 10
    assert within == pytest.approx(pure) and between == pytest.approx((3 * np.sum(means**2) / 2 - pure) / 3)
    alone = make_problem(law.form, np.zeros((5, 1)), 0.45 * np.exp(-means))
    assert design._noise(alone, PHI, np.arange(5), 3) == (pytest.approx(np.sum(means**2) / 2), 1e-16)
    assert design._noise(alone, PHI, np.arange(5), 5)[0] == pytest.approx(np.sum(means**2))
    still = make_problem(law.form, np.zeros((15, 1)), 0.45 * np.exp(-(r - means[cells])))
    assert design._noise(still, PHI, cells, 3)[0] == 0.0


def test_candidates_stand_between_the_rungs_and_beyond_them():
    run = np.array([[10.0], [20.0], [40.0]])
    quarters = [float(f"{rung * 2**share:.3g}") for rung in (10, 20) for share in (0.25, 0.5, 0.75)]
    assert design._candidates(run, 1.0).ravel().tolist() == [10, 20, 40, *quarters]
    assert design._candidates(run, 8.0).ravel().tolist() == [10, 20, 40, *quarters, 80, 160, 320]
    assert design._candidates(run, 7.9).ravel().tolist() == [10, 20, 40, *quarters, 80, 160]
    assert design._candidates(run[:1], 4.0).ravel().tolist() == [10, 20, 40]
    dense = 10 * 1.1 ** np.arange(3)[:, None]
    beyond = design._candidates(dense, 1.5).ravel()
    assert beyond[-2:].tolist() == [float(f"{12.1 * 1.1**k:.3g}") for k in (1, 2)]  # steps count as 1.2 at least


def test_ratios_of_two_axes_stay_near_those_that_were_run():
    run = np.array([[1.0, 10.0], [10.0, 100.0], [100.0, 1000.0]])
    offered = design._candidates(run, 1.0)
    assert sorted(map(tuple, offered)) == [(1, 10), (10, 100), (100, 1000)]
    wide = np.array([[1.0, 10.0], [3.0, 10.0], [9.0, 90.0]])
    found = set(map(tuple, design._candidates(wide, 1.0)))
    assert found == {(1, 10), (3, 10), (9, 10), (3, 90), (9, 90)}  # .1 / 4 to .3 * 4


def test_a_run_costs_rows_times_their_seconds():
    cost = design.Cost(100.0, 2.0, {"p": 0.5, "q": 0.25}, None)
    assert cost.hours({"p": 4.0, "q": 8.0}) == pytest.approx(100 * (2 + 2 + 2) / 3600)
    assert design.Cost(None, 2.0, {}, None).hours({}) == pytest.approx(2 / 3600)
    assert design.Cost(100.0, 2.0, {}, "d").hours({"d": 50.0}) == pytest.approx(100 / 3600)
    table = pd.DataFrame({"p": [1.0, 2.0, 4.0], "examples": [10.0, 30.0, 20.0]})
    priced = design.measured_cost(table, ["p"], speed=3.0)
    assert (priced.rows, priced.fixed, priced.per_size, priced.data) == (20.0, 0.0, {"p": 2.0}, None)
    assert design.measured_cost(table, ["p", "examples"], speed=3.0).data == "examples"
    for columns in (["examples"], ["p", "q"]):
        with pytest.raises(ValueError, match="one size and the data"):
            design.measured_cost(table, columns, speed=3.0)
    slow = table.assign(rows_per_s=1 / (0.5 + 0.1 * table.p))
    slow.loc[3] = [8.0, 20.0, np.nan]
    found = design.measured_cost(slow, ["p"])
    assert found.fixed == pytest.approx(0.5) and found.per_size == pytest.approx({"p": 0.1}) and found.rows == 20.0
    unmeasured = table.assign(rows_per_s=np.nan, wall_s=(0.5 + 0.1 * table.p) * table.examples)
    assert design.measured_cost(unmeasured, ["p"]).per_size == pytest.approx({"p": 0.1})


def test_a_plan_takes_what_is_worth_most_an_hour_until_nothing_is_left():
    one = design_of((1, 1, 1, 1, 1, 1, 0))
    runs = design.plan([one], 3.0).runs
    left, current = 3.0, one
    for run in runs:
        rate = np.where(SIZES <= left, current.gains() / SIZES, 0.0)
        best = int(np.argmax(rate))
        assert run.point == (SIZES[best],) and run.hours == SIZES[best] and run.name == "a"
        left -= run.hours
        current = current.with_run(best)
    assert runs and np.all(np.where(SIZES <= left, current.gains(), 0) == 0)
    assert design.plan([one], 3.0).hours == pytest.approx(3.0 - left)
    # The better of two designs gets the run; a design that has reached the goal gets none.
    other = design_of((1, 1, 1, 1, 1, 1, 0), hours=SIZES / 10)
    assert design.plan([one, other], 0.02).designs[0].counts.sum() == 6
    wide, narrow = one.widths()["alpha"], design_of((4,) * 7).widths()["alpha"]
    found = design.plan([one, design_of((4,) * 7)], 1e4, ("alpha", 0.95 * max(wide, one.likely_width("alpha"))))
    assert found.reached is True and {run.name for run in found.runs} == {"a"} and narrow < wide
    assert found.designs[1].counts.sum() == 28 and found.designs[0].counts.sum() > 6
    assert design.plan([one], 0.001, ("alpha", 1e-9)).reached is False
    assert design.plan([one], 0.001).runs == () and design.plan([one], 0.001).reached is None
    planned = design.planned(one, np.array([[1.0], [2.0], [1.0]]), "next")
    assert planned.name == "next" and planned.points.ravel().tolist() == [1, 2] and list(planned.counts) == [2, 1]
    np.testing.assert_allclose(planned.slopes, slopes_of(np.array([1.0, 2.0])), rtol=1e-6, atol=1e-9)
    assert np.isnan(planned.hours).all()
