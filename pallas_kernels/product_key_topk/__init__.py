"""Exact top-k over n*n product-key slots, from two axes of n sub-keys."""

from .api import product_key_topk
from .reference import pair_ranks

__all__ = ["pair_ranks", "product_key_topk"]
