"""`grouped_matmul` in plain JAX, for tests: a loop over groups, each of which multiplies every row."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def matmul(x: Array, w: Array, group_sizes: Array) -> Array:
    """x [N, D], w [G, D, F], group_sizes [G] -> [N, F]; arguments as for `grouped_matmul`, gradients by JAX."""
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(x.shape[0])
    y = jnp.zeros((x.shape[0], w.shape[-1]), jnp.float32)
    for g in range(w.shape[0]):
        inside = (row >= ends[g] - group_sizes[g]) & (row < ends[g])
        # Rows are cut out before the product: another group's NaN must not reach this group's gradient.
        rows = jnp.where(inside[:, None], x, 0)
        own = w[g].astype(x.dtype).astype(jnp.float32)
        product = jnp.matmul(rows.astype(jnp.float32), own, precision=jax.lax.Precision.HIGHEST)
        y = y + jnp.where(inside[:, None], product, 0.0)
    return y.astype(x.dtype)
