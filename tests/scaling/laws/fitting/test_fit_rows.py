"""From rows to a problem and from a solution to a record, on rows and solutions that are laid out by hand."""

import hashlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from recscale.scaling.laws.fitting import fit as fitting
from recscale.scaling.laws.fitting import record as recording
from recscale.scaling.laws.fitting.law_fit import LawFit, Settings, with_numbers
from recscale.scaling.laws.fitting.problem import make_problem
from recscale.scaling.laws.fitting.solver import Batch, Solution
from recscale.scaling.laws.forms.registry import get
from recscale.scaling.laws.judgement.gates import Gate
from recscale.scaling.laws.tables.validate import prepare

X = np.geomspace(1e3, 1e6, 9)
PHI = np.log([0.4, 0.1, 0.3])


def table(y=None, **columns):
    y = 0.4 + 0.1 * (X / np.exp(np.log(X).mean())) ** -0.3 if y is None else y
    return pd.DataFrame({"p": X, "logloss": y, "run_id": [f"r{i}" for i in range(9)]}).assign(**columns)


def rows_of(frame, form="power_offset", columns=None, **options):
    return prepare(frame, get(form), columns or {"x": "p"}, "logloss", **options)


def solution_at(phi=PHI, objective=0.5):
    none = np.zeros(2)
    return Solution(
        np.asarray(phi), objective, 7, 1e-9, 0.75, Batch(np.tile(phi, (2, 1)), none, none.astype(int), none)
    )


@pytest.mark.parametrize(
    ("form", "axes", "slots"),
    [
        ("chinchilla", {"N": "p", "D": "q"}, ("N", "D")),
        ("chinchilla", ["p", "q"], ("p", "q")),
        ("kappa_sum", ["p", "q", "r"], ("N", "D", "r")),
        ("KSUM", ["p", "q", "r"], ("N", "D", "r")),
        ("joint", ["p", "q"], ("N", "D")),
        ("joint", ["p"], ("p",)),
        ("power", "p", None),
        ("power", None, None),
        ("sum", None, ("dense_params", "history_length")),
        ("kappa_sum", None, ("N", "D", "history_length")),
    ],
)
def test_slots_of_forms_that_take_any_axes(form, axes, slots):
    frame = pd.DataFrame({"dense_params": [1, 2], "examples": [3, 3], "history_length": [1, 2], "p": [1, 2]})
    assert fitting._slot_names(frame, form, axes) == slots
    assert fitting._slot_names(frame, get("power"), ["p", "q"]) == ("p", "q")


def test_fixed_floors_are_numbers_or_a_column_below_the_metric():
    rows = rows_of(table(best=0.3, own=0.3 + 0.01 * np.arange(9) / 9, high=[0.3] * 8 + [9.9], gap=[0.3] * 8 + [np.nan]))
    form = get("power_offset")

    def known(**fixed):
        return fitting._known(form, rows, Settings(fixed=fixed))

    assert known(E=0.2, alpha=1) == {"E": 0.2, "alpha": 1.0}
    assert known(E="@best") == {"E": 0.3} and known(E="@own") == {"E": 0.0}
    with pytest.raises(ValueError, match="only a floor can differ"):
        known(alpha="@best")
    for column in ("high", "gap"):
        with pytest.raises(ValueError, match="1 rows have none below logloss, the first is r8"):
            known(E=f"@{column}")
    signed = rows_of(table(best=-0.3))
    assert fitting._known(form, signed, Settings(fixed={"E": "@best"})) == {"E": -0.3}
    equal = rows_of(table(y=np.full(9, 0.3), best=0.3))
    with pytest.raises(ValueError, match="9 rows have none below"):
        fitting._known(form, equal, Settings(fixed={"E": "@best"}))


