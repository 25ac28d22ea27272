"""Paired differences of a study: the interval of each method's saving, and what it means."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from recscale.scaling.acceptance.paired import paired_differences


def test_savings_are_paired_by_seed_whatever_the_order_of_rows():
    noise, saved = np.array([0.0, 0.4, 0.2]), np.array([0.011, 0.010, 0.012])
    cells = {"base": 1.0 + noise, "good": 1.0 + noise - saved, "bad": 1.0 + noise + saved, "same": 1.0 + noise[::-1]}
    runs = pd.DataFrame(
        [
            {"case": c, "method": m, "seed": s, "loss": x}
            for c in "xy"
            for m, v in cells.items()
            for s, x in enumerate(v)
        ]
    )
    found = paired_differences(runs.sample(frac=1, random_state=0), "loss", "base", ("case",)).set_index(
        ["case", "method"]
    )
    exact = stats.ttest_1samp(saved, 0).confidence_interval(0.95)
    row = found.loc[("x", "good")]
    np.testing.assert_allclose(row[["saved", "low", "high"]].to_numpy(float), (saved.mean(), exact.low, exact.high))
    assert row["loss"] == pytest.approx(cells["good"].mean())
    verdicts = {"base": "", "good": "confirmed", "bad": "refuted", "same": "not resolved"}
    assert found.loc["y"]["verdict"].to_dict() == verdicts
    with pytest.raises(ValueError, match="2 or more for its interval"):
        paired_differences(runs[runs["seed"] == 0], "loss", "base", ("case",))
