"""The specification curve: flat on exact data, honest about what was refused, frozen where asked."""

import numpy as np
import pandas as pd
import pytest

from recscale.scaling.laws.forms.metric_maps import t_to_auc
from recscale.scaling.laws.judgement.specification import DIMENSIONS, specification_curve


def runs(noise=0.0, seed=0):
    """Ten sizes x two seeds x (undecayed, decayed) rows of y = .4 + .02 (N / 1e5)^-.3."""
    rng = np.random.default_rng(seed)
    rows = []
    for k, size in enumerate(np.geomspace(1e4, 1e6, 10)):
        for s in range(2):
            for decayed in (False, True):
                term = (size / 1e5) ** -0.3
                loss = 0.4 + 0.02 * term + noise * rng.standard_normal()
                rows.append(
                    dict(
                        run_id=f"r{k}-{s}", shape_id=f"s{k}", seed=s, dense_params=size,
                        active_params=size / 2, head_params=size / 10, examples=1e6 if decayed else 9e5,
                        decayed=decayed, logloss=loss,
                    )
                )  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def exact():
    freeze = {"form": None, "metric": None, "weights": None}
    return specification_curve(runs(), "power_offset", {"x": "dense_params"}, at={"x": 3e6}, freeze=freeze)


def test_exact_data_give_a_flat_curve(exact):
    truth = 0.4 + 0.02 * 30**-0.3
    values = exact.rows["value"].to_numpy()
    assert exact.count == len(exact.rows) == exact.possible
    np.testing.assert_allclose(values, truth, rtol=1e-8)
    assert exact.low <= exact.median <= exact.high


def test_every_dimension_is_varied_unless_frozen(exact):
    varied = {name for name in DIMENSIONS if exact.rows[name].nunique() > 1}
    assert varied == {"huber_delta", "outliers", "rows", "size"}
    assert set(exact.rows["size"]) == {"dense_params", "active_params", "dense_plus_head"}
    # 3 widths x 3 outlier rules x (all, decayed; the other row rules keep the same rows) x 3 sizes
    assert len(exact.rows) == 54
    assert exact.rows["headline"].sum() == 1


@pytest.fixture(scope="module")
def noisy():
    return specification_curve(
        runs(noise=1e-4),
        "power_offset",
        {"x": "dense_params"},
        at={"x": 3e6},
        limit=24,
        freeze={"size": None},
        seed=3,
    )


def test_noise_spreads_the_curve_and_the_headline_has_a_rank(noisy):
    values = noisy.rows["value"].dropna().to_numpy()
    assert np.all(np.diff(values) >= 0) and np.ptp(values) > 0
    assert len(noisy.rows) == 24 < noisy.possible
    assert noisy.rows.loc[noisy.rank - 1, "headline"] and noisy.headline == noisy.rows.loc[noisy.rank - 1, "value"]
    assert (noisy.low, noisy.median, noisy.high) == pytest.approx(tuple(np.quantile(values, [0.05, 0.5, 0.95])))
    assert set(noisy.rows["weights"].dropna()) == {"specification_noise_se"}


def test_a_form_that_fits_clearly_worse_is_not_admitted(noisy):
    assert "power" in noisy.inadmissible_forms and "rms residual" in noisy.inadmissible_forms["power"]
    assert "power" not in set(noisy.rows["form"])
    summary = noisy.summary()
    assert summary["count"] + summary["refused"] == 24 and summary["inadmissible_forms"] == noisy.inadmissible_forms


def test_refused_values_keep_their_row_and_reason():
    table = runs(noise=1e-4)
    narrow = table[table["dense_params"] <= 4e5]  # 1.5 decades with the smallest size, fewer without it
    freeze = {name: None for name in DIMENSIONS if name != "outliers"}
    found = specification_curve(narrow, "power_offset", {"x": "dense_params"}, quantity="alpha", freeze=freeze)
    reasons = dict(zip(found.rows["outliers"], found.rows["reason"], strict=True))
    assert "decades" in reasons["drop smallest size"]
    values = found.rows.set_index("outliers")["value"]
    assert np.isnan(values["drop smallest size"]) and np.isfinite(values["all"])


def test_exponents_may_be_read_from_auc_instead():
    table = runs()
    table["auc"] = t_to_auc(1.0 - 0.05 * (table["dense_params"] / 1e5) ** -0.3)
    freeze = {name: None for name in DIMENSIONS if name != "metric"}
    found = specification_curve(table, "power_offset", {"x": "dense_params"}, quantity="alpha", freeze=freeze)
    assert sorted(found.rows["metric"]) == ["auc", "logloss"]
    np.testing.assert_allclose(found.rows["value"], 0.3, atol=1e-6)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="cannot freeze \\['colour'\\]"):
        specification_curve(runs(), "power_offset", {"x": "dense_params"}, at={"x": 1e7}, freeze={"colour": 1})
    with pytest.raises(ValueError, match="needs `at`"):
        specification_curve(runs(), "power_offset", {"x": "dense_params"})
    with pytest.raises(ValueError, match="headline fit is refused"):
        specification_curve(runs().head(4), "power_offset", {"x": "dense_params"}, at={"x": 1e7})
