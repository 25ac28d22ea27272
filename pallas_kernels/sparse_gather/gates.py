"""What a gated read does with y: out = gate * f(y)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def with_gate(y: Array, dtype: Any, gate: Array | None, gate_fn: str) -> tuple[Array, Array | None]:
    """(out, saved y) of float32 y: y in `dtype` without a gate, else gate * f(y) and y in the gate's dtype."""
    if gate is None:
        return y.astype(dtype), None
    return (gate.astype(jnp.float32) * GATES[gate_fn](y)).astype(gate.dtype), y.astype(gate.dtype)
