"""What a run's metrics lines come to at its end."""

import pytest

from recscale.scaling.training.intervals import progressive_metrics


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
