"""`w8a16_matmul` in plain JAX, for tests: everything in float32, one group of inputs after the other."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from recscale.pallas_kernels.activations import ACTIVATIONS

Array = jax.Array


def dequantize(wq: Array, scale: Array) -> Array:
    """The float32 weights that int8 `wq` [..., D, F] stands for; scale [..., F], or [..., D/group, F] per group."""
    if scale.ndim == wq.ndim - 1:
        scale = scale[..., None, :]
    return wq.astype(jnp.float32) * jnp.repeat(scale, wq.shape[-2] // scale.shape[-2], axis=-2)


def matmul(x: Array, wq: Array, scale: Array, bias: Array | None, act: str | None, out_dtype) -> Array:
    """x [N, D] or token-major [T, N, D], wq [D, F] or [T, D, F], scale [.., G, F] with D/G inputs each -> [.., F]."""
    x, wq = x.astype(jnp.float32), wq.astype(jnp.float32)
    groups, size = scale.shape[-2], wq.shape[-2] // scale.shape[-2]
    y = jnp.zeros((*x.shape[:-1], wq.shape[-1]), jnp.float32)
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        sums = jnp.matmul(x[..., part], wq[..., part, :], precision=jax.lax.Precision.HIGHEST)
        y = y + sums * scale[..., g, :][..., None, :]
    if bias is not None:
        y = y + bias.astype(jnp.float32)[..., None, :]
    return ACTIVATIONS[act](y).astype(out_dtype)
