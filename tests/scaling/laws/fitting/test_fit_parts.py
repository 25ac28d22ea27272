"""The parts of a fit by hand: starts, bounds and priors, allocation, and what a fit tells of its solution."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import optimize as scipy_optimize
from scipy import special

from recscale.scaling.laws import Refused
from recscale.scaling.laws.fitting import optimum as allocation
from recscale.scaling.laws.fitting import solver, starts
from recscale.scaling.laws.fitting.law_fit import LawFit, Settings, derived_quantities, with_numbers
from recscale.scaling.laws.fitting.problem import Prior, bounded, make_problem, residual_scale, residuals, with_priors
from recscale.scaling.laws.forms.registry import get
from recscale.scaling.laws.judgement.gates import Gate
from recscale.scaling.laws.uncertainty.curvature import Grouping, Spread
from recscale.scaling.laws.uncertainty.profile import Profile

U = np.linspace(-3, 3, 9)
GRID = np.geomspace(0.03, 2.5, 16)


def test_exponents_are_tried_on_a_grid_or_at_sobol_points():
    assert starts.exponent_grid(0).shape == (1, 0)
    np.testing.assert_allclose(starts.exponent_grid(1).ravel(), GRID)
    np.testing.assert_allclose(starts.exponent_grid(2), list(product(GRID, GRID)))
    for free, count in ((3, 1024), (4, 1024), (5, 2048)):
        points = starts.exponent_grid(free)
        assert points.shape == (count, free)
        assert 0.03 <= points.min() < 0.0305 and 2.45 < points.max() <= 2.5
        assert np.median(points) == pytest.approx(np.sqrt(0.03 * 2.5), rel=0.01)


def test_a_grid_of_its_own_is_crossed_in():
    values = starts._grid(get("repeated_data").linear)
    found = set(zip(values["alpha"], values["beta"], values["R_star"], strict=True))
    single = starts.exponent_grid(1).ravel()
    assert found == set(product(single, single, (1.0, 10.0))) and len(values["alpha"]) == 512


def test_active_sets_hold_what_is_signed():
    assert starts._active_sets(2, (False, False)).tolist() == [[1, 1], [1, 0], [0, 1], [0, 0]]
    assert starts._active_sets(2, (True, False)).tolist() == [[1, 1], [1, 0]]


@pytest.mark.parametrize("relative", [True, False])
def test_coefficients_of_a_grid_point_are_weighted_nonnegative_least_squares(relative):
    rng = np.random.default_rng(0)
    y, weights = 0.4 + 0.1 * np.exp(-0.5 * U) + 0.01 * rng.normal(size=9), rng.uniform(0.5, 2, 9)
    weights[3] = 0.0
    linear = get("power_offset").linear
    named, values = starts.project(linear, U[:, None], y, weights, relative)
    divide = 1 / y if relative else np.full(9, 1 / np.std(y[weights > 0]))
    for at in (0, 7, 15):
        design = np.stack([np.ones(9), np.exp(-GRID[at] * U)], axis=1)
        root = np.sqrt(weights) * divide
        expected, miss = scipy_optimize.nnls(design * root[:, None], y * root)
        assert (named["E"][at], named["A"][at]) == pytest.approx(tuple(expected), abs=1e-9)
        assert values[at] == pytest.approx(miss**2, abs=1e-9)
    held = get("power_offset").holding({"E": 0.3}).linear
    named, values = starts.project(held, U[:, None], y, weights, relative)
    design = np.exp(-GRID[7] * U)[:, None]
    expected, miss = scipy_optimize.nnls(design * root[:, None], (y - 0.3) * root) if relative else (None, None)
    if relative:
        assert named["A"][7] == pytest.approx(expected[0]) and values[7] == pytest.approx(miss**2)


def test_a_form_that_is_linear_in_the_logarithm_is_solved_there():
    n, e = (part.ravel() for part in np.meshgrid(np.linspace(-1, 1, 4), np.linspace(-2, 2, 4), indexing="ij"))
    truth = {"a": -0.1, "b": -0.2, "c": 0.05, "d": 0.3}
    y = np.exp(truth["a"] * n + truth["b"] * e + truth["c"] * n * e + truth["d"])
    named, values = starts.project(get("moe_unified").linear, np.column_stack([n, e]), y, np.ones(16), True)
    assert {name: float(named[name][0]) for name in truth} == pytest.approx(truth, abs=1e-6)
    assert values == pytest.approx([0.0], abs=1e-9)


def test_starts_are_the_best_and_others_of_the_better_half():
    order = np.array([3, 0, 2, 1, 7, 6, 5, 4, 8, 9, 10, 11])
    values = np.empty(12)
    values[order] = np.arange(12.0)
    assert starts._spread(values, 4).tolist() == [3, 0, 2, 6]
    assert starts._spread(values, 8).tolist() == [3, 0, 2, 1, *([7] * 2), *([6] * 2)]
    assert starts._spread(np.array([2.0]), 1).tolist() == [0]
    crossed = starts._crossed({"p": np.array([1.0, 2.0])}, {"q": (3.0, 4.0), "r": (5.0, 6.0)}, 2)
    pairs = set(zip(crossed["p"], crossed["q"], crossed["r"], strict=True))
    assert pairs == set(product((1.0, 2.0), (3.0, 4.0), (5.0, 6.0))) and len(crossed["p"]) == 8
    assert starts._crossed({"p": np.array([1.0])}, {}, 1)["p"].tolist() == [1.0]


def test_terms_that_were_solved_to_zero_start_visible():
    y = 0.5 * np.exp(-0.3 * U)  # no floor
    form = get("power_offset")
    found = starts.starting_points(make_problem(form, U[:, None], y), np.ones(9))
    natural = form.to_natural(found)
    assert found.shape == (8, 3) and np.all(natural["E"] >= 0.0999 * np.median(y)) and np.all(natural["A"] > 0.05)
    assert natural["E"].min() == pytest.approx(0.1 * np.median(y))
    assert np.abs(natural["alpha"] / 0.3 - 1).min() < 0.2
    line = get("log_linear", real=True)
    solved = starts.starting_points(make_problem(line, U[:, None], 0.1 - 0.2 * U, kind="plain"), np.ones(9))
    np.testing.assert_allclose(solved, [[0.1, 0.2]], atol=1e-9)
    assert len(starts.starting_points(make_problem(get("kappa"), np.column_stack([U, U[::-1]]), y), np.ones(9))) == 16


def test_problems_are_prepared_with_their_defaults_and_kinds():
    form, y = get("power_offset"), 0.4 + 0.1 * np.exp(-0.3 * U)
    plain = make_problem(form, U[:, None], y)
    assert (
        np.all(plain.weights == 1) and np.all(plain.delta == 1e-3) and np.all(plain.unit == 1) and plain.kind == "log"
    )
    assert np.exp(plain.high[0]) == pytest.approx(2 * np.median(y)) and plain.pull.shape == (3, 3)
    phi = np.log([0.41, 0.1, 0.3])
    curve = 0.41 + 0.1 * np.exp(-0.3 * U)
    assert residuals(plain, phi) == pytest.approx(np.log(curve / y))
    apart = make_problem(form, U[:, None], y - 1, kind="plain", unit=0.5, delta=np.full(9, 0.2))
    assert residuals(apart, phi) == pytest.approx((curve - y + 1) / 0.5) and np.all(apart.delta == 0.2)
    np.testing.assert_array_equal(apart.target, y - 1)
    with pytest.raises(ValueError, match="log residuals need a positive metric"):
        make_problem(form, U[:, None], y - y.min())
    assert residual_scale(np.array([1.0, 2.0, 4.0, 9.0, 30.0])) == pytest.approx(1.4826 * 3)


def test_bounds_narrow_a_search_and_priors_pull():
    problem = make_problem(get("power_offset"), U[:, None], np.full(9, 0.5))
    found = bounded(problem, {"alpha": (0.1, 0.6), "E": (0.0, 99.0)})
    assert np.exp([found.low[2], found.high[2]]) == pytest.approx([0.1, 0.6])
    assert (found.low[0], found.high[0]) == (problem.low[0], problem.high[0])
    real = make_problem(get("log_linear"), U[:, None], np.full(9, 0.5))
    assert bounded(real, {"b": (-0.1, 0.2)}).low[1] == -0.1 and bounded(real, {"b": (-0.1, 0.2)}).high[1] == 0.2
    for wrong, words in (({"alpha": (0.6, 0.6)}, "no value lies"), ({"gamma": (0, 1)}, "searches no 'gamma'")):
        with pytest.raises(ValueError, match=words):
            bounded(problem, wrong)
    pulled = with_priors(problem, {"alpha": Prior("normal", 0.3, 0.5), "E": Prior("lognormal", 0.4, 0.2)}, 0.01)
    assert pulled.pull[:, 2] == pytest.approx([0.01 / 0.25, 0.3, 1.0])
    assert pulled.pull[:, 0] == pytest.approx([0.01 / 0.04, np.log(0.4), 0.0]) and np.all(pulled.pull[:, 1] == 0)
    assert with_priors(real, {"b": Prior("normal", 0.3, 0.5)}, 0.01).pull[:, 1] == pytest.approx([0.04, 0.3, 0.0])
    wrong = (("uniform", 0.3, 0.1), ("normal", 0.3, 0.0), ("lognormal", 0.0, 0.1))
    for which, name, priors in ((problem, "alpha", wrong), (real, "b", (("lognormal", 0.3, 0.1),))):
        for prior in priors:
            with pytest.raises(ValueError, match="is not .normal or lognormal"):
                with_priors(which, {name: Prior(*prior)}, 0.01)


@pytest.mark.parametrize(
    ("rows", "padded"),
    [(1, 16), (16, 16), (17, 32), (512, 512), (513, 640), (640, 640), (641, 768), (1024, 1024), (1025, 1280)],
)
def test_rows_are_padded_to_powers_of_two_and_then_their_quarters(rows, padded):
    assert solver._padded(rows) == padded


def test_the_share_of_starts_that_reach_the_best(monkeypatch):
    problem = make_problem(get("power_offset"), U[:, None], np.full(9, 0.5))
    ends = np.arange(24.0).reshape(8, 3)
    objective = np.array([3.0, np.nan, 1.0, 1.00009, 1.00011, np.inf, 2.0, 1.0])

    def refine(problem, starts, *, weights, control):
        assert starts.shape == (8, 3) and weights.sum() == 5 and control.limit == 9
        return solver.Batch(ends, objective, np.arange(8), np.arange(8) / 10)

    monkeypatch.setattr(solver, "refine", refine)
    weights = (np.arange(9) < 5).astype(float)
    found = solver.solve(problem, weights, solver.Control(limit=9))
    np.testing.assert_array_equal(found.phi, ends[2])
    assert (found.objective, found.iterations, found.gradient, found.convergence_share) == (1.0, 2, 0.2, 3 / 8)
    assert found.starts.iterations[:3].tolist() == [2, 7, 3] and found.starts.objective[0] == 1.0
    # Of exact rows, objectives of rounding count as reached: 1e-14 for every row of weight.
    objective[:] = [0.0, 4.9e-14, 5.1e-14, 1, 1, 1, 1, 1]
    assert solver.solve(problem, weights, solver.Control(limit=9)).convergence_share == 2 / 8


def test_allocations_of_a_budget_are_the_closed_form():
    def total(at):
        return 480 * np.exp(-0.35 * at[0]) + 2100 * np.exp(-0.37 * at[1])

    centre = np.log([1e8, 1e10])
    n, d = np.exp(allocation.allocate(total, centre, lambda n, d: 6 * n * d, 6e20))
    best = (0.35 * 480 / (0.37 * 2100)) ** (1 / 0.72) * 1e20 ** (0.37 / 0.72)
    assert n == pytest.approx(best, rel=1e-4) and n * d == pytest.approx(1e20, rel=1e-9)
    assert allocation.allocate(lambda at: 0.0, np.zeros(1), lambda x: 2 * x, 8.0) == pytest.approx([np.log(4)])
    even = allocation.allocate(lambda at: np.exp(-at).sum(), np.zeros(3), allocation.product_cost, 8.0)
    assert even == pytest.approx(np.log([2, 2, 2]), abs=1e-3) and even.sum() == pytest.approx(np.log(8))
    assert allocation.product_cost(np.array([2.0]), np.array([3.0]), np.array([4.0])) == 24
    for value, cost, dims, words in (
        (lambda at: at[0], lambda n, d: n * d, 2, "edge of the search"),
        (lambda at: 0.0, lambda n, d: n * d, 2, "edge of the search"),
        (total, lambda n, d: n * d * 0 + 1.0, 2, "no allocation costs"),
        (total, lambda n: n * 0 + 1.0, 1, "no value of the axis costs"),
    ):
        with pytest.raises(ValueError, match=words):
            allocation.allocate(value, np.zeros(dims), cost, 5.0)


PHI = np.log([1.8, 0.7, 0.35, 0.6, 0.37])


def law_of(draws=None, **changes):
    """A chinchilla law with centre (e^2, e^3): y = 1.8 + .7 e^(-.35 u) + .6 e^(-.37 w)."""
    form = get("chinchilla")
    n, d = (part.ravel() for part in np.meshgrid(np.exp(2 + U[::2]), np.exp(3 + U[::2]), indexing="ij"))
    axes = np.column_stack([np.log(n) - 2, np.log(d) - 3])
    y = form.value(PHI, axes) * np.exp(0.01 * (-1.0) ** np.arange(25))
    rows = SimpleNamespace(
        axes={"N": n, "D": d}, columns={"N": "p", "D": "q"}, y=y, target="loss", frame=pd.DataFrame()
    )
    problem = make_problem(form, axes, y)
    solution = SimpleNamespace(phi=PHI)
    found = LawFit(form, rows, Settings(), (), (), problem, solution, {"N": 2.0, "D": 3.0}, draws=draws)
    return with_numbers(replace(found, **changes))


def test_best_splits_follow_the_law_and_its_draws():
    scale = (0.35 * 0.7 * np.exp(0.7) / (0.37 * 0.6 * np.exp(1.11))) ** (1 / 0.72)
    shifts = np.linspace(-0.1, 0.1, 9)
    law = law_of(np.stack([PHI + [0, s, 0, 0, 0] for s in shifts]))
    told = allocation.optimum(law, [1e3, 1e4], interval=True)
    assert told["N"] == pytest.approx(scale * np.array([1e3, 1e4]) ** (0.37 / 0.72), rel=1e-4)
    assert told["N"] * told["D"] == pytest.approx([1e3, 1e4]) and list(told["budget"]) == [1e3, 1e4]
    assert told["metric"] == pytest.approx(law.predict({"N": told["N"], "D": told["D"]}))
    # The best size moves with its coefficient, to the power 1 / (alpha + beta).
    for side, end in zip((-0.095, 0.095), told["N_interval"], strict=True):
        assert end == pytest.approx(told["N"] * np.exp(side / 0.72), rel=1e-3)
    for side, end in zip((0.095, -0.095), told["D_interval"][::-1], strict=True):
        assert end == pytest.approx(told["D"] * np.exp(side / 0.72), rel=1e-3)
    single = allocation.optimum(law, 1e3, lambda n, d: 2 * n * d)
    assert (
        isinstance(single["N"], float)
        and single["N"] * single["D"] == pytest.approx(500)
        and "N_interval" not in single
    )
    with pytest.raises(ValueError, match="no resampled draws"):
        allocation.optimum(law_of(), 1e3, interval=True)
    refused = law_of(gates=(Gate("width", 1, "", False, "wide", refuses=("alpha",)),))
    with pytest.raises(Refused, match="alpha refused .width: wide"):
        allocation.optimum(refused, 1e3)


def test_numbers_of_a_fit_are_those_that_no_gate_refused():
    law = law_of()
    assert law.centred == pytest.approx(dict(zip(law.form.names, np.exp(PHI), strict=True)))
    raw = {"E": 1.8, "A": 0.7 * np.exp(0.7), "alpha": 0.35, "B": 0.6 * np.exp(1.11), "beta": 0.37}
    assert law.params == pytest.approx(raw) == law.solution_params() and law.derived == pytest.approx(
        {"a": 0.37 / 0.72}
    )
    assert law.granted and not law.refused and law.intervals == dict.fromkeys([*raw, "a"])
    ends = {"E": (1.7, 1.9), "A": (0.6, 0.8), "alpha": (0.36, 0.4), "B": (0.5, 0.7), "beta": (0.3, 0.36)}
    curves = {name: Profile(name, np.zeros(1), np.zeros(1), 4.0, pair, 1.0) for name, pair in ends.items()}
    jacobian = np.random.default_rng(0).normal(size=(25, 5))
    spread = Spread(jacobian, 0.01 * (-1.0) ** np.arange(25), [Grouping(np.arange(25), np.ones(5, bool), True)])
    told = law_of(profiles=curves, spread=spread)
    # An end that the estimate passes moves to it; raw coefficients carry the error of their exponents and have none.
    held = {**ends, "alpha": (0.35, 0.4), "beta": (0.3, 0.37)}
    assert told.centred_intervals == {name: pytest.approx(pair) for name, pair in held.items()}
    shown = {name: pair for name, pair in told.intervals.items() if pair}
    assert shown.pop("a") == told.intervals["a"]
    assert shown == {name: pytest.approx(held[name]) for name in ("E", "alpha", "beta")}
    reach = np.sqrt(spread.squared_reach(np.array([0, 0, -1.0, 0, 1.0])))
    middle = np.log(0.37 / 0.35)
    assert told.intervals["a"] == pytest.approx((special.expit(middle - reach), special.expit(middle + reach)))
    gates = (
        Gate("width", 1, "", False, "wide", refuses=("E",)),
        Gate("belongs", 1, "", False, "of E", refuses=("alpha", "A")),
    )
    part = law_of(profiles=curves, spread=spread, gates=gates)
    assert part.params == {"E": None, "A": None, "alpha": None, "B": pytest.approx(raw["B"]), "beta": 0.37}
    assert part.derived == {"a": None} and part.intervals["a"] is None and part.ranges == {"alpha": (0.36, 0.4)}
    assert part.floor_upper_bound == 1.9 and part.reason("E") == "width: wide" and part.reason("beta") == ""
    few = law_of(profiles=curves, spread=spread, gates=(Gate("clusters", 3, "", False, "3", refuses=("intervals",)),))
    assert set(few.intervals.values()) == {None} and few.params["alpha"] == pytest.approx(0.35)
    nothing = law_of(profiles=curves, gates=(Gate("dof", 3, "", False, "3", refuses=("*",)),))
    assert nothing.refused and not nothing.granted and set(nothing.params.values()) == {None}
    assert nothing.floor_upper_bound is None
    with pytest.raises(Refused, match="dof: 3"):
        nothing.solved()
    assert derived_quantities(get("power"), {"A": 1.0, "alpha": 0.3}) == {}


def test_predictions_have_the_bands_of_their_draws():
    shifts = np.linspace(-0.1, 0.1, 201)
    law = law_of(np.stack([PHI + [s, s, 0, s, 0] for s in shifts]))  # whole curves times e^s
    at = {"N": np.exp([2.0, 3.0]), "q": np.exp(3.5)}
    curve = 1.8 + 0.7 * np.exp([0, -0.35]) + 0.6 * np.exp(-0.37 * 0.5)
    assert law.predict(at) == pytest.approx(curve)
    for level in (0.95, 0.5):
        value, low, high = law.predict(at, interval=True, level=level)
        assert value == pytest.approx(curve)
        assert np.log(low / curve) == pytest.approx([-0.1 * level] * 2) and np.log(high / curve) == pytest.approx(
            [0.1 * level] * 2
        )
    assert law.predict(at, interval=True)[1] == pytest.approx(curve * np.exp(-0.095))
    still = law_of(np.tile(PHI, (400, 1)))
    _, low, high = still.predict(at, interval=True, noise=True)
    assert np.log(low / curve) == pytest.approx([-0.01] * 2) and np.log(high / curve) == pytest.approx([0.01] * 2)
    assert isinstance(law.predict({"N": 1.0, "D": 1.0}), float)
    with pytest.warns(UserWarning, match="1 of 2 predictions"):
        told = law.predict({"N": np.exp([2.0, 99.0]), "D": np.exp(3.0)})
    assert np.isnan(told).tolist() == [False, True]
    assert np.isfinite(law.predict({"N": np.exp([2.0, 99.0]), "D": np.exp(3.0)}, beyond_range=True)).all()
    with pytest.raises(ValueError, match="predict needs axis D"):
        law.predict({"N": 1.0})
    with pytest.raises(Refused, match="bootstrap=0"):
        law_of().predict(at, interval=True)
    ends = law.bootstrap_intervals()
    assert ends["alpha"] == pytest.approx((0.35, 0.35)) and ends["E"] == pytest.approx(
        (1.8 * np.exp(-0.095), 1.8 * np.exp(0.095))
    )
    assert law.seed_intervals() == {} and law_of(seed_draws=law.draws).seed_intervals() == ends
    assert (
        law_of(law.draws, gates=(Gate("width", 1, "", False, "w", refuses=("E",)),)).bootstrap_intervals()["E"] is None
    )


def test_settings_that_contradict_themselves_are_refused():
    for wrong, words in (
        ({"fixed": {"E": 1.0}, "bounds": {"E": (0, 1)}}, "E is fixed"),
        ({"fixed": {"E": 1.0}, "priors": {"E": ("normal", 0, 1)}}, "E is fixed"),
        ({"residuals": "odd"}, "residuals must be"), ({"bootstrap": -1}, "bootstrap is -1"),
        ({"huber_delta": 0.0}, "huber_delta is 0"), ({"huber_delta": np.nan}, "huber_delta is nan"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            Settings(**wrong)
    usual = Settings(bootstrap=0)
    assert (usual.huber_delta, usual.residuals, usual.seed, usual.profile, usual.invalid) == (
        1e-3,
        "auto",
        0,
        True,
        "refuse",
    )
    assert Settings().bootstrap == 1000 and (usual.auc, usual.measured_v) == ("auc", None)
    known = Settings(
        fixed={"E": 0.4}, bounds={"alpha": (0, 2)}, priors={"alpha": ("normal", 0.3, 0.1), "beta": ("normal", 1, 2)}
    )
    assert law_of(settings=known).given == {
        "E": "fixed at 0.4", "alpha": "between 0 and 2, normal prior 0.3, sd 0.1", "beta": "normal prior 1, sd 2",
    }  # fmt: skip
