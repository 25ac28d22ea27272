"""Logistic regressions beside a log: the user's own rate row by row, the optimum's slope, and what they find."""

import dataclasses

import numpy as np
import pytest

from recscale.scaling.data.metrics import constant_logloss
from recscale.scaling.data.stored_log.packed import write_packed
from recscale.scaling.data.stored_log.references import IDS, TWO_FEATURES, fit_references, own_rate


@pytest.fixture(scope="module")
def taught(made_up_arrays, tmp_path_factory):
    """A log of one user field, whose users click at rates of their own."""
    rates = np.linspace(0.05, 0.95, 9)[made_up_arrays.users]
    labels = made_up_arrays.labels.copy()
    labels[:, 0] = np.random.default_rng(1).random(len(labels)) < rates
    log = dataclasses.replace(made_up_arrays, labels=labels)
    return write_packed(log, tmp_path_factory.mktemp("taught") / "log")


def test_a_users_own_rate_knows_earlier_times_alone(taught):
    found, mask = own_rate(taught), taught.label_mask[:, 0] > 0
    train = slice(*taught.splits["train"])
    base = taught.labels[train, 0][mask[train]].mean()
    for row in range(0, len(taught), 7):
        before = (taught.users == taught.users[row]) & (taught.times < taught.times[row]) & mask
        rate = (taught.labels[before, 0].sum() + 5 * base) / (before.sum() + 5)
        assert found[row] == pytest.approx(np.log(rate / (1 - rate)) - np.log(base / (1 - base)), abs=1e-12)


def test_both_beat_the_base_rate_where_users_differ(taught):
    found = fit_references(taught)
    assert set(found) == {IDS, TWO_FEATURES}
    start, end = taught.splits["test"]
    labels, mask = taught.labels[start:end, 0], taught.label_mask[start:end, 0]
    for reference in found.values():
        assert reference["logloss"] < constant_logloss(0.5, labels, mask) - 0.02
        assert reference["valid_logloss"] > 0 and reference["strength"] > 0


def test_a_log_without_users_or_times_has_none(made_up_arrays, tmp_path):
    schema = dataclasses.replace(made_up_arrays.schema, sequences=())
    log = dataclasses.replace(made_up_arrays, schema=schema, users=None, events={}, ends={})
    assert fit_references(write_packed(log, tmp_path / "log")) == {}
