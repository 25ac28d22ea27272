"""Metrics against brute force over pairs and rows, on 200 rows with ties."""

import math
import sys
import types

import numpy as np
import pytest

from recscale.scaling.data import make_source, metrics
from recscale.scaling.records import overrides, runs
from recscale.scaling.training import get_config, run_id, train

ROWS = 200


@pytest.fixture(scope="module")
def log():
    """Logits on a grid of halves (many ties), labels, a mask with holes, and 20 groups of which some have one class."""
    rng = np.random.default_rng(7)
    logits = np.round(rng.normal(-0.5, 1.5, ROWS) * 2) / 2
    groups = rng.integers(0, 20, ROWS) * 1_000_003  # ids far apart: nothing may assume they are dense
    labels = (rng.random(ROWS) < 1 / (1 + np.exp(-logits))).astype(float)
    labels[groups == groups[0]] = 1.0
    mask = (rng.random(ROWS) < 0.9).astype(float)
    return logits, labels, groups, mask


def slow_auc(scores, labels):
    pairs = [
        1.0 if p > n else 0.5 if p == n else 0.0
        for p, y in zip(scores, labels, strict=True)
        if y
        for n, x in zip(scores, labels, strict=True)
        if not x
    ]
    return sum(pairs) / len(pairs) if pairs else None


def test_logloss_and_ne(log):
    logits, labels, _, mask = log
    kept = [(z, y) for z, y, m in zip(logits, labels, mask, strict=True) if m]
    losses = [-math.log(1 / (1 + math.exp(-z))) if y else -math.log(1 - 1 / (1 + math.exp(-z))) for z, y in kept]
    rate = sum(y for _, y in kept) / len(kept)
    expected = sum(losses) / len(kept)
    assert metrics.logloss(logits, labels, mask) == pytest.approx(expected, rel=1e-13)
    assert metrics.base_rate(labels, mask) == pytest.approx(rate, rel=1e-15)
    own = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
    assert metrics.normalised_entropy(logits, labels, mask) == pytest.approx(expected / own, rel=1e-13)
    assert metrics.constant_logloss(rate, labels, mask) == pytest.approx(own, rel=1e-13)


def test_logloss_is_exact_at_extremes():
    assert metrics.logloss(np.array([1e4]), np.array([0])) == 1e4
    assert metrics.logloss(np.array([-np.inf, np.inf]), np.array([0, 1])) == 0.0
    assert metrics.logloss(np.array([40.0]), np.array([1])) == pytest.approx(math.exp(-40), rel=1e-12)
    assert metrics.constant_logloss(0.0, np.array([0, 0])) == 0.0
    assert metrics.constant_logloss(0.0, np.array([0, 1])) == math.inf


def test_auc_with_ties(log):
    logits, labels, _, mask = log
    keep = mask > 0
    assert metrics.auc(logits, labels, mask) == pytest.approx(slow_auc(logits[keep], labels[keep]), rel=1e-13)
    assert metrics.auc(np.zeros(ROWS), labels) == 0.5
    assert metrics.auc(logits, 1 - labels, mask) == pytest.approx(1 - metrics.auc(logits, labels, mask), rel=1e-13)
    assert math.isnan(metrics.auc(logits, np.ones(ROWS)))
    assert math.isnan(metrics.auc(np.where(np.arange(ROWS) == 3, np.nan, logits), labels))


def test_gauc_by_rows(log):
    logits, labels, groups, mask = log
    keep = mask > 0
    total, rows, skipped, skipped_rows, used = 0.0, 0, 0, 0, 0
    for group in sorted(set(groups[keep])):
        inside = keep & (groups == group)
        value = slow_auc(logits[inside], labels[inside])
        if value is None:
            skipped, skipped_rows = skipped + 1, skipped_rows + inside.sum()
        else:
            total, rows, used = total + value * inside.sum(), rows + inside.sum(), used + 1
    found = metrics.gauc_by_rows(logits, labels, groups, mask)
    assert skipped >= 1
    assert found.value == pytest.approx(total / rows, rel=1e-13)
    assert (found.groups, found.rows) == (used, rows)
    assert (found.skipped_groups, found.skipped_rows) == (skipped, skipped_rows)


def test_gauc_of_constant_scores_is_half_and_of_one_class_is_nan(log):
    _, labels, groups, _ = log
    assert metrics.gauc_by_rows(np.ones(ROWS), labels, groups).value == 0.5
    alone = metrics.gauc_by_rows(np.arange(3.0), np.ones(3), np.arange(3))
    assert math.isnan(alone.value) and alone.skipped_groups == 3 and alone.groups == 0


def test_calibration_and_bins(log):
    logits, labels, _, mask = log
    keep = mask > 0
    p, y = 1 / (1 + np.exp(-logits[keep])), labels[keep]
    assert metrics.calibration(logits, labels, mask) == pytest.approx(p.sum() / y.sum(), rel=1e-13)
    assert math.isnan(metrics.calibration(logits, np.zeros(ROWS)))
    bins = metrics.calibration_bins(logits, labels, mask)
    assert len(bins["rows"]) == 20 and sum(bins["rows"]) == keep.sum()
    weighted = [n * q for n, q in zip(bins["rows"], bins["predicted"], strict=True) if n]
    assert sum(weighted) == pytest.approx(p.sum(), rel=1e-12)
    seen = [n * q for n, q in zip(bins["rows"], bins["observed"], strict=True) if n]
    assert sum(seen) == pytest.approx(y.sum(), rel=1e-12)
    means = [q for q in bins["predicted"] if q is not None]
    assert means == sorted(means)
    shuffled = np.random.default_rng(0).permutation(ROWS)
    again = metrics.calibration_bins(logits[shuffled], labels[shuffled], mask[shuffled])
    assert again["rows"] == bins["rows"]
    assert None in bins["predicted"], "the grid has fewer values than bins, so some bins are empty"


