"""Every gate at both sides of its threshold, and what it refuses there."""

import numpy as np
import pytest

from recscale.scaling.laws.forms.registry import get
from recscale.scaling.laws.judgement import gates
from recscale.scaling.laws.uncertainty.profile import Profile

POWER = get("power_offset")
AXIS = POWER.slots[0].name


def axis(count, decades):
    return np.geomspace(1e3, 1e3 * 10**decades, count)


@pytest.mark.parametrize(
    ("values", "passed"),
    [(axis(5, 1.5), True), (axis(4, 3.0), False), (axis(5, 1.49), False), (np.repeat(axis(4, 2), 3), False)],
)
def test_span(values, passed):
    gate = gates.span(POWER, AXIS, values)
    assert gate.passed is passed
    if not passed:
        assert set(gate.refuses) == set(POWER.names)


def test_a_single_value_and_a_constant_metric_are_degenerate():
    slot = AXIS
    good = np.arange(1.0, 6.0)
    assert gates.degenerate(POWER, {slot: good}, good) == []
    assert [g.passed for g in gates.degenerate(POWER, {slot: np.ones(5)}, good)] == [False]
    flat = np.full(5, 0.5)
    assert [g.refuses for g in gates.degenerate(POWER, {slot: good}, flat * (1 + 1e-13))] == [("*",)]
    assert gates.degenerate(POWER, {slot: good}, flat * (1 + 1e-11 * good)) == []


def test_degrees_of_freedom():
    count = len(POWER.names)
    assert gates.dof(POWER, count + 3, count, count).passed
    for rows, clusters, distinct in ((2, 0, 0), (3, -1, 0), (3, 0, -1)):
        assert not gates.dof(POWER, count + rows, count + clusters, count + distinct).passed


@pytest.mark.parametrize(
    ("columns", "correlation", "refused"),
    [
        (("dense_params", "train_flops"), 0.91, True),
        (("dense_params", "train_flops"), 0.89, False),
        (("dense_params", "examples"), 0.91, False),
        (("dense_params", "examples"), 0.994, False),
        (("dense_params", "examples"), 0.996, True),
        (("dense_params", "examples"), -0.996, True),
    ],
)
def test_axes_that_move_together(columns, correlation, refused):
    form = get("sum", axes=("N", "D"))
    rng = np.random.default_rng(0)
    a, b = np.linalg.qr(np.column_stack([np.ones(40), rng.standard_normal((40, 2))]))[0][:, 1:].T
    other = correlation * a + np.sqrt(1 - correlation**2) * b
    first, second = (slot.name for slot in form.slots)
    found = gates.collinear(form, {first: np.exp(a), second: np.exp(other)}, {first: columns[0], second: columns[1]})
    assert [gate.passed for gate in found] == [not refused]
    if refused:
        assert found[0].value == pytest.approx(abs(correlation)) and found[0].refuses


def test_shares_of_starts_and_numbers_of_clusters():
    assert gates.convergence(0.2).passed and not gates.convergence(0.19).passed
    assert gates.clusters(6).passed and gates.clusters(5).refuses == ("intervals",)


def test_search_bounds_and_a_vanishing_floor():
    count = len(POWER.names)
    low, high, phi = np.zeros(count), np.full(count, 10.0), np.full(count, 5.0)
    (good,) = gates.bounds(POWER, phi, low, high, 0.5)
    assert good.passed
    for value, refused in ((0.11, False), (0.09, True), (9.89, False), (9.91, True)):
        for at, name in enumerate(POWER.names):
            moved = phi.copy()
            moved[at] = value
            found = gates.bounds(POWER, moved, low, high, 1e-3)
            assert [gate.refuses for gate in found if not gate.passed] == ([(name,)] if refused else [])
    at = POWER.floor_at
    if POWER.parameters[at].searched == "log":
        for factor, refused in ((1.1, False), (0.9, True)):
            phi[at] = np.log(factor * 1e-6 * 0.5)
            found = gates.bounds(POWER, phi, np.full(count, -100.0), np.full(count, 100.0), 0.5)
            assert [gate.refuses for gate in found if not gate.passed] == ([(POWER.names[at],)] if refused else [])


