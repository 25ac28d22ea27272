"""Exact metrics of a model's logits on the known-truth log, and the functions that go with them.

    rows   = truth(world, batch)                 # per row, float64 on the host
    known  = card(world)                         # constants: base rate, v, E_inf, H*, AUC*, variances, plateaus
    report = evaluate(world, batches, logits)    # excess logloss KL(p*||p), expected AUC, recovery per part
    logits = oracle_logits(world, batch, quanta=64)
    loss   = predict(world, quanta=[64, 256], examples=1e6)

No metric here has label noise except the ones called observed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from scipy.special import expit

from ...models.inputs import Batch
from .known_truth_card import card
from .known_truth_config import REQUEST_FIELDS, TASK_NAMES
from .known_truth_laws import predict, surface
from .known_truth_quadrature import divergence, entropy, expected_auc, logit
from .known_truth_truth import PARTS, TruthRows, oracle_logits, truth
from .known_truth_world import World

__all__ = [
    "card", "evaluate", "evaluate_rows", "oracle_logits", "predict", "row_groups", "stack_truth", "surface", "truth",
]  # fmt: skip

_DECILES = 10


def evaluate(
    world: World, batches: Iterable[Batch], logits: np.ndarray, constants: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Metrics of logits [number of batches, R, C, Y] on batches with whole histories; see `evaluate_rows`.

    `constants`: the card, if it is at hand. Rows that are not `valid` take no part.
    """
    batches = [jax.device_get(batch) for batch in batches]
    rows = stack_truth([truth(world, batch) for batch in batches])
    labels, mask, valid = (np.stack([getattr(b, n) for b in batches]) for n in ("labels", "label_mask", "valid"))
    groups, weighting = row_groups(batches)
    constants = card(world) if constants is None else constants
    return evaluate_rows(world, rows, logits, labels, mask, valid, groups, constants) | {"gauc_weighting": weighting}


def evaluate_rows(
    world: World,
    rows: TruthRows,
    logits: np.ndarray,
    labels: np.ndarray,
    mask: np.ndarray,
    valid: np.ndarray,
    groups: np.ndarray,
    constants: Mapping[str, Any],
) -> dict[str, Any]:
    """Metrics of logits [..., Y] against truth of the same shape; valid, groups: [...]; constants: the card.

    Keys: rows; excess_logloss = mean KL(p*||p); logloss = H* + excess_logloss; entropy_floor; asymptote; base_rate; ne;
    auc, gauc: in expectation over labels; calibration = mean p / mean p*; calibration_deciles: the same by decile of
    p*; observed_logloss; observed_excess: paired with p* on the same labels, with observed_excess_se, must agree with
    excess_logloss; coefficients, recovery: per part of the logit, the least-squares coefficient, and corr^2 of the part
    with what is left of the logit when the other parts' fitted shares are taken out. A second label adds the same keys
    ending in its name; in a cascade its rows count with the probability that the first label is 1.

    Raises:
        ValueError: shapes differ.
    """
    logits = np.asarray(logits, np.float64)
    if logits.shape != rows.z.shape:
        raise ValueError(f"logits have shape {logits.shape}, the rows {rows.z.shape}; they must be equal")
    keep = np.asarray(valid, bool)
    out: dict[str, Any] = {"rows": int(keep.sum())}
    for task in range(world.config.tasks):
        predicted, p, q = (x[..., task][keep] for x in (logits, rows.p, rows.q))
        weight = rows.p[..., 0][keep] if world.config.cascade and task else np.ones_like(p)
        facts = constants[TASK_NAMES[task]] if task else constants
        values = _exact_metrics(predicted, p, q, weight, np.asarray(groups)[keep], facts)
        seen = np.asarray(mask)[..., task][keep] > 0
        values |= _observed(predicted[seen], p[seen], q[seen], np.asarray(labels)[..., task][keep][seen])
        values |= _recovery(predicted, {name: rows.parts[name][..., task][keep] for name in PARTS})
        out |= {f"{name}_{TASK_NAMES[task]}": value for name, value in values.items()} if task else values
    return out


