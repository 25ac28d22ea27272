"""The parts of forecasts by hand: who is admitted, stacked intervals, the second stage, and pooled exponents."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from recscale.scaling.laws import Refused
from recscale.scaling.laws.forecasting import forecast as forecasting
from recscale.scaling.laws.forecasting import pooling, second_stage
from recscale.scaling.laws.forms.metric_maps import auc_to_t, t_to_auc
from recscale.scaling.laws.judgement.rolling import Rolling


def rolling_of(errors, refused=(), points=None):
    """One cut at which forms and baselines have these errors."""
    rows = [(name, 1.0, 9, 4, rms, 0.0) for name, rms in errors.items()]
    scores = pd.DataFrame(rows, columns=["form", "cut", "train", "test", "rms", "bias"])
    return Rolling("x", (1.0,), scores, pd.DataFrame() if points is None else points, {}, dict(refused))


def test_forms_within_twice_the_best_error_are_admitted():
    found = rolling_of({"a": 0.1, "b": 0.2, "c": 0.21, "last_value": 0.5, "log_linear_baseline": 0.01}, {"d": "dof"})
    weights, rejected = forecasting._admitted(found)
    assert weights == pytest.approx({"a": 0.8, "b": 0.2})  # inverse squares
    assert set(rejected) == {"c", "d"} and "0.21" in rejected["c"] and "limit 0.2" in rejected["c"]
    weights, rejected = forecasting._admitted(rolling_of({"a": 0.1, "b": 0.15, "last_value": 0.12}))
    assert weights == {"a": 1.0} and set(rejected) == {"b"}
    assert forecasting._admitted(rolling_of({"a": 0.1, "last_value": 0.1}))[0] == {"a": 1.0}
    assert forecasting._admitted(rolling_of({"a": 0.1}))[0] == {"a": 1.0}
    for errors, words in (({"a": 0.1, "last_value": 0.09}, "repeating the last value"), ({"last_value": 1.0}, "dof")):
        with pytest.raises(Refused, match=words):
            forecasting._admitted(rolling_of(errors, {"d": "dof"}))


def test_a_prediction_is_a_weighted_mean_inside_the_outer_ends():
    def law(value, half):
        def predict(points, *, interval, noise):
            assert interval and noise
            x = points["p"].to_numpy(float)
            return value * x, (value - half) * x, (value + half) * x

        return SimpleNamespace(predict=predict)

    laws, points = {"a": law(1.0, 0.5), "b": law(2.0, 0.25)}, pd.DataFrame({"p": [1.0, 4.0]})
    told = forecasting._predicted(laws, {"a": 0.75, "b": 0.25}, points, "p", 2.0)
    assert told.to_dict("list") == {
        "p": [1.0, 4.0], "ratio": [0.5, 2.0], "predicted": [1.25, 5.0], "low": [0.5, 2.0], "high": [2.25, 9.0],
    }  # fmt: skip
    assert forecasting._predicted(laws, {"a": 0.75, "b": 0.25}, points, "q", 2.0)["ratio"].isna().all()
    assert list(forecasting._predicted(laws, {}, points[:0], "p", 2.0).columns) == list(told.columns)


def test_rows_above_the_cut_are_held_out_and_judged(monkeypatch):
    """Sizes 2 to 2000; the fit predicts .5 within .05 up to 1200 and refuses what lies above."""
    fitted = []

    def fit(rows, form, axes, target, draws, *, profile, cluster, seed):
        fitted.append((len(rows), form, axes, target, draws, profile, cluster, seed))

        def predict(points, *, interval, noise):
            half = np.where(points["p"] <= 1200, 0.05, np.nan)
            return 0.5 + 0 * half, 0.5 - half, 0.5 + half

        return SimpleNamespace(predict=predict)

    def rolling_origin(below, candidates, axes, target, *, axis, draws, **options):
        fitted.append((len(below), candidates, dict(axes), target, axis, draws, options))
        found = rolling_of({"power": 0.1, "kappa": 0.5, "last_value": 0.9}, points=ROLLED)
        law = SimpleNamespace(form="the form", rows=SimpleNamespace(columns={"x": "p"}))
        return Rolling("p", (1.0,), found.scores, found.points, {"power": law, "kappa": law}, {"m4": "few"})

    monkeypatch.setattr(forecasting, "fit", fit)
    monkeypatch.setattr(forecasting, "rolling_origin", rolling_origin)
    table = pd.DataFrame(
        {"p": [2.0, 20.0, 180.0, 202.0, 1000.0, 2000.0, 2000.0], "loss": [0.9, 0.8, 0.7, 0.5, 0.6, 0.5, 0.5]}
    )
    table["status"] = ["done"] * 6 + ["failed"]
    at = [{"x": 400.0}, {"x": 4000.0}]
    found = forecasting.forecast(table, ["power", "kappa"], {"x": "p"}, "loss", at=at, cluster="c", draws=7, seed=3)
    assert found.cut == pytest.approx(200.0) and found.axis == "p" and found.target == "loss"
    assert fitted[0] == (3, ["power", "kappa"], {"x": "p"}, "loss", "p", 7, {"cluster": "c", "seed": 3})
    assert fitted[1] == (3, "the form", {"x": "p"}, "loss", 7, False, "c", 3)
    assert found.weights == {"power": 1.0} and set(found.rejected) == {"kappa", "m4"} and set(found.laws) == {"power"}
    held = found.held_out
    assert held["p"].tolist() == [202, 1000, 2000] and held["actual"].tolist() == [0.5, 0.6, 0.5]
    assert held["ratio"].tolist() == pytest.approx([1.01, 5, 10]) and held["inside"].tolist()[:2] == [True, False]
    assert pd.isna(held["inside"].iloc[2])  # refused is neither inside nor outside
    assert found.points["p"].tolist() == [400, 4000] and found.points["ratio"].tolist() == pytest.approx([2, 20])
    told = found.calibration.set_index("ratio")
    assert told["rolling_rows"].tolist() == [19, 0, 0] and told["held_out_rows"].tolist() == [1, 1, 0]
    # Nineteen errors of up to 1.9 half-widths of ln y widen the first point, and no other.
    assert found.held_out["wide_high"][0] == pytest.approx(np.exp(WIDE))
    assert found.held_out["wide_low"].notna().tolist() == [True, False, False]
    given = forecasting.forecast(table, ["power"], {"x": "p"}, "loss", axis="p", cut=20.0, where="p < 1200", draws=0)
    assert given.held_out["p"].tolist() == [180, 202, 1000] and given.points.empty
    with pytest.raises(ValueError, match="leaves 6 rows of p below it and 0 above"):
        forecasting.forecast(table[:6], ["power"], {"x": "p"}, "loss", cut=1e4)
    assert len(forecasting.forecast(table[:6], ["power"], {"x": "p"}, "loss", cut=1e4, at=at).points) == 2
    with pytest.raises(ValueError, match="leaves 0 rows"):
        forecasting.forecast(table, ["power"], {"x": "p"}, "loss", cut=0.5, at=at)
    over = forecasting.forecast(table.assign(best=0.4), ["power_offset"], {"x": "p"}, "loss", over="best")
    assert over.target == "loss over best" and over.held_out["actual"].tolist()[0] == pytest.approx(0.1)
    (candidate,) = fitted[-2][1]
    assert candidate.names == ("A", "alpha")  # its own floor is held at 0


ROLLED = pd.DataFrame(
    {"form": "power", "cut": 1.0, "run_id": range(19), "ratio": 1.5, "actual": np.arange(1.0, 20.0) / 10,
     "low_95": -1.0, "high_95": 1.0},
)  # fmt: skip
# The band of .45 to .55 in the logarithm, 1.9 times as wide.
WIDE = np.log(0.45 * 0.55) / 2 + 1.9 * np.log(0.55 / 0.45) / 2


def test_intervals_of_the_rolling_cuts_are_stacked():
    rows = [
        ("a", 1.0, "r", 2.0, 0.5, -1.0, 1.0),
        ("b", 1.0, "r", 2.0, 0.5, -0.5, 3.0),
        ("c", 1.0, "r", 2.0, 0.5, -9, 9),
    ]
    rows += [("a", 2.0, "r", 1.5, 0.5, -0.1, 0.1), ("b", 2.0, "s", 1.5, 0.5, np.nan, np.nan)]
    points = pd.DataFrame(rows, columns=["form", "cut", "run_id", "ratio", "actual", "low_95", "high_95"])
    told = forecasting._stacked(rolling_of({}, points=points), ["a", "b"])
    assert told[["low", "high"]].to_numpy().tolist() == [[-1.0, 3.0], [-0.1, 0.1]]


def test_calibration_counts_by_how_far_out():
    stacked = pd.DataFrame({"ratio": [1.0, 1.5, 2.0, 2.1, 10.0, 50.0], "actual": [9, 0, 2, 0, 0, 5.0]})
    stacked = stacked.assign(low=-1.0, high=1.0)
    held_out = pd.DataFrame({"ratio": [1.5, 2.0, 3.0, 100.0, 101.0], "inside": [True, None, False, True, True]})
    told = forecasting.calibrate(stacked, held_out).set_index("ratio")
    assert told["rolling_rows"].tolist() == [2, 2, 1] and told["rolling_inside"].tolist() == [0.5, 1.0, 0.0]
    assert told["held_out_rows"].tolist() == [1, 1, 1] and told["held_out_inside"].tolist() == [1.0, 0.0, 1.0]
    assert told["widening"].isna().all()
    none = forecasting.calibrate(stacked[:0], held_out[:0])
    assert none["rolling_inside"].isna().all() and none["held_out_inside"].isna().all()


@pytest.mark.parametrize(("count", "factor"), [(18, None), (19, 19 / 2), (39, 38 / 2)])
def test_nineteen_errors_say_what_one_in_twenty_exceeds(count, factor):
    errors = np.random.default_rng(0).permutation(np.arange(1.0, count + 1)) * (-1.0) ** np.arange(count)
    past = pd.DataFrame({"actual": 0.5 + errors, "low": -1.5, "high": 2.5})
    assert forecasting._widening(past) == (factor if factor is None else pytest.approx(factor))
    assert forecasting._widening(past.assign(actual=0.6)) == (None if factor is None else 1.0)


def test_widened_intervals_keep_their_middle():
    calibration = pd.DataFrame({"widening": [2.0, None, 3.0]})
    points = pd.DataFrame({"ratio": [1.0, 2.0, 2.1, 10.1, 100.0, 101.0], "low": 1.0, "high": 2.0})
    plain = forecasting.widen(points, calibration, positive=False)
    assert plain["wide_low"].tolist() == pytest.approx([np.nan, 0.5, np.nan, 0.0, 0.0, np.nan], nan_ok=True)
    assert plain["wide_high"].tolist() == pytest.approx([np.nan, 2.5, np.nan, 3.0, 3.0, np.nan], nan_ok=True)
    logs = forecasting.widen(points, calibration, positive=True)
    assert logs["wide_low"][1] == pytest.approx(2**-0.5) and logs["wide_high"][3] == pytest.approx(4.0)


def forecast_of(points, held_out, axis="p"):
    columns = ["p", "ratio", "predicted", "low", "high"]
    found = (pd.DataFrame(rows, columns=columns) for rows in (held_out, points))
    held, asked = found
    return forecasting.Forecast(axis, 10.0, "loss", {"a": 1.0}, {}, held, asked, pd.DataFrame(), {})


def test_auc_is_a_line_in_the_loss_below_the_cut():
    loss = np.linspace(0.4, 0.5, 8)
    t = 1.5 - 4 * (loss - 0.4)
    table = pd.DataFrame({"p": np.arange(1.0, 9.0), "loss": loss, "auc": t_to_auc(t), "status": "done"})
    odd = table.assign(auc=0.6, p=11.0)  # above the cut
    lost = table.assign(auc=0.6, status="diverged")
    gaps = table.assign(auc=np.nan)
    found = forecast_of(
        [(20.0, 2.0, 0.38, 0.37, 0.39), (99.0, 9.9, np.nan, np.nan, np.nan)], [(11, 1.1, 0.39, 0.38, 0.41)]
    )
    told = second_stage.to_auc(found, pd.concat([table, odd, lost, gaps], ignore_index=True), draws=60)
    assert told["p"].tolist() == [11, 20, 99]
    for name, ends in (("auc", [0.39, 0.38]), ("auc_low", [0.41, 0.39]), ("auc_high", [0.38, 0.37])):
        assert told[name].to_numpy()[:2] == pytest.approx(t_to_auc(1.5 - 4 * (np.array(ends) - 0.4)), abs=1e-9)
        assert np.isnan(told[name].to_numpy()[2])
    assert found.granted and not forecast_of([(1, 1, np.nan, 0, 0)], [(1, 1, np.nan, 0, 0)]).granted
    assert forecast_of([(1, 1, np.nan, 0, 0)], [(1, 1, 0.5, 0, 0)]).granted
    # Six clusters: of the axis, or of shapes where there are some.
    assert len(second_stage.to_auc(found, table[:6], draws=5)) == 3
    for few in (table[:5], table.assign(shape_id=[1, 1, 2, 2, 3, 3, 4, 5])):
        with pytest.raises(Refused, match="5 clusters"):
            second_stage.to_auc(found, few)
    for rising in (table.assign(auc=t_to_auc(3.0 - t)), table.assign(auc=0.7)):
        with pytest.raises(Refused, match="does not fall"):
            second_stage.to_auc(found, rising)


def test_the_scatter_around_the_line_widens_auc():
    rng = np.random.default_rng(0)
    loss = np.repeat(np.linspace(0.4, 0.5, 40), 2)
    t = 1.5 - 4 * (loss - 0.4) + 0.1 * rng.normal(size=80)
    table = pd.DataFrame({"p": np.repeat(np.linspace(1, 9, 40), 2), "loss": loss, "auc": t_to_auc(t)})
    found = forecast_of([(20.0, 2.0, 0.45, 0.45, 0.45)], [])
    told = second_stage.to_auc(found, table, draws=2000).iloc[0]
    slope, level = np.polyfit(loss, t, 1)
    assert auc_to_t(told["auc"]) == pytest.approx(slope * 0.45 + level)
    # At the mean of the losses the line itself adds sd / sqrt(n) only.
    left = t - slope * loss - level
    ends = np.percentile(left, [2.5, 97.5])
    assert auc_to_t(told["auc_low"]) - auc_to_t(told["auc"]) == pytest.approx(ends[0], rel=0.1)
    assert auc_to_t(told["auc_high"]) - auc_to_t(told["auc"]) == pytest.approx(ends[1], rel=0.1)


RAW = {
    "E_p": 0.40,
    "E_q": 0.41,
    "E_r": 0.42,
    "A_p": 0.1,
    "alpha_p": 0.3,
    "A_q": 0.2,
    "alpha_q": 0.4,
    "A_r": 0.3,
    "alpha_r": 0.5,
}


@pytest.mark.parametrize("shared", [True, False])
def test_curves_side_by_side_are_each_its_own(shared):
    form = pooling.pooled_form(("p", "q", "r"), shared)
    raw = {name: value for name, value in RAW.items() if not name.startswith("E")} | ({"E": 0.4} if shared else {})
    raw |= {} if shared else {name: RAW[name] for name in ("E_p", "E_q", "E_r")}
    assert set(form.names) == set(raw) and form.floor == ("E" if shared else None)
    which = np.array([1.0, 2.0, 3.0, 3.0, 1.0])
    u = np.linspace(-1, 1, 5)
    names = ["pqr"[int(k) - 1] for k in which]
    expected = [
        raw[("E" if shared else f"E_{k}")] + raw[f"A_{k}"] * np.exp(-raw[f"alpha_{k}"] * x)
        for k, x in zip(names, u, strict=True)
    ]
    points = np.column_stack([u, which])
    phi = form.to_search({name: np.array(value) for name, value in raw.items()})
    np.testing.assert_allclose(form.value(phi, points), expected)
    known = {name: np.array([[raw[name]]]) for name in form.linear.exponents}
    columns = [np.broadcast_to(c, (1, 5))[0] for c in form.linear.columns(known, points)]
    total = sum(raw[name] * c for name, c in zip(form.linear.coefficients, columns, strict=True))
    np.testing.assert_allclose(total, expected)
    assert len(form.linear.signed) == len(columns) and not any(form.linear.signed)


def law_with(names, alphas, intervals=None):
    params = {f"alpha_{name}": alpha for name, alpha in zip(names, alphas, strict=True)}
    return SimpleNamespace(params=params, intervals=intervals or {})


def test_exponents_are_shrunk_by_dersimonian_and_laird():
    names, alphas = ("p", "q", "r", "s"), np.array([0.30, 0.36, 0.50, 0.9])
    logs, errors = np.log(alphas), np.array([0.05, 0.1, 0.08, 0.3])
    granted = np.array([True, True, True, False])
    law = law_with(names, [0.30, 0.36, 0.50, None], {"alpha_p": (0.2, 0.4)})
    found = pooling._pooled(law, names, logs, errors, granted, {"all": 0.4}, "why")
    y, v = logs[:3], errors[:3] ** 2
    mean = np.average(y, weights=1 / v)
    q = np.sum((y - mean) ** 2 / v)
    tau2 = (q - 2) / (np.sum(1 / v) - np.sum(1 / v**2) / np.sum(1 / v))
    mu, se = np.average(y, weights=1 / (v + tau2)), np.sum(1 / (v + tau2)) ** -0.5
    t = stats.t.ppf(0.975, 2)
    assert found.tau == pytest.approx(np.sqrt(tau2)) and found.mean == pytest.approx(np.exp(mu))
    assert found.mean_interval == pytest.approx((np.exp(mu - t * se), np.exp(mu + t * se)))
    for one, own, var in zip(found.exponents[:3], y, v, strict=True):
        share = tau2 / (tau2 + var)
        centre, sd = share * own + (1 - share) * mu, np.sqrt(share * var + (1 - share) ** 2 * se**2)
        assert one.share == pytest.approx(share) and one.pooled == pytest.approx(np.exp(centre))
        assert one.pooled_interval == pytest.approx((np.exp(centre - t * sd), np.exp(centre + t * sd)))
        assert one.alone == pytest.approx(np.exp(own))
    assert found.exponents[0].alone_interval == (0.2, 0.4) and found.exponents[1].alone_interval is None
    assert found.exponents[3] == pooling.Pooled("s", None, None, None, None, None)
    alike = pooling._pooled(law, names, logs * 0 - 1, errors, granted, {}, "why")
    assert alike.tau == 0.0 and [one.share for one in alike.exponents[:3]] == [0.0] * 3
    assert [one.pooled for one in alike.exponents[:3]] == pytest.approx([np.exp(-1)] * 3)
    assert (found.floors, found.shared) == ({"all": 0.4}, "why")


def test_a_floor_is_shared_by_those_who_read_the_same_rows():
    table = pd.DataFrame({"architecture": list("ppqq"), "dataset": "log", "data_seed": [0, 1, 1, 0], "epochs": np.nan})
    shared, why = pooling._same_stream(table, "architecture")
    assert shared and "dataset, data_seed" in why and "epochs" not in why
    for column, values in (("data_seed", [0, 0, 1, 1]), ("dataset", list("aabb"))):
        shared, why = pooling._same_stream(table.assign(**{column: values}), "architecture")
        assert not shared and f"{column} differs" in why
    assert pooling._same_stream(table.drop(columns="dataset"), "architecture")[0] is False


def test_pooling_numbers_the_architectures_and_needs_three(monkeypatch):
    """The joint fit is laid out: draws of ln alpha with known scatter, and what it grants."""
    seen = {}

    def fit(table, form, axes, target, bootstrap, cluster, *, where, seed, profile):
        seen.update(table=table, form=form, axes=axes, options=(target, bootstrap, cluster, where, seed, profile))
        phi = form.to_search({name: np.array(RAW.get(name, 0.4)) for name in form.names})
        draws = phi + np.array([[-0.1], [0.1]])
        params = {name: float(np.exp(value)) for name, value in zip(form.names, phi, strict=True)} | seen.get(
            "refused", {}
        )
        draws = seen.get("draws", draws)
        solved = lambda: (None, SimpleNamespace(phi=phi))  # noqa: E731
        return SimpleNamespace(
            form=form, params=params, intervals={}, draws=draws, reason=lambda _: "few", solved=solved
        )

    monkeypatch.setattr(pooling, "fit", fit)
    table = pd.DataFrame({"architecture": list("rpq") * 2, "dataset": "log", "dense_params": 1.0, "logloss": 0.5})
    found = pooling.hierarchy(table, bootstrap=7, seed=3, where="logloss > 0", cluster="c")
    assert seen["options"] == ("logloss", 7, "c", "logloss > 0", 3, False)
    assert seen["axes"] == {"x": "dense_params", "k": "architecture_number"}
    assert seen["table"]["architecture_number"].tolist() == [3.0, 1.0, 2.0] * 2
    assert [one.name for one in found.exponents] == ["p", "q", "r"] and list(found.floors) == ["all"]
    assert [one.alone for one in found.exponents] == pytest.approx([0.3, 0.4, 0.5])
    logs = np.log([0.3, 0.4, 0.5])  # errors of .1 each
    assert found.tau == pytest.approx(np.sqrt(np.var(logs, ddof=1) - 0.01))
    own = pooling.hierarchy(table.assign(dataset=table.architecture), bootstrap=7)
    assert own.floors == pytest.approx({"p": 0.40, "q": 0.41, "r": 0.42})
    seen["refused"] = {"alpha_q": None}
    part = pooling.hierarchy(table, bootstrap=7)
    assert part.mean is None and [one.alone for one in part.exponents] == [pytest.approx(0.3), None, pytest.approx(0.5)]
    seen["draws"] = None
    with pytest.raises(Refused, match="no pooling without resampled fits"):
        pooling.hierarchy(table)
    with pytest.raises(ValueError, match="has 2 values"):
        pooling.hierarchy(table[table.architecture != "p"])
