"""Wukong (arXiv 2403.02545): a stack of factorisation-machine blocks beside linear compressions of the tokens.

A layer turns T_l tokens X [B,T_l,D] into T' = T_F + T_L tokens (section 3 of the paper):

    Z   = X (X^T P)                                       P [T_l,rank]; X^T P first, never the Gram matrix X X^T
    FMB = reshape(MLP(LN(flatten Z))) to [T_F,D]          m hidden ReLU layers of width F, linear output
    LCB = W_L X                                           W_L [T_L,T_l]
    X'  = LN(concat(FMB, LCB) + res)                      res = X if T_l = T', else W_r X with W_r [T',T_l]
    logits = towers(MLP(flatten X_L))

Letters: B rows, T_l tokens into layer l (T_0 = T, then T'), D token width, L layers, Y tasks; F hidden width, m hidden
layers and `rank` of the factorisation. Activations are token-major [T,B,D] inside.

Closed forms per layer:
    params = 3*T_l*rank + (T_l*rank*F + (m-1)*F^2 + F*T_F*D + m*F + T_F*D) + T_L*T_l + [T_l != T']*T'*T_l + 2*D
    flops  = 4*T_l*D*rank + 2*(T_l*rank*F + (m-1)*F^2 + F*T_F*D) + 2*T_L*T_l*D + [T_l != T']*2*T'*T_l*D
plus the tokenizer and Y*(T'*D + 1).

Undisclosed -> flag (default): what P depends on -> attentive (False: a learned constant). True is a reconstruction of
the paper's remark that an MLP on linearly compressed input makes the projection: P = reshape(relu(flatten(X^T P_0) W_1
+ b_1) W_2 + b_2) to [T_l,rank] per row, P_0 [T_l,rank], hidden width F; it adds rank*D*F + F + F*T_l*rank + T_l*rank
parameters and twice its matrices plus 2*T_l*D*rank in FLOPs. Head -> head_mlp (()), tower (()); init; norm_eps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recscale.models.architecture import BackboneSpec
from recscale.models.counts import Flops, Params
from recscale.models.inputs.history import NO_TOKENS, TokenShape
from recscale.models.inputs.schema import Schema
from recscale.models.inputs.tokenizers import plan_tokens
from recscale.models.layers.dense import FFN, MLP, Dense
from recscale.models.layers.matmul import contract
from recscale.models.layers.mixing import TokenLinear
from recscale.models.layers.norms import Norm
from recscale.models.options import require_positive, require_sizes
from recscale.models.sizing import dense_params, interpolate, solve_widths, widths_around

from .flattened import FieldTokenOptions, flattened_builder, frame_flops, frame_params, raw_flops

# Token widths and numbers of tokens (T_F, T_L and rank alike) `size_space` prefers, by dense parameters.
_WIDTHS = {1e4: 16, 1e5: 16, 1e6: 32, 1e7: 64, 1e8: 128, 1e9: 128}
_TOKENS = {1e4: 4, 1e5: 8, 1e6: 16, 1e7: 16, 1e8: 24, 1e9: 48}
_HIDDEN = {1e4: 32, 1e5: 160, 1e6: 256, 1e7: 1024, 1e8: 3072, 1e9: 7168}


@dataclasses.dataclass(frozen=True)
class WukongConfig(FieldTokenOptions):
    """width D, layers L, fm_tokens T_F, linear_tokens T_L, rank, hidden F, hidden_layers m."""

    fm_tokens: int = 16
    linear_tokens: int = 16
    rank: int = 16
    hidden: int = 256
    hidden_layers: int = 1
    attentive: bool = False
    head_mlp: tuple[int, ...] = ()
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(norm_eps=self.norm_eps)
        require_sizes(fm_tokens=self.fm_tokens, linear_tokens=self.linear_tokens, rank=self.rank, hidden=self.hidden)
        require_sizes(hidden_layers=self.hidden_layers, head_mlp=self.head_mlp)

    @property
    def out_tokens(self) -> int:
        """T'."""
        return self.fm_tokens + self.linear_tokens

    @property
    def head_widths(self) -> tuple[int, ...]:
        return self.head_mlp

    def flat(self, tokens: int) -> int:
        return self.out_tokens * self.width

    def sizes(self, tokens: int) -> list[int]:
        """T_l of every layer."""
        return [tokens, *[self.out_tokens] * (self.layers - 1)]


