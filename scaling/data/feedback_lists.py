"""Who liked an item best and who least, before a moment: lists of earlier rows, for PROMO's prompts (arXiv 2412.18082).

    value of a row    alpha * (dwell, standardised) + beta * (interactions, standardised)
    best, worst       of each item the K highest of its rows with positive, and lowest of those with negative feedback

Every list holds rows of strictly earlier requests, and none of the user it is made for, evaluation's included: that is
what leave-one-out by user gets wrong most easily. Of equal values the newest come first. An item with less feedback
borrows: its list goes on with those of its nearest popular items.
"""

from __future__ import annotations

import bisect
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Num


class Feedback(NamedTuple):
    """Rows in the order of time. request: int [n], not descending; user, item: int [n]; value: float [n], NaN of a row
    that only asks and gave no feedback; positive: bool [n]."""

    request: Int[np.ndarray, " n"]
    user: Int[np.ndarray, " n"]
    item: Int[np.ndarray, " n"]
    value: Float[np.ndarray, " n"]
    positive: Bool[np.ndarray, " n"]


class Lists(NamedTuple):
    """Numbers of earlier rows, int32 [n, K] each, -1 where a list ends."""

    best: Int[np.ndarray, "n K"]
    worst: Int[np.ndarray, "n K"]


def feedback_value(
    interactions: Num[np.ndarray, " n"],
    dwell: Num[np.ndarray, " n"] | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Float[np.ndarray, " n"]:
    """alpha * dwell + beta * interactions, each standardised over the rows that are not NaN; no dwell counts as 0."""
    found = beta * _standardised(interactions)
    return found if dwell is None else found + alpha * _standardised(dwell)


def feedback_lists(
    feedback: Feedback,
    users: int,
    neighbours: Int[np.ndarray, "V k"] | None = None,
    *,
    then: tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]] | None = None,
) -> tuple[Lists, Lists | None]:
    """Lists of K = `users` rows for every row, and for later ones.

    Args:
        neighbours: of every item the ones it borrows from, nearest first; none: nobody borrows.
        then: user and item of rows after all feedback (an evaluation).

    Raises:
        ValueError: requests that are not in the order of time.
    """
    if (np.diff(feedback.request) < 0).any():
        raise ValueError("feedback has to be in the order of time: a request comes after a later one; sort the rows")
    known: dict[bool, dict[int, list[tuple[float, int]]]] = {True: {}, False: {}}
    user, n = feedback.user, len(feedback.item)

    def listed(item: int, asking: int, positive: bool) -> list[int]:
        found: list[int] = []
        borrowed = () if neighbours is None else neighbours[item]
        for source in (item, *borrowed):
            for _, place in known[positive].get(int(source), ()):
                if len(found) == users:
                    return found
                if user[-place] != asking and -place not in found:
                    found.append(-place)
        return found

    def fill(out: Lists, row: int, item: int, asking: int) -> None:
        for array, positive in ((out.best, True), (out.worst, False)):
            rows = listed(item, asking, positive)
            array[row, : len(rows)] = rows

    own, start = _empty(n, users), 0
    for stop in [*(np.flatnonzero(np.diff(feedback.request)) + 1), n]:
        for row in range(start, stop):
            fill(own, row, int(feedback.item[row]), int(user[row]))
        for row in range(start, stop):  # after all rows of the request were served
            positive, value = bool(feedback.positive[row]), float(feedback.value[row])
            if np.isnan(value):
                continue
            # Descending value of the best, ascending of the worst; then the newest, which is the smallest -row.
            key = (-value if positive else value, -row)
            bisect.insort(known[positive].setdefault(int(feedback.item[row]), []), key)
        start = stop
    if then is None:
        return own, None
    late = _empty(len(then[0]), users)
    for row, (asking, item) in enumerate(zip(*then, strict=True)):
        fill(late, row, int(item), int(asking))
    return own, late


def popular_neighbours(
    vectors: Float[np.ndarray, "V d"], positives: Int[np.ndarray, " V"], *, cold_share: float, count: int
) -> tuple[Bool[np.ndarray, " V"], Int[np.ndarray, "V k"]]:
    """Which items are cold, the `cold_share` with fewest positives, and of each item the nearest others, by cosine.

    A popular item is none of its own neighbours.
    """
    order = np.argsort(positives, kind="stable")
    cold = np.zeros(len(positives), bool)
    cold[order[: round(cold_share * len(order))]] = True
    popular = np.flatnonzero(~cold)
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    near = unit @ unit[popular].T
    near[popular, np.arange(len(popular))] = -np.inf
    nearest = np.argsort(-near, axis=1, kind="stable")[:, : min(count, max(len(popular) - 1, 0))]
    return cold, popular[nearest].astype(np.int32)


def _empty(rows: int, users: int) -> Lists:
    return Lists(*(np.full((rows, users), -1, np.int32) for _ in range(2)))


def _standardised(values: Num[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    values = np.asarray(values, np.float64)
    spread = np.nanstd(values)
    return (values - np.nanmean(values)) / (spread if spread > 0 else 1.0)