def test_problems_are_centred_and_keep_their_kind():
    rows = rows_of(table(w=np.arange(1.0, 10.0)), weights="w")
    problem, centre = fitting.problem_of(get("power_offset"), rows, Settings(huber_delta=0.02))
    assert centre == {"x": pytest.approx(np.log(X).mean())} and problem.kind == "log"
    assert problem.axes[:, 0] == pytest.approx(np.log(X) - np.log(X).mean()) and np.all(problem.delta == 0.02)
    assert problem.weights == pytest.approx(np.arange(1, 10) / 5)
    narrow, _ = fitting.problem_of(get("power_offset"), rows, Settings(bounds={"alpha": (0.1, 0.2)}))
    assert np.exp([narrow.low[2], narrow.high[2]]) == pytest.approx([0.1, 0.2])
    for form, residuals, kind in (
        (get("log_linear", real=True), "auto", "plain"), (get("power_offset"), "plain", "plain"),
        (get("log_linear", real=True), "log", "log"), (get("power_offset"), "log", "log"),
    ):  # fmt: skip
        assert fitting.problem_of(form, rows, Settings(residuals=residuals))[0].kind == kind
    stages = pd.concat([table(D=7.0, stage=1.0), table(D=7.0, stage=2.0)])
    trunk = rows_of(stages, "trunk", {"N": "p", "D": "D", "stage": "stage"})
    problem, centre = fitting.problem_of(get("trunk"), trunk, Settings())
    assert (
        centre["stage"] == 0.0 and list(problem.axes[:, 2]) == [1.0] * 9 + [2.0] * 9 and np.all(problem.axes[:, 1] == 0)
    )


def test_floors_of_rows_are_taken_off_and_residuals_stay_relative():
    y = 0.5 + 0.01 * np.arange(9)
    rows = rows_of(table(y, own=0.3 + 0.02 * (np.arange(9) % 3), best=0.3))
    bare = get("power_offset").without_floor()
    problem, _ = fitting.problem_of(bare, rows, Settings(fixed={"E": "@own"}))
    assert problem.kind == "plain" and problem.y == pytest.approx(y - 0.3 - 0.02 * (np.arange(9) % 3))
    np.testing.assert_array_equal(problem.unit, y)
    same, _ = fitting.problem_of(get("power_offset").holding({"E": 0.3}), rows, Settings(fixed={"E": "@best"}))
    assert same.kind == "log" and same.y == pytest.approx(y)


def test_a_prior_weighs_against_the_noise_of_the_rows(monkeypatch):
    """Two solutions: without the prior, whose residuals tell the noise, and with it."""
    rng = np.random.default_rng(0)
    noise = 0.01 * rng.normal(size=9)
    rows = rows_of(table(np.asarray(table().logloss) * np.exp(-noise), w=np.arange(1.0, 10.0)), weights="w")
    problems, assembled = [], []

    def solve(problem):
        problems.append(problem)
        return solution_at(objective=float(len(problems)))

    monkeypatch.setattr(fitting, "solve", solve)
    monkeypatch.setattr(fitting, "_assemble", lambda *given: assembled.append(given))
    fitting.fit_rows(get("power_offset"), rows, Settings(priors={"alpha": ("lognormal", 0.3, 0.2)}))
    first, second = problems
    variance = np.sum(rows.weights * noise**2) / 6
    assert np.all(first.pull == 0) and second.pull[:, 2] == pytest.approx([variance / 0.04, np.log(0.3), 0.0])
    form, _, _, before, problem, centre, solution = assembled[0]
    assert problem is second and solution.objective == 2.0 and centre["x"] == pytest.approx(np.log(X).mean())
    assert [gate.id for gate in before][:2] == ["dof", "span"]
    fitting.fit_rows(get("power_offset"), rows, Settings())
    assert len(problems) == 3
    refused = fitting.fit_rows(get("power_offset"), rows_of(table()[:4]), Settings())
    assert refused.refused and len(problems) == 3 and refused.problem is None


def test_rules_before_a_fit_are_those_the_rows_call_for():
    def told(frame, form="power_offset", columns=None):
        found = fitting._gates_before(get(form), rows_of(frame, form, columns))
        return {gate.id: gate.passed for gate in found}

    plain = told(table(shape_id=range(9), lr_bracketed=True))
    assert plain == {"dof": True, "span": True, "correlation": True, "trend": True, "clusters": True, "tuning": True}
    assert told(table(lr_bracketed=[True] * 8 + [False]))["tuning"] is False and told(table())["tuning"] is None
    assert told(table(shape_id=[0, 0, 0, 0, 1, 2, 3, 4, 5]))["clusters"] is True
    assert told(table(shape_id=[0, 0, 0, 0, 1, 2, 3, 4, 4]))["clusters"] is False
    assert "span" not in told(table(), "log_linear") and told(table(), "gain")["gain"] is False
    assert told(table(np.full(9, 0.5)))["degenerate"] is False and "trend" not in told(table(np.full(9, 0.5)))
    few = told(table().iloc[[0, 0, 3, 3, 5, 5, 8, 8]].assign(run_id=range(8)))
    assert few["span"] is False and "trend" not in few  # four values say no trend
    noise = 0.5 + 0.01 * np.random.default_rng(3).normal(size=9)
    assert told(table(noise))["trend"] is False
    assert fitting._gates_before(get("power"), rows_of(table(), where="p < 0"))[0].id == "empty"


