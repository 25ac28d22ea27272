"""LayerNorm and RMSNorm with float32 statistics.

layer:  (x - mean) / sqrt(var + eps) * gain + bias          rms:  x / sqrt(mean(x^2) + eps) * gain
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recscale.models.options import Options, refuse_unused, require_positive

from . import param

NORMS = ("layer", "rms")


@dataclasses.dataclass(frozen=True)
class NormOptions(Options):
    """norm: "layer", "rms", or None for no norm, which a sweep writes "none". norm_affine: whether there are a gain and
    a bias; norm_per_token: a gain for every token; norm_eps: added to the variance."""

    norm: Literal["layer", "rms", "none"] | None = "layer"
    norm_affine: bool = True
    norm_per_token: bool = False
    norm_eps: float = 1e-6

    def __post_init__(self):
        super().__post_init__()
        require_positive(norm_eps=self.norm_eps)
        if self.norm in (None, "none"):
            reason = "there is no norm; set norm"
            refuse_unused(self, reason, norm_affine=self.norm_affine, norm_per_token=self.norm_per_token)
            refuse_unused(self, reason, norm_eps=self.norm_eps)


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
        dtype: DTypeLike = jnp.float32,
    ):
        if kind not in NORMS:
            raise ValueError(f"norm is {kind!r}, expected one of {', '.join(NORMS)}")
        shape, axes = ((width,), ("embed",)) if tokens is None else ((tokens, width), ("tokens", "embed"))
        self.kind, self.eps, self.dtype = kind, eps, dtype
        self.gain = param.constant(shape, axes, 1.0) if affine else None
        self.bias = param.constant(shape, axes) if affine and kind == "layer" else None

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        x = x.astype(jnp.float32)
        if self.kind == "layer":
            x = x - x.mean(axis=-1, keepdims=True)
        y = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.eps)
        if self.gain is not None:
            y = y * _like(self.gain[...], y)
        if self.bias is not None:
            y = y + _like(self.bias[...], y)
        return y.astype(self.dtype)


def make_norm(
    options: NormOptions, width: int, *, tokens: int | None = None, dtype: DTypeLike = jnp.float32
) -> Norm | None:
    """The norm that `options` describe, or None; `tokens` T is needed for gains per token alone."""
    if options.norm in (None, "none"):
        return None
    if options.norm_per_token and tokens is None:
        raise ValueError("norm_per_token=True needs the number of tokens")
    gains = tokens if options.norm_per_token else None
    return Norm(width, kind=options.norm, affine=options.norm_affine, tokens=gains, eps=options.norm_eps, dtype=dtype)


def normalise(norm: Norm | None, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    """norm(x), or x itself without a norm."""
    return x if norm is None else norm(x)


def options_params(options: NormOptions, width: int, tokens: int) -> int:
    """Parameters of the norm that `make_norm` makes of the same arguments."""
    gains = tokens if options.norm_per_token else None
    return norm_params(width, kind=options.norm, affine=options.norm_affine, tokens=gains)


def norm_params(width: int, *, kind: str | None, affine: bool = True, tokens: int | None = None) -> int:
    """Parameters of one `Norm`; 0 for kind None or "none"."""
    if kind in (None, "none") or not affine:
        return 0
    return (2 if kind == "layer" else 1) * width * (tokens or 1)


def _like(p: Array, x: Array) -> Array:
    """[D] or [T, D] with axes of size 1 put in, so that nothing relies on implicit rank promotion."""
    return p.reshape(p.shape[:-1] + (1,) * (x.ndim - p.ndim) + p.shape[-1:])
