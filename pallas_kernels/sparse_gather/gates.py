"""What a gated read does with y: out = gate * f(y)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array

GATES: dict[str, Callable[[Array], Array]] = {
    "none": lambda y: y,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "identity": lambda y: y,
    "one_plus_tanh": lambda y: 1.0 + jnp.tanh(y),
}