def test_trends_rivals_and_misfits():
    slot = AXIS
    assert gates.trend(POWER, {slot: 0.049})[0].passed
    assert gates.trend(POWER, {slot: 0.05})[0].refuses == ("*",)
    first, second = ("N", "D")
    one, other = gates.trend(get("sum", axes=("N", "D")), {first: 0.5, second: 0.01})
    assert other.passed and not one.passed and "*" not in one.refuses
    assert gates.simpler(POWER, {"a line": 1.0})[0].passed and not gates.simpler(POWER, {"a line": 0.99})[0].passed
    for p, share, passed in ((0.009, 0.0026, False), (0.01, 0.0026, True), (0.009, 0.0024, True)):
        assert gates.misfit(POWER, {slot: (p, share)})[0].passed is passed


def profile(low, high):
    nothing = np.zeros(0)
    return Profile("E", nothing, nothing, 4.0, (low, high), 1.0)


@pytest.mark.parametrize(
    ("spare", "ratio", "held_out", "low", "passed"),
    [
        (3, 1.5, 1.2, 0.1, True),
        (2, 1.5, 1.2, 0.1, False),
        (3, 1.49, 1.2, 0.1, False),
        (3, 1.5, 1.21, 0.1, False),
        (3, 1.5, 1.2, 0.0, False),
        (3, 1.5, 1.2, -0.1, False),
    ],
)
def test_floor(spare, ratio, held_out, low, passed):
    gate = gates.floor("E", spare, dict(ratio=ratio, held_out_ratio=held_out), profile(low, 0.5))
    assert gate.passed is passed and gate.refuses == (() if passed else ("E",))


def test_width_and_the_estimate_inside_its_interval():
    assert gates.width("E", profile(1.0, 3.5), 1.0).passed and not gates.width("E", profile(1.0, 3.51), 1.0).passed
    assert gates.width("E", profile(1.0, 5.0), 2.0).value == pytest.approx(1.0)
    for low, high in ((1.0, np.inf), (-np.inf, 1.0), (0.0, 1.0)):
        assert not gates.width("E", profile(low, high), 1e9).passed  # open
    for value, passed in ((1.0, True), (1.0 - 0.9e-6, True), (1.0 - 1.1e-6, False), (2.0, True), (2.00001, False)):
        assert gates.contained(profile(1.0, 2.0), value).passed is passed


def test_shapes_and_tuning():
    for low, high, passed in ((1.0, 20.0, False), (1.01, 20.0, True), (1.0, 19.9, True), (0.5, 40.0, False)):
        assert gates.shape("kappa", (low, high)).passed is passed
    assert gates.shape("kappa", None).passed is None
    assert gates.tuning(np.ones(3, bool)).passed and gates.tuning(None).passed is None
    gate = gates.tuning(np.asarray([True, False, False]))
    assert gate.refuses == ("law",) and gate.value == 2


