"""The parts of rolling origin by hand: ranking, coverage, widening, forecasts, cuts, baselines and held-out errors."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from recscale.scaling.laws import Refused
from recscale.scaling.laws.fitting.law_fit import Settings
from recscale.scaling.laws.fitting.problem import make_problem
from recscale.scaling.laws.forms.registry import get
from recscale.scaling.laws.judgement import rolling
from recscale.scaling.laws.judgement.rolling import Rolling


def scores_of(rows):
    frame = pd.DataFrame(rows, columns=["form", "cut", "rms", "bias"])
    return frame.assign(train=9, test=4)


def rolling_of(scores=(), points=(), fits=None):
    found = pd.DataFrame(points, columns=["form", "ratio_bin", "actual", "error", "half"])
    for level in (50, 80, 95):
        half = found["half"] * level / 95
        found[f"low_{level}"], found[f"high_{level}"] = found["actual"] + found["error"] - half, 0.0
        found[f"high_{level}"] = found[f"low_{level}"] + 2 * half
    return Rolling("x", (1.0, 2.0), scores_of(list(scores)), found, fits or {})


def test_forms_are_ranked_where_all_were_scored():
    found = rolling_of(
        [
            ("sum", 1.0, 0.3, 0.1), ("kappa", 1.0, 0.1, 0.0), ("last_value", 1.0, 0.5, 0.0),
            ("sum", 2.0, 0.1, -0.2), ("kappa", 2.0, 0.2, 0.3), ("last_value", 2.0, 0.4, 0.0),
            ("kappa", 3.0, 9.0, 9.0),
        ]
    )  # fmt: skip
    ranking = found.ranking
    assert list(ranking.index) == ["kappa", "sum", "last_value"] and found.best == "kappa"
    assert ranking["mean_rms"].to_dict() == pytest.approx({"kappa": 0.15, "sum": 0.2, "last_value": 0.45})
    assert ranking["worst_rms"].to_dict() == {"kappa": 0.2, "sum": 0.3, "last_value": 0.5}
    assert ranking["bias"].to_dict() == pytest.approx({"kappa": 0.15, "sum": -0.05, "last_value": 0.0})
    assert set(ranking["cuts"]) == {2}
    # Weights are the inverse mean squares: .025 and .05.
    assert ranking["weight"].to_dict() == pytest.approx({"kappa": 2 / 3, "sum": 1 / 3, "last_value": 0.0})
    beaten = rolling_of([("sum", 1.0, 0.3, 0.0), ("last_value", 1.0, 0.2, 0.0)])
    assert beaten.best is None and rolling_of().best is None and list(rolling_of().ranking.columns)[-1] == "weight"
    nothing = rolling_of([("last_value", 1.0, 0.2, 0.0), ("log_linear_baseline", 1.0, 0.1, 0.0)])
    assert list(nothing.ranking["weight"]) == [0.0, 0.0]
    exact = rolling_of([("sum", 1.0, 0.0, 0.0), ("kappa", 1.0, 0.0, 0.0)])
    assert list(exact.ranking["weight"]) == [0.5, 0.5]


def test_coverage_counts_points_inside_by_ratio():
    points = [("sum", "<=3x", 0.0, error, 1.0) for error in (0.1, 0.6, -0.9, 1.2)]
    points += [("sum", "3-10x", 0.0, 1.0, 1.0), ("sum", "3-10x", 0.0, 1.0, np.nan)]
    told = rolling_of(points=points).coverage.set_index(["ratio", "level"])
    assert told.loc["<=3x", "coverage"].to_dict() == {0.5: 0.25, 0.8: 0.5, 0.95: 0.75}
    assert told.loc["3-10x", "coverage"].to_dict() == {0.5: 0.0, 0.8: 0.0, 0.95: 1.0}
    assert told.loc["<=3x", "points"].tolist() == [4] * 3 and told.loc["3-10x", "points"].tolist() == [1] * 3
    for none in ([], [("sum", "<=3x", 0.0, 0.0, np.nan)]):
        assert rolling_of(points=none).coverage.empty


@pytest.mark.parametrize(("count", "level", "place"), [(19, 0.95, 19), (18, 0.95, None), (10, 0.8, 9), (9, 0.8, None)])
def test_widening_is_the_corrected_quantile_of_errors_in_half_widths(count, level, place):
    errors = np.random.default_rng(0).permutation(np.arange(1.0, count + 1)) * (-1.0) ** np.arange(count)
    points = [("sum", "3-10x", 0.3, error, 2.0) for error in errors]
    points += [("kappa", "3-10x", 0.3, 99.0, 1.0)] * 20 + [("sum", "3-10x", 0.3, 99.0, np.nan)] * 20
    found = rolling_of(points=points).widening("sum", level)
    assert found == {"<=3x": None, "10-30x": None, "3-10x": None if place is None else pytest.approx(place / 2)}
    assert set(rolling_of().widening("sum").values()) == {None}


def test_a_forecast_is_the_weighted_mean_of_the_ranked_forms():
    def law(value):
        return SimpleNamespace(predict=lambda axes, beyond_range: value * np.asarray(axes["x"]) + beyond_range)

    scores = [("sum", 1.0, 0.1, 0.0), ("kappa", 1.0, 0.2, 0.0), ("last_value", 1.0, 0.5, 0.0), ("gone", 1.0, 0.1, 0.0)]
    found = rolling_of(scores, fits={"sum": law(1.0), "kappa": law(2.0)})
    told = found.forecast({"x": [1.0, 2.0]})
    assert told["mean"] == pytest.approx([1.2, 2.4]) and told["weights"] == pytest.approx({"sum": 0.8, "kappa": 0.2})
    assert (
        list(told["low"]) == [1.0, 2.0] and list(told["high"]) == [2.0, 4.0] and list(told["forms"]["kappa"]) == [2, 4]
    )
    assert found.forecast({"x": 1.0}, beyond_range=True)["mean"] == pytest.approx(2.2)
    with pytest.raises(Refused, match="no form could be ranked"):
        rolling_of(scores).forecast({"x": 1.0})
    record = found.record()
    assert record["cuts"] == [1.0, 2.0] and record["best"] == "gone" and set(record["widening"]) == {"sum", "kappa"}
    assert record["ranking"][0]["form"] == "gone" and len(record["scores"]) == 4 and record["refused"] == {}


def test_cuts_are_even_in_the_logarithm_and_reach_thirty_times():
    cuts = rolling._cut_values(np.array([10.0, 1e3, 1e5]), 5)
    assert np.log10(cuts) == pytest.approx(1 + 4 * np.array([0.45, 0.55, 0.65, 0.75, 0.85]))
    values = np.array([1.0, 2.0, 2.0 * (1 + 1e-11), 59.0, 60.0, 60.0 * (1 + 1e-10)])
    train, test = rolling._split(values, 2.0)
    np.testing.assert_array_equal(train, [1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(test, [0, 0, 1, 1, 1, 0])


def test_the_cut_axis_is_compute_or_what_the_axes_make():
    frame = pd.DataFrame({"dense_params": [2.0, 3.0], "examples": [5.0, 7.0], "train_flops": [1.0, 2.0]})
    assert rolling._with_cut_axis(frame, None, None)[0] == "train_flops"
    assert rolling._with_cut_axis(frame, None, "examples") == ("examples", frame)
    bare = frame.drop(columns="train_flops")
    name, made = rolling._with_cut_axis(bare, None, None)
    assert name == "dense_params x examples" and list(made[name]) == [10, 21]
    assert rolling._with_cut_axis(bare, {"N": "examples", "D": "examples"}, None)[0] == "examples"
    assert rolling._with_cut_axis(bare, {"N": "examples", "D": "rows"}, None)[0] == "examples"
    with pytest.raises(ValueError, match="no column 'rows'"):
        rolling._with_cut_axis(bare, {"D": "rows"}, None)
    with pytest.raises(ValueError, match="no column 'flops'"):
        rolling._with_cut_axis(bare, None, "flops")


@pytest.mark.parametrize(
    ("form", "axes", "told"),
    [
        ("chinchilla", None, None),
        ("power", None, {"x": "cut"}),
        ("power", {"x": "p", "N": "q"}, {"x": "p"}),
        ("power", {"N": "q"}, {"x": "q"}),
        ("power", {"N": "q", "D": "r"}, {"x": "cut"}),
        ("chinchilla", {"N": "q", "D": "r", "x": "p", "length": "s"}, {"N": "q", "D": "r", "x": "p"}),
    ],
)
def test_each_form_takes_the_axes_it_has(form, axes, told):
    assert rolling._axes_for(form, axes, "cut") == told


def law_of(y, values, form="power_offset", **changes):
    """A law of one axis as far as scoring needs it: rows, form and settings."""
    rows = SimpleNamespace(
        y=np.asarray(y, float), axes={"x": np.asarray(values, float)}, run_ids=[f"r{i}" for i in range(len(y))],
        codes=np.arange(len(y)),
    )  # fmt: skip
    return SimpleNamespace(form=get(form), rows=rows, settings=Settings(), refused=False, refusals=[], **changes)


def test_baselines_are_the_last_value_and_a_line():
    values = np.geomspace(1, 1e4, 14)
    y = 0.4 + 0.1 * values**-0.3 + 0.001 * (-1.0) ** np.arange(14)
    cuts = (values[7], values[6], values[10], values[11])  # 8, 7, 11 and 12 rows to train on
    found = rolling._baselines(law_of(y, values), values, cuts)
    assert [(row["form"], row["cut"]) for row in found] == [
        (name, cut) for cut in (cuts[0], cuts[2]) for name in ("last_value", "log_linear_baseline")
    ]
    for k, row in enumerate(found):
        train = values <= row["cut"]
        test = ~train & (values <= 30 * row["cut"])
        line = np.polyval(np.polyfit(np.log(values[train]), y[train], 1), np.log(values[test]))
        guess = line if k % 2 else y[train][-1]
        error = np.log(guess / y[test])
        assert (row["train"], row["test"]) == (train.sum(), test.sum())
        assert (row["rms"], row["bias"]) == pytest.approx((np.sqrt(np.mean(error**2)), error.mean()))
    signed = rolling._baselines(law_of(y - 0.45, values), values, cuts[:1])
    gap = y[7] - y[8:12]
    assert (signed[0]["rms"], signed[0]["bias"]) == pytest.approx((np.sqrt(np.mean(gap**2)), gap.mean()))


PHI = np.log([0.4, 0.1, 0.3])


def fitted(y, values, form="power_offset", kind="log", phi=PHI):
    problem = make_problem(get(form), np.log(values)[:, None], np.asarray(y, float), kind=kind, unit=0.5)
    return problem, SimpleNamespace(phi=phi), problem.weights


def test_held_out_errors_are_relative_where_the_metric_is_positive():
    values = np.geomspace(1, 1e4, 6)
    y, rows = 0.5 + 0.01 * np.arange(6), np.arange(6) > 2
    law = law_of(y, values)
    curve = 0.4 + 0.1 * values[3:] ** -0.3
    which, predicted, actual, error = rolling._held_out(law, *fitted(y, values)[:2], rows)
    np.testing.assert_array_equal(which, rows)
    assert predicted == pytest.approx(np.log(curve)) and actual == pytest.approx(np.log(y[3:]))
    assert error == pytest.approx(np.log(curve / y[3:]))
    signed = y - 0.54
    _, predicted, actual, error = rolling._held_out(law, *fitted(signed, values, kind="plain")[:2], rows)
    assert predicted == pytest.approx(curve) and actual == pytest.approx(signed[3:])
    assert error == pytest.approx(curve - signed[3:])


def test_points_beyond_a_cut_have_their_ratio_and_bands(monkeypatch):
    values = np.concatenate([np.geomspace(1, 100, 9), [150.0, 300.0, 301.0, 1000.0, 1001.0, 3000.0, 3001.0]])
    y = 0.5 + 0.01 * np.arange(16)
    law = law_of(y, values)
    trained = []

    def fit_part(law, mask):
        trained.append(mask)
        return fitted(y, values)

    def bands(law, problem, solution, weights, which, draws):
        return [np.stack([np.full(which.sum(), -level), np.full(which.sum(), level)]) for level in (1.0, 2.0, 3.0)]

    monkeypatch.setattr(rolling, "fit_part", fit_part)
    monkeypatch.setattr(rolling, "_bands", bands)
    score, points = rolling._score(law, "mine", values, 100.0, 5)
    np.testing.assert_array_equal(trained[0], values <= 100)
    assert [p[4] for p in points] == ["<=3x"] * 2 + ["3-10x"] * 2 + ["10-30x"] * 2
    assert [p[2] for p in points] == [f"r{i}" for i in range(9, 15)]
    assert [p[3] for p in points] == pytest.approx(values[9:15] / 100) and {p[1] for p in points} == {100.0}
    error = np.log((0.4 + 0.1 * values[9:15] ** -0.3) / y[9:15])
    assert [p[7] for p in points] == pytest.approx(error) and points[0][5] == pytest.approx(np.log(y[9]))
    assert points[0][8:] == [-1.0, 1.0, -2.0, 2.0, -3.0, 3.0]
    spread = {"rms": pytest.approx(np.sqrt(np.mean(error**2))), "bias": pytest.approx(error.mean())}
    assert score == {"form": "mine", "cut": 100.0, "train": 9, "test": 6, **spread}
    _, bare = rolling._score(law, "mine", values, 100.0, 0)
    assert np.isnan(bare[0][8:]).all() and len(bare[0]) == 14
    monkeypatch.setattr(rolling, "_bands", lambda *_: None)
    assert np.isnan(rolling._score(law, "mine", values, 100.0, 5)[1][0][8:]).all()
    # Eight rows at least, twice as many as parameters, and three rows beyond the cut.
    eight = np.arange(16) > 0
    part = law_of(y[eight], values[eight])
    monkeypatch.setattr(rolling, "fit_part", lambda law, mask: fitted(y[eight], values[eight]))
    assert rolling._score(part, "mine", values[eight], 100.0, 0) is not None
    assert rolling._score(part, "mine", values[eight], 99.0, 0) is None
    assert rolling._score(part, "mine", values[eight], 1000.0, 0) is not None
    assert rolling._score(part, "mine", values[eight], 1001.0, 0) is None
    wide = law_of(y, values, "m4")
    assert rolling._score(wide, "mine", values, 100.0, 0) is None  # five parameters


def test_bands_are_percentiles_of_resampled_curves_and_residuals(monkeypatch):
    values = np.geomspace(1, 1e4, 10)
    y = (0.4 + 0.1 * values**-0.3) * np.exp(0.01 * (-1.0) ** np.arange(10))
    law, which = law_of(y, values), np.arange(10) > 7
    seen = {}

    def bootstrap(problem, solution, codes, draws, seed, *, counts, weights, restart):
        seen.update(counts=counts, weights=weights, restart=restart, seed=seed)
        return np.tile(PHI, (draws, 1))

    monkeypatch.setattr(rolling, "bootstrap", bootstrap)
    for kind in ("log", "plain"):
        problem, solution, _ = fitted(y, values, kind=kind)
        weights = (np.arange(10) < 8).astype(float)
        bands = rolling._bands(law, problem, solution, weights, which, 400)
        assert seen["weights"] is weights and seen["restart"] is False and seen["seed"] == 0
        assert seen["counts"].shape == (400, 10) and np.all(seen["counts"].sum(axis=1) == 8)
        assert np.all(seen["counts"][:, 8:] == 0)
        curve = 0.4 + 0.1 * values[which] ** -0.3
        # Residuals are one of two values: half of all draws lie at either end of every band.
        for low, high in bands:
            if kind == "log":
                assert (low, high) == (pytest.approx(np.log(curve) - 0.01), pytest.approx(np.log(curve) + 0.01))
            else:
                spread = np.abs((0.4 + 0.1 * values**-0.3) - y)[:8]
                assert np.all(np.exp(high) - curve <= spread.max() + 1e-12) and np.all(np.exp(low) < curve)
                assert np.all(np.exp(high) > curve + spread.min() - 1e-12)
    assert len(bands) == 3
    few = (np.arange(10) < 5).astype(float)
    assert rolling._bands(law, problem, solution, few, which, 10) is None
    six = (np.arange(10) < 6).astype(float)
    assert rolling._bands(law, problem, solution, six, which, 10) is not None


def test_the_levels_of_bands_are_central(monkeypatch):
    values = np.geomspace(1, 1e4, 10)
    y = 0.4 + 0.1 * values**-0.3
    law, which = law_of(y, values), np.arange(10) > 8
    shifts = np.linspace(-0.1, 0.1, 401)
    monkeypatch.setattr(rolling, "bootstrap", lambda *_, **__: np.stack([PHI + [s, s, 0] for s in shifts]))
    problem, solution, weights = fitted(y, values)
    bands = rolling._bands(law, problem, solution, weights, which, 401)
    centre = np.log(y[-1])
    for level, (low, high) in zip((0.5, 0.8, 0.95), bands, strict=True):
        assert (low[0], high[0]) == pytest.approx((centre - 0.1 * level, centre + 0.1 * level), abs=1e-9)


def test_either_end_of_a_ladder_is_left_out(monkeypatch):
    values = np.array([1.0, 1, 2, 3, 4, 4, 5, 5, 5])
    y = 0.5 + 0.01 * np.arange(9)
    law, masks = law_of(y, values), []

    def fit_part(law, mask):
        masks.append(mask)
        return fitted(law.rows.y, law.rows.axes["x"])

    monkeypatch.setattr(rolling, "fit_part", fit_part)
    found = rolling.ladder_ends(law)
    np.testing.assert_array_equal(masks, [values != 5, values != 1])
    for name, rung, rows in (("largest", 5.0, 3), ("smallest", 1.0, 2)):
        error = np.log((0.4 + 0.1 * rung**-0.3) / y[values == rung])
        assert found[name] == {"value": rung, "rows": rows, "rms": pytest.approx(np.sqrt(np.mean(error**2))),
                               "bias": pytest.approx(error.mean())}  # fmt: skip
    # Six rows for three parameters are left without the largest, and three rungs at least.
    short = rolling.ladder_ends(law_of(y[1:], values[1:]))
    assert "reason" in short["largest"] and "rms" not in short["largest"]
    two = rolling.ladder_ends(law_of(y, np.array([1.0, 1, 1, 1, 1, 2, 2, 2, 3])))
    assert "reason" in two["largest"] and "reason" in two["smallest"]


def test_a_calibrated_interval_has_its_half_width_multiplied():
    points = [("power_offset", "3-10x", 0.0, 2.0, 1.0)] * 19
    found = rolling_of(points=points)

    def predict(axes, *, interval, noise, beyond_range):
        assert interval and noise
        return 0.5, 0.4, 0.6 + beyond_range

    law = SimpleNamespace(form=get("power_offset"), predict=predict)
    for ratio, known in ((3.0, False), (3.01, True), (10.0, True), (10.01, False), (0.5, False), (99.0, False)):
        value, low, high, note = rolling.calibrated_interval(law, found, {"x": 1.0}, ratio)
        assert value == 0.5
        if known:
            assert low * high == pytest.approx(0.24) and high / low == pytest.approx(1.5**2)
            assert note == "coverage at 3-10x: 0.00 of 0.95; widened x2.00"
        else:
            assert (low, high, note) == (0.4, 0.6, "uncalibrated")
    assert rolling.calibrated_interval(law, found, {"x": 1.0}, 1.0, beyond_range=True)[2] == 1.6
