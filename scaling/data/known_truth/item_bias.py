"""Biases of items of the known-truth log: the exact bound on what can be gained on cold items.

A bias is one of 32 equally likely scores. Whoever knows all else of a row, the rest r of its logit, and of an item
nothing but its feedback, rows (r_t, y_t) that were seen before, predicts best by Bayes' rule:

    w_j  ~  prod_t P(y_t | r_t + s_j),      p = sum_j w_j P(1 | r + s_j),      j = 1 ... 32

No method that learns an item from that feedback, whatever else it knows, has a lower expected loss. So what it can gain
on another predictor is at most the other's excess less Bayes'; on an item without feedback Bayes' is `fresh_excess`.
Items are taken one by one: that the 32 of a block have the 32 scores in some order is known to nobody.

P(1 | z) = E sigmoid(z + eta), eta the row's noise. For the first label; NumPy, float64.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float64, Int, Num

from .config import KnownTruthConfig
from .exact import TruthRows, part_variances
from .expectations import divergence, hermite, logit, smoothed
from .world import World, bias_scores

# Rows whose likelihoods under all scores are formed at a time.
_PIECE = 1 << 14


def rest_of_logit(rows: TruthRows) -> Float64[np.ndarray, "*rows"]:
    """r: the logit of the first label without the item's bias."""
    return rows.z[..., 0] - rows.parts["B_item"][..., 0]


def item_weights(
    world: World,
    items: Int[np.ndarray, " n"],
    rest: Float[np.ndarray, " n"],
    noise_sd: Float[np.ndarray, " n"],
    labels: Num[np.ndarray, " n"],
) -> Float64[np.ndarray, "V 32"]:
    """w of every item of the vocabulary given rows of feedback; 1/32 each where there was none.

    Raises:
        ValueError: the log has no biases, or a label is none of 0 and 1.
    """
    _require_biases(world.config)
    labels = np.asarray(labels, np.float64)
    if not np.isin(labels, (0.0, 1.0)).all():
        raise ValueError("feedback is 0 or 1; labels that are probabilities (soft_labels) say nothing of what was seen")
    log = np.zeros((world.config.vocabulary, 32))
    for start in range(0, len(rest), _PIECE):
        part = slice(start, start + _PIECE)
        p, q = _chances(world, rest[part], noise_sd[part])
        np.add.at(log, items[part], np.log(np.where(labels[part, None] > 0, p, q)))
    weights = np.exp(log - log.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def bayes_logits(
    world: World,
    items: Int[np.ndarray, " n"],
    rest: Float[np.ndarray, " n"],
    noise_sd: Float[np.ndarray, " n"],
    weights: Float[np.ndarray, "V 32"],
) -> Float64[np.ndarray, " n"]:
    """Logits of the best prediction of rows whose items are known by these weights."""
    found = np.empty(len(rest))
    for start in range(0, len(rest), _PIECE):
        part = slice(start, start + _PIECE)
        p, q = _chances(world, rest[part], noise_sd[part])
        own = weights[items[part]]
        found[part] = logit((own * p).sum(axis=1), (own * q).sum(axis=1))
    return found


def fresh_excess(config: KnownTruthConfig, nodes: int = 81) -> float:
    """Closed form of the excess of the best prediction for an item without feedback, with the rest of the logit normal.

    E KL(p(r + s) || mean over scores of p(r + s')), about v/2 times the variance of an item's bias, c_B / 2.

    Raises:
        ValueError: the log has no biases, or noise that is not the same in all rows.
    """
    _require_biases(config)
    if config.drift or config.ragged:
        raise ValueError("the closed form is of logs without drift and ragged histories; take `bayes_logits` on rows")
    points, weights = hermite(nodes)
    spread = sum(part_variances(config).values()) - config.c_b / 2
    scores = (config.c_b / 2) ** 0.5 * bias_scores()
    rest = config.b + spread**0.5 * points
    p, q = smoothed(rest[:, None] + scores, config.noise_variance() ** 0.5)
    mixed = logit(p.mean(axis=1), q.mean(axis=1))
    each = divergence(p, q, np.broadcast_to(mixed[:, None], p.shape)).mean(axis=1)
    return float(weights @ each)


def _chances(world: World, rest: np.ndarray, noise_sd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """P(1 | r + s_j) and P(0 | r + s_j): [n, 32] each."""
    scores = np.asarray(world.bias_scores, np.float64) / world.scale
    return smoothed(np.asarray(rest)[:, None] + scores, np.asarray(noise_sd)[:, None])


def _require_biases(config: KnownTruthConfig) -> None:
    if not config.has_b:
        raise ValueError("the log has no biases of items: give B, the last of `shares`, a share")
