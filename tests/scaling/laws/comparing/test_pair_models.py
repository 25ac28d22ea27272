"""Two architectures under one law: closed forms of the curves, the F-test, resampling, and what is fitted to what."""

import numpy as np
import pytest
from scipy import stats

from recscale.scaling.laws.comparing import pair_models
from recscale.scaling.laws.comparing.pair_models import PairData, PairFit
from recscale.scaling.laws.fitting.solver import Batch

FREE = {"shared": 3, "shift": 4, "exponents": 5, "own": 6, "power": 4, "log_linear": 4}
PHI = np.array([np.log(0.4), 0.2, np.log(0.05), 0.3, np.log(0.5), 0.1])


def fit_of(model="own", phi=PHI, **changes):
    known = dict(objective=0.1, convergence_share=1.0, rss=1.0, residuals=np.zeros(8), draws=np.empty((0, len(phi))))
    return PairFit(model, np.asarray(phi), **{**known, **changes})


def data_of(positions_a, positions_b, y=None, clusters=None, matched=False):
    """Rows at ln x = the positions, one cluster a row."""
    x = np.exp([*positions_a, *positions_b])
    is_a = np.arange(len(x)) < len(positions_a)
    clusters = np.arange(len(x)) if clusters is None else np.asarray(clusters)
    return PairData(x, np.full(len(x), 0.5) if y is None else y, is_a, clusters, matched)


def test_constants_and_curves_are_those_of_either_side():
    own = fit_of()
    sides = {"a": 0.5, "b": -0.5}
    expected = {
        f"{letter}_{name}": np.exp(PHI[i] + g * PHI[i + 1])
        for name, g in sides.items()
        for i, letter in ((0, "E"), (2, "A"), (4, "alpha"))
    }
    assert own.constants() == pytest.approx(expected)
    assert own.exponent_difference() == pytest.approx(expected["alpha_a"] - expected["alpha_b"])
    batch = own.constants(np.stack([PHI, PHI + 0.1]))
    assert batch["A_b"] == pytest.approx(np.exp([PHI[2] - 0.15, PHI[2] + 0.1 - 0.2]))
    u = np.array([-1.0, 0.5, 2.0])
    for name in sides:
        curve = expected[f"E_{name}"] + expected[f"A_{name}"] * np.exp(-expected[f"alpha_{name}"] * u)
        assert own.predict(u, np.full(3, name == "a")) == pytest.approx(curve)
    assert {model: fit_of(model).free for model in FREE} == FREE


def test_straight_lines_have_a_level_and_a_slope_each():
    line = fit_of("log_linear", [0.5, 0.1, 0.02, 0.004])
    assert line.constants() == pytest.approx({"E_a": 0.55, "E_b": 0.45, "alpha_a": 0.022, "alpha_b": 0.018})
    assert line.predict(np.array([2.0, 2.0]), np.array([True, False])) == pytest.approx([0.506, 0.414])


def test_a_shift_moves_one_curve_onto_the_other():
    shift = fit_of("shift", [np.log(0.4), 0.0, np.log(0.05), -0.3, np.log(0.5), 0.0])
    log_s, u = shift.log_shift(), np.linspace(-2, 2, 5)
    assert log_s == pytest.approx(0.3 / 0.5)
    assert shift.predict(u, np.ones(5, bool)) == pytest.approx(shift.predict(u + log_s, np.zeros(5, bool)))


def test_the_place_of_a_metric_is_on_its_curve_or_nowhere():
    own, metric = fit_of(), 0.6
    at_a, at_b = own.log_x_at(metric)
    assert own.predict(np.array([at_a, at_b]), np.array([True, False])) == pytest.approx([metric, metric])
    floor_a = float(own.constants()["E_a"])
    for low in (floor_a, 0.99 * floor_a):
        at_a, at_b = own.log_x_at(low)
        assert at_a == np.inf and np.isfinite(at_b)


def test_the_f_test_counts_rows_at_their_effective_number():
    noise = np.random.default_rng(0).standard_normal(20)
    small, large = fit_of("shift", rss=1.5, residuals=noise), fit_of("own", rss=1.0, residuals=noise)
    alone = np.arange(20)
    assert pair_models.nesting_p_value(small, large, alone) == pytest.approx(stats.f.sf(0.5 / 2 / (1.0 / 14), 2, 14))
    little = fit_of("shift", rss=1.0 + 1 / 14, residuals=noise)  # a statistic of 1/2
    assert pair_models.nesting_p_value(little, large, alone) == pytest.approx(stats.f.sf(0.5, 2, 14))
    assert pair_models.nesting_p_value(fit_of("shift", rss=0.9), large, alone) == 1.0
    # Ten clusters of two equal residuals are ten rows.
    twice = fit_of("own", rss=1.0, residuals=np.repeat(noise[:10], 2))
    in_tens = pair_models.nesting_p_value(small, twice, np.repeat(np.arange(10), 2))
    assert in_tens == pytest.approx(stats.f.sf(0.5 / 2 / (1.0 / 4), 2, 4))
    for rows, p in ((6, 1.0), (7, stats.f.sf(0.5 / 2 / 1.0, 2, 1))):
        few = fit_of("own", rss=1.0, residuals=noise[:rows])
        assert pair_models.nesting_p_value(small, few, np.arange(rows)) == pytest.approx(p)


