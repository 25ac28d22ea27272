"""Attention of query rows over a history of known length, for every sequence model."""

from .api import hybrid_attention, merge_attention

__all__ = ["hybrid_attention", "merge_attention"]
