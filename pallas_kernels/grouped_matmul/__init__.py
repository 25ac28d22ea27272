"""Matrix product of rows sorted by expert with the experts' matrices, with its gradient."""

from .api import grouped_matmul

__all__ = ["grouped_matmul"]
