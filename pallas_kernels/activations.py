"""Elementwise functions that kernels apply to a float32 sum before it is rounded to the result's dtype."""

from __future__ import annotations

from collections.abc import Callable

import jax

Array = jax.Array

ACTIVATIONS: dict[str | None, Callable[[Array], Array]] = {
    None: lambda y: y,
    "gelu": lambda y: jax.nn.gelu(y, approximate=True),  # the tanh form
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
