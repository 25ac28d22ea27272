"""How rows of a table, also bfloat16 ones, become the 32-bit words that the cores of a TPU copy.

TensorCore, whose copies take one row of float32, or a leading index of any array:

    up to 128 wide     float32 [M, d]; bfloat16 [M/2, 2, d], since two rows share their words as it is
    beyond             [M, C, 128], columns beyond the width are 0: a copy of the table in another order

SparseCore, whose indirect copies know 32-bit words only:

    float32, and bfloat16 up to 128 wide     float32 words                              [M, C, 128]
    bfloat16 beyond                          column c and column c + 128 C in one word  [M, C, 128], uint32

Such a row is `parts` tiles [C, 128] of float32, side by side; columns beyond the width are 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

Array = jax.Array

LANES = 128

# The upper of two bfloat16 in a word.
HIGH = np.uint32(0xFFFF0000)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a TensorCore copies rows: `rows` of them (1 or 2) at a time, each [columns, lanes]."""

    rows: int
    columns: int
    lanes: int

    @property
    def stored(self) -> tuple[int, int]:
        """Shape of what is copied."""
        return self.rows * self.columns, self.lanes

    @property
    def row(self) -> tuple[int, int]:
        """(C, L), the shape of one row."""
        return self.columns, self.lanes

    @property
    def flat(self) -> bool:
        """Whether the array has two axes, rows as they are."""
        return self.rows * self.columns == 1

    def block(self, rows: int) -> tuple[int, ...]:
        """Shape of an array of that many rows."""
        return (rows, self.lanes) if self.flat else (-(-rows // self.rows), *self.stored)

    def at(self, row: Any) -> Any:
        """Index of [C, L], or of the tile that holds it, in an array or block."""
        if self.flat:
            return pl.ds(row, 1)
        return row if self.rows == 1 else jax.lax.shift_right_logical(row, 1)

    def pick(self, tile: Array, row: Any) -> Array:
        """float32 [C, L] of a row in the tile that holds it."""
        tile = tile.astype(jnp.float32)
        return tile if self.rows == 1 else jnp.where((row & 1) == 1, tile[1:2], tile[0:1])


def tiles_of(width: int, dtype: Any) -> Tiles:
    """How rows of `width` values are copied."""
    if width > LANES:
        return Tiles(1, -(-width // LANES), LANES)
    return Tiles(2 if dtype == jnp.bfloat16 else 1, 1, width)


def as_tiles(values: Array) -> Array:
    """Rows [M, d] as tiles of their dtype."""
    tiles = tiles_of(values.shape[1], values.dtype)
    pad = (0, values.shape[0] % tiles.rows), (0, tiles.columns * tiles.lanes - values.shape[1])
    return jnp.pad(values, pad).reshape(tiles.block(values.shape[0]))


def tiling(width: int, dtype: Any) -> tuple[int, int]:
    """(C, parts) of a row of `width` values as 32-bit words."""
    columns = -(-width // LANES)
    if dtype == jnp.bfloat16 and columns > 1:
        return -(-columns // 2), 2
    return columns, 1


def as_words(values: Array) -> Array:
    """Rows [M, d] as words [M, C, 128]."""
    tiles, parts = tiling(values.shape[1], values.dtype)
    half = tiles * LANES
    values = jnp.pad(values, ((0, 0), (0, parts * half - values.shape[1])))
    if parts == 1:
        return values.astype(jnp.float32).reshape(-1, tiles, LANES)
    return pack(values[:, :half], values[:, half:]).reshape(-1, tiles, LANES)


def pack(low: Array, high: Array) -> Array:
    """Two bfloat16 arrays in the halves of one uint32 array."""
    low, high = (jax.lax.bitcast_convert_type(a, jnp.uint16).astype(jnp.uint32) for a in (low, high))
    return low | (high << 16)


def split(words: Array, bitcast: Callable[[Array, Any], Array] = jax.lax.bitcast_convert_type) -> tuple[Array, ...]:
    """The float32 parts of words; a SparseCore has a `bitcast` of its own."""
    if words.dtype == jnp.float32:
        return (words,)
    return bitcast(words << 16, jnp.float32), bitcast(words & HIGH, jnp.float32)
