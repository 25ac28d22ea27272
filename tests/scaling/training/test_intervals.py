"""What a run's metrics lines come to at its end."""

import math

import numpy as np
import pytest

from recscale.scaling.training.intervals import progressive_metrics, summarise


def test_the_last_tenth_of_a_run_is_averaged_with_what_a_bank_says():
    lines = [
        {"step": step, "rows": rows, "logloss": loss, "model_bank/error": error, "model_other": 1.0}
        for step, rows, loss, error in ((80, 4, 9.0, 9.0), (95, 1, 0.2, 0.1), (100, 3, 0.4, 0.3))
    ]
    found = progressive_metrics(lines, 100)
    assert found == {
        "progressive_logloss": pytest.approx(0.35),
        "progressive_rows": 4,
        "bank_error": pytest.approx(0.2),
        "examples_to_start": None,
    }
    assert progressive_metrics([lines[0] | {"logloss": None}], 100)["progressive_rows"] == 0


def test_a_run_starts_where_an_interval_is_below_the_base_rate():
    losses = enumerate([None, 1.01, 0.99, 0.97, 1.0, 0.9])
    lines = [{"step": n, "examples": 10 * n, "rows": 1, "logloss": 0.5, "ne": ne} for n, ne in losses]
    assert progressive_metrics(lines, 5)["examples_to_start"] == 30
    assert progressive_metrics(lines[:3], 2)["examples_to_start"] is None


def test_only_intervals_that_end_in_the_last_tenth_count_or_the_last_one():
    def line(step, loss, rows=2, **more):
        return {"step": step, "examples": step, "rows": rows, "logloss": loss, **more}

    def tail(*lines, steps=10):
        found = progressive_metrics(list(lines), steps)
        return found["progressive_logloss"], found["progressive_rows"]

    assert tail(line(9, 1.0), line(10, 3.0, 6)) == (3.0, 6)  # the ninth step is not behind nine tenths
    assert tail(line(95, 1.0), line(100, 3.0, 6), steps=100) == (2.5, 8)
    assert tail(line(4, 1.0), line(8, 3.0, 6)) == (3.0, 6)
    for broken in (None, math.nan, math.inf):
        assert tail(line(95, broken), line(100, 3.0), steps=100) == (None, 0)
    assert tail(line(10, 0.5, 0)) == (None, 0) and tail() == (None, 0)
    two = [
        line(95, 1.0, **{"model_bank/a": 1, "model_bank/b": 5}),
        line(100, 1.0, **{"model_bank/a": 2, "model_bank/b": 7}),
    ]
    found = progressive_metrics(two, 100)
    assert (found["bank_a"], found["bank_b"]) == (1.5, 6.0)
    assert progressive_metrics([line(1, 0.5, ne=0.98), line(2, 0.5, ne=0.979)], 2)["examples_to_start"] == 2


def test_a_first_task_is_told_and_all_where_there_are_several():
    rows, ones = np.array([[[3.0]], [[1.0]]]), np.ones((1, 1))
    logloss = np.array([[[0.5, 1.0]], [[1.5, 2.0]]], np.float32)
    label = np.array([[[0.0, 1.0]], [[0.0, 1.0]]], np.float32)
    made = {
        "rows": rows,
        "logloss": logloss,
        "prediction": label + 0.5,
        "label": label,
        "rate": np.array([ones[0]] * 2),
    }
    found = summarise(made | {"loss": np.array([ones[0], 3 * ones[0]], np.float32)})
    assert found["task_logloss"].tolist() == [[0.75, 1.25]] and found["logloss"].tolist() == [0.75]
    assert found["rows"].tolist() == [4.0] and found["loss"].tolist() == [2.0]
    base = 1e-12  # of no clicks at all
    np.testing.assert_allclose(found["calibration"], 0.5 / base)
    np.testing.assert_allclose(found["ne"], 0.75 / -(base * np.log(base) + np.log1p(-base)), rtol=1e-3)
    assert "model_load" not in found


def test_an_interval_of_one_row_and_one_of_clicks_alone():
    ones = np.ones((1, 1, 1), np.float32)
    one = {"rows": ones, "logloss": 0.5 * ones, "prediction": ones, "label": ones}
    one |= {"loss": ones[0], "rate": ones[0], "stats": {"load": ones[0]}}
    three = {name: np.concatenate([values] * 3) for name, values in one.items() if name != "stats"}
    three |= {"rate": np.array([[1.0], [2.0], [3.0]], np.float32), "stats": {"load": np.ones((3, 1), np.float32)}}
    for fetched, rate, rows in ((one, 1.0, 1.0), (three, 3.0, 3.0)):
        found = summarise(fetched)
        assert (found["logloss"], found["rate"], found["rows"]) == (0.5, rate, rows)
        assert found["calibration"] == 1 / (1 - 1e-12)
        np.testing.assert_allclose(found["ne"], 0.5 / (-1e-12 * np.log(1e-12) + 1e-12), rtol=1e-3)
        assert {values.dtype for values in found.values()} == {np.dtype(np.float64)} and found["model_load"] == 1.0
