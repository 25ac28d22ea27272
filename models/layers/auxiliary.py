"""Heads on lower blocks, which only training has (TokenMixer-Large, arXiv 2602.06563).

    "joint"        weight * mean_l BCE(y, z_L + z_l)        low blocks learn what the last one leaves over
    "independent"  weight * mean_l BCE(y, z_l)

z_L are the model's logits, z_l those of the head on block l: towers of their own on the mean over normed tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recscale.models.options import Options, refuse_unused

from . import param
from .norms import Norm
from .towers import Towers, mean_tokens, tower_params


@dataclasses.dataclass(frozen=True)
class AuxiliaryOptions(Options):
    """aux_mode: "joint" or "independent". aux_weight: of the sum of the heads' losses, 0 is off. aux_layers: blocks
    with a head, counted from 1; None is the middle one. aux_stop_gradient: z_L is a constant in "joint" losses."""

    aux_mode: Literal["joint", "independent"] = "joint"
    aux_weight: float = 0.1
    aux_layers: tuple[int, ...] | None = None
    aux_stop_gradient: bool = False

    def auxiliary_blocks(self, layers: int) -> tuple[int, ...]:
        """Blocks with a head, of so many."""
        if not self.aux_weight:
            return ()
        middle = (layers // 2,) if layers > 1 else ()
        return middle if self.aux_layers is None else self.aux_layers

    def check_auxiliary(self, layers: int) -> None:
        """ValueError for blocks that do not exist, or flags without effect."""
        if self.aux_weight < 0:
            raise ValueError(f"aux_weight is {self.aux_weight:g}, expected 0 (no auxiliary heads) or more")
        blocks = self.aux_layers or ()
        if len(set(blocks)) < len(blocks) or any(not 1 <= block < layers for block in blocks):
            raise ValueError(f"aux_layers is {blocks}, expected blocks from 1 to {layers - 1}, each once")
        if not self.aux_weight:
            reason = "aux_weight is 0, so there are no auxiliary heads; set aux_weight"
            refuse_unused(self, reason, aux_mode=self.aux_mode, aux_layers=self.aux_layers)
        if not self.aux_weight or self.aux_mode == "independent":
            reason = "no loss joins the model's logits; set aux_weight and aux_mode='joint'"
            refuse_unused(self, reason, aux_stop_gradient=self.aux_stop_gradient)


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
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.norm = Norm(width, kind="rms", eps=norm_eps, dtype=dtype)
        self.towers = Towers(width, tasks, tower=tower, init=init, dtype=dtype, rngs=rngs)
        param.training_only(self)

    def __call__(self, x: Float[Array, "T B D"]) -> Float[Array, "B Y"]:
        return self.towers(mean_tokens(self.norm(x)))


class AuxiliaryHeads(nnx.Module):
    """A head on each block of `layers` (counted from 1), and their losses.

    Args:
        width, tasks: D, Y. layers: blocks with a head, `options.auxiliary_blocks(L)`.
        options: how their losses are made.
        tower, norm_eps, init: of every head.
    """

    def __init__(
        self,
        width: int,
        tasks: int,
        *,
        layers: tuple[int, ...] = (),
        options: AuxiliaryOptions = AuxiliaryOptions(),  # noqa: B008
        tower: tuple[int, ...] = (),
        norm_eps: float = 1e-6,
        init: str = "lecun_normal",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.layers, self.mode, self.weight = layers, options.aux_mode, options.aux_weight
        self.stop_gradient = options.aux_stop_gradient
        self.heads = nnx.List(
            AuxiliaryHead(width, tasks, tower=tower, norm_eps=norm_eps, init=init, dtype=dtype, rngs=rngs)
            for _ in layers
        )

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
