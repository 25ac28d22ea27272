"""Exact metrics of a model's logits on the known-truth log.

    report = evaluate(world, batches, logits)    # excess logloss KL(p*||p), expected AUC, recovery per part

No metric here has label noise except the ones called observed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num
from scipy.special import expit

from recscale.models.inputs import Batch

from .card import card
from .config import REQUEST_FIELDS, TASK_NAMES
from .exact import TruthRows, truth
from .expectations import divergence, entropy_of_both, expected_auc, logit
from .logit_parts import term_values
from .world import Terms, World, popularity

_DECILES = 10
_CONSTANT = 1e-9  # logits closer together than this are one constant: nothing is recovered
_PIECE = 4096  # rows whose terms are formed at a time


def evaluate(
    world: World,
    batches: Iterable[Batch],
    logits: Float[np.ndarray, "batches R C Y"],
    constants: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Metrics of logits on batches with whole histories; see `evaluate_rows`.

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
    logits: Float[np.ndarray, " ..."],
    labels: Num[np.ndarray, "*rows Y"],
    mask: Num[np.ndarray, "*rows Y"],
    valid: Bool[np.ndarray, "*rows"],
    groups: Int[np.ndarray, "*rows"],
    constants: Mapping[str, Any],
) -> dict[str, Any]:
    """Metrics of logits [*rows, Y] against truth of the same shape; constants: the card.

    Keys: rows; excess_logloss = mean KL(p*||p); logloss = H* + excess_logloss; entropy_floor; asymptote; base_rate; ne;
    auc, gauc: in expectation over labels; calibration = mean p / mean p*; calibration_deciles: the same by decile of
    p*; observed_logloss; observed_excess: paired with p* on the same labels, with observed_excess_se, must agree with
    excess_logloss; coefficients: least squares of the logit on its parts, so the share of a part whose terms are known
    or not, times the shrinkage all parts have in common; recovery: corr^2 of a part with the logit's projection on it.
    The projection is term by term for N, by order; for L, M, B and X it is what the logit holds beside the N terms and
    the fitted shares of the others, so that their errors lower it; item_bias_by_popularity: the coefficient of the
    item's bias by tenth of the item popularity, most popular first (None: no item), and excess_logloss_rare the mean of
    KL(p*||p) in the least popular tenth. With several domains recovery also has N_shared and N_domain0, ..., the terms
    of all domains and of each alone; with two labels N_common and N_own.
    A second label adds the same keys ending in its name; in a cascade its rows count with the probability that the
    first label is 1.

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
        values |= _recovery(world, task, predicted, rows, keep)
        if world.config.has_b:
            rare = _popularity_tenth(world, rows.item_block[keep]) == _DECILES - 1
            lost = weight * divergence(p, q, predicted)
            values["excess_logloss_rare"] = float(lost[rare].sum() / weight[rare].sum()) if rare.any() else None
        out |= {f"{name}_{TASK_NAMES[task]}": value for name, value in values.items()} if task else values
    return out


def row_groups(batches: list[Batch]) -> tuple[Int[np.ndarray, "batches R C"], str]:
    """Group of every row for GAUC, and the statement of its weighting.

    The request where it has several candidates; else the user, as far as the inputs tell users apart, else all rows.
    """
    shape = (len(batches), *batches[0].valid.shape)
    weighting = "expected positive-negative pairs of the "
    if shape[2] > 1:
        requests = np.arange(shape[0] * shape[1]).reshape(shape[:2])
        return np.broadcast_to(requests[..., None], shape), weighting + "request"
    if "user" in batches[0].user.ids:
        users = np.stack([np.asarray(batch.user.ids["user"]) for batch in batches]).astype(np.int64)
        weighting += "user"
    elif not batches[0].user.dense:
        users, weighting = np.zeros(shape[:2], np.int64), weighting + "whole log"
    else:
        code = np.stack([np.asarray(batch.user.dense[f"{REQUEST_FIELDS[0]}_code"]) for batch in batches])
        users = ((code < 0).astype(np.int64) << np.arange(code.shape[-1])).sum(-1)
        weighting += "user code"
    return np.broadcast_to(users[..., None], shape), weighting


def stack_truth(rows: list[TruthRows]) -> TruthRows:
    """Truth of several batches with a leading batch axis."""
    return jax.tree.map(lambda *values: np.stack(values), *rows)


def _exact_metrics(
    predicted: np.ndarray,
    p: np.ndarray,
    q: np.ndarray,
    weight: np.ndarray,
    groups: np.ndarray,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
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
        "ne": loss / float(entropy_of_both(facts["base_rate"])),
        "auc": expected_auc(predicted, positive, negative),
        "gauc": expected_auc(predicted, positive, negative, groups),
        "calibration": float(weight @ probability / positive.sum()),
        "calibration_deciles": [float(a / b) if b > 0 else None for a, b in zip(*sums, strict=True)],
    }


