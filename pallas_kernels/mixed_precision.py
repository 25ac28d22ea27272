"""Products of low-precision operands with float32 sums, on every platform."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def einsum_float32(spec: str, x: Array, y: Array) -> Array:
    """`einsum(spec, x, y)` with products and sums in float32, whatever the operands' dtype; the result is float32.

    XLA's CPU backend lacks some low-precision products; float32 ones of the same operands are exact. Which is used is
    decided when the program is lowered, so that a program compiled on a CPU machine for an accelerator keeps its own.
    """
    if x.dtype == y.dtype == jnp.float32:
        return _direct(spec, x, y)
    return jax.lax.platform_dependent(
        x, y, cpu=lambda x, y: _widened(spec, x, y), default=lambda x, y: _direct(spec, x, y)
    )


def full_precision(*operands: Array) -> jax.lax.Precision | None:
    """The precision that keeps float32 operands float32: matrix units round them to 8 or 10 bits by default."""
    return jax.lax.Precision.HIGHEST if any(x.dtype == jnp.float32 for x in operands) else None


def _direct(spec: str, x: Array, y: Array) -> Array:
    return jnp.einsum(spec, x, y, precision=full_precision(x, y), preferred_element_type=jnp.float32)


def _widened(spec: str, x: Array, y: Array) -> Array:
    return _direct(spec, x.astype(jnp.float32), y.astype(jnp.float32))
