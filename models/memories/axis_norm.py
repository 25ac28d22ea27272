"""Norms of the two halves of a memory's queries and keys, p wide each, with gains and biases [2, p].

    layer   (x - mean) / sqrt(var + eps) * gain + bias           over the p features of one half
    rms     x / sqrt(mean(x^2) + eps) * gain
    batch   (x - m) / sqrt(v + eps) * gain + bias                m, v per feature, over the reads of a training batch;
                                                                 running means of them otherwise

Letters: N reads, H heads, p key width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from recscale.models.layers import param
from recscale.models.layers.hidden import RunningStatistic

KINDS = ("layer", "rms", "batch")


class AxisNorm(nnx.Module):
    """Normalises the last axis of x [N, H, 2, p] (or keys [H, 2, n, p] with `sub_keys=True`); float32.

    Args:
        width: p.
        kind: "layer", "rms" or "batch".
        heads: H, for the statistics of "batch".
        gain: initial gain.
        momentum: weight of a new batch in the running statistics.
    """

    def __init__(
        self, width: int, kind: str, *, heads: int = 1, gain: float = 1.0, eps: float = 1e-6, momentum: float = 0.1
    ):
        if kind not in KINDS:
            raise ValueError(f"norm is {kind!r}, expected one of {', '.join(KINDS)}")
        self.kind, self.eps, self.momentum = kind, eps, momentum
        axes = ("axes", "key")
        self.gain = param.constant((2, width), axes, gain)
        self.bias = None if kind == "rms" else param.constant((2, width), axes)
        batch = kind == "batch"
        self.mean = RunningStatistic(jnp.zeros((heads, 2, width))) if batch else None
        self.variance = RunningStatistic(jnp.ones((heads, 2, width))) if batch else None

    def __call__(
        self,
        x: Float[Array, "*lead p"],
        *,
        train: bool = False,
        valid: Bool[Array, " N"] | None = None,
        sub_keys: bool = False,
    ) -> Float[Array, "*lead p"]:
        """valid: bool [N], reads that count in batch statistics (padding must not)."""
        x = x.astype(jnp.float32)
        if self.kind == "batch":
            y = self._batch(x, train, valid)
        else:
            x = x - x.mean(axis=-1, keepdims=True) if self.kind == "layer" else x
            y = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.eps)
        lead = (1,) * (x.ndim - 2 - sub_keys)
        shape = (*lead, 2, 1, x.shape[-1]) if sub_keys else (*lead, 2, x.shape[-1])
        y = y * self.gain[...].reshape(shape)
        return y if self.bias is None else y + self.bias[...].reshape(shape)

    def _batch(self, x: Array, train: bool, valid: Array | None) -> Array:
        assert self.mean is not None and self.variance is not None
        if not train:
            mean, variance = self.mean[...], self.variance[...]
        else:
            weight = (
                jnp.ones((x.shape[0], 1, 1, 1)) if valid is None else valid.astype(jnp.float32).reshape(-1, 1, 1, 1)
            )
            count = jnp.maximum(jnp.sum(weight), 1.0)
            mean = jnp.sum(x * weight, axis=0) / count
            variance = jnp.sum(jnp.square(x - mean[None]) * weight, axis=0) / count
            for running, new in ((self.mean, mean), (self.variance, variance)):
                old = running[...]
                running.set_value(old + self.momentum * (jax.lax.stop_gradient(new) - old))
        return (x - mean[None]) * jax.lax.rsqrt(variance + self.eps)[None]


def make_axis_norm(width: int, kind: str | None, *, heads: int = 1, gain: float = 1.0) -> AxisNorm | None:
    """An `AxisNorm`; None for kind None, which a sweep writes "none"."""
    return None if kind in (None, "none") else AxisNorm(width, kind, heads=heads, gain=gain)


def axis_norm_params(width: int, kind: str | None) -> int:
    """Parameters of one `AxisNorm`; 0 for kind None or "none"."""
    return 0 if kind in (None, "none") else (2 if kind == "rms" else 4) * width