def test_clusters_are_left_out_and_the_one_that_moves_most_is_named(monkeypatch):
    form, rows = get("power_offset"), rows_of(table(shape_id=list("aabbccdde")))
    left = PHI + np.array([[0.0, 0.1, 0.0], [0.0, -0.1, 0.0], [0.0, 0.0, 0.2], [0.01, 0.0, 0.0], [0.0, 0.0, 0.0]])
    monkeypatch.setattr(fitting.resampling, "jackknife", lambda *_: left)
    told = fitting._jackknife(form, None, solution_at(), rows, {"x": 2.0})
    # By its own spread each parameter moved by .1 / .0632, .2 / .08 and .01 / .004: the last two alike, so the first.
    assert told["most_influential"] == "c" and told["range"]["E"] == pytest.approx((0.4, 0.4 * np.exp(0.01)))
    raw = np.exp(left[:, 1] + 2 * np.exp(left[:, 2]))
    assert told["range"]["A"] == pytest.approx((raw.min(), raw.max()))
    assert told["shift"] == pytest.approx(
        {"E": 0.0, "A": raw[2] - 0.1 * np.exp(0.6), "alpha": 0.3 * (np.exp(0.2) - 1)}, abs=1e-12
    )
    np.testing.assert_array_equal(fitting.codes_of(get("joint"), rows), np.tile(rows.codes, 2))
    np.testing.assert_array_equal(fitting.codes_of(form, rows), rows.codes)


def law_of(frame=None, settings=None, **changes):
    frame = table() if frame is None else frame
    rows = rows_of(frame, invalid="exclude")
    centre = {"x": float(np.log(rows.axes["x"]).mean())}
    y = rows.y * np.exp(0.01 * (-1.0) ** np.arange(len(rows.y)))
    problem = make_problem(get("power_offset"), (np.log(rows.axes["x"]) - centre["x"])[:, None], y)
    rows = replace(rows, y=y)
    law = LawFit(get("power_offset"), rows, settings or Settings(), (), rows.warnings, problem, solution_at(), centre)
    return with_numbers(replace(law, **changes))


def test_information_criteria_count_the_noise_as_a_parameter():
    r = np.array([0.1, -0.2, 0.3, -0.1, 0.2, 0.0, 0.1])
    log_likelihood = 7 * np.log(np.mean(r**2))
    told = recording.information_criteria(r, 3)
    assert told == pytest.approx({"aicc": log_likelihood + 8 + 2 * 4 * 5 / 2, "bic": log_likelihood + 4 * np.log(7)})
    assert recording.information_criteria(r, 5) == {"aicc": None, "bic": None}
    assert recording.information_criteria(r * 0, 3) == {"aicc": None, "bic": None}
    assert recording.information_criteria(r, 4)["bic"] is not None


def test_columns_are_summed_up_in_a_few_words():
    assert recording.summarise(pd.Series([3, 1, 3])) == [1, 3]
    assert recording.summarise(pd.Series(list("ab"), dtype=object)) == ["a", "b"]
    assert recording.summarise(pd.Series(range(8))) == list(range(8))
    assert recording.summarise(pd.Series(range(9))) == {"min": 0, "median": 4, "max": 8, "distinct": 9}
    assert recording.summarise(pd.Series(list("abcdefghi"), dtype=object)) == {"distinct": 9}


def test_a_table_is_known_by_its_names_and_rows():
    frame = pd.DataFrame({"a": [1, 2], "b": ["x", "y"]})
    text = "a\x1fb" + "1\x1f'x'" + "2\x1f'y'"
    assert recording.table_hash(frame) == hashlib.sha256(text.encode()).hexdigest()


