"""The definition of `sparse_gather` in plain JAX; differentiable as it stands. Holds every gathered row at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def read(values: Float[Array, "M d"], ids: Int[Array, "N J"], weights: Float[Array, "N J"]) -> Float[Array, "N d"]:
    """y[t] = sum_j weights[t,j] * values[ids[t,j]] in float32: [M,d], [N,J], [N,J] -> [N,d]; ids below 0 are absent."""
    present = jnp.where(ids >= 0, weights.astype(jnp.float32), 0.0)
    return jnp.einsum("nj,njd->nd", present, _rows(values, ids), precision=jax.lax.Precision.HIGHEST)


def dot(values: Float[Array, "M d"], ids: Int[Array, "N J"], x: Float[Array, "N d"]) -> Float[Array, "N J"]:
    """s[t,j] = <x[t], values[ids[t,j]]> in float32, 0 for absent hits: [M,d], [N,J], [N,d] -> [N,J]."""
    products = jnp.einsum("nd,njd->nj", x.astype(jnp.float32), _rows(values, ids), precision=jax.lax.Precision.HIGHEST)
    return jnp.where(ids >= 0, products, 0.0)


def _rows(values: Array, ids: Array) -> Array:
    """float32 [N, J, d]; zeros for absent hits, whose place in the table may hold a NaN."""
    rows = jnp.take(values, jnp.clip(ids, 0, values.shape[0] - 1), axis=0).astype(jnp.float32)
    return jnp.where((ids >= 0)[..., None], rows, 0.0)
