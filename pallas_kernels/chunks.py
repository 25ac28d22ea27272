"""Work on many independent rows a piece at a time, so that temporaries stay small whatever the number of rows.

Rows that do not fill a last chunk are done apart instead of padded: the counted work is exactly that of the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def rows_within(limit_bytes: int, bytes_per_row: int) -> int:
    """Rows whose temporaries fit a limit, at least 1."""
    return max(limit_bytes // max(bytes_per_row, 1), 1)


def map_rows(function: Callable[..., Any], rows: int, *arrays: Array) -> Any:
    """`function(*arrays)` computed `rows` leading rows at a time; its results have the same leading axis."""
    _, result = fold_rows(lambda carry, *chunk: (carry, function(*chunk)), (), rows, *arrays)
    return result


def fold_rows(function: Callable[..., tuple[Any, Any]], carry: Any, rows: int, *arrays: Array) -> tuple[Any, Any]:
    """carry, y = function(carry, *chunk) over consecutive chunks; returns the last carry and all y joined (or None)."""
    total = arrays[0].shape[0]
    # Of a program exported for any number of rows the number is a symbol: all of them are one chunk.
    if not isinstance(total, int) or total <= rows:
        return function(carry, *arrays)
    whole = total - total % rows
    chunks = [a[:whole].reshape(whole // rows, rows, *a.shape[1:]) for a in arrays]
    carry, parts = jax.lax.scan(lambda c, chunk: function(c, *chunk), carry, chunks)
    parts = jax.tree.map(lambda p: p.reshape(whole, *p.shape[2:]), parts)
    if whole == total:
        return carry, parts
    carry, rest = function(carry, *(a[whole:] for a in arrays))
    return carry, jax.tree.map(lambda p, r: jnp.concatenate([p, r]), parts, rest)
