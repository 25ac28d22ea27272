"""Choosing one arm per row under a budget, and the area under the curve of reward against cost.

    maximise sum_i reward[i, a_i]  subject to  sum_i cost[i, a_i] <= budget          multiple-choice knapsack

For a price lam the rows decide alone: a_i = argmax_j reward_ij - lam cost_ij. The smallest price whose decisions are
affordable is found by bisection, and what is left is spent on the best ratios of reward to cost. The dual value
sum_i max_j (reward_ij - lam cost_ij) + lam budget bounds every choice from above. All of it on the host, in float64.

Letters: N rows, J arms; arm 0 costs nothing.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Num

_HALVINGS = 100


class Allocation(NamedTuple):
    """arms int [N]; lam, the price; what is spent and what it brings; upper_bound: no choice brings more."""

    arms: Int[np.ndarray, " N"]
    lam: float
    spent: float
    value: float
    upper_bound: float


def solve_mckp(
    reward: Float[np.ndarray, "N J"], cost: Float[np.ndarray, "N J"], budget: float, *, fill: bool = True
) -> Allocation:
    """One arm for every row, at most `budget` spent; within one row's reward of the best choice there is.

    fill: spend what the price leaves over.

    Raises:
        ValueError: a negative budget or cost, or an arm 0 that costs something.
    """
    reward, cost = np.asarray(reward, np.float64), np.asarray(cost, np.float64)
    if budget < 0 or (cost < 0).any() or cost[:, 0].any():
        raise ValueError(f"the budget is {budget}; expected none negative, no negative cost, and an arm 0 that is free")
    gain, spend = reward - reward[:, :1], cost
    ratio = np.divide(gain, spend, out=np.zeros_like(gain), where=spend > 0)
    low, high = 0.0, 1.0 + max(0.0, float(ratio.max()))
    if _spent(cost, decide(reward, cost, low)) <= budget:
        high = low
    for _ in range(_HALVINGS if high > low else 0):
        middle = 0.5 * (low + high)
        if _spent(cost, decide(reward, cost, middle)) <= budget:
            high = middle
        else:
            low = middle
    arms = decide(reward, cost, high)
    bound = float((reward - high * cost).max(axis=1).sum() + high * (budget if high else 0.0))
    if fill:
        arms = _filled(reward, cost, arms, budget)
    rows = np.arange(len(arms))
    return Allocation(arms, high, _spent(cost, arms), float(reward[rows, arms].sum()), bound)


def decide(reward: Num[np.ndarray, "N J"], cost: Num[np.ndarray, "N J"], lam: float) -> Int[np.ndarray, " N"]:
    """argmax_j reward - lam cost; of equal arms the cheapest."""
    scores = np.asarray(reward, np.float64) - lam * np.asarray(cost, np.float64)
    best = scores >= scores.max(axis=1, keepdims=True)
    return np.where(best, cost, np.inf).argmin(axis=1)


def spend_up_to(
    reward: Num[np.ndarray, "N J"], cost: Num[np.ndarray, "N J"], true_cost: Num[np.ndarray, "N J"], budget: float
) -> Int[np.ndarray, " N"]:
    """Decisions by predicted reward and cost, at the smallest price at which they truly cost no more than `budget`.

    So that policies of different predictions are compared at one spend.
    """
    low, high = 0.0, 1.0
    if _spent(true_cost, decide(reward, cost, low)) <= budget:
        return decide(reward, cost, low)
    while _spent(true_cost, decide(reward, cost, high)) > budget:
        if high > 1e12:
            raise ValueError("no price makes these decisions affordable: predicted costs of arms that cost are 0")
        high *= 2
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        if _spent(true_cost, decide(reward, cost, middle)) <= budget:
            high = middle
        else:
            low = middle
    return decide(reward, cost, high)


def aucc(
    score: Num[np.ndarray, " N"],
    reward: Num[np.ndarray, " N"],
    cost: Num[np.ndarray, " N"],
    treated: Bool[np.ndarray, " N"],
    steps: int = 200,
) -> float:
    """Area under the curve of incremental reward against incremental cost, as a share of the rectangle around it.

    Rows of a trial with two arms are treated in descending order of `score`; at each depth a curve is the mean of the
    treated up to there less that of the others, both over all rows of their arm. The cost curve is made monotone by its
    running maximum. .5 for scores that say nothing.
    """
    order = np.argsort(-np.asarray(score), kind="stable")
    given = np.asarray(treated, bool)[order]

    def curve(values: np.ndarray) -> Float64[np.ndarray, " depths"]:
        values = np.asarray(values, np.float64)[order]
        own = np.cumsum(np.where(given, values, 0.0)) / max(given.sum(), 1)
        others = np.cumsum(np.where(given, 0.0, values)) / max((~given).sum(), 1)
        return np.concatenate([[0.0], own - others])

    gained, spent = curve(reward), np.maximum.accumulate(curve(cost))
    points = np.interp(np.linspace(0.0, spent[-1], steps + 1), spent, gained)
    return float(points.sum() / (gained[-1] * (steps + 1)))


def aucc_interval(
    score: Num[np.ndarray, " N"],
    reward: Num[np.ndarray, " N"],
    cost: Num[np.ndarray, " N"],
    treated: Bool[np.ndarray, " N"],
    *,
    draws: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of `aucc` over rows drawn with replacement, `draws` times."""
    rng = np.random.default_rng(seed)
    score, reward, cost, treated = (np.asarray(x) for x in (score, reward, cost, treated))
    found = []
    for _ in range(draws):
        rows = rng.integers(0, len(score), len(score))
        found.append(aucc(score[rows], reward[rows], cost[rows], treated[rows]))
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _spent(cost: np.ndarray, arms: np.ndarray) -> float:
    return float(np.asarray(cost, np.float64)[np.arange(len(arms)), arms].sum())


def _filled(reward: np.ndarray, cost: np.ndarray, arms: np.ndarray, budget: float) -> np.ndarray:
    """Moves rows to dearer arms while money is left, the best ratio of reward to cost first."""
    arms, left = arms.copy(), budget - _spent(cost, arms)

    def moves(row: int) -> list[tuple[float, int, int, int]]:
        now = arms[row]
        more = [(reward[row, j] - reward[row, now], cost[row, j] - cost[row, now], j) for j in range(cost.shape[1])]
        return [(-gain / spend, row, int(now), j) for gain, spend, j in more if gain > 0 and 0 < spend]

    heap = [move for row in range(len(arms)) for move in moves(row)]
    heapq.heapify(heap)
    while heap:
        _, row, before, after = heapq.heappop(heap)
        spend = cost[row, after] - cost[row, before]
        if arms[row] == before and spend <= left:
            arms[row], left = after, left - spend
            for move in moves(row):
                heapq.heappush(heap, move)
    return arms
