"""Ids of categorical values: 0 = padding, 1 = unknown, then the training values from the commonest down."""

from __future__ import annotations

import dataclasses

import numpy as np

PADDING = 0
UNKNOWN = 1
FIRST_ID = 2


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Maps values to ids; `values[i]` has id i + 2.

    values: distinct values in id order, an integer or a string array.
    """

    values: np.ndarray

    @property
    def size(self) -> int:
        """Table rows needed: the values, padding and unknown."""
        return int(self.values.size) + FIRST_ID

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Ids of `values`, int32 of the same shape; a value that training never showed becomes 1, unknown."""
        values = np.asarray(values)
        if not self.values.size:
            return np.full(values.shape, UNKNOWN, np.int32)
        order = np.argsort(self.values)
        ordered = self.values[order]
        place = np.minimum(np.searchsorted(ordered, values), ordered.size - 1)
        return np.where(ordered[place] == values, order[place] + FIRST_ID, UNKNOWN).astype(np.int32)


def build_vocabulary(values: np.ndarray, *, min_count: int = 1) -> Vocabulary:
    """Vocabulary of the training values seen at least `min_count` times: by descending count, ties by value.

    Pass the training split only; a value of another split must stay unknown.
    """
    distinct, counts = np.unique(np.asarray(values).reshape(-1), return_counts=True)
    distinct, counts = distinct[counts >= min_count], counts[counts >= min_count]
    return Vocabulary(distinct[np.argsort(-counts, kind="stable")])


def unknown_share(ids: np.ndarray) -> float:
    """Share of unknown (id 1) among the ids that are not padding; 0 of an empty array."""
    ids = np.asarray(ids)
    present = int(np.count_nonzero(ids != PADDING))
    return int(np.count_nonzero(ids == UNKNOWN)) / present if present else 0.0