def test_what_is_refused_with_an_axis():
    two, three = get("chinchilla"), get("sum", axes=("p", "q", "r"))
    assert gates.span(two, "N", axis(4, 3)).refuses == ("E", "A", "alpha")
    assert gates.span(two, "D", axis(4, 3)).refuses == ("E", "B", "beta")
    assert gates.span(get("m4"), "x", axis(7, 3)).refuses == ("E", "E0", "a", "A", "c")
    assert gates.span(get("auc"), "x", axis(4, 3)).refuses == ("S", "A", "alpha")
    # Five values at least, more where a form needs more; zeros span nothing.
    for form, passed in (("bnsl", [False, False, False, True]), ("log_linear", [False, True, True, True])):
        assert [gates.span(get(form), "x", axis(count, 3)).passed for count in (4, 5, 11, 12)] == passed
    assert gates.span(POWER, AXIS, np.append(axis(5, 1.4), 0.0)).passed is False
    assert gates.span(POWER, AXIS, np.zeros(5)).value == "1 values over 0.00 decades"
    still, moving = gates.trend(two, {"N": 0.5, "D": 0.01})
    assert still.refuses == ("E", "A", "alpha") and moving.refuses == () and still.value == 0.5
    u = np.arange(1.0, 9.0)
    (found,) = gates.collinear(three, {"p": u, "q": u**2, "r": u[::-1] % 3 + 1}, {"p": "p", "q": "q", "r": "r"})
    assert found.refuses == ("A_p", "alpha_p", "A_q", "alpha_q") and found.value == pytest.approx(1.0)
    for axes in ({"p": u, "q": u * 0 + 2}, {"p": u * 0 + 2, "q": u}):
        (found,) = gates.collinear(three, axes, {"p": "p", "q": "q"})
        assert found.passed and found.value is None
    (found,) = gates.collinear(two, {"N": u, "D": np.exp(u)}, {"N": "train_flops", "D": "dense_params"})
    assert found.passed is False  # ln u and u correlate at .95: too much for parameters and FLOPs
    assert gates.collinear(two, {"N": u, "D": np.exp(u)}, {"N": "examples", "D": "dense_params"})[0].passed


def test_degenerate_is_one_value_or_one_metric():
    good = np.array([1.0, 2.0])
    assert gates.degenerate(POWER, {AXIS: good}, np.zeros(0)) == []
    assert gates.degenerate(POWER, {AXIS: good}, np.array([-1e-13, 1.0])) == []
    assert [g.value for g in gates.degenerate(POWER, {AXIS: good}, np.array([-0.5, -0.5]))] == [0.0]
    assert len(gates.degenerate(POWER, {AXIS: good * 0 + 3}, np.array([0.5, 0.5]))) == 2


def test_only_a_floor_may_be_too_small_to_be_one():
    wide = np.full(3, -100.0), np.full(3, 100.0)
    low = np.log(0.9e-6 * 0.5)
    for at, refused in ((0, ["E"]), (1, []), (2, [])):
        phi = np.where(np.arange(3) == at, low, 0.0)
        assert [n for g in gates.bounds(POWER, phi, *wide, 0.5) for n in g.refuses] == refused
    real = get("power_offset", real_floor=True)
    assert gates.bounds(real, np.array([low, 0.0, 0.0]), *wide, 0.5)[0].passed
    (found,) = gates.bounds(POWER, np.array([99.5, 0.0, 0.0]), *wide, 0.5)
    assert found.value == "at the upper end" and "upper" in found.reason
    (found,) = gates.bounds(POWER, np.array([low, 0.0, 0.0]), *wide, 0.5)
    assert found.value == "at the lower end" and "1e-06 of the smallest metric" in found.reason


def test_what_belongs_to_a_refused_parameter_goes_with_it():
    two = get("chinchilla")
    found = gates.belongs(two, {"E"}, {"E", "beta"})
    assert [(g.refuses, g.value) for g in found] == [(("A",), "E, alpha"), (("alpha",), "E"), (("B",), "E, beta")]
    assert gates.belongs(two, set(), {"E"}) == [] and gates.belongs(two, {"alpha"}, {"alpha"})[0].refuses == ("A",)
    (gain,) = gates.gains(get("gain"))
    assert gain.refuses == ("comparison",) and gain.passed is False and gates.gains(POWER) == []