def test_a_record_says_what_was_fitted_and_what_is_missing():
    frame = table(status="done", batch_rows=64, data_seed=1, epochs=1, seed=[0, 1, 2] * 3)
    frame.loc[9] = {**frame.loc[0].to_dict(), "run_id": "r9", "status": "diverged"}
    frame.loc[10] = {**frame.loc[0].to_dict(), "run_id": "r10", "status": "failed"}
    frame.loc[11] = {**frame.loc[0].to_dict(), "run_id": "r11", "logloss": -1.0}
    settings = Settings(notes={"size_counts": "dense", "claimed_range": "all"}, huber_delta=0.02)
    told = recording.record(law_of(frame, settings), {"axis": "p"})
    assert told["runs"]["rows"] == 9 and (told["runs"]["diverged"], told["runs"]["failed"]) == (1, 1)
    assert [e["run_id"] for e in told["runs"]["excluded"]] == ["r9", "r10", "r11"]
    assert told["runs"]["status"] == {"done": 9} and sum(told["runs"]["excluded_counts"].values()) == 3
    assert (told["runs"]["batch"], told["runs"]["data_order"], told["runs"]["seeds"]) == ([64], [1], [0, 1, 2])
    assert told["hypothesis"]["size_counts"] == "dense" and told["hypothesis"]["claimed_range"] == "all"
    assert told["ranking"]["epochs"] == [1] and told["ranking"]["base_rate"] is None
    missing = told["checklist"]["missing"]
    assert "ranking.base_rate" in missing and "validation" not in missing and "runs.batch" not in missing
    assert told["checklist"]["complete"] is False
    fitted = told["fit"]
    r = 0.01 * np.tile([-1.0, 1.0], 5)[:9]
    assert fitted["residual_scale"] == pytest.approx(1.4826 * 0.0, abs=1e-9) or fitted["residual_scale"] > 0
    assert fitted["residual_rms"] == pytest.approx(np.sqrt(np.mean(r**2)))
    assert fitted["residual_sd"] == pytest.approx(np.std(r))
    assert (fitted["value"], fitted["starts"], fitted["iterations"], fitted["convergence_share"]) == (0.5, 2, 7, 0.75)
    assert fitted["huber_delta"] == 0.02 and fitted["residual"] == "ln yhat - ln y" and fitted["transform"] == "none"
    assert fitted["centre"]["x"] == pytest.approx(np.exp(np.log(X).mean()))
    result = told["result"]
    assert result["data_alone"] == ["E", "A", "alpha"] and result["bootstrap"] == {"draws": 0, "seed": 0, "level": 0.95}
    assert np.asarray(result["residuals"]) == pytest.approx(r) and "correlation" not in result
    none = recording.record(law_of(settings=Settings(huber_delta=np.inf)))
    assert none["fit"]["huber_delta"] == "inf (least squares)" and "validation" in none["checklist"]["missing"]
    assert none["runs"]["status"] is None


def test_draws_of_a_record_are_correlated_and_refused_numbers_left_out():
    rng = np.random.default_rng(0)
    draws = PHI + 0.1 * rng.normal(size=(50, 3))
    told = recording.record(law_of(draws=draws))["result"]
    np.testing.assert_allclose(told["correlation"]["matrix"], np.corrcoef(draws.T))
    assert told["bootstrap"]["draws"] == 50
    still = recording.record(law_of(draws=draws * [0, 1, 1]))["result"]
    assert "correlation" not in still
    jackknife = {"range": {"E": (0, 1), "alpha": (0, 1)}, "most_influential": "a", "shift": {"E": 1.0, "alpha": 1.0}}
    bare = {"A": 1.0, "alpha": 0.2}
    refused = (Gate("floor", 1, "", False, "", refuses=("E",)),)
    told = recording.record(law_of(gates=refused, jackknife=jackknife, no_floor=bare))["result"]
    assert told["jackknife"] == {"range": {"alpha": [0, 1]}, "most_influential": "a", "shift": {"alpha": 1.0}}
    assert told["no_floor_fit"] == bare
    for gate, shown in (("form", {}), ("trend", {}), ("span", {}), ("width", bare)):
        none = (Gate(gate, 1, "", False, "", refuses=("alpha",)),)
        assert recording.record(law_of(gates=none, no_floor=bare))["result"]["no_floor_fit"] == shown


def test_a_claimed_range_goes_as_far_as_forecasts_do():
    def law(**axes):
        return SimpleNamespace(rows=SimpleNamespace(axes={slot: np.array(values) for slot, values in axes.items()}))

    near = recording.claimed_range(law(N=[2.0, 10.0], D=[1.0, 1000.0], zero=[0.0, 5.0], none=[]))
    assert near == {"N": (2.0, 50.0), "D": (1.0, 30000.0), "zero": (0.0, 5.0)}
