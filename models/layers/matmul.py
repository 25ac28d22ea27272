"""Matrix products: operands in the compute dtype, accumulation in float32, the same for both gradients."""

from __future__ import annotations

import functools
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recscale.pallas_kernels.mixed_precision import einsum_float32


@runtime_checkable
class Kernel(Protocol):
    """What a layer's `kernel` may be instead of an `nnx.Param`: weights that know how to multiply (int8 ones)."""

    def product(self, x: Float[Array, "*T B in"], dtype: DTypeLike, inputs: slice) -> Float[Array, "*U B out"]:
        """x [B, in] or [T, B, in] times the kernel's rows `inputs`: [B, out], or [T, B, out] with a kernel per token.

        The result has `dtype`.
        """
        ...


def product(
    x: Float[Array, "*T B in"],
    kernel: nnx.Variable | Kernel,
    dtype: DTypeLike = jnp.float32,
    *,
    transposed: bool = False,
    inputs: slice = slice(None),  # noqa: B008
) -> Float[Array, "*U B out"]:
    """x times a layer's kernel, as `contract` does it; x [B, in] with a kernel per token is read by every token.

    Args:
        x: [B, in], or [T, B, in] with a kernel per token.
        kernel: parameter [in, out] or [T, in, out] ([out, in], [T, out, in] if `transposed`), or an object that
            multiplies by itself.
        inputs: which of the kernel's inputs x holds.
    """
    if not isinstance(kernel, nnx.Variable):
        return kernel.product(x, dtype, inputs)
    token = "t" if kernel.ndim == 3 else ""
    left, right = "tbd" if x.ndim == 3 else "bd", "fd" if transposed else "df"
    w = kernel[...]
    if inputs != slice(None):
        w = w[..., inputs] if transposed else w[..., inputs, :]
    return contract(f"{left},{token}{right}->{token}bf", x, w, dtype)


def contract(
    spec: str, x: Float[Array, "*x"], w: Float[Array, "*w"], dtype: DTypeLike = jnp.float32
) -> Float[Array, "*y"]:
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
    return einsum_float32(spec, x.astype(dtype), w.astype(dtype))


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
