"""Garbage in, refusals out: broken tables, degenerate designs, gates, exclusions by name."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pandas as pd
import pytest

from recscale.scaling.laws import Refused, fit, optimum, record
from recscale.scaling.laws.tables.read import read

AXES = {"N": "N", "D": "D"}


def two_axes(sizes=8, amounts=8, noise=1e-3, seed=0):
    n, d = np.meshgrid(np.geomspace(1e4, 1e7, sizes), np.geomspace(1e5, 1e9, amounts), indexing="ij")
    n, d = n.ravel(), d.ravel()
    y = (0.42 + 3 * n**-0.35 + 8 * d**-0.28) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(n)))
    return pd.DataFrame({"N": n, "D": d, "loss": y})


def one_axis(count=9, decades=4.0, floor=0.42, noise=1e-4, seed=0):
    x = np.geomspace(1e4, 1e4 * 10**decades, count)
    y = floor + 3 * x**-0.35
    return pd.DataFrame({"x": x, "loss": y * np.exp(noise * np.random.default_rng(seed).standard_normal(count))})


def fit_one(frame, form="power_offset", **options):
    return fit(frame, form, {"x": "x"}, "loss", **{"bootstrap": 0, **options})


def assert_nothing_is_told(law, gate):
    """No number anywhere a reader would look, a named reason, and no exception from the record."""
    assert gate in [refusal.id for refusal in law.refusals]
    assert all(refusal.reason and refusal.consequence for refusal in law.refusals)
    assert all(value is None for value in law.params.values())
    assert all(value is None for value in law.centred.values())
    assert all(value is None for value in law.intervals.values())
    with pytest.raises(Refused, match=gate):
        law.predict({slot: 1e5 for slot in law.form.axes})
    with pytest.raises(Refused):
        optimum(law, budget=1e10)
    told = json.loads(json.dumps(record(law)))
    assert told["result"]["params"] == dict.fromkeys(law.form.names)
    assert "refused" in law.headline()


def poisoned(column, value, at=5):
    frame = two_axes()
    frame[column] = frame[column].astype(object)
    frame.loc[at, column] = value
    return frame


BROKEN = {
    "missing loss": (poisoned("loss", np.nan), "values", "loss is nan"),
    "infinite loss": (poisoned("loss", np.inf), "values", "loss is inf"),
    "zero loss": (poisoned("loss", 0.0), "values", "loss is 0, not positive"),
    "negative loss": (poisoned("loss", -0.3), "values", "loss is -0.3, not positive"),
    "text loss": (poisoned("loss", "diverged"), "values", "loss is 'diverged'"),
    "missing size": (poisoned("N", None), "values", "axis N: N is None"),
    "zero size": (poisoned("N", 0), "values", "axis N: N is 0, not positive"),
    "negative data": (poisoned("D", -1e5), "values", "axis D: D is -100000, not positive"),
    "duplicated rows": (pd.concat([two_axes(), two_axes().iloc[:3]]), "duplicates", "copy of row 0"),
    "one size": (two_axes()[lambda t: t["N"] == t["N"].iloc[0]], "degenerate", "axis N has the single value"),
    "constant loss": (two_axes().assign(loss=0.5), "degenerate", "metric is constant"),
    "three points": (two_axes().iloc[[0, 20, 63]], "dof", "3 rows"),
    "three distinct points": (
        pd.concat([two_axes(noise=0.01, seed=s).iloc[[0, 20, 63]] for s in range(5)]),
        "dof",
        "3 distinct points",
    ),
    "empty": (two_axes().iloc[:0], "empty", "the table is empty"),
}


@pytest.mark.parametrize("kind", list(BROKEN))
def test_broken_tables_are_refused_with_a_reason_and_no_number(kind):
    frame, gate, words = BROKEN[kind]
    law = fit(frame, "chinchilla", AXES, "loss", bootstrap=20)
    assert_nothing_is_told(law, gate)
    assert any(words in refusal.reason for refusal in law.refusals), [r.reason for r in law.refusals]


@pytest.mark.parametrize("kind", ["missing loss", "zero loss", "duplicated rows", "missing size"])
def test_broken_rows_may_be_excluded_on_request_and_are_listed(kind):
    frame, _, words = BROKEN[kind]
    law = fit(frame, "chinchilla", AXES, "loss", bootstrap=0, invalid="exclude")
    assert law.params["alpha"] == pytest.approx(0.35, abs=0.02)
    assert any(words.split(":")[-1].strip()[:12] in exclusion.reason for exclusion in law.rows.exclusions)
    assert len(law.rows.y) + len(law.rows.exclusions) == len(frame)
    assert json.loads(json.dumps(record(law)))["runs"]["excluded"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": "los"}, "no column 'los' for the target; did you mean .loss"),
        ({"axes": {"N": "size", "D": "D"}}, "no column 'size' for axis N"),
        ({"axes": {"Q": "N"}}, "form chinchilla has no axis 'Q'; its axes are N"),
        ({"cluster": "shape"}, "no column 'shape' for cluster"),
        ({"form": "chinchila"}, "did you mean .chinchilla"),
        ({"invalid": "ignore"}, "'refuse' or 'exclude'"),
        ({"huberdelta": 1.0}, "no option among huberdelta"),
        ({"where": "nothing > 3"}, "cannot be evaluated"),
        ({"weights": "loss_se"}, "no column 'loss_se' for weights"),
        ({"residuals": "squared"}, "auto, log or plain"),
    ],
)
def test_wrong_calls_raise_and_name_the_mend(changes, words):
    call = {"form": "chinchilla", "axes": AXES, "target": "loss", "bootstrap": 0} | changes
    with pytest.raises(ValueError, match=words):
        fit(two_axes(), **call)


def test_diverged_and_failed_runs_are_excluded_by_name_and_counted():
    frame = two_axes().assign(run_id=[f"r{i}" for i in range(64)], status="done")
    clean = fit(frame, "chinchilla", AXES, "loss", bootstrap=0)
    frame.loc[3, ["status", "loss"]] = ["diverged", np.nan]
    frame.loc[9, ["status", "loss"]] = ["failed", 0.0]
    frame.loc[11, ["status", "loss"]] = ["diverged", 700.0]
    frame.loc[12, "status"] = "running"
    law = fit(frame, "chinchilla", AXES, "loss", bootstrap=0)
    assert {(e.run_id, e.reason) for e in law.rows.exclusions} == {
        ("r3", "status diverged"),
        ("r9", "status failed"),
        ("r11", "status diverged"),
        ("r12", "status running"),
    }
    told = json.loads(json.dumps(record(law)))["runs"]
    assert (told["diverged"], told["failed"], told["rows"]) == (2, 1, 60)
    assert told["excluded_counts"]["status diverged"] == 2
    assert law.params["alpha"] == pytest.approx(clean.params["alpha"], abs=0.02)


def test_too_few_sizes_refuse_the_exponent_and_the_floor_but_not_the_slope():
    law = fit_one(pd.concat([one_axis(4, noise=1e-3, seed=s) for s in range(4)]))
    gate = next(refusal for refusal in law.refusals if refusal.id == "span")
    assert "4 distinct values" in gate.reason
    assert law.params == {"E": None, "A": None, "alpha": None}
    assert law.slopes["x"] < 0 and law.reason("alpha").startswith("span")


def test_the_log_linear_slope_is_never_refused_for_a_short_axis():
    line = fit_one(one_axis(6, decades=0.7), "log_linear")
    assert line.params["b"] > 0 and not line.refusals
    assert line.params["b"] == pytest.approx(-line.slopes["x"], rel=0.05)


def test_one_decade_refuses_the_exponent():
    law = fit_one(one_axis(9, decades=1.0))
    assert "span" in [refusal.id for refusal in law.refusals] and law.params["alpha"] is None


def test_a_short_axis_refuses_only_what_rests_on_it():
    n, d = np.meshgrid(np.geomspace(1e4, 1e7, 8), np.geomspace(1e8, 4e8, 6), indexing="ij")
    y = (0.42 + 3 * n**-0.35 + 8 * d**-0.28).ravel()
    law = fit(pd.DataFrame({"N": n.ravel(), "D": d.ravel(), "loss": y}), "chinchilla", AXES, "loss", bootstrap=0)
    assert law.params["alpha"] == pytest.approx(0.35, rel=1e-6)
    assert law.params["beta"] is None and law.params["B"] is None and law.params["E"] is None
    assert law.derived["a"] is None


def test_a_true_floor_of_zero_is_not_reported_as_a_floor():
    for noise in (0.0, 1e-3):
        law = fit_one(one_axis(15, floor=0.0, noise=noise), bootstrap=50)
        assert law.params["E"] is None
        assert {"floor", "bound"} & {refusal.id for refusal in law.refusals}
        assert law.no_floor["alpha"] == pytest.approx(0.35, abs=0.01)
        assert law.floor_upper_bound is None or law.floor_upper_bound >= 0


def test_a_clear_floor_is_reported():
    law = fit_one(one_axis(15), bootstrap=50)
    assert law.params["E"] == pytest.approx(0.42, abs=2e-3)
    assert not law.refusals


def test_a_duplicated_column_refuses_the_pair():
    frame = two_axes().assign(M=lambda t: t["N"] * 3.0)
    law = fit(frame, "chinchilla", {"N": "N", "D": "M"}, "loss", bootstrap=0)
    gate = next(refusal for refusal in law.refusals if refusal.id == "correlation")
    assert "ln N and ln D correlate at 1.0000" in gate.reason
    assert law.params["alpha"] is None and law.params["beta"] is None


def test_parameters_with_flops_are_held_to_a_tighter_correlation():
    generator = np.random.default_rng(0)
    n = np.geomspace(1e4, 1e7, 40)
    frame = pd.DataFrame({"dense_params": n, "train_flops": n * np.exp(generator.normal(size=40) * 0.5)})
    frame["logloss"] = 0.4 + 3 * frame["dense_params"] ** -0.3 + 2 * frame["train_flops"] ** -0.2
    law = fit(frame, "sum", ["dense_params", "train_flops"], bootstrap=0)
    assert "correlation" in [refusal.id for refusal in law.refusals]


def test_five_clusters_refuse_bootstrap_intervals_and_give_the_leave_one_out_range():
    frame = two_axes(10, 8).assign(shape_id=lambda t: pd.factorize(t["N"])[0] // 2)
    law = fit(frame, "chinchilla", AXES, "loss", bootstrap=50)
    assert "clusters" in [refusal.id for refusal in law.refusals]
    assert law.params["alpha"] is not None and set(law.intervals.values()) == {None}
    low, high = law.jackknife["range"]["alpha"]
    assert low <= law.params["alpha"] <= high
    with pytest.raises(Refused, match="5 clusters"):
        law.predict({"N": 1e5, "D": 1e6}, interval=True)


def test_untuned_learning_rates_forbid_the_word_law_and_nothing_else():
    frame = two_axes().assign(lr_bracketed=True)
    frame.loc[4, "lr_bracketed"] = False
    law = fit(frame, "chinchilla", AXES, "loss", bootstrap=0)
    gate = next(refusal for refusal in law.refusals if refusal.id == "tuning")
    assert gate.refuses == ("law",) and law.params["alpha"] is not None
    silent = fit(two_axes(), "chinchilla", AXES, "loss", bootstrap=0)
    assert next(g for g in silent.gates if g.id == "tuning").passed is None and not silent.refusals


def test_forecasts_far_beyond_the_rows_are_refused():
    law = fit(two_axes(), "chinchilla", AXES, "loss", bootstrap=0)
    with pytest.warns(UserWarning, match="1 of 3 predictions"):
        values = law.predict({"N": [1e6, 1e8, 1e9], "D": 1e9})
    assert np.isfinite(values[:2]).all() and np.isnan(values[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isfinite(law.predict({"N": 1e9, "D": 1e9}, beyond_range=True))
    short = two_axes()[lambda t: t["N"] <= 1.3e5]
    narrow = fit(short, "power_offset", {"x": "D"}, "loss", bootstrap=0, where="N < 2e4")
    assert narrow.rows.axes["x"].max() == 1e9 and all("not where" in e.reason for e in narrow.rows.exclusions)


def test_a_gain_exponent_is_flagged_as_not_comparable():
    x = 2.0 ** np.arange(1, 8)
    for alpha, expected in ((0.2, 0.3495), (0.35, 0.2930), (0.5, 0.2456), (1.0, 0.1392)):
        law = fit(
            pd.DataFrame({"x": x, "gain": 1 - x**-alpha}),
            "gain",
            {"x": "x"},
            "gain",
            bootstrap=0,
            huber_delta=np.inf,
        )
        assert law.params["gamma"] == pytest.approx(expected, abs=5e-4)
        refusal = next(gate for gate in law.refusals if gate.id == "gain")
        assert refusal.refuses == ("comparison",)


def test_default_columns_and_slot_aliases():
    frame = two_axes().rename(columns={"N": "dense_params", "D": "examples", "loss": "logloss"})
    by_default = fit(frame, bootstrap=0)
    assert by_default.form.id == "chinchilla" and by_default.rows.target == "logloss"
    aliased = fit(frame, "C", {"x1": "dense_params", "x2": "examples"}, bootstrap=0)
    assert aliased.params == by_default.params
    single = one_axis()
    assert fit(single, "power_offset", {"N": "x"}, "loss", bootstrap=0).params == fit_one(single).params
    assert fit(single, "P1", "x", bootstrap=0).params == fit_one(single).params


def test_tables_are_read_by_suffix_and_from_a_sweep_folder(tmp_path):
    frame = two_axes()
    frame.to_csv(tmp_path / "runs.csv", index=False)
    frame.to_parquet(tmp_path / "runs.parquet")
    frame.to_json(tmp_path / "runs.jsonl", orient="records", lines=True)
    for path in (tmp_path / "runs.csv", tmp_path / "runs.parquet", tmp_path / "runs.jsonl", tmp_path):
        pd.testing.assert_frame_equal(read(path), frame, check_exact=False, rtol=1e-9)
    with pytest.raises(ValueError, match="unknown table format '.xlsx'"):
        (tmp_path / "a.xlsx").write_text("")
        read(tmp_path / "a.xlsx")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no runs.parquet"):
        read(tmp_path / "empty")
    with pytest.raises(ValueError, match="no such table"):
        read(tmp_path / "absent.csv")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", ""),
        ("a.csv", "x,y\n1,2\n1,2,3\n"),
        ("a.parquet", "PAR1"),
        ("a.jsonl", '{"x": 1}\n{"x"'),
        ("a.jsonl", ""),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name} (cannot be read as|holds no table)"):
        read(tmp_path / name)