def test_sums_of_rounding_prove_nothing():
    noise = np.random.default_rng(0).standard_normal(20)
    for rss, p in ((2e-25, 1.0), (4e-25, stats.f.sf(4e-25 / 2 / (2e-25 / 14), 2, 14))):
        small, large = fit_of("shift", rss=rss), fit_of("own", rss=0.0, residuals=noise)
        assert pair_models.nesting_p_value(small, large, np.arange(20)) == pytest.approx(p)


def test_which_models_carry_a_claim_about_exponents():
    noise, clusters = np.random.default_rng(0).standard_normal(20), np.arange(20)
    own = fit_of("own", rss=1.0, residuals=noise)
    verdicts = {model: pair_models.admissible(fit_of(model, rss=1.0), own, clusters)[0] for model in FREE}
    assert verdicts == {model: model not in ("shared", "shift") for model in FREE}
    for p, passed in ((0.0099, False), (0.0101, True)):
        rss = 1.0 + stats.f.isf(p, 1, 14) / 14
        assert pair_models.admissible(fit_of("exponents", rss=rss), own, clusters)[0] is passed
    for share, passed in ((0.2, True), (0.19, False)):
        assert pair_models.admissible(fit_of("own", convergence_share=share), own, clusters)[0] is passed


def test_data_of_a_pair_are_centred_counted_and_cut():
    data = data_of([0.0, 1.0, 1.0, 2.0], [1.0, 5.0])
    assert data.centre == pytest.approx(10 / 6) and data.u == pytest.approx(np.log(data.x) - 10 / 6)
    assert data.fewest_values == 2
    part = data.subset(np.array([True, False, True, False, False, True]))
    assert np.log(part.x) == pytest.approx([0, 1, 5]) and list(part.is_a) == [True, True, False]
    assert list(part.clusters) == [0, 2, 5] and len(part.y) == 3 and part.matched is False


def test_resamples_of_whole_clusters_have_enough_of_them_on_either_side():
    data = data_of(range(5), range(6), clusters=[4, 3, 2, 1, 0, 5, 6, 7, 8, 9, 10])
    weights = pair_models.resampling_weights(data, 300, seed=3)
    for side in (data.is_a, ~data.is_a):
        assert np.all(weights[:, side].sum(axis=1) == side.sum())
        assert (weights[:, side] > 0).sum(axis=1).min() == 4
    few = pair_models.resampling_weights(data_of(range(3), range(5)), 50, seed=3)
    assert np.all(few[:, :3] == 1) and few.shape == (50, 8)
    both = data_of(range(5), range(5), clusters=[*range(5), *range(5)], matched=True)
    paired = pair_models.resampling_weights(both, 50, seed=3)
    np.testing.assert_array_equal(paired[:, :5], paired[:, 5:])
    assert np.all(paired.sum(axis=1) == 10)
    assert not np.array_equal(paired, pair_models.resampling_weights(both, 50, seed=4))


def test_each_cluster_is_left_out_once():
    weights = pair_models.leave_one_out_weights(data_of([0, 1], [0, 1], clusters=[0, 2, 0, 2], matched=True))
    np.testing.assert_array_equal(weights, [[0, 1, 0, 1], [1, 0, 1, 0]])


def test_starts_hold_what_a_model_holds_and_find_exact_rows():
    u = np.linspace(-3, 3, 9)
    data = data_of(u, u)
    alpha = 0.03 * (2.5 / 0.03) ** (8 / 15)  # of the grid
    curve = {True: 0.4 + 0.06 * np.exp(-alpha * u), False: 0.4 + 0.03 * np.exp(-alpha * u)}
    data = PairData(data.x, np.concatenate([curve[True], curve[False]]), data.is_a, data.clusters, False)
    for model in ("shared", "shift", "exponents", "own", "power"):
        starts = pair_models._starts(pair_models._problem(data, model, 1e-3), model)
        absent = np.exp(starts[:, 0]) == 0
        assert len(starts) == 8 and np.all(absent == (model == "power"))
        for column in (1, 3, 5):
            fixed = {"shared": (1, 3, 5), "shift": (1, 5), "exponents": (1,), "own": (), "power": (1,)}[model]
            assert column not in fixed or np.all(starts[:, column] == 0)
    assert np.exp(starts[[0, -1], 4]) == pytest.approx([1e-3, 0.3])
    assert np.exp(starts[:, 2]) == pytest.approx(np.median(data.y))
    first = pair_models._starts(pair_models._problem(data, "own", 1e-3), "own")[0]
    assert first == pytest.approx([np.log(0.4), 0, np.log(np.sqrt(0.06 * 0.03)), np.log(2), np.log(alpha), 0], abs=1e-6)
    assert np.ptp(np.exp(pair_models._starts(pair_models._problem(data, "own", 1e-3), "own")[:, 4])) > 0.2


