"""Closed forms of work and traffic at one pass; b bytes per value, id and weight 4 bytes each.

    read        2 N J d FLOPs     N J (d b + 8) + N d b bytes, a gate adds N d b
    gradients   4 N J d FLOPs     N J (d b + 12) + rows_hit d (b + 4) bytes, values and weights together

rows_hit is what uniform ids hit on average.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp


def read_cost(reads: int, per_read: int, width: int, dtype: Any, gated: bool) -> tuple[int, int]:
    """(FLOPs, bytes) of a read, and of a weight gradient alone, which moves as much."""
    size, hits = jnp.dtype(dtype).itemsize, reads * per_read
    return 2 * hits * width, hits * (width * size + 8) + reads * width * size * (1 + gated)


def gradients_cost(reads: int, per_read: int, width: int, rows: int, dtype: Any) -> tuple[int, int]:
    """(FLOPs, bytes) of both gradients."""
    size, hits = jnp.dtype(dtype).itemsize, reads * per_read
    rows_hit = round(rows * -math.expm1(-hits / rows))
    return 4 * hits * width, hits * (width * size + 12) + rows_hit * width * (size + 4)


def value_gradient_cost(reads: int, per_read: int, width: int, rows: int) -> tuple[int, int]:
    """(FLOPs, bytes) of the value gradient alone, from float32 g."""
    hits = reads * per_read
    return 2 * hits * width, hits * (4 * width + 12) + rows * width * 4
