"""`sparse_gather` on XLA: one hit of every read at a time, so that the gathered rows [N, J, d] never exist.

The sum over j is a loop whose body XLA fuses with its gather: 5 to 9 times faster on CPUs than gathering first and
contracting afterwards, and it adds in increasing j. Reads are cut into chunks where [N, d] itself is large.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from recscale.pallas_kernels.chunks import map_rows, rows_within

from .hits import sort_hits, sum_hits

Array = jax.Array

# Most bytes of gathered rows alive at once: `_UNROLL` hits of a chunk of reads.
_LIMIT_BYTES = 64 * 2**20

# Hits per iteration of the loop: enough to fuse, few enough to compile quickly.
_UNROLL = 8

_FULL = jax.lax.Precision.HIGHEST


def read(values: Array, ids: Array, weights: Array) -> Array:
    """y [N, d] float32 as `reference.read` defines it."""

    def chunk(ids, weights):
        def add(y, hit):
            index, weight = hit
            # An absent hit has no row: 0 times what the table holds there may be NaN.
            rows = jnp.where((index >= 0)[:, None], _rows(values, index), 0.0)
            return y + jnp.einsum("n,nd->nd", weight, rows, precision=_FULL), None

        start = jnp.zeros((ids.shape[0], values.shape[1]), jnp.float32)
        present = jnp.where(ids >= 0, weights.astype(jnp.float32), 0.0)
        return jax.lax.scan(add, start, (ids.T, present.T), unroll=_unroll(ids))[0]

    return map_rows(chunk, _chunk(values), ids, weights)


def weight_gradient(values: Array, ids: Array, g: Array) -> Array:
    """dw[t,j] = <g[t], values[ids[t,j]]>, 0 for absent hits: float32 [N, J]."""

    def chunk(ids, g):
        def one(_, index):
            return None, jnp.einsum("nd,nd->n", g, _rows(values, index), precision=_FULL)

        dw = jax.lax.scan(one, None, ids.T, unroll=_unroll(ids))[1].T
        return jnp.where(ids >= 0, dw, 0.0)

    return map_rows(chunk, _chunk(values), ids, g)


def value_gradient(rows: int, ids: Array, weights: Array, g: Array) -> Array:
    """dV float32 [M, d], summed in the order `hits` states."""
    return sum_hits(sort_hits(ids, rows), weights, g, rows)


def _rows(values: Array, index: Array) -> Array:
    return jnp.take(values, jnp.clip(index, 0, values.shape[0] - 1), axis=0, mode="clip").astype(jnp.float32)


def _chunk(values: Array) -> int:
    return rows_within(_LIMIT_BYTES, 4 * _UNROLL * values.shape[1])


def _unroll(ids: Array) -> int:
    return min(ids.shape[1], _UNROLL)
