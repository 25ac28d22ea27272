"""AutoInt (arXiv 1810.11921): self-attention over field tokens, the residual projected, ReLU after every layer.

    X' = relu(softmax(Q K^T) V + X W_res)        Q, K, V = X W_Q, X W_K, X W_V, H heads of width d (eq. 5-8)
    logits = towers(flatten X_L)

All four projections are shared by all tokens and have no bias: D -> A = H*d in the first layer, A -> A in the others.

Letters: B rows, T tokens, D token width, H heads, A = H*d attention width, L layers, Y tasks. Token-major [T,B,D].

Closed forms:
    params = tokenizer + 4*D*A + 4*(L-1)*A^2 + Y*(T*A + 1)
    flops  = tokenizer + 8*T*A*(D + (L-1)*A) + 4*L*T^2*A + 2*Y*T*A          about 2*T per parameter
so models of equal parameters cost T times what an MLP does: compare at equal FLOPs as well.

Undisclosed -> flag (default): whether logits are scaled by 1/sqrt(d) -> scale_logits (False, as printed); init; head ->
tower (()).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recscale.models.architecture import BackboneSpec
from recscale.models.counts import Flops, Params
from recscale.models.inputs.history import NO_TOKENS, TokenShape
from recscale.models.inputs.schema import Schema
from recscale.models.inputs.tokenizers import plan_tokens
from recscale.models.layers.attention import attend_tokens
from recscale.models.layers.dense import Dense
from recscale.models.options import require_sizes
from recscale.models.sizing import dense_params, interpolate, solve_widths, widths_around

from .flattened import FieldTokenOptions, flattened_builder, frame_flops, frame_params, raw_flops

# Token and attention widths `size_space` prefers, by dense parameters.
_WIDTHS = {1e4: 16, 1e5: 32, 1e6: 64, 1e7: 128, 1e8: 256, 1e9: 512}
_ATTENTION = {1e4: 40, 1e5: 96, 1e6: 272, 1e7: 896, 1e8: 2816, 1e9: 9088}


@dataclasses.dataclass(frozen=True)
class AutoIntConfig(FieldTokenOptions):
    """width D, attention A, heads H, layers L."""

    width: int = 16
    attention: int = 64
    heads: int = 2
    layers: int = 3
    scale_logits: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(attention=self.attention, heads=self.heads)
        if self.attention % self.heads:
            raise ValueError(f"attention={self.attention} does not divide into {self.heads} heads; make it a multiple")

    def flat(self, tokens: int) -> int:
        return tokens * self.attention

    def sizes(self, tokens: int) -> list[int]:
        """Token width into every layer."""
        return [self.width, *[self.attention] * (self.layers - 1)]


class InteractingLayer(nnx.Module):
    """relu(softmax(Q K^T) V + X W_res): x [T, B, D] -> [T, B, A]."""

    def __init__(self, width: int, options: AutoIntConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        A, H, axes = options.attention, options.heads, ("embed", "heads")
        self.heads, self.dtype, self.scale = H, dtype, (A // H) ** -0.5 if options.scale_logits else 1.0
        self.query, self.key, self.value, self.residual = (
            Dense(width, A, use_bias=False, axes=axes, init=options.init, dtype=dtype, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x: Float[Array, "T B D"]) -> Float[Array, "T B A"]:
        q, k, v = (f(x).reshape(*x.shape[:2], self.heads, -1) for f in (self.query, self.key, self.value))
        return jax.nn.relu(attend_tokens(q, k, v, self.scale, self.dtype) + self.residual(x))


def count_params(config: AutoIntConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Params:
    """Closed form of the parameter tree."""
    plan, A = plan_tokens(schema, config, config.width, tokens), config.attention
    frame = frame_params(plan, config, len(schema.tasks))
    return frame + Params(dense=4 * A * sum(config.sizes(plan.tokens)))


def count_flops(config: AutoIntConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Flops:
    """Closed form of the matrix products: user tokens per request, all else per candidate."""
    plan, A, L = plan_tokens(schema, config, config.width, tokens), config.attention, config.layers
    T = plan.tokens
    frame = frame_flops(plan, config, len(schema.tasks))
    rest = 8 * T * A * A * (L - 1) + 4 * L * T * T * A
    return frame + raw_flops(plan, 8 * T * A * config.width) + Flops(candidate=rest)


def size_space(
    schema: Schema, config: AutoIntConfig, target_dense_params: float, tokens: TokenShape = NO_TOKENS
) -> Iterator[dict[str, Any]]:
    """Overrides (width, attention) near the target; heads and layers stay as configured. A is solved for each D."""
    params, target = dense_params(count_params, config, schema, tokens), target_dense_params
    ideal = interpolate(target, _ATTENTION)
    shapes = ((dict(width=D), "attention", ideal) for D in widths_around(interpolate(target, _WIDTHS), target))
    yield from solve_widths(shapes, params, target, large=(64, 32, 16), multiple=config.heads)


AUTOINT = BackboneSpec(AutoIntConfig, flattened_builder(InteractingLayer), count_params, count_flops, size_space)
