"""`product_key_topk` and its gradient on XLA, in chunks of reads.

Axes are ordered (head, axis, read, sub-key) inside, so that scores leave the matrix product in the order the selection
reads them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from recscale.pallas_kernels.chunks import fold_rows, map_rows, rows_within
from recscale.pallas_kernels.mixed_precision import full_precision

from .reference import comparable, pair_ranks, products

Array = jax.Array

# Most bytes of scores, or of their gradients, alive at once.
_LIMIT_BYTES = 64 * 2**20


def topk(q: Array, keys: Array, k: int, scale: float) -> tuple[Array, Array]:
    """q [N,H,2,p], keys [H,2,n,p] -> scores float32 [N,H,k], ids int32 [N,H,k]."""
    heads, _, sub_keys, _ = keys.shape
    i, j = pair_ranks(k)
    row, column = np.zeros_like(i), np.ones_like(j)
    rows = rows_within(_LIMIT_BYTES, 4 * heads * (2 * sub_keys + 2 * len(i)))

    def select(q):
        best, index = _largest(comparable(products("nhap,hamp->hanm", q, keys) * scale), k)
        # Gathers, not slices: XLA knows a top_k on CPUs by its slices, and with further ones on top it sorts everything
        # instead, which takes 30 times as long.
        pairs = best[:, row, :, i] + best[:, column, :, j]
        scores, chosen = _largest(jnp.moveaxis(pairs, 0, -1), k)
        slots = jnp.moveaxis(index[:, row, :, i] * sub_keys + index[:, column, :, j], 0, -1)
        ids = jnp.take_along_axis(slots, chosen, axis=-1)
        return scores.swapaxes(0, 1), ids.swapaxes(0, 1)

    return map_rows(select, rows, q)


def _largest(x: Array, k: int) -> tuple[Array, Array]:
    """The k largest of the last axis and where they are; one is a maximum, which XLA on CPUs would sort for."""
    if k > 1:
        return jax.lax.top_k(x, k)
    index = jnp.argmax(x, axis=-1, keepdims=True)
    return jnp.take_along_axis(x, index, axis=-1), index.astype(jnp.int32)


def gradients(q: Array, keys: Array, ids: Array, ds: Array, scale: float) -> tuple[Array, Array]:
    """Gradients (dq [N,H,2,p], dkeys [H,2,n,p], both float32) of scores with gradient ds [N,H,K].

    Several winners of a read may share a row or a column key: their gradients are added in one dense row of scores
    [N,H,2,n], whose products with keys and queries are the rest.
    """
    heads, _, sub_keys, _ = keys.shape
    rows = rows_within(_LIMIT_BYTES, 4 * heads * 2 * sub_keys)
    # A masked key is not finite and was not selected; 0 * inf would make NaN of nothing.
    finite = jnp.where(jnp.isfinite(keys), keys, 0.0).astype(jnp.float32)
    precision = full_precision(q, keys)

    def chunk(dkeys, q, ids, ds):
        dense = _spread(ids, ds, sub_keys) * scale
        dq = jnp.einsum("hanm,hamp->nhap", dense, finite, precision=precision)
        return dkeys + jnp.einsum("hanm,nhap->hamp", dense, q.astype(jnp.float32), precision=precision), dq

    dkeys, dq = fold_rows(chunk, jnp.zeros(keys.shape, jnp.float32), rows, q, ids, ds)
    return dq, dkeys


def _spread(ids: Array, ds: Array, sub_keys: int) -> Array:
    """ds [N,H,K] at ids added up per sub-key: [H,2,N,n]."""
    reads, heads, k = ids.shape
    axes = jnp.stack([ids // sub_keys, ids % sub_keys]).transpose(2, 0, 1, 3)
    lanes = jnp.arange(heads * 2 * reads, dtype=jnp.int32)[:, None]
    values = jnp.broadcast_to(ds.transpose(1, 0, 2)[:, None], (heads, 2, reads, k)).reshape(-1, k)
    dense = jnp.zeros((heads * 2 * reads, sub_keys), jnp.float32)
    dense = dense.at[lanes, axes.reshape(-1, k)].add(values.astype(jnp.float32), mode="promise_in_bounds")
    return dense.reshape(heads, 2, reads, sub_keys)
