"""Public run tables: the fitter against numbers their authors print or store."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from recscale.scaling.laws import fit, forms
from recscale.scaling.laws.fitting.problem import make_problem
from recscale.scaling.laws.fitting.solver import solve
from recscale.scaling.laws.judgement import rolling

TABLES = Path(__file__).parents[3] / "tables"
GOLDEN = {entry["id"]: entry for entry in json.loads((TABLES / "golden.json").read_text())}
GEMSTONES = [name for name in GOLDEN if name.startswith("gemstones")]
OVERTRAINING = [name for name in GOLDEN if name.startswith("overtraining")]


def gemstones(entry, **options):
    frame = pd.read_json(TABLES / entry["table"], lines=True)
    assert len(frame) == entry["select"]["rows"]
    cluster = "run_name" if "run_name" in frame else None
    axes = {"N": "params_active_precise", "D": "tokens"}
    return fit(frame, "chinchilla", axes, "final_loss", **{"bootstrap": 0, "cluster": cluster, **options})


@pytest.mark.parametrize("name", GEMSTONES)
def test_objective_is_never_above_the_published_one(name):
    entry = GOLDEN[name]
    law = gemstones(entry, huber_delta=float(name.rpartition("delta")[2]))
    slack = 1 + entry["tolerance"]["objective_relative"]
    assert law.solution.objective <= entry["published"]["objective"] * slack
    assert law.solution.objective <= entry["expect"]["objective_at_most"] * slack
    if "best_objective_known" not in entry["expect"]:
        return
    assert law.solution.objective <= entry["expect"]["best_objective_known"] * slack
    found = law.solution_params()
    for key, digits in (("alpha", 2e-4), ("beta", 2e-4), ("E", 2e-4)):
        assert found[key] == pytest.approx(entry["expect"][key], abs=digits)


@pytest.mark.parametrize("name", [name for name in GEMSTONES if "512x" in name])
def test_five_models_of_one_width_are_refused(name):
    law = gemstones(GOLDEN[name], huber_delta=float(name.rpartition("delta")[2]), bootstrap=10)
    assert "span" in [gate.id for gate in law.refusals]
    assert law.params["alpha"] is None and law.params["E"] is None and law.derived["a"] is None
    assert set(law.intervals.values()) == {None}


def test_one_long_suite_is_reported_with_the_published_values_inside():
    law = gemstones(GOLDEN["gemstones_hot_100b+_delta0.001"], bootstrap=100, profile=False)
    assert not [gate for gate in law.refusals if gate.id != "correlation"]
    published = GOLDEN["gemstones_hot_100b+_delta0.001"]["published"]
    for key in ("alpha", "beta", "E"):
        drawn = law.form.uncentre(law.form.to_natural(law.draws), law.centre)[key]
        low, high = np.percentile(drawn, [2.5, 97.5])
        assert low < published[key] < high
    points = gemstones(GOLDEN["gemstones_hot_100b+_delta0.001"], bootstrap=100, profile=False, cluster=None)
    spread = [np.exp(fitted.draws[:, 2]).std() for fitted in (law, points)]
    assert spread[0] > 1.5 * spread[1]


@pytest.mark.parametrize("name", OVERTRAINING)
def test_overtraining_law_from_five_points(name):
    """E + (a M^eta + b M^-eta) C^-eta with C = 6 N D and M = D / N is the tied sum with alpha = 2 eta."""
    entry = GOLDEN[name]
    frame = pd.read_csv(TABLES / entry["table"])
    frame = frame[(frame["train_set"] == entry["select"]["train_set"]) & frame["val_set"].str.contains("c4_val")]
    sizes = sorted(frame["params"].unique())[:4]
    chosen = frame[
        (frame["params"].isin(sizes) & (frame["token_multiplier"] == 1))
        | ((frame["params"] == sizes[0]) & (frame["token_multiplier"] == 16))
    ]
    assert len(chosen) == 5
    form, logs = forms.get("chinchilla_tied"), np.log(chosen[["params", "tokens"]].to_numpy(float))
    centre = logs.mean(axis=0)
    problem = make_problem(form, logs - centre, chosen["loss"].to_numpy(), delta=np.inf, kind="plain")
    solution = solve(problem)
    raw = form.uncentre(form.to_natural(solution.phi), dict(zip(form.axes, centre, strict=True)))
    eta = raw["alpha"] / 2
    found = {"E": raw["E"], "a": raw["A"] * 6**eta, "b": raw["B"] * 6**eta, "eta": eta}
    for key, value in found.items():
        assert value == pytest.approx(entry["expect"][key], abs=entry["tolerance"][key]), key
    for row in entry["expect"]["predictions"]:
        point = np.log([[row["params"], row["params"] * row["M"]]]) - centre
        error = 100 * abs(form.value(solution.phi, point)[0] / row["loss"] - 1)
        assert error == pytest.approx(row["relative_error_percent"], abs=entry["tolerance"]["relative_error_percent"])
        if row["name"] in entry.get("published", {}):
            assert error == pytest.approx(entry["published"][row["name"]], abs=0.01)
    refused = fit(chosen, "chinchilla_tied", {"N": "params", "D": "tokens"}, "loss", bootstrap=0)
    assert "dof" in [gate.id for gate in refused.refusals] and refused.params["E"] is None


def ladder():
    """One row per run: size, tokens of the last evaluation, mean of its last five losses."""
    frame = pd.read_csv(TABLES / "olmo_ladder" / "ladder_runs.csv").sort_values(["run", "step"])
    groups = frame.groupby("run")
    last = groups.last().reset_index()
    return last.assign(
        loss=groups["ce_c4_en"].mean().to_numpy(), last=last["ce_c4_en"], N=last["params"], D=last["tokens"]
    )


def test_ladder_fit_and_its_thirteen_billion_forecast():
    entry = GOLDEN["olmo_ladder_c4"]
    runs = ladder()
    chosen = runs[
        runs["size"].isin(entry["select"]["size"])
        & runs["length"].isin(entry["select"]["length"])
        & (runs["rerun"] == 0)
    ]
    law = fit(chosen, "chinchilla", {"N": "N", "D": "D"}, "loss", bootstrap=200, profile=False, cluster="run")
    assert len(law.rows.y) == 16
    found, expect = law.solution_params(), entry["expect"]
    assert np.log(found["A"]) == pytest.approx(expect["logA"], abs=2e-3)
    assert np.log(found["B"]) == pytest.approx(expect["logB"], abs=2e-3)
    for key in ("alpha", "beta", "E"):
        assert found[key] == pytest.approx(expect[key], abs=2e-4)
    assert law.solution.objective == pytest.approx(expect["objective"], rel=1e-5)
    target = {"N": 13202396160, "D": 5.0e12}
    forced = law.predict(target, beyond_range=True)
    assert forced == pytest.approx(expect["predicted_13B"], abs=entry["tolerance"]["predicted_13B"])
    # .8 decades of size carry no exponent, and 13 B is further beyond them than they are wide: no number is
    # offered.
    assert law.params["alpha"] is None and law.params["E"] is None
    with pytest.warns(UserWarning, match="refused"):
        value, low, high = law.predict(target, interval=True)
    assert np.isnan([value, low, high]).all()
    bigger = runs[(runs["size"] == "3B") & (runs["rerun"] == 0)]
    for length, percent in expect["relative_error_percent_3B"].items():
        row = bigger[bigger["length"] == length].iloc[0]
        with np.errstate(all="ignore"):
            predicted = law.predict({"N": row["N"], "D": row["D"]}, beyond_range=True)
        assert 100 * (predicted / row["loss"] - 1) == pytest.approx(percent, abs=0.02)


def test_leaving_the_largest_size_out_gives_the_warning_the_ladder_needed():
    runs = ladder()
    chosen = runs[(runs["rerun"] == 0) & (runs["length"] != "0.5xC")]
    law = fit(chosen, "chinchilla", {"N": "N", "D": "D"}, "loss", bootstrap=0, cluster="run")
    ends = rolling.ladder_ends(law)
    assert ends["largest"]["rows"] == 4 and ends["largest"]["bias"] < -0.005
    assert abs(ends["largest"]["bias"]) > 3 * abs(np.log(1.0003))


def test_run_to_run_noise_at_fixed_configuration():
    entry = GOLDEN["olmo_rerun_noise"]
    runs = ladder()[lambda t: t["length"] == "1xC"].set_index(["size", "rerun"])["last"]
    for size, percent in entry["expect"].items():
        difference = 100 * (runs[size, 1] / runs[size, 0] - 1)
        assert abs(difference) == pytest.approx(abs(percent), abs=entry["tolerance"]["abs"])


def test_wukong_points_by_least_squares():
    """Seven printed points (arXiv 2403.02545, table 5): relative logloss in percent against GFLOP per
    example.
    """
    gflop = np.array([0.53, 1.25, 2.12, 5.6, 22.23, 61.0, 108.0])
    percent = np.array([-0.35, -0.45, -0.53, -0.6, -0.67, -0.7, -0.76])
    frame = pd.DataFrame({"gflop": gflop, "percent": percent, "ratio": 100 + percent})
    squares = {"bootstrap": 0, "huber_delta": np.inf, "residuals": "plain"}
    law = fit(frame, "power", {"x": "gflop"}, "ratio", **squares)
    found = law.solution_params()
    assert found["A"] == pytest.approx(99.5602, abs=5e-4) and round(found["A"], 2) == 99.56
    assert found["alpha"] == pytest.approx(7.072e-4, abs=1e-6) and round(found["alpha"], 5) == 0.00071
    # Over a change of .4 % a power law and a straight line in ln x are one curve: the exponent is not quoted.
    assert law.params["alpha"] is None and "a straight line in ln x describes the rows" in law.reason("alpha")
    line = fit(frame, "log_linear", {"x": "gflop"}, "percent", **squares)
    assert line.params["b"] == pytest.approx(0.07029, abs=5e-6)
    offset = fit(frame, "power_offset", {"x": "gflop"}, "percent", **squares)
    assert {"floor", "width"} & {gate.id for gate in offset.refusals}
    assert offset.params["E"] is None and offset.params["alpha"] is None
    assert offset.solution_params()["E"] == pytest.approx(-0.8426, abs=5e-4)
    assert offset.solution_params()["alpha"] == pytest.approx(0.2937, abs=5e-4)
