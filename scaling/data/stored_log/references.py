"""What a model of a real log has to beat: two logistic regressions on hardly anything, fitted by SciPy.

    ids           logit = b + u[user] + i[item],   ridge strength / 2 (|u|^2 + |i|^2)
    two features  logit = b + i[item] + w * own,   own = log odds of the user's rate before the request, less the base's

Fitted on the training rows of the first task, the strength chosen on validation, reported on test. A user's own rate
counts the observed labels of earlier times in all parts, as a system that serves would know them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import minimize
from scipy.special import expit, logit

from recscale.scaling.data.metrics import base_rate, evaluate_binary

from .packed import PackedLog

IDS, TWO_FEATURES = "logistic regression on user and item", "item bias and the user's own rate"
STRENGTHS = (0.35, 0.5, 0.7, 1.0, 2.0, 4.0, 8.0)
# Newest training rows that are fitted at most.
_MOST_ROWS = 2_000_000
# Rows at the base rate that a user's own rate starts from.
_PRIOR_ROWS = 5.0


def fit_references(log: PackedLog, *, strengths: Sequence[float] = STRENGTHS) -> dict[str, dict[str, Any]]:
    """Metrics of both on test by name, validation's as `valid_*`, and the strength that validation chose.

    Empty for a log without users, times or a single-valued candidate id. Rows whose label was not observed count
    nowhere.
    """
    item = next((f.name for f in log.schema.candidate_fields if not f.is_dense and f.bag == 1), None)
    if item is None or log.users is None or log.times is None:
        return {}
    users, items = np.asarray(log.users), np.asarray(log.column(item))
    own = own_rate(log)[:, None]
    return {
        IDS: _best(log, [users, items], own[:, :0], strengths),
        TWO_FEATURES: _best(log, [items], own, strengths),
    }


def own_rate(log: PackedLog) -> Float[np.ndarray, " rows"]:
    """Log odds of every row's user's rate before the row's time, less those of the training base rate."""
    assert log.users is not None and log.times is not None
    start, end = log.splits["train"]
    base = base_rate(log.labels[start:end, 0], log.label_mask[start:end, 0])
    order = np.lexsort((log.times, log.users))
    user, time = log.users[order], log.times[order]
    mask = log.label_mask[order, 0].astype(np.int64)
    seen, positive = (np.r_[0, np.cumsum(values)] for values in (mask, log.labels[order, 0] * mask))
    place = np.arange(len(order))
    new_user = np.r_[True, user[1:] != user[:-1]]
    # Rows of one time do not know each other: all see what was there when the first of them came.
    first = np.maximum.accumulate(np.where(new_user | np.r_[True, time[1:] != time[:-1]], place, 0))
    begin = np.maximum.accumulate(np.where(new_user, place, 0))
    rate = (positive[first] - positive[begin] + _PRIOR_ROWS * base) / (seen[first] - seen[begin] + _PRIOR_ROWS)
    found = np.empty(len(order))
    found[order] = logit(rate) - logit(base)
    return found


def _best(
    log: PackedLog,
    ids: list[Int[np.ndarray, " rows"]],
    numbers: Float[np.ndarray, "rows k"],
    strengths: Sequence[float],
) -> dict[str, Any]:
    found = []
    for strength in strengths:
        logits = _fit(log, ids, numbers, strength)
        valid = _evaluate(log, logits, "valid")
        found.append((valid["logloss"], strength, logits, valid))
    _, strength, logits, valid = min(found, key=lambda row: row[0])
    test = _evaluate(log, logits, "test")
    return {"strength": strength, **test, **{f"valid_{name}": value for name, value in valid.items()}}


def _fit(log: PackedLog, ids: list[np.ndarray], numbers: np.ndarray, strength: float) -> np.ndarray:
    """Logits of every row after fitting on the training rows."""
    start, end = log.splits["train"]
    train = np.arange(max(start, end - _MOST_ROWS), end)
    train = train[log.label_mask[train, 0] > 0]
    label = log.labels[train, 0].astype(np.float64)
    sizes = [int(column.max()) + 1 for column in ids]
    free = 1 + numbers.shape[1]  # what no ridge holds back

    def logits(parameters: np.ndarray, rows: Any) -> np.ndarray:
        biases = np.split(parameters[free:], np.cumsum(sizes)[:-1])
        own = sum(bias[column[rows]] for bias, column in zip(biases, ids, strict=True))
        return parameters[0] + numbers[rows] @ parameters[1:free] + own

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        z = logits(parameters, train)
        residual = expit(z) - label
        value = np.sum(np.logaddexp(0.0, z) - label * z) + strength / 2 * np.sum(parameters[free:] ** 2)
        slopes = [
            np.bincount(column[train], weights=residual, minlength=size)
            for column, size in zip(ids, sizes, strict=True)
        ]
        slope = np.concatenate([[residual.sum()], numbers[train].T @ residual, *slopes])
        return value, slope + strength * np.r_[np.zeros(free), parameters[free:]]

    fitted = minimize(loss, np.zeros(free + sum(sizes)), jac=True, method="L-BFGS-B", options={"maxiter": 2000})
    if not fitted.success:
        raise RuntimeError(f"the logistic regression did not converge at strength {strength}: {fitted.message}")
    return logits(fitted.x, slice(None))


def _evaluate(log: PackedLog, logits: np.ndarray, split: str) -> dict[str, Any]:
    rows = slice(*log.splits[split])
    users = None if log.users is None else log.users[rows]
    return evaluate_binary(logits[rows], log.labels[rows, 0], mask=log.label_mask[rows, 0], groups=users)
