"""What regularises the hidden layers of a baseline: dropout, and batch norm between a product and its activation.

dropout      training zeroes a share of the outputs of hidden layers, or of what the towers read where none is before
batch norm   (x - m) / sqrt(v + eps) * gain + bias      m, v per feature, over the real rows of a training batch;
                                                        running means of them otherwise
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from recscale.models.options import require_share

from . import param
from .dropout import dropout
from .per_token import activation
from .towers import TowerOptions, Towers


@dataclasses.dataclass(frozen=True)
class DropoutOptions(TowerOptions):
    """hidden_dropout: share that training drops of the outputs of hidden layers and of what the towers read."""

    hidden_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share(hidden_dropout=self.hidden_dropout)

    def towers(self, width: int, tasks: int, *, init: str, dtype: DTypeLike, rngs: nnx.Rngs) -> Towers:
        """The towers of such a model on vectors of `width`."""
        rate = self.hidden_dropout
        return Towers(width, tasks, tower=self.tower, dropout=rate, init=init, dtype=dtype, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class HiddenOptions(DropoutOptions):
    """batch_norm: in every hidden layer, before the activation."""

    batch_norm: bool = False


class RunningStatistic(nnx.Variable):
    """State of a batch norm: changed by training steps only, part of the checkpoint, not a parameter."""


class BatchNorm(nnx.Module):
    """x [B, F] -> float32 [B, F]; 2*F parameters. momentum: weight of a new batch in the running statistics."""

    def __init__(self, width: int, *, eps: float = 1e-5, momentum: float = 0.1):
        self.eps, self.momentum = eps, momentum
        self.gain, self.bias = param.constant((width,), ("hidden",), 1.0), param.constant((width,), ("hidden",))
        self.mean, self.variance = RunningStatistic(jnp.zeros(width)), RunningStatistic(jnp.ones(width))

    def __call__(
        self, x: Float[Array, "B F"], *, train: bool = False, valid: Bool[Array, " B"] | None = None
    ) -> Float[Array, "B F"]:
        """valid: rows that count in batch statistics (padding must not)."""
        x = x.astype(jnp.float32)
        mean, variance = self.mean[...], self.variance[...]
        if train:
            weight = jnp.ones((x.shape[0], 1)) if valid is None else valid.astype(jnp.float32)[:, None]
            count = jnp.maximum(jnp.sum(weight), 1.0)
            mean = jnp.sum(x * weight, axis=0) / count
            variance = jnp.sum(jnp.square(x - mean[None]) * weight, axis=0) / count
            for running, new in ((self.mean, mean), (self.variance, variance)):
                running.set_value(running[...] + self.momentum * (jax.lax.stop_gradient(new) - running[...]))
        y = (x - mean[None]) * jax.lax.rsqrt(variance + self.eps)[None]
        return y * self.gain[...][None] + self.bias[...][None]


class Hidden(nnx.Module):
    """What follows the product of a hidden layer: batch norm (of rows [B, F]), activation, dropout.

    Args:
        width: F. layer: number of the layer in its model, for the dropout's key. options: see the file's docstring.
    """

    def __init__(self, width: int, layer: int, activation: str, options: DropoutOptions = DropoutOptions()):  # noqa: B008
        self.layer, self.act, self.rate = layer, activation, options.hidden_dropout
        self.norm = BatchNorm(width) if isinstance(options, HiddenOptions) and options.batch_norm else None

    def __call__(
        self, x: Float[Array, "*rows F"], key: Array | None = None, valid: Bool[Array, " B"] | None = None
    ) -> Float[Array, "*rows F"]:
        """key: given in training only. valid: rows that are no padding."""
        if self.norm is not None:
            x = self.norm(x, train=key is not None, valid=valid).astype(x.dtype)
        key = None if key is None else jax.random.fold_in(key, self.layer)
        return dropout(activation(self.act)(x), self.rate, key)


def hidden_params(widths: tuple[int, ...], options: DropoutOptions) -> int:
    """Parameters of a `Hidden` behind every layer of these widths."""
    return 2 * sum(widths) if isinstance(options, HiddenOptions) and options.batch_norm else 0
