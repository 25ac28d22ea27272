"""Forecasts from smaller runs, from loss to AUC, from trunks, and of several architectures together."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from recscale.scaling.laws import Refused, fit
from recscale.scaling.laws.forecasting import forecast as forecasting
from recscale.scaling.laws.forecasting.forecast import forecast
from recscale.scaling.laws.forecasting.forecast_command import forecast as forecast_command
from recscale.scaling.laws.forecasting.pool_command import pool
from recscale.scaling.laws.forecasting.pooling import hierarchy
from recscale.scaling.laws.forecasting.second_stage import to_auc
from recscale.scaling.laws.forms.metric_maps import auc_to_t, t_to_auc

FORMS = ("power_offset", "power", "log_linear")


def ladder(seed=0, sizes=14, noise=2e-4, alpha=0.4, name="a", scale=0.06, decades=3.5):
    generator, rows = np.random.default_rng(seed), []
    for size in np.geomspace(1e3, 1e3 * 10**decades, sizes):
        for k in (0, 1):
            loss = (0.4 + scale * (size / 1e4) ** -alpha) * np.exp(noise * generator.standard_normal())
            t = 1.5 - 4 * (loss - 0.4) + 2e-3 * generator.standard_normal()
            shape = f"{name}{size:.0f}"
            rows.append({"run_id": f"{shape}-{k}", "architecture": name, "shape_id": shape, "seed": k, "dataset": "log",
                         "dense_params": size, "logloss": loss, "auc": float(t_to_auc(t)),
                         "status": "done"})  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def found():
    at = [{"x": 1e7}, {"x": 1e12}]
    return forecast(ladder(), FORMS, {"x": "dense_params"}, cut=1e5, at=at, draws=60)


def test_rows_above_the_cut_are_predicted_by_forms_that_are_not_rejected(found):
    table = ladder()
    assert len(found.held_out) == (table.dense_params > 1e5).sum() and found.weights["power_offset"] > 0.5
    assert "log_linear" in found.rejected and sum(found.weights.values()) == pytest.approx(1)
    near = found.held_out[found.held_out.ratio < 10]
    assert (near.predicted / near.actual - 1).abs().max() < 5e-3 and near.inside.mean() > 0.8
    # The interval widens with the distance, and a point beyond every gate has none.
    width = (found.held_out.high - found.held_out.low).groupby(found.held_out.dense_params).mean().dropna()
    assert width.iloc[-1] > width.iloc[0]
    near, far = found.points.to_dict("records")
    assert near["low"] < 0.4 + 0.06 * 1000**-0.4 < near["high"] or pd.isna(near["predicted"])
    assert pd.isna(far["predicted"]) and pd.isna(far["low"])


def test_calibration_is_counted_by_ratio(found):
    told = found.calibration.set_index("ratio")
    assert list(told.index) == ["up to x2", "up to x10", "up to x100"]
    assert told.rolling_rows.sum() > 5 and told.held_out_rows.sum() == found.held_out.inside.notna().sum()
    assert told.loc["up to x10", "rolling_inside"] >= 0.8
    # Nineteen errors say what one in twenty exceeds; with fewer nothing is widened.
    assert list(told.widening.notna()) == list(told.rolling_rows >= 19) and (told.widening.dropna() >= 1).all()


def test_intervals_that_missed_below_the_cut_are_widened():
    """Errors of 1 to 20 half-widths: 95 % of them, and of one more, are within 20."""
    missed = pd.DataFrame({"actual": np.arange(1.0, 21.0), "low": -1.0, "high": 1.0, "ratio": 1.5})
    held_out = pd.DataFrame({"ratio": [], "inside": []})
    calibration = forecasting.calibrate(missed, held_out)
    assert calibration["widening"][0] == 20 and calibration["rolling_inside"][0] == 1 / 20
    points = pd.DataFrame({"ratio": [1.5, 5.0], "low": np.exp([-1.0, -1.0]), "high": np.exp([1.0, 1.0])})
    wide = forecasting.widen(points, calibration, positive=True)
    assert np.log([wide.wide_low[0], wide.wide_high[0]]) == pytest.approx([-20, 20]) and np.isnan(wide.wide_low[1])


def test_a_cut_needs_rows_on_both_sides():
    with pytest.raises(ValueError, match="leaves 0 rows of dense_params below"):
        forecast(ladder(), FORMS, {"x": "dense_params"}, cut=1.0)


def test_auc_follows_in_a_second_stage_with_the_interval_carried(found):
    table = ladder()
    told = to_auc(found, table).iloc[: len(found.held_out)]
    actual = table[table.dense_params > 1e5]["auc"].to_numpy()
    granted = told.auc.notna().to_numpy()
    assert np.abs(auc_to_t(told.auc[granted]) - auc_to_t(actual[granted])).max() < 0.03
    assert ((told.auc_low <= told.auc) & (told.auc <= told.auc_high))[granted].all()
    loss_alone = t_to_auc(1.5 - 4 * (told.low - 0.4)) - t_to_auc(1.5 - 4 * (told.high - 0.4))
    assert ((told.auc_high - told.auc_low) > 0.9 * loss_alone)[granted].all()
    with pytest.raises(Refused, match="does not fall"):
        to_auc(found, table.assign(auc=1.3 - table.auc))


def test_the_command_prints_forecast_and_calibration(tmp_path):
    ladder().to_csv(tmp_path / "runs.csv", index=False)
    arguments = [str(tmp_path / "runs.csv"), "--axes", "dense_params", "--cut", "1e5", "--at", "x=3e6", "--draws", "40"]
    done = CliRunner().invoke(forecast_command, [*arguments, "--auc", "auc", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output.splitlines()[-1])
    assert told["points"][0]["dense_params"] == 3e6 and len(told["auc"]) == len(told["held_out"]) + 1
    assert "Share inside the 95 % intervals" in done.output
    few = CliRunner().invoke(forecast_command, [str(tmp_path / "runs.csv"), "--axes", "dense_params", "--cut", "3e3"])
    assert few.exit_code == 3 and "no form can be ranked" in few.output


def bottleneck(seed=0, floor=0.4):
    """A table over sizes and rows, whichever is scarcer; its exact floor in a column."""
    generator, rows = np.random.default_rng(seed), []
    for size in np.geomspace(1e3, 1e5, 7):
        for examples in np.geomspace(1e5, 1e6, 4):
            excess = ((size / 1e3) ** -1.6 + 4 * (examples / 1e5) ** -1.8) ** 0.5 * 4e-3
            loss = floor + excess * np.exp(0.02 * generator.standard_normal())
            row = {"shape_id": f"{size:.0f}", "dense_params": size, "examples": examples, "status": "done"}
            rows.append(row | {"run_id": f"{len(rows)}", "logloss": loss, "best": floor, "auc": 0.7})
    return pd.DataFrame(rows)


def test_the_excess_over_known_floors_is_forecast_beyond_both_axes(tmp_path):
    bottleneck().to_csv(tmp_path / "runs.csv", index=False)
    arguments = [str(tmp_path / "runs.csv"), "--axes", "N=dense_params,D=examples", "--cut", "1e5", "--over", "best"]
    command = [*arguments, "--at", "N=4e5,D=4e6", "--form", "kappa", "--form", "chinchilla", "--draws", "40"]
    done = CliRunner().invoke(forecast_command, [*command, "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output.splitlines()[-1])
    true = (400**-1.6 + 4 * 40**-1.8) ** 0.5 * 4e-3
    (point,) = told["points"]
    assert point["low"] < true < point["high"] < 4 * true and told["target"] == "logloss over best"
    assert "logloss over best below dense_params = 1e+05" in done.output
    assert CliRunner().invoke(forecast_command, [*arguments, "--auc", "auc"]).exit_code == 2


def test_a_trunk_forecasts_what_its_decay_will_give():
    generator, rows = np.random.default_rng(0), []
    for size in np.geomspace(1e4, 1e6, 7):
        for examples in np.geomspace(1e5, 1e7, 8):
            for decayed in (True, False):
                if decayed and (examples > 1e6 or size > 3e5):
                    continue  # these are still on their trunks
                loss = 0.4 + 0.03 * (size / 1e5) ** -0.5 + 0.02 * (examples / 1e6) ** -0.4 + 0.008 * (not decayed)
                loss *= np.exp(1e-4 * generator.standard_normal())
                row = {"shape_id": f"{size:.0f}", "dense_params": size, "examples": examples, "decayed": decayed}
                rows.append(row | {"logloss": loss})
    law = fit(pd.DataFrame(rows), "trunk", bootstrap=60, profile=False)
    assert law.solution_params()["C"] == pytest.approx(0.008, rel=0.05)
    told = law.predict({"N": 1e6, "D": 1e7, "stage": 1})
    assert told == pytest.approx(0.4 + 0.03 * 10**-0.5 + 0.02 * 10**-0.4, abs=3e-4)


@pytest.mark.slow
def test_exponents_are_pooled_as_much_as_their_errors_deserve(tmp_path):
    names = ("a", "b", "c", "d")
    same = pd.concat([ladder(k, 10, alpha=0.4, name=name, scale=0.05 + 0.01 * k) for k, name in enumerate(names)])
    found = hierarchy(same, bootstrap=40)
    assert list(found.floors) == ["all"] and "one floor for all: the same dataset" in found.shared
    assert found.floors["all"] is None or found.floors["all"] == pytest.approx(0.4, abs=2e-3)
    granted = [e for e in found.exponents if e.pooled is not None]
    if granted:
        assert found.mean == pytest.approx(0.4, abs=0.03)
        spread = [np.std([getattr(e, which) for e in granted]) for which in ("alone", "pooled")]
        assert spread[1] <= spread[0] and all(0 <= e.share <= 1 for e in granted)
    own = hierarchy(same.assign(dataset=same.architecture), bootstrap=40)
    assert set(own.floors) == set(names) and "dataset differs" in own.shared
    same.to_parquet(tmp_path / "runs.parquet")
    done = CliRunner().invoke(pool, [str(tmp_path), "--bootstrap", "40", "--json"])
    assert done.exit_code in (0, 3), done.output
    assert {e["name"] for e in json.loads(done.output.splitlines()[-1])["exponents"]} == set(names)
    with pytest.raises(ValueError, match="recscale compare takes two"):
        hierarchy(same[same.architecture < "c"])
