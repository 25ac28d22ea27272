"""Weighted sums of a few rows of a large table, with gradients that never have the table's size unless asked for."""

from .api import VALUE_GRADS, sparse_dot, sparse_gather
from .gates import GATES
from .hits import SortedHits, sort_hits, sum_hits

__all__ = ["GATES", "VALUE_GRADS", "SortedHits", "sort_hits", "sparse_dot", "sparse_gather", "sum_hits"]
