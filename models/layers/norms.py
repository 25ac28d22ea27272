"""LayerNorm and RMSNorm with float32 statistics.

layer:  (x - mean) / sqrt(var + eps) * gain + bias          rms:  x / sqrt(mean(x^2) + eps) * gain
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from . import param

Array = jax.Array

NORMS = ("layer", "rms")


class Norm(nnx.Module):
    """Normalises the last axis of x [T, B, D] (or [..., D] when the gain is shared).

    Args:
        width: D.
        kind: "layer" or "rms".
        affine: whether there are a gain and, for "layer", a bias.
        tokens: None for one gain [D] shared by all tokens; T for a gain per token [T, D], which expects x [T, B, D].
        eps: added to the variance.
        dtype: dtype of the result; statistics are float32 whatever it is.
    """

    def __init__(
        self,
        width: int,
        *,
        kind: str = "layer",
        affine: bool = True,
        tokens: int | None = None,
        eps: float = 1e-6,
        dtype=jnp.float32,
    ):
        if kind not in NORMS:
            raise ValueError(f"norm is {kind!r}, expected one of {', '.join(NORMS)}")
        shape, axes = ((width,), ("embed",)) if tokens is None else ((tokens, width), ("tokens", "embed"))
        self.kind, self.eps, self.dtype = kind, eps, dtype
        self.gain = param.constant(shape, axes, 1.0) if affine else None
        self.bias = param.constant(shape, axes) if affine and kind == "layer" else None

    def __call__(self, x: Array) -> Array:
        x = x.astype(jnp.float32)
        if self.kind == "layer":
            x = x - x.mean(axis=-1, keepdims=True)
        y = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.eps)
        if self.gain is not None:
            y = y * _like(self.gain[...], y)
        if self.bias is not None:
            y = y + _like(self.bias[...], y)
        return y.astype(self.dtype)


def norm_params(width: int, *, kind: str | None, affine: bool = True, tokens: int | None = None) -> int:
    """Parameters of one `Norm`; 0 for kind None or "none"."""
    if kind in (None, "none") or not affine:
        return 0
    return (2 if kind == "layer" else 1) * width * (tokens or 1)


def _like(p: Array, x: Array) -> Array:
    """[D] or [T, D] with axes of size 1 put in, so that nothing relies on implicit rank promotion."""
    return p.reshape(p.shape[:-1] + (1,) * (x.ndim - p.ndim) + p.shape[-1:])