def test_bins_without_ties_hold_equal_rows():
    bins = metrics.calibration_bins(np.arange(100.0), np.arange(100) % 2)
    assert bins["rows"] == [5] * 20


def test_evaluate_binary_collects_the_same_numbers(log):
    logits, labels, groups, mask = log
    shape = (4, 25, 2)
    result = metrics.evaluate_binary(
        logits.reshape(shape), labels.reshape(shape), mask=mask.reshape(shape), groups=groups.reshape(shape)
    )
    assert result["rows"] == mask.sum()
    assert result["logloss"] == metrics.logloss(logits, labels, mask)
    assert result["ne"] == metrics.normalised_entropy(logits, labels, mask)
    assert result["auc"] == metrics.auc(logits, labels, mask)
    assert result["gauc"] == metrics.gauc_by_rows(logits, labels, groups, mask).value
    assert result["gauc_weighting"] == "rows"
    assert result["base_rate"] == metrics.base_rate(labels, mask)


def brier(logits, labels, *, mask, groups):
    assert logits.ndim == 1 and logits.shape == labels.shape == mask.shape == groups.shape
    return np.mean((1 / (1 + np.exp(-logits)) - labels)[mask] ** 2)


BRIER = metrics.Metric("brier", "Brier score", function=brier)
TAKEN = metrics.Metric("auc", function=brier)
COLUMN = metrics.Metric("train_flops", function=brier)


@pytest.fixture
def addresses(monkeypatch):
    module = types.ModuleType("made_up_metrics")
    module.BRIER, module.TAKEN, module.COLUMN = BRIER, TAKEN, COLUMN
    monkeypatch.setitem(sys.modules, "made_up_metrics", module)


def test_metrics_by_name_and_address_are_evaluated_on_the_rows_that_count(log, addresses):
    logits, labels, groups, mask = log
    wanted = ["gauc", "made_up_metrics:BRIER", "ne", "calibration", "auc", "logloss"]
    found = metrics.evaluate(wanted, *(x.reshape(4, 25, 2) for x in (logits, labels)), mask=mask, groups=groups)
    whole = metrics.evaluate_binary(logits, labels, mask=mask, groups=groups)
    assert found.pop("brier") == pytest.approx(np.mean((1 / (1 + np.exp(-logits)) - labels)[mask > 0] ** 2))
    assert found == {name: whole[name] for name in ("gauc", "ne", "calibration", "auc", "logloss")}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("logos", "there is no metric 'logos'; did you mean 'logloss'"),
        ("excess_logloss", "has no function"),
        ("made_up_metrics:TAKEN", "calls itself 'auc'"),
        ("made_up_metrics:COLUMN", "calls itself 'train_flops'"),
        ("math:pi", "expected a recscale.scaling.data.metrics.Metric"),
    ],
)
def test_a_metric_that_cannot_be_evaluated_is_refused_when_the_run_is_planned(addresses, name, text):
    with pytest.raises(ValueError, match=text):
        make_source({"name": "known_truth", "preset": "smoke", "metrics": (name,)}, requests=8)


def test_a_run_evaluates_the_metrics_it_asks_for_and_keeps_its_id_without(tmp_path, addresses):
    config = get_config("dlrm_mlp")
    asked = overrides.apply(config, overrides.parse(config, ["data.metrics=made_up_metrics:BRIER,gauc"]))
    assert asked.data.metrics == ("made_up_metrics:BRIER", "gauc")
    assert "metrics" not in overrides.apply(config, {"training.lr": 0.1}).data
    assert run_id(asked) != run_id(config)
    values = {"data.preset": "smoke", "data.holdout_rows": 512, "training.requests": 64, "training.examples": 640}
    record = train(overrides.apply(asked, values), tmp_path)
    assert 0.0 < record["metrics"]["brier"] < 0.3
    assert runs.run_row(record)["brier"] == record["metrics"]["brier"]


def test_what_is_known_of_a_column():
    assert metrics.describe("auc").lower_is_better is False and metrics.describe("calibration").lower_is_better is None
    assert metrics.describe("logloss").is_loss and not metrics.describe("progressive_logloss").is_loss
    assert metrics.describe("my_column") == metrics.Metric("my_column")


@pytest.mark.parametrize(
    ("logits", "labels", "mask", "text"),
    [
        (np.zeros(3), np.zeros(4), None, r"shape \(3,\)"),
        (np.zeros(3), np.full(3, 0.5), None, "0 or 1, found 0.5"),
        (np.zeros(3), np.zeros(3), np.zeros(3), "no label is observed"),
        (np.zeros(3), np.zeros(3), np.ones(2), r"mask has shape \(2,\)"),
    ],
)
def test_bad_arguments_are_named(logits, labels, mask, text):
    with pytest.raises(ValueError, match=text):
        metrics.logloss(logits, labels, mask)


def test_entropy_of_a_rate():
    assert metrics.entropy(0.0) == 0.0 == metrics.entropy(1.0)
    assert metrics.entropy(0.5) == pytest.approx(math.log(2), rel=1e-15)
    with pytest.raises(ValueError, match="between 0 and 1"):
        metrics.entropy(1.5)