def test_forecasts_reach_the_fitted_span_again_and_at_most_thirty_times():
    near, wide = {"N": np.asarray([1.0, 10.0])}, {"N": np.asarray([1.0, 1000.0])}
    np.testing.assert_array_equal(gates.forecast(near, {"N": np.asarray([99.0, 100.0, 100.1, 0.01])}), [0, 0, 1, 0])
    np.testing.assert_array_equal(gates.forecast(wide, {"N": np.asarray([3e4, 3.0001e4])}), [False, True])
    both = gates.forecast(near | {"D": near["N"]}, {"N": np.asarray([5.0, 5.0]), "D": np.asarray([50.0, 500.0])})
    np.testing.assert_array_equal(both, [False, True])


def test_effective_rows():
    codes = np.repeat(np.arange(4), 5)
    same = np.repeat([1.0, -1.0, 2.0, -2.0], 5)
    assert gates.effective_rows(same, codes) == pytest.approx(4)  # rows of a cluster say the same
    rng = np.random.default_rng(0)
    within = rng.standard_normal((4, 5))
    within -= within.mean(axis=1, keepdims=True)
    assert gates.effective_rows(within.ravel(), codes) == pytest.approx(20)  # clusters say nothing of each other
    # rho from one-way ANOVA: mean squares 10 between and 2 within, 5 rows a cluster
    means = np.asarray([1.0, -1.0, 1.0, -1.0]) * np.sqrt(10 * 3 / 20)
    rows = within * np.sqrt(2 * 16 / np.sum(within**2)) + means[:, None]
    rho = (10 - 2) / (10 + 4 * 2)
    assert gates.effective_rows(rows.ravel(), codes) == pytest.approx(20 / (1 + 4 * rho))
    assert (
        gates.effective_rows(rows.ravel(), np.arange(20)) == 20 and gates.effective_rows(same, np.zeros(20, int)) == 20
    )


def test_effective_rows_of_uneven_clusters():
    rng = np.random.default_rng(1)
    sizes = np.array([2, 3, 5, 1])
    codes = np.repeat(np.arange(4), sizes)
    rows = 0.5 + rng.normal(size=4)[codes] + 0.7 * rng.normal(size=11)
    parts = [rows[codes == k] for k in range(4)]
    between = sum(len(p) * (p.mean() - rows.mean()) ** 2 for p in parts) / 3
    within = sum(((p - p.mean()) ** 2).sum() for p in parts) / 7
    typical = (11 - (sizes**2).sum() / 11) / 3
    rho = (between - within) / (between + (typical - 1) * within)
    assert 0 < rho < 1 and gates.effective_rows(rows, codes) == pytest.approx(11 / (1 + (11 / 4 - 1) * rho))
    two = np.repeat([0, 1], 4)
    assert gates.effective_rows(np.repeat([1.0, 2.0], 4), two) == pytest.approx(2)
    assert gates.effective_rows(np.zeros(8), two) == 8


def test_ends_and_estimates_agree_up_to_rounding():
    for ends, value, passed in (
        ((-2.0, -1.0), -2.0 - 1.9e-6, True), ((-2.0, -1.0), -2.0 - 2.1e-6, False), ((-2.0, -1e-9), 1.9e-6, True),
        ((-2.0, -1e-9), 2.1e-6, False), ((-np.inf, 4.0), 4.0 + 3.9e-6, True), ((-np.inf, 4.0), 4.0 + 4.1e-6, False),
        ((-np.inf, 0.0), 1e-7, False),
    ):  # fmt: skip
        gate = gates.contained(profile(*ends), value)
        assert gate.passed is passed and gate.value == ("inside" if passed else "outside")
    low, high = np.full(3, -5.0), np.full(3, 15.0)  # one per cent of it is .2
    for value, refused in ((-4.79, False), (-4.81, True), (14.79, False), (14.81, True)):
        found = gates.bounds(POWER, np.array([0.0, 0.0, value]), low, high, 1e-9)
        assert (found[0].refuses == ("alpha",)) is refused
    assert gates.floor("E", 3, dict(ratio=2.0, held_out_ratio=1.0), None).passed
    assert gates.floor("E", 3, dict(ratio=2.0, held_out_ratio=1.0), profile(-2.0, -0.1)).passed