class Refined:
    """Stands in for the solver: notes how it was called and gives ends and objectives that were laid out for it."""

    def __init__(self, monkeypatch, *laid_out):
        self.calls, self.laid_out = [], list(laid_out)
        monkeypatch.setattr(pair_models, "refine", self)

    def __call__(self, problem, starts, *, free, weights=None, control=None):
        self.calls.append(dict(problem=problem, starts=starts, free=free, weights=weights, control=control))
        phi, objective = self.laid_out.pop(0) if len(self.laid_out) > 1 else self.laid_out[0]
        none = np.zeros(len(objective))
        return Batch(np.asarray(phi, float), np.asarray(objective, float), none.astype(int), none)


def test_a_fit_is_the_best_end_and_its_residuals_those_of_least_squares(monkeypatch):
    data = data_of(range(4), range(4))
    squares = PHI + 0.01
    ends = np.stack([PHI + 1, PHI, PHI + 2, PHI + 3])
    refined = Refined(monkeypatch, (ends, [2.0, 1.0, 1.0 + 0.99e-4, 1.0 + 1.01e-4]), (squares[None], [0.5]))
    found = pair_models.fit_pair(data, "exponents", delta=0.02)
    np.testing.assert_array_equal(found.phi, PHI)
    assert (found.objective, found.convergence_share, found.draws.shape) == (1.0, 0.5, (0, 6))
    expected = np.log(fit_of("own", squares).predict(data.u, data.is_a)) - np.log(data.y)
    assert found.residuals == pytest.approx(expected) and found.rss == pytest.approx(np.sum(expected**2))
    robust, least = refined.calls
    assert np.all(robust["problem"].delta == 0.02) and least["problem"].delta.min() > 100
    np.testing.assert_array_equal(least["starts"], [PHI])
    for call in refined.calls:
        np.testing.assert_array_equal(call["free"], [1, 0, 1, 1, 1, 1])
    with pytest.raises(ValueError, match="no pair model 'joint'"):
        pair_models.fit_pair(data, "joint")


def test_a_draw_is_the_better_of_a_warm_start_and_a_random_one(monkeypatch):
    data, weights = data_of(range(4), range(4)), np.ones((3, 8))
    warm, away = np.tile(PHI, (3, 1)), np.tile(PHI + 1, (3, 1))
    refined = Refined(monkeypatch, (warm, [1.0, 2.0, 3.0]), (away, [1.0, 1.9, np.nan]))
    found = pair_models.resampled(fit_of("shift"), data, weights, seed=2)
    np.testing.assert_array_equal(found.draws, [PHI, PHI + 1, PHI])
    first, second = refined.calls
    np.testing.assert_array_equal(first["starts"], warm)
    moved = second["starts"] - PHI
    assert np.all(moved[:, [1, 3, 5]] == 0) and np.all(moved[:, [0, 2, 4]] != 0) and np.abs(moved).max() < 1.2
    for call in refined.calls:
        assert call["weights"] is weights and call["control"].polish is False
        np.testing.assert_array_equal(call["free"], [1, 0, 1, 1, 1, 0])
    Refined(monkeypatch, (warm, [1.0, 2.0, 3.0]))
    other = pair_models.resampled(fit_of("shift", convergence_share=0.5), data, weights)
    assert other.convergence_share == 0.5 and other.model == "shift"


def test_errors_beyond_a_cut_are_those_of_the_rows_in_reach_of_it(monkeypatch):
    """Cuts at 4.5, 5.5 ... 8.5 of ln x in 0 to 10; 30 times further is 3.4."""
    data = data_of(range(11), range(10), y=0.4 + np.random.default_rng(0).uniform(0.1, 0.2, 21))
    refined = Refined(monkeypatch, (np.stack([PHI + 1, PHI]), [2.0, 1.0]))
    found = pair_models.rolling_origin_error(data, ("shared", "own"), delta=0.02)
    place = np.log(data.x).round()
    error = np.log(fit_of().predict(data.u, data.is_a)) - np.log(data.y)
    beyond = {cut: error[(place > cut) & (place <= cut + 3)] for cut in (4, 5, 6, 7, 8)}
    rms = {cut: np.sqrt(np.mean(part**2)) for cut, part in beyond.items()}
    assert len(beyond[8]) == 3  # the fewest that will do
    # Six parameters want twelve rows to be fitted to, which the first cut has not.
    assert found == pytest.approx({"shared": np.mean(list(rms.values())), "own": np.mean(list(rms.values())[1:])})
    trained = [call["weights"].sum() for call in refined.calls]
    assert trained == [10, 12, 14, 16, 18, 12, 14, 16, 18]
    assert [int(call["free"].sum()) for call in refined.calls] == [3] * 5 + [6] * 4
    assert all(np.all(call["problem"].delta == 0.02) for call in refined.calls)
    for gone, cuts in ((2, 5), (3, 4)):  # eight rows at the first cut are enough, seven are not
        refined.calls.clear()
        pair_models.rolling_origin_error(data.subset(~np.isin(np.arange(21), [1, 2, 12][:gone])), ("shared",))
        assert len(refined.calls) == cuts
    few = pair_models.rolling_origin_error(data.subset(place < 4), ("shared",))
    assert few == {"shared": None}
