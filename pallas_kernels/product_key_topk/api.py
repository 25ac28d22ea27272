"""Exact top-k over M = n*n slots whose score is a sum of two: slot (i, j) scores q_row . row_i + q_col . col_j.

    s_a        = scale * q_a . keys_a^T            float32, a in (row, col)
    axis lists = the best K sub-keys of each axis, by (score descending, index ascending)
    winners    = the best K pairs of list entries, by (float32 sum descending, row rank, column rank)
    id         = i_row * n + i_col

With these ties the result equals the top-k over all M slots in that order, ids included, and costs O(n) instead of
O(M): a pair of ranks (i, j) with (i+1)(j+1) > K has K better ones and is never looked at.

A kernel (see `recscale.pallas_kernels.dispatch`) has

    obstacle(target, q_shape, keys_shape, topk, (q_dtype, keys_dtype)) -> str | None
    topk(q, keys, topk, scale, *, target, interpret) -> scores float32 [N, H, K], ids int32 [N, H, K]

for keys [H, 2, n, p].

Letters: N reads, H heads, n sub-keys per axis, p key width per axis, K winners.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from recscale.pallas_kernels.checks import if_checked
from recscale.pallas_kernels.dispatch import Backend, Implementation, choose

from . import reference, xla


def product_key_topk(
    q: Array,
    keys: Array,
    topk: int,
    *,
    scale: float = 1.0,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> tuple[Float32[Array, "N H K"], Int32[Array, "N H K"]]:
    """The `topk` best slots of every read and head, best first.

    A score of -inf (a masked key) counts as -1e30, a key's entry of -inf as -2^120; -0.0 equals +0.0. A score of NaN
    counts as larger than all others, so that every implementation gives the same ids, and comes back as NaN; with
    RECSCALE_CHECK=1 a NaN is a ValueError. Ids have no gradient; the gradient of the scores reaches queries (in their
    dtype) and keys.

    Args:
        q: [N, H, 2, p], float32 or bfloat16. Products are summed in float32.
        keys: [H, 2, n, p], or [2, n, p] for keys shared by all heads.
        topk: K <= n.
        scale: factor of the scores, a Python number.
        implementation: see `recscale.pallas_kernels.dispatch`.
        interpret: run a Pallas kernel in interpret mode (for tests on a CPU).

    Returns:
        scores float32 [N, H, K] descending, ids int32 [N, H, K] in [0, n*n).

    Raises:
        ValueError: shapes that do not fit, K outside [1, n], or n*n beyond int32.
        NotImplementedError: the named implementation cannot serve the request.
    """
    _check(q, keys, topk, scale)
    if_checked(_refuse_nan, lambda: (jnp.isnan(q).any(), jnp.isnan(keys).any()))
    reads, heads = q.shape[:2]
    if keys.ndim == 3:  # shared by the heads: a head is then one more read
        q, keys = q.reshape(reads * heads, 1, *q.shape[2:]), keys[None]
    request = q.shape, keys.shape, topk, (q.dtype, keys.dtype)
    backend = choose("product_key_topk", implementation, interpret, *request)
    if backend.name == "reference":
        scores, ids = reference.topk(q, keys, topk, float(scale))
    else:
        scores, ids = _differentiable(q, keys, topk, float(scale), backend)
    # Where one of a slot's two scores was NaN: no sum of others comes near.
    scores = jnp.where(scores < reference.BROKEN / 2, scores, jnp.nan)
    return scores.reshape(reads, heads, topk), ids.reshape(reads, heads, topk)


def _topk(q: Array, keys: Array, topk: int, scale: float, backend: Backend) -> tuple[Array, Array]:
    if backend.kernel is None:
        return xla.topk(q, keys, topk, scale)
    return backend.call("topk", q, keys, topk, scale)


def _forward(q, keys, topk, scale, backend):
    scores, ids = _topk(q, keys, topk, scale, backend)
    return (scores, ids), (q, keys, ids)


def _backward(topk, scale, backend, saved, cotangents):
    q, keys, ids = saved
    dq, dkeys = xla.gradients(q, keys, ids, cotangents[0], scale)
    return dq.astype(q.dtype), dkeys.astype(keys.dtype)


_differentiable = jax.custom_vjp(_topk, nondiff_argnums=(2, 3, 4))
_differentiable.defvjp(_forward, _backward)


def _refuse_nan(in_q, in_keys) -> None:
    if in_q or in_keys:
        raise ValueError(f"product_key_topk: there is a NaN in {'q' if in_q else 'keys'}")


def _check(q: Array, keys: Array, topk: int, scale: float) -> None:
    if q.ndim != 4 or q.shape[2] != 2:
        raise ValueError(f"product_key_topk: q has shape {q.shape}, expected [N, H, 2, p]")
    if keys.ndim not in (3, 4) or keys.shape[-3] != 2:
        raise ValueError(f"product_key_topk: keys have shape {keys.shape}, expected [H, 2, n, p] or [2, n, p]")
    if keys.ndim == 4 and keys.shape[0] != q.shape[1]:
        raise ValueError(f"product_key_topk: q has {q.shape[1]} heads, keys have {keys.shape[0]}")
    if keys.shape[-1] != q.shape[-1]:
        raise ValueError(f"product_key_topk: q has key width {q.shape[-1]}, keys have {keys.shape[-1]}")
    sub_keys = keys.shape[-2]
    if not 1 <= topk <= sub_keys:
        raise ValueError(f"product_key_topk: topk is {topk}, expected 1 to n = {sub_keys}")
    if sub_keys > math.isqrt(2**31 - 1):
        raise ValueError(f"product_key_topk: n is {sub_keys}, so n*n slots do not fit int32; n may be at most 46340")
    for name, array in (("q", q), ("keys", keys)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"product_key_topk: {name} is {array.dtype}, expected a floating dtype")
    if not isinstance(scale, int | float):
        raise ValueError(f"product_key_topk: scale is a {type(scale).__name__}; multiply a traced scale into q instead")
