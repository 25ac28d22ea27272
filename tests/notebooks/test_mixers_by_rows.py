"""The study over sizes and rows: rates, forecast and note say what the committed tables hold."""

import json
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from recscale.scaling.laws import fit
from recscale.scaling.laws.forecasting.forecast_command import forecast
from recscale.scaling.laws.judgement.specification import FORMS
from recscale.sweeps import quickstart
from recscale.sweeps.mixers import mixers_by_rows, mixers_by_rows_check, mixers_by_rows_rates

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "notebooks" / "runs"
WORDS = {"rankmixer": "RankMixer", "dlrm_mlp": "DLRM-MLP"}
FORECASTS = json.loads((RUNS / "forecast.json").read_text(encoding="utf-8"))


def vertices(name):
    """(architecture, dense parameters) -> the rate at the vertex of a parabola through the logarithms of three."""
    runs = pd.read_parquet(RUNS / f"{name}.parquet")
    found = {}
    for shape, rows in runs.groupby(["architecture", "dense_params"]):
        rates, excess = np.log(rows["lr_dense"]), np.log(rows["logloss"] - rows["asymptote"])
        bend, slope, _ = np.polyfit(rates, excess, 2)
        assert len(rows) == quickstart.TRIALS and bend > 0
        found[shape] = float(np.exp(-slope / bend / 2))
    return found


def test_rates_fall_with_rows_as_two_searches_say():
    few, many = vertices("mixers_by_rows_rates"), vertices("quickstart_rates")
    fewer = mixers_by_rows.SEARCHED_ROWS / mixers_by_rows_rates.get_config().training.examples
    for name, exponent in mixers_by_rows.RATE_EXPONENT.items():
        found = [np.log(few[shape] / many[shape]) / np.log(fewer) for shape in many if shape[0] == name]
        assert len(found) == len(quickstart.LADDER) and np.mean(found) == pytest.approx(exponent, abs=0.05)
        (large,) = [rate for (architecture, size), rate in few.items() if architecture == name and size > 4e5]
        assert float(f"{large:.2g}") == mixers_by_rows_check.RATES[name]


def test_the_table_holds_the_runs_of_the_quickstart_too():
    runs = pd.read_parquet(RUNS / "mixers_by_rows.parquet")
    own = runs[runs["sweep"] == "mixers_by_rows"]
    assert len(own) == len(mixers_by_rows.get_sweep()) and (runs["status"] == "done").all()
    assert not own["lr_bracketed"].any() and runs["run_id"].is_unique
    for name in ("quickstart", "quickstart_more_rows"):
        other = pd.read_parquet(RUNS / f"{name}.parquet").set_index("run_id")["logloss"]
        pd.testing.assert_series_equal(runs.set_index("run_id")["logloss"][other.index], other)


def numbers(row):
    """Prediction, interval and widened interval, as the page has them: excess times 1,000, or loss."""
    scale, digits = (1e3, 3) if "--over" in row["command"] else (1, 5)

    def text(name):
        return f"{scale * row[name]:.{digits}f}"

    wide = "" if row["wide_low"] is None else f"[{text('wide_low')}, {text('wide_high')}]"
    cells = [WORDS[row["architecture"]], row["by"], text("predicted"), f"[{text('low')}, {text('high')}]", wide]
    return "| " + " | ".join(cells) + " |"


def test_the_page_of_the_forecast_has_its_numbers_and_commands():
    page = (RUNS / "forecast.md").read_text(encoding="utf-8")
    for row in FORECASTS:
        assert numbers(row) in page and row["command"] in page


@pytest.mark.slow
@pytest.mark.parametrize("row", FORECASTS, ids=lambda row: f"{row['architecture']}, {row['by']}")
def test_the_command_makes_the_forecast(row, monkeypatch):
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(forecast, [*shlex.split(row["command"])[2:], "--json"])
    assert done.exit_code == 0, done.output
    (point,) = json.loads(done.output.splitlines()[-1])["points"]
    for name in ("predicted", "low", "high", "wide_low", "wide_high"):
        assert row[name] == (None if point[name] is None else pytest.approx(point[name], rel=0.03))


@pytest.mark.slow
def test_the_page_says_what_the_gates_grant():
    """Of the excess all joint forms; of the loss, with the asymptote given, only the MLP's."""
    runs = pd.read_parquet(RUNS / "mixers_by_rows.parquet")
    axes = {"N": "dense_params", "D": "examples"}
    for name, granted in {"rankmixer": False, "dlrm_mlp": True}.items():
        own = runs[runs["architecture"] == name].assign(excess=lambda rows: rows["logloss"] - rows["asymptote"])
        for form in FORMS[2]:
            law = fit(own, form, axes, "excess", bootstrap=300, fixed={"E": 0.0}, profile=False)
            assert {gate.id for gate in law.refusals} == {"tuning"}, (name, form)
        law = fit(own, "kappa", axes, bootstrap=200, fixed={"E": "@asymptote"})
        assert law.granted == granted
