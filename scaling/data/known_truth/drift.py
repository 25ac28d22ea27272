"""Posterior of the drifting hidden states of the known-truth log, from the visible window of events.

Each request has r independent +-1 states; going one event forward in time, state i is redrawn with probability rho_i,
and every event shows it flipped with probability q_i. The posterior of each state at request time is exact by a
forward recursion from the oldest visible event, started at 1/2 (the chain is stationary).
"""

from __future__ import annotations

import itertools

import numpy as np


def posterior(observed: np.ndarray, length: np.ndarray, refresh: np.ndarray, flip: np.ndarray) -> np.ndarray:
    """P(state_i = +1 | visible events), float64 [R, r].

    observed: [R, S, r] in {-1, 1}, newest first; length: int [R], visible events; refresh, flip: [r].
    """
    observed, length = np.asarray(observed), np.asarray(length)
    up = np.full((observed.shape[0], observed.shape[2]), 0.5)
    for event in reversed(range(observed.shape[1])):
        predicted = (1.0 - refresh) * up + 0.5 * refresh
        likelihood_up = np.where(observed[:, event] > 0, 1.0 - flip, flip)
        joint = predicted * likelihood_up
        filtered = joint / (joint + (1.0 - predicted) * (1.0 - likelihood_up))
        up = np.where((event < length)[:, None], filtered, up)
    return up


def states(count: int) -> np.ndarray:
    """All sign vectors of `count` states: [2^count, count]."""
    return np.asarray(list(itertools.product((-1.0, 1.0), repeat=count)))


def state_weights(up: np.ndarray) -> np.ndarray:
    """Probability of each sign vector of `states` given independent marginals `up` [R, r]: [R, 2^r]."""
    signs = states(up.shape[1])
    chosen = np.where(signs[None] > 0, up[:, None, :], 1.0 - up[:, None, :])
    return chosen.prod(axis=2)
