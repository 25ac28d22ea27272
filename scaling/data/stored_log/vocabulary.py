"""Ids of categorical values: 0 = padding, 1 = unknown, then the training values from the commonest down."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
from jaxtyping import Int, Int32, Shaped

PADDING = 0
UNKNOWN = 1
FIRST_ID = 2


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Maps values to ids; `values[i]` has id i + 2.

    values: distinct values in id order, integers or strings.
    """

    values: Shaped[np.ndarray, " values"]

    @property
    def size(self) -> int:
        """Table rows needed: the values, padding and unknown."""
        return int(self.values.size) + FIRST_ID

    def encode(self, values: Shaped[np.ndarray, "*shape"]) -> Int32[np.ndarray, "*shape"]:
        """Ids of `values`; a value that training never showed becomes 1, unknown."""
        place = pd.Index(self.values).get_indexer(pd.Index(values.reshape(-1)))
        return np.where(place < 0, UNKNOWN, place + FIRST_ID).astype(np.int32).reshape(values.shape)


def build_vocabulary(values: Shaped[np.ndarray, " ..."], *, min_count: int = 1) -> Vocabulary:
    """Vocabulary of the training values seen at least `min_count` times: by descending count, ties by value.

    Pass the training split only; a value of another split must stay unknown.
    """
    distinct, counts = np.unique(values, return_counts=True)
    distinct, counts = distinct[counts >= min_count], counts[counts >= min_count]
    return Vocabulary(distinct[np.argsort(-counts, kind="stable")])


def unknown_share(ids: Int[np.ndarray, " ..."]) -> float:
    """Share of unknown (id 1) among the ids that are not padding; 0 of an empty array."""
    present = int(np.count_nonzero(ids != PADDING))
    return int(np.count_nonzero(ids == UNKNOWN)) / present if present else 0.0
