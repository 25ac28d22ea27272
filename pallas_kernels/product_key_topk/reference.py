"""The definition of `product_key_topk` in plain JAX; differentiable as it stands."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from recscale.pallas_kernels.mixed_precision import einsum_float32

# What a score of -inf counts as: low enough never to win, finite so that sums of two stay ordered.
MASKED = -1e30

# What a score of NaN or +inf counts as: it wins, and a sum of two is finite still. It comes back as NaN.
BROKEN = 1e38

# What a key's entry of -inf counts as. Matrix units multiply float32 in bfloat16 pieces, of which infinity has none
# but itself; a power of two is its own piece. A query of 1e-6 or more brings it below MASKED.
_MASKED_ENTRY = -(2.0**120)


def pair_count(topk: int) -> int:
    """Number of pairs of ranks (i, j) with (i+1)*(j+1) <= topk: sum_i floor(topk / i)."""
    return sum(topk // i for i in range(1, topk + 1))


def pair_ranks(topk: int) -> tuple[np.ndarray, np.ndarray]:
    """Ranks (i, j) with (i+1)*(j+1) <= topk in (i, j) order: the only pairs that can be among the best `topk`.

    Every other pair has `topk` pairs of higher rank in both lists. There are sum_i floor(topk / i) of them.
    """
    i, j = np.meshgrid(np.arange(topk), np.arange(topk), indexing="ij")
    kept = (i + 1) * (j + 1) <= topk
    return i[kept].astype(np.int32), j[kept].astype(np.int32)


def comparable(scores: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """Scores as the selection compares them, all finite: -inf raised to -1e30, NaN and +inf 1e38, -0.0 made +0.0."""
    # Not `scores + 0.0`: XLA simplifies that away, and top_k takes -0.0 for the smaller one.
    scores = jnp.where(scores == 0, 0.0, jnp.maximum(scores, MASKED))
    return jnp.where(scores < BROKEN, scores, BROKEN)


def finite_keys(keys: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """Keys with entries of -inf made finite, far below every other."""
    return jnp.maximum(keys, jnp.asarray(_MASKED_ENTRY, keys.dtype))


def products(spec: str, q: Array, keys: Array) -> Array:
    """float32 einsum of queries and keys, of their values as they are: no device may round float32 inputs first."""
    if q.dtype == keys.dtype != jnp.float32:
        return einsum_float32(spec, q, finite_keys(keys))
    return exact_products(spec, q, keys)


def exact_products(spec: str, q: Array, keys: Array) -> Array:
    """The same, with gradients whose products are float32 as well whatever the inputs' dtype."""
    q, keys = q.astype(jnp.float32), finite_keys(keys.astype(jnp.float32))
    return jnp.einsum(spec, q, keys, precision=jax.lax.Precision.HIGHEST)


def topk(
    q: Float[Array, "N H 2 p"], keys: Float[Array, "H 2 n p"], k: int, scale: float, multiply=exact_products
) -> tuple[Float[Array, "N H K"], Int[Array, "N H K"]]:
    """q [N,H,2,p], keys [H,2,n,p] -> scores float32 [N,H,k], ids int32 [N,H,k]."""
    sub_keys = keys.shape[2]
    best, index = jax.lax.top_k(comparable(multiply("nhap,hamp->nham", q, keys) * scale), k)
    i, j = pair_ranks(k)
    pairs = best[:, :, 0, i] + best[:, :, 1, j]
    slots = index[:, :, 0, i] * sub_keys + index[:, :, 1, j]
    scores, chosen = jax.lax.top_k(pairs, k)
    return scores, jnp.take_along_axis(slots, chosen, axis=-1)
