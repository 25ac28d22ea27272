"""Layers with one matrix per token: one of them, or two with the hidden between them never written."""

from .api import fuses, per_token_ffn, per_token_matmul

__all__ = ["fuses", "per_token_ffn", "per_token_matmul"]