class FMBlock(nnx.Module):
    """reshape(MLP(LN(flatten(X (X^T P))))): x [T, B, D] -> [T_F, B, D]."""

    def __init__(self, tokens: int, options: WukongConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        D, rank, F, init = options.width, options.rank, options.hidden, options.init
        self.rank, self.dtype = rank, dtype
        self.projection = TokenLinear(tokens, rank, init=init, dtype=dtype, rngs=rngs)
        attention = None
        if options.attentive:
            attention = FFN(rank * D, F, tokens * rank, activation="relu", init=init, dtype=dtype, rngs=rngs)
        self.attention = attention
        self.norm = Norm(tokens * rank, eps=options.norm_eps, dtype=dtype)
        self.mlp = MLP(tokens * rank, (F,) * options.hidden_layers, init=init, dtype=dtype, rngs=rngs)
        axes = ("hidden", "embed")
        self.out = Dense(F, options.fm_tokens * D, axes=axes, init=init, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "T B D"]) -> Float[Array, "F B D"]:
        tokens, rows, width = x.shape
        by_row, compressed = x.swapaxes(0, 1), self.projection(x).swapaxes(0, 1)
        if self.attention is not None:
            weights = self.attention(compressed.reshape(rows, -1)).reshape(rows, tokens, self.rank)
            compressed = contract("btd,btr->brd", by_row, weights, self.dtype)
        z = contract("btd,brd->btr", by_row, compressed, self.dtype)
        y = self.out(self.mlp(self.norm(z.reshape(rows, -1))))
        return y.reshape(rows, -1, width).swapaxes(0, 1)


class WukongLayer(nnx.Module):
    """LN(concat(FMB, LCB) + res): x [T_l, B, D] -> [T_F + T_L, B, D]."""

    def __init__(self, tokens: int, options: WukongConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        linear = functools.partial(TokenLinear, tokens, init=options.init, dtype=dtype, rngs=rngs)
        self.fm = FMBlock(tokens, options, dtype=dtype, rngs=rngs)
        self.linear = linear(options.linear_tokens)
        self.residual = linear(options.out_tokens) if tokens != options.out_tokens else None
        self.norm = Norm(options.width, eps=options.norm_eps, dtype=dtype)

    def __call__(self, x: Float[Array, "T B D"]) -> Float[Array, "out B D"]:
        y = jnp.concatenate([self.fm(x), self.linear(x)], axis=0)
        return self.norm(y + (x if self.residual is None else self.residual(x)))


def count_params(config: WukongConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Params:
    """Closed form of the parameter tree."""
    plan = plan_tokens(schema, config, config.width, tokens)
    D, F, m, rank, out = config.width, config.hidden, config.hidden_layers, config.rank, config.out_tokens
    layers = 0
    for T in config.sizes(plan.tokens):
        layers += 3 * T * rank + _mlp_weights(config, T) + m * F + config.fm_tokens * D
        layers += config.linear_tokens * T + (T != out) * out * T + 2 * D
        layers += config.attentive * (rank * D * F + F + F * T * rank + T * rank)
    frame = frame_params(plan, config, len(schema.tasks))
    return frame + Params(dense=layers)


def count_flops(config: WukongConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Flops:
    """Closed form of the matrix products: user tokens per request, all else per candidate."""
    plan = plan_tokens(schema, config, config.width, tokens)
    D, F, rank, out = config.width, config.hidden, config.rank, config.out_tokens
    total = frame_flops(plan, config, len(schema.tasks))
    for i, T in enumerate(config.sizes(plan.tokens)):
        on_tokens = (4 + 2 * config.attentive) * T * D * rank
        on_tokens += 2 * T * D * (config.linear_tokens + (T != out) * out)
        rest = 2 * _mlp_weights(config, T) + config.attentive * 2 * (rank * D * F + F * T * rank)
        total += Flops(candidate=rest) + (Flops(candidate=on_tokens) if i else raw_flops(plan, on_tokens))
    return total


def size_space(
    schema: Schema, config: WukongConfig, target_dense_params: float, tokens: TokenShape = NO_TOKENS
) -> Iterator[dict[str, Any]]:
    """Overrides (width, fm_tokens, linear_tokens, rank, hidden) near the target; depths stay as configured.

    T_F = T_L = rank; for each D and number of tokens the hidden width is solved for.
    """
    params, target = dense_params(count_params, config, schema, tokens), target_dense_params
    ideal, suits = interpolate(target, _WIDTHS), interpolate(target, _TOKENS)
    powers = sorted({round(suits * ratio) for ratio in (0.25, 0.5, 1, 2)} - {0}, key=lambda n: abs(n / suits - 1))
    hidden = interpolate(target, _HIDDEN)
    shapes = (
        (dict(width=D, fm_tokens=n, linear_tokens=n, rank=n), "hidden", hidden)
        for D in widths_around(ideal, target, large=64)
        for n in powers
    )
    yield from solve_widths(shapes, params, target)


def _mlp_weights(config: WukongConfig, tokens: int) -> int:
    """Matrices of the MLP behind the factorisation machine."""
    F, rows = config.hidden, config.rank * tokens
    return rows * F + (config.hidden_layers - 1) * F * F + F * config.fm_tokens * config.width


WUKONG = BackboneSpec(WukongConfig, flattened_builder(WukongLayer), count_params, count_flops, size_space)