def row_groups(batches: list[Batch]) -> tuple[np.ndarray, str]:
    """Group of every row for GAUC, int64 [number of batches, R, C], and the statement of its weighting.

    The request where it has several candidates; else the user, as far as the inputs tell users apart.
    """
    shape = (len(batches), *batches[0].valid.shape)
    weighting = "expected positive-negative pairs of the "
    if shape[2] > 1:
        requests = np.arange(shape[0] * shape[1]).reshape(shape[:2])
        return np.broadcast_to(requests[..., None], shape), weighting + "request"
    if "user" in batches[0].user.ids:
        users = np.stack([np.asarray(batch.user.ids["user"]) for batch in batches]).astype(np.int64)
        weighting += "user"
    else:
        code = np.stack([np.asarray(batch.user.dense[f"{REQUEST_FIELDS[0]}_code"]) for batch in batches])
        users = ((code < 0).astype(np.int64) << np.arange(code.shape[-1])).sum(-1)
        weighting += "user code"
    return np.broadcast_to(users[..., None], shape), weighting


def stack_truth(rows: list[TruthRows]) -> TruthRows:
    """Truth of several batches with a leading batch axis."""
    stacked = {name: np.stack([getattr(row, name) for row in rows]) for name in ("z", "noise_sd", "fresh", "p", "q")}
    return TruthRows(parts={k: np.stack([row.parts[k] for row in rows]) for k in rows[0].parts}, **stacked)


def _exact_metrics(predicted, p, q, weight, groups, facts) -> dict[str, Any]:
    total = weight.sum()
    excess = float(weight @ divergence(p, q, predicted) / total)
    probability = expit(predicted)
    positive, negative = weight * p, weight * q
    rank = np.argsort(np.argsort(p, kind="stable"), kind="stable")
    decile = rank * _DECILES // max(len(p), 1)
    sums = [np.bincount(decile, weights=x, minlength=_DECILES) for x in (weight * probability, positive)]
    loss = facts["entropy_floor"] + excess
    return {
        "excess_logloss": excess,
        "logloss": loss,
        "entropy_floor": facts["entropy_floor"],
        "asymptote": facts["asymptote"],
        "base_rate": facts["base_rate"],
        "ne": loss / float(entropy(facts["base_rate"])),
        "auc": expected_auc(predicted, positive, negative),
        "gauc": expected_auc(predicted, positive, negative, groups),
        "calibration": float(weight @ probability / positive.sum()),
        "calibration_deciles": [float(a / b) if b > 0 else None for a, b in zip(*sums, strict=True)],
    }


def _observed(predicted, p, q, labels) -> dict[str, Any]:
    """Logloss on the labels drawn (soft labels included), and its paired difference to that of p*."""
    if not len(labels):
        return {"observed_logloss": math.nan, "observed_excess": math.nan, "observed_excess_se": math.nan}
    own, best = (
        np.logaddexp(0.0, -x) * labels + np.logaddexp(0.0, x) * (1.0 - labels) for x in (predicted, logit(p, q))
    )
    difference = own - best
    return {
        "observed_logloss": float(own.mean()),
        "observed_excess": float(difference.mean()),
        "observed_excess_se": float(difference.std() / math.sqrt(len(labels))),
    }


def _recovery(predicted: np.ndarray, parts: dict[str, np.ndarray]) -> dict[str, Any]:
    parts = {**parts, "B": parts["B_user"] + parts["B_item"]}
    names = [name for name in ("N1", "N2", "N3", "N4", "L", "M", "B", "X") if np.ptp(parts[name]) > 0]
    centred = np.stack([parts[name] - parts[name].mean() for name in names], axis=1)
    target = predicted - predicted.mean()
    coefficients, *_ = np.linalg.lstsq(centred, target, rcond=None)
    rest = target - centred @ coefficients
    recovery = {}
    for index, name in enumerate(names):
        own = rest + coefficients[index] * centred[:, index]
        scale = (own @ own) * (centred[:, index] @ centred[:, index])
        recovery[name] = float((own @ centred[:, index]) ** 2 / scale) if scale > 0 else 0.0
    return {"coefficients": dict(zip(names, coefficients.tolist(), strict=True)), "recovery": recovery}
