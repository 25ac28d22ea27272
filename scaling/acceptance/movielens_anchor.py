"""The score a model must beat on MovieLens-100K: ridge logistic regression on one bias per user and per item.

    logit(row) = b + u[user] + i[item],   minimise  sum of row loglosses + strength / 2 (|u|^2 + |i|^2)

Fitted on the training rows, the strength chosen on validation, reported on test: two embeddings of width one,
no interaction, no history. SciPy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from recscale.scaling.data.metrics import evaluate_binary
from recscale.scaling.data.stored_log.packed import PackedLog

STRENGTHS = (0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0)


def fit_anchor(log: PackedLog, *, strengths: Sequence[float] = STRENGTHS) -> dict[str, Any]:
    """Metrics of the anchor on test, with the strength that validation chose and the validation metrics as
    `valid_*`.

    log: a packed log with the fields `user` and `item` and splits train, valid, test.
    """
    candidates = []
    for strength in strengths:
        logits = _fit(log, strength)
        valid = _evaluate(log, logits, "valid")
        candidates.append((valid["logloss"], strength, logits, valid))
    _, strength, logits, valid = min(candidates, key=lambda row: row[0])
    test = _evaluate(log, logits, "test")
    return {"strength": strength, **test, **{f"valid_{name}": value for name, value in valid.items()}}


def _fit(log: PackedLog, strength: float) -> np.ndarray:
    """Logits of every row of the log after fitting on the training rows."""
    columns = [np.asarray(log.column(name)) for name in ("user", "item")]
    sizes = [int(column.max()) + 1 for column in columns]
    train = slice(*log.splits["train"])
    label = log.labels[train, 0].astype(np.float64)

    def logits(parameters: np.ndarray, rows: slice) -> np.ndarray:
        user, item = np.split(parameters[1:], [sizes[0]])
        return parameters[0] + user[columns[0][rows]] + item[columns[1][rows]]

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        logit = logits(parameters, train)
        residual = expit(logit) - label
        value = np.sum(np.logaddexp(0.0, logit) - label * logit) + strength / 2 * np.sum(parameters[1:] ** 2)
        slopes = [
            np.bincount(column[train], weights=residual, minlength=size)
            for column, size in zip(columns, sizes, strict=True)
        ]
        return value, np.concatenate([[residual.sum()], *slopes]) + strength * np.r_[0.0, parameters[1:]]

    fitted = minimize(loss, np.zeros(1 + sum(sizes)), jac=True, method="L-BFGS-B", options={"maxiter": 2000})
    if not fitted.success:
        raise RuntimeError(f"the anchor did not converge at strength {strength}: {fitted.message}")
    return logits(fitted.x, slice(None))


def _evaluate(log: PackedLog, logits: np.ndarray, split: str) -> dict[str, Any]:
    rows = slice(*log.splits[split])
    users = None if log.users is None else log.users[rows]
    return evaluate_binary(logits[rows], log.labels[rows, 0], groups=users)
