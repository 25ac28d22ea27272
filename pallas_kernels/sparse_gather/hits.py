"""Hits of a table in the order their gradients are added: by row, and within a row as they came.

    dV[m] = sum over hits (t, j) with ids[t,j] = m of weights[t,j] * g[t]          in float32, in flat order t*J + j

A row with more than 4096 hits is summed in pieces of 4096 that are then added left to right, so that a hot row can be
shared by many workers and still gives the same bits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from recscale.pallas_kernels.chunks import fold_rows, rows_within

Array = jax.Array

# Hits of one row added in one piece.
PIECE = 4096

# Most bytes of products w * g alive at once.
_LIMIT_BYTES = 64 * 2**20


class SortedHits(NamedTuple):
    """Hits sorted by (row, flat index). rows: int32 [n], M for absent hits (they come last); order: int32 [n]."""

    rows: Array
    order: Array


def sort_hits(ids: Array, rows: int) -> SortedHits:
    """Sorts int32 ids [...] of a table with `rows` rows; ids below 0 are absent, ids beyond the table are clamped.

    Ids and positions share one 32-bit word: a sort of single words takes a fifth of the time of a stable sort of pairs
    on CPUs. Where the bits do not suffice, ids are sorted a few bits at a time, low bits first.
    """
    flat = jnp.where(ids < 0, rows, jnp.minimum(ids, rows - 1)).reshape(-1).astype(jnp.uint32)
    low = max(math.ceil(math.log2(max(flat.size, 2))), 1)
    digit, high = 32 - low, rows.bit_length()
    position = jnp.arange(flat.size, dtype=jnp.uint32)
    order = position
    for shift in range(0, high, digit):
        part = (jnp.take(flat, order, mode="clip") >> shift) & ((1 << digit) - 1)
        packed = jax.lax.sort((part << low) | position, is_stable=False)
        order = jnp.take(order, packed & ((1 << low) - 1), mode="clip")
    return SortedHits(jnp.take(flat, order, mode="clip").astype(jnp.int32), order.astype(jnp.int32))


def sum_hits(hits: SortedHits, weights: Array, g: Array, rows: int) -> Array:
    """dV float32 [M, d] of hits with weights [N, J] and read gradients g [N, d]; rows without a hit are exactly 0."""
    total, width = hits.rows.size, g.shape[-1]
    extra = total // PIECE  # no more than that many further pieces
    target = _piece_targets(hits.rows, rows) if extra else hits.rows
    sums = jnp.zeros((rows + extra, width), jnp.float32)
    flat = weights.reshape(-1)
    heads = weights.shape[1]

    def add(sums, target, order):
        products = products_of(flat, g, order, heads)
        return sums.at[target].add(products, mode="drop", indices_are_sorted=not extra), ()

    # Absent hits are sent beyond the last piece, where a dropping scatter ignores them.
    target = jnp.where(hits.rows == rows, rows + extra, target)
    sums, _ = fold_rows(add, sums, rows_within(_LIMIT_BYTES, 4 * width), target, hits.order)
    return _join_pieces(sums, hits.rows, target, rows) if extra else sums


def products_of(flat_weights: Array, g: Array, order: Array, per_read: int) -> Array:
    """w * g of the hits with the given flat indices: float32 [n, d]."""
    w = jnp.take(flat_weights, order, mode="clip").astype(jnp.float32)
    rows = jnp.take(g, order // per_read, axis=0, mode="clip").astype(jnp.float32)
    return jnp.einsum("h,hd->hd", w, rows, precision=jax.lax.Precision.HIGHEST)


def _piece_targets(rows_of_hits: Array, rows: int) -> Array:
    """Where each hit is added: its row for the first piece, beyond the table a place for each further one."""
    position = jnp.arange(rows_of_hits.size, dtype=jnp.int32)
    starts = jnp.concatenate([jnp.ones(1, bool), rows_of_hits[1:] != rows_of_hits[:-1]])
    first = jax.lax.cummax(jnp.where(starts, position, 0))
    rank = position - first
    opens = (rank > 0) & (rank % PIECE == 0) & (rows_of_hits < rows)
    return jnp.where(rank < PIECE, rows_of_hits, rows + jnp.cumsum(opens) - 1).astype(jnp.int32)


def _join_pieces(sums: Array, rows_of_hits: Array, target: Array, rows: int) -> Array:
    """Adds the further pieces to their rows, left to right."""
    extra = sums.shape[0] - rows
    owner = (
        jnp.full(extra, rows, jnp.int32).at[target - rows].set(rows_of_hits, mode="drop", wrap_negative_indices=False)
    )
    return sums[:rows].at[owner].add(sums[rows:], mode="drop", indices_are_sorted=True)
