"""Expectations over normal logit noise, and exact expected metrics of binary predictions, in NumPy float64.

Nothing here knows the generator: inputs are logits, click probabilities and standard deviations.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float64, Int, Shaped
from scipy.special import expit, log_expit, ndtri, xlogy

NODES = 41
_SPLINE_STEP = 1.0 / 128
_CHUNK = 1 << 15  # rows per quadrature block: the [rows, nodes] block stays in cache


@functools.lru_cache(maxsize=8)
def hermite(nodes: int = NODES) -> tuple[Float64[np.ndarray, " {nodes}"], Float64[np.ndarray, " {nodes}"]]:
    """Nodes and weights of E f(xi), xi standard normal (probabilists' Gauss-Hermite, weights sum to 1)."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    return points, weights / weights.sum()


def smoothed(
    z: Any, sd: Any, amplitude: Any = 0.0, nodes: int = NODES
) -> tuple[Float64[np.ndarray, "*shape"], Float64[np.ndarray, "*shape"]]:
    """Click probability under noise: (p, 1 - p), p = E sigmoid(z + sd xi + amplitude c), xi normal, c a fair sign.

    All arguments broadcast; `amplitude` is the size of an unobservable +-amplitude, 0 where there is none.
    """
    z, sd, amplitude = np.broadcast_arrays(*(np.asarray(x, np.float64) for x in (z, sd, amplitude)))
    low, spread, shift = z.ravel(), sd.ravel(), amplitude.ravel()
    p = _normal_mean(low - shift, spread, nodes)
    coin = shift != 0
    if coin.any():
        p[coin] = 0.5 * (p[coin] + _normal_mean((low + shift)[coin], spread[coin], nodes))
    p = p.reshape(z.shape)
    return p, 1.0 - p


def _normal_mean(z: np.ndarray, sd: np.ndarray, nodes: int) -> np.ndarray:
    points, weights = hermite(nodes)
    blocks = [slice(start, start + _CHUNK) for start in range(0, z.size, _CHUNK)]
    return np.concatenate([expit(z[b, None] + sd[b, None] * points) @ weights for b in blocks] or [np.zeros(0)])


def entropy_of_both(p: Any, q: Any = None) -> Float64[np.ndarray, " ..."]:
    """Entropy of a label, -p ln p - q ln q in nats, q = 1 - p unless given."""
    p = np.asarray(p, np.float64)
    q = 1.0 - p if q is None else np.asarray(q, np.float64)
    return np.asarray(-(xlogy(p, p) + xlogy(q, q)))


def on_grid(function: Callable[[np.ndarray], np.ndarray], z: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """function(z) for a smooth function of many logits: evaluated on a grid of step 1/128, cubic spline between.

    The error is below 1e-10 for averages of sigmoids and their entropies.
    """
    from scipy.interpolate import CubicSpline  # a quarter of a second, which no run needs whose card is stored

    low, high = float(z.min()) - 0.1, float(z.max()) + 0.1
    grid = np.linspace(low, high, max(8, int(np.ceil((high - low) / _SPLINE_STEP))))
    return CubicSpline(grid, function(grid))(z)


def noise_mean(
    function: Callable[[np.ndarray], np.ndarray], sd: float, nodes: int = NODES
) -> Callable[[np.ndarray], np.ndarray]:
    """The function z -> E function(z + sd xi), xi standard normal."""
    points, weights = hermite(nodes)
    return lambda z: function(np.asarray(z)[..., None] + sd * points) @ weights


def entropy_of_logit(z: Any) -> Float64[np.ndarray, " ..."]:
    """Entropy of a label with logit z, exact for logits of any size."""
    p, q = expit(z), expit(-np.asarray(z))
    return np.asarray(-(p * log_expit(z) + q * log_expit(-np.asarray(z))))


def divergence(
    p: Float64[np.ndarray, "*shape"], q: Float64[np.ndarray, "*shape"], logits: Shaped[np.ndarray, "*shape"]
) -> Float64[np.ndarray, "*shape"]:
    """KL(Bernoulli(p) || Bernoulli(sigmoid(logits))) per row in nats, q = 1 - p."""
    logits = np.asarray(logits, np.float64)
    return p * (np.log(p) - log_expit(logits)) + q * (np.log(q) - log_expit(-logits))


def logit(p: Float64[np.ndarray, "*shape"], q: Float64[np.ndarray, "*shape"]) -> Float64[np.ndarray, "*shape"]:
    """Logit ln(p / q) of a probability p, q = 1 - p."""
    return np.log(p) - np.log(q)


def gaussian_constants(b: float, variance: float, nodes: int = 101) -> dict[str, float]:
    """What a log with logit ~ Normal(b, variance), all of it known, would have: base_rate, v, asymptote, auc, t.

    The check of a generator that needs no generator: real logits are sums of many small parts.
    """
    points, weights = hermite(nodes)
    z = b + variance**0.5 * points
    p = expit(z)
    rate = float(weights @ p)
    # AUC = P(z of a positive > z of a negative): a double sum over a fine grid of logits.
    grid = np.linspace(b - 9 * variance**0.5, b + 9 * variance**0.5, 20_001)
    density = np.exp(-0.5 * (grid - b) ** 2 / variance)
    density /= density.sum()
    negative = density * expit(-grid)
    below = np.cumsum(negative) - 0.5 * negative
    auc = float((density * expit(grid)) @ below / (rate * (1 - rate)))
    return {
        "base_rate": rate,
        "v": float(weights @ (p * expit(-z))),
        "asymptote": float(weights @ entropy_of_logit(z)),
        "auc": auc,
        "t": t_of_auc(auc),
    }


def t_of_auc(auc: float) -> float:
    """Variance of normal logits that have this AUC at a small base rate: t = 2 Phi^-1(AUC)^2."""
    return float(2.0 * ndtri(auc) ** 2)


def expected_auc(scores: Any, positive: Any, negative: Any, groups: Any | None = None) -> float:
    """AUC in expectation over labels, from each row's expected positive and negative mass.

    sum_{i != j} P_i N_j ([s_i > s_j] + [s_i = s_j] / 2) / (sum P sum N - sum P_i N_i), P = p*, N = 1 - p* for a
    label that is always observed. With `groups` both sums run over pairs of one group: the mean of group AUCs weighted
    by their expected positive-negative pairs. NaN if no group has a pair. O(n log n).
    """
    scores, positive, negative = (np.asarray(x, np.float64).ravel() for x in (scores, positive, negative))
    groups = np.zeros(scores.size, np.int64) if groups is None else np.asarray(groups).ravel()
    order = np.lexsort((scores, groups))
    score, p, n, group = scores[order], positive[order], negative[order], groups[order]
    new_group = np.r_[True, group[1:] != group[:-1]]
    new_tie = new_group | np.r_[True, score[1:] != score[:-1]]
    tie_starts = np.flatnonzero(new_tie)
    tie_p, tie_n = np.add.reduceat(p, tie_starts), np.add.reduceat(n, tie_starts)
    self_pairs = np.add.reduceat(p * n, tie_starts)
    group_starts = np.flatnonzero(new_group[tie_starts])  # first tie of every group
    group_of_tie = np.cumsum(new_group[tie_starts]) - 1
    before = np.cumsum(tie_n) - tie_n
    below = before - before[group_starts][group_of_tie]
    wins = np.add.reduceat(tie_p * (below + 0.5 * tie_n) - 0.5 * self_pairs, group_starts)
    totals = [np.add.reduceat(x, group_starts) for x in (tie_p, tie_n, self_pairs)]
    pairs = totals[0] * totals[1] - totals[2]
    # A group of one row has no pair; rounding may leave a trace of one.
    single = np.diff(np.r_[tie_starts[group_starts], score.size]) == 1
    pairs, wins = np.where(single, 0.0, pairs), np.where(single, 0.0, wins)
    return float(wins.sum() / pairs.sum()) if pairs.sum() > 0 else float("nan")


def posterior(
    observed: Shaped[np.ndarray, "R S r"],
    length: Int[np.ndarray, " R"],
    refresh: Float64[np.ndarray, " r"],
    flip: Float64[np.ndarray, " r"],
) -> Float64[np.ndarray, "R r"]:
    """Probability that each drifting hidden state is +1 at request time, given the visible events.

    Each request has r independent +-1 states; going one event forward in time, state i is redrawn with probability
    refresh_i, and every event shows it flipped with probability flip_i. Exact by a forward recursion from the oldest
    visible event, started at 1/2 (the chain is stationary).

    observed: noisy states -1 or 1, newest event first; length: visible events.
    """
    up = np.full((observed.shape[0], observed.shape[2]), 0.5)
    for event in reversed(range(observed.shape[1])):
        predicted = (1.0 - refresh) * up + 0.5 * refresh
        likelihood_up = np.where(observed[:, event] > 0, 1.0 - flip, flip)
        joint = predicted * likelihood_up
        filtered = joint / (joint + (1.0 - predicted) * (1.0 - likelihood_up))
        up = np.where((event < length)[:, None], filtered, up)
    return up


def states(count: int) -> Float64[np.ndarray, "vectors {count}"]:
    """All 2^count sign vectors of `count` states."""
    return np.asarray(list(itertools.product((-1.0, 1.0), repeat=count)))


def state_weights(up: Float64[np.ndarray, "R r"]) -> Float64[np.ndarray, "R vectors"]:
    """Probability of each sign vector of `states` given independent marginals `up`."""
    signs = states(up.shape[1])
    chosen = np.where(signs[None] > 0, up[:, None, :], 1.0 - up[:, None, :])
    return chosen.prod(axis=2)
