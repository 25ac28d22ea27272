"""Matrix products: operands in the compute dtype, accumulation in float32, the same for both gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

Array = jax.Array


def contract(spec: str, x: Array, w: Array, dtype=jnp.float32) -> Array:
    """`einsum(spec, x, w)` with operands cast to `dtype`, products summed in float32; the result has `dtype`.

    Below float32 the two gradients are products of `dtype` operands as well (differentiating
    `preferred_element_type=float32` alone would turn them into float32 products), and the gradient of a float32
    parameter keeps its float32 accumulator instead of being rounded to `dtype`. `spec` must name every index in at
    least two of its three terms.
    """
    dtype = jnp.dtype(dtype)
    if dtype == jnp.float32:
        return jnp.einsum(spec, x.astype(dtype), w.astype(dtype), preferred_element_type=jnp.float32)
    return _low_precision(spec, dtype.name, x, w)


def _product(spec: str, dtype: str, x: Array, w: Array) -> Array:
    return jnp.einsum(spec, x.astype(dtype), w.astype(dtype), preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _low_precision(spec: str, dtype: str, x: Array, w: Array) -> Array:
    return _product(spec, dtype, x, w).astype(dtype)


def _forward(spec, dtype, x, w):
    # The empty arrays carry the dtypes the gradients must have.
    saved = (x.astype(dtype), w.astype(dtype), jnp.zeros((0,), x.dtype), jnp.zeros((0,), w.dtype))
    return _low_precision(spec, dtype, x, w), saved


def _backward(spec, dtype, saved, g):
    x, w, like_x, like_w = saved
    terms, out = spec.replace(" ", "").split("->")
    left, right = terms.split(",")
    dx = _product(f"{out},{right}->{left}", dtype, g, w).astype(like_x.dtype)
    dw = _product(f"{left},{out}->{right}", dtype, x, g).astype(like_w.dtype)
    return dx, dw


_low_precision.defvjp(_forward, _backward)
