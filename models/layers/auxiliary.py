"""Heads on lower blocks, which only training has (TokenMixer-Large, arXiv 2602.06563).

    "joint"        weight * mean_l BCE(y, z_L + z_l)        low blocks learn what the last one leaves over
    "independent"  weight * mean_l BCE(y, z_l)

z_L are the model's logits, z_l those of the head on block l: towers of their own on the mean over normed tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from . import param
from .norms import Norm
from .towers import Towers, mean_tokens, tower_params

Array = jax.Array


class AuxiliaryHead(nnx.Module):
    """Logits [B, Y] of a block's x [T, B, D]: RMSNorm, mean over tokens, towers."""

    def __init__(
        self,
        width: int,
        tasks: int,
        *,
        tower: tuple[int, ...] = (),
        norm_eps: float = 1e-6,
        init: str = "lecun_normal",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.norm = Norm(width, kind="rms", eps=norm_eps, dtype=dtype)
        self.towers = Towers(width, tasks, tower=tower, init=init, dtype=dtype, rngs=rngs)
        param.training_only(self)

    def __call__(self, x: Array) -> Array:
        return self.towers(mean_tokens(self.norm(x)))


class AuxiliaryHeads(nnx.Module):
    """A head on each block of `layers` (counted from 1), and their losses.

    Args:
        width, tasks: D, Y. layers: blocks with a head.
        mode: "joint" or "independent". weight: of the sum of their losses.
        stop_gradient: whether z_L is a constant in "joint" losses.
        head: arguments of `AuxiliaryHead`.
    """

    def __init__(
        self,
        width: int,
        tasks: int,
        *,
        layers: tuple[int, ...] = (),
        mode: str = "joint",
        weight: float = 0.1,
        stop_gradient: bool = False,
        **head,
    ):
        self.layers, self.mode, self.weight, self.stop_gradient = layers, mode, weight, stop_gradient
        self.heads = nnx.List(AuxiliaryHead(width, tasks, **head) for _ in layers)

    def each(self, function: Callable[[AuxiliaryHead, Array], Array], after: Sequence[Array]) -> list[Array]:
        """function(head, x) of every head; after[l]: x after block l, after[0] what enters the first."""
        return [function(head, after[layer]) for layer, head in zip(self.layers, self.heads, strict=True)]

    def loss_logits(self, logits: Array, low: list[Array], shape: tuple[int, ...]) -> dict[str, tuple[float, Array]]:
        """`Output.loss_logits` of the model's logits and those of the heads, all [B, Y], brought to `shape`."""
        if not low:
            return {}
        found = {"main": (1.0, logits.reshape(shape))}
        high = jax.lax.stop_gradient(logits) if self.stop_gradient else logits
        for layer, z in zip(self.layers, low, strict=True):
            z = z + high if self.mode == "joint" else z
            found[f"auxiliary_{layer}"] = (self.weight / len(low), z.reshape(shape))
        return found


def auxiliary_params(width: int, tasks: int, tower: tuple[int, ...] = ()) -> int:
    """Parameters of one `AuxiliaryHead`."""
    return width + tower_params(width, tasks, tower)
