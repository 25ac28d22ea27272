"""Dropout that only a key switches on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def dropout(x: Float[Array, "*any"], rate: float, key: Array | None) -> Float[Array, "*any"]:
    """Zeroes a share `rate` of x and scales the rest up to keep the mean; x itself without a key or a rate."""
    if not rate or key is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)
