"""From tokens to logits: sums over tokens, and one tower per task, the same flag and default for every architecture.

tower=():      z_y = h w_y + c_y                                  Y*(D + 1) parameters
tower=(F,):    z_y = relu(h W_y + b_y) w_y + c_y                  Y*(D*F + F + F + 1) parameters, and so on
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recscale.models.options import Options, require_sizes

from . import param
from .dropout import dropout
from .layout import is_laid_out
from .matmul import contract

# Above this many tokens one reduction is better than a program with an addition per token.
_MOST_ADDITIONS = 64
# Keys of the towers' dropout lie apart from those of the layers before.
_STREAM = 1 << 16


@dataclasses.dataclass(frozen=True)
class TowerOptions(Options):
    """tower: hidden widths of the tower of every task, none by default."""

    tower: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(tower=self.tower)


class Towers(nnx.Module):
    """h [B, D], or [Y, B, D] with one vector per task, -> float32 logits [B, Y].

    The last product is float32 whatever the compute dtype. dropout: share of hidden outputs that
    training drops.
    """

    def __init__(
        self,
        width: int,
        tasks: int,
        *,
        tower: tuple[int, ...] = (),
        dropout: float = 0.0,
        init: str = "lecun_normal",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype, self.dropout = dtype, dropout
        shapes = [(tasks, a, b) for a, b in _pairs(width, tower)]
        self.kernels = nnx.List(param.kernel(rngs, shape, ("tasks", "embed", "hidden"), init) for shape in shapes)
        self.biases = nnx.List(param.constant((tasks, shape[-1]), ("tasks", "hidden")) for shape in shapes)

    def __call__(self, h: Float[Array, "*Y B D"], key: Array | None = None) -> Float[Array, "B tasks"]:
        """key: given in training only, for the dropout."""
        layers = list(zip(self.kernels, self.biases, strict=True))
        for i, (kernel, bias) in enumerate(layers):
            last = i == len(layers) - 1
            dtype = jnp.float32 if last else self.dtype
            h = contract("bd,ydf->ybf" if h.ndim == 2 else "ybd,ydf->ybf", h, kernel[...], dtype)
            h = h + bias[...].astype(dtype)[:, None]
            if not last:
                h = dropout(jax.nn.relu(h), self.dropout, None if key is None else jax.random.fold_in(key, _STREAM + i))
        return h[..., 0].T


def tower_params(width: int, tasks: int, tower: tuple[int, ...] = ()) -> int:
    """Parameters of `Towers`."""
    return tasks * sum(a * b + b for a, b in _pairs(width, tower))


def tower_flops(width: int, tasks: int, tower: tuple[int, ...] = ()) -> int:
    """Forward FLOPs of `Towers` per row."""
    return 2 * tasks * sum(a * b for a, b in _pairs(width, tower))


@jax.custom_jvp
def mean_tokens(x: Float[Array, "T B D"]) -> Float[Array, "B D"]:
    """x [T, B, D] -> float32 [B, D], the mean over tokens.

    Written as T - 1 additions, which XLA's CPU backend fuses into one pass; its reduction over a leading axis takes
    four times as long (4 % of a RankMixer step); where devices each hold some tokens, as a reduction.
    The derivative is that of the mean.
    """
    x = x.astype(jnp.float32)
    if x.shape[0] > _MOST_ADDITIONS or is_laid_out():
        return x.mean(axis=0)
    return functools.reduce(operator.add, [x[t] for t in range(x.shape[0])]) / x.shape[0]


@mean_tokens.defjvp
def _mean_tokens_jvp(primals, tangents):
    return mean_tokens(*primals), tangents[0].astype(jnp.float32).mean(axis=0)


def sum_tokens(x: Float[Array, "T B D"]) -> Float[Array, "B D"]:
    """x [T, B, D] -> float32 [B, D], the sum over tokens: T times their mean."""
    return mean_tokens(x) * x.shape[0]


def _pairs(width: int, tower: tuple[int, ...]) -> list[tuple[int, int]]:
    return list(pairwise((width, *tower, 1)))