def _observed(predicted: np.ndarray, p: np.ndarray, q: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
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


def _recovery(world: World, task: int, predicted: np.ndarray, rows: TruthRows, keep: np.ndarray) -> dict[str, Any]:
    """Coefficients and recovered shares; see `evaluate_rows`."""
    parts = {name: value[..., task][keep] for name, value in rows.parts.items()}
    parts["B"] = parts["B_user"] + parts["B_item"]
    names = [name for name in ("N1", "N2", "N3", "N4", "L", "M", "B", "X") if np.ptp(parts[name]) > 0]
    centred = np.stack([parts[name] - parts[name].mean() for name in names], axis=1)
    target = predicted - predicted.mean()
    if np.abs(target).max() < _CONSTANT:
        nothing = dict.fromkeys(names, 0.0)
        return {"coefficients": nothing, "recovery": nothing | dict.fromkeys(_term_classes(world, task), 0.0)}
    coefficients, *_ = np.linalg.lstsq(centred, target, rcond=None)
    others = [index for index, name in enumerate(names) if name[0] != "N"]
    recovery, rest = {}, target
    if world.terms:
        # Without the other parts, whose chance overlap with so many terms would be taken for N.
        own = target - centred[:, others] @ coefficients[others]
        recovery, projected = _term_recovery(world, task, own, rows.words[keep], rows.domain[keep])
        rest = target - projected
    left, *_ = np.linalg.lstsq(centred[:, others], rest, rcond=None)
    rest = rest - centred[:, others] @ left
    for column, own_coefficient in zip(others, left, strict=True):
        own = rest + own_coefficient * centred[:, column]
        scale = (own @ own) * (centred[:, column] @ centred[:, column])
        recovery[names[column]] = float((own @ centred[:, column]) ** 2 / scale) if scale > 0 else 0.0
    out = {"coefficients": dict(zip(names, coefficients.tolist(), strict=True)), "recovery": recovery}
    if "B" in names:
        own = rest + left[others.index(names.index("B"))] * centred[:, names.index("B")]
        out["item_bias_by_popularity"] = _by_popularity(world, own, parts["B_item"], rows.item_block[keep])
    return out


def _by_popularity(world: World, own: np.ndarray, bias: np.ndarray, block: np.ndarray) -> list[float | None]:
    """Coefficient of the item's bias among rows of each tenth of the item popularity, most popular first."""
    tenth, found = _popularity_tenth(world, block), []
    for number in range(_DECILES):
        x, y = bias[tenth == number], own[tenth == number]
        spread = float(((x - x.mean()) ** 2).sum()) if len(x) else 0.0
        found.append(float((x - x.mean()) @ (y - y.mean()) / spread) if spread > 0 else None)
    return found


def _popularity_tenth(world: World, block: np.ndarray) -> np.ndarray:
    """Tenth of the item popularity, by impressions, that a popularity block is in: 0 the most popular."""
    law = popularity(world)
    return np.minimum((_DECILES * (np.cumsum(law) - 0.5 * law)).astype(np.int64), _DECILES - 1)[block]


def _term_recovery(
    world: World, task: int, target: np.ndarray, words: np.ndarray, domain: np.ndarray
) -> tuple[dict[str, float], np.ndarray]:
    """(recovered share by class, projection of `target` on all terms): terms are orthonormal, so both are sums of dots.

    With rows enough a second pass takes out what the sample's terms have in common by chance.
    """
    terms, n = world.terms[task], len(target)
    pieces = [slice(start, start + _PIECE) for start in range(0, n, _PIECE)]
    inputs = [(words[piece].T, domain[piece] if world.config.domains > 1 else None) for piece in pieces]
    learned, norms, projected = np.zeros(len(terms.number)), np.zeros(len(terms.number)), np.zeros(n)
    for _ in range(2 if n >= 4 * len(learned) else 1):
        rest = (target - projected).astype(np.float32)
        sums = [_dots(terms, *given, rest[piece]) for given, piece in zip(inputs, pieces, strict=True)]
        totals: np.ndarray = np.asarray(jax.device_get(sums), np.float64).sum(axis=0)
        dots, norms = totals
        learned += dots / np.maximum(norms, 1.0)
        weights = learned.astype(np.float32)
        projected = np.concatenate([_combine(terms, *given, weights) for given in inputs]).astype(np.float64)
    true, weight = terms.coefficient / world.scale, norms / n
    recovery = {}
    for name, own in _term_classes(world, task).items():
        noise = len(own) * float(target @ target) / n**2  # what random dots would add to the sum of squares
        found = max(float(weight[own] @ learned[own] ** 2) - noise, noise)
        scale = float(weight[own] @ true[own] ** 2) * found
        agreement = float(weight[own] @ (true[own] * learned[own]))
        recovery[name] = min(1.0, agreement**2 / scale) if scale > 0 else 0.0
    return recovery, projected


def _term_classes(world: World, task: int) -> dict[str, np.ndarray]:
    """Names of what terms of N are reported by -> their places: order, domain, and whether both labels have them."""
    if not world.terms:
        return {}
    terms, config = world.terms[task], world.config
    order = np.asarray([group.order for group in terms.groups])[terms.group]
    members = {f"N{number}": order == number for number in sorted(set(order))}
    if config.domains > 1:
        members |= {"N_shared": terms.domain < 0}
        members |= {f"N_domain{domain}": terms.domain == domain for domain in range(config.domains)}
    if config.tasks > 1:
        members |= {"N_common": terms.common, "N_own": ~terms.common}
    return {name: np.flatnonzero(own) for name, own in members.items() if own.any()}


@jax.jit
def _dots(terms: Terms, words: Array, domain: Array | None, target: Array) -> tuple[Array, Array]:
    values = term_values(words, terms, domain)
    return jnp.matmul(values, target, precision="highest"), jnp.sum(jnp.abs(values), axis=1)


@jax.jit
def _combine(terms: Terms, words: Array, domain: Array | None, coefficients: Array) -> Array:
    return jnp.matmul(coefficients, term_values(words, terms, domain), precision="highest")
