"""HiFormer (arXiv 2311.05884): attention whose queries, keys and values are projections of the whole token list.

One learned task token per label is appended to the field tokens, X [B,T,D] with T including them. Per layer, with the
composite projections in low rank, all heads together:

    [k_1..k_T] = flatten(X) A_k B_k         A_k [T*D,r_k]  B_k [r_k,T*H*d_k]; q the same, v with r_v and d_v
    o_i = concat_h sum_j softmax_j(q_i^h . k_j^h / sqrt(d_k)) v_j^h         S = LN(o W_O + X)       W_O [T,H*d_v,D]
    X = LN(PFFN(S) + S)                                                     PFFN per token, gelu
    logit_y = tower_y(task token y)

The last layer computes task-token queries only, Q = Y instead of T: nothing else is read afterwards.

Letters: B rows, T tokens, Q query tokens of a layer, D token width, H heads, d_k, d_v key and value widths, r_k, r_v
ranks, F hidden width, L layers, Y tasks. Activations are token-major [T,B,D] inside.

Closed forms per layer, plus the tokenizer and Y*D + Y*(D + 1):
    params = r_k*(2*T*D + Q*H*d_k + T*H*d_k) + r_v*(T*D + T*H*d_v) + Q*H*d_v*D + Q*(2*D*F + F + D) + 4*D
    flops  = 2*(r_k*(2*T*D + Q*H*d_k + T*H*d_k) + r_v*(T*D + T*H*d_v)) + 2*Q*T*H*(d_k + d_v) + 2*Q*H*d_v*D + 4*Q*D*F

Printed setting: D=128, H=4, F=512, d_k=16, d_v=64, r_k=128, r_v=1024 (the defaults here). Undisclosed -> flag
(default): place of the norms -> norm_place ("post"; "pre" adds one before the towers); number of layers -> layers (2);
activation, norm_eps, init; head -> tower (()).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recscale.models.architecture import BackboneSpec, token_builder
from recscale.models.counts import Flops, Params
from recscale.models.inputs.history import NO_TOKENS, TokenShape
from recscale.models.inputs.schema import Schema
from recscale.models.inputs.tokenizers import TokenPlan, plan_tokens
from recscale.models.layers import param
from recscale.models.layers.attention import attend_tokens
from recscale.models.layers.dense import Dense
from recscale.models.layers.dropout import dropout
from recscale.models.layers.mixing import flatten_token_major
from recscale.models.layers.norms import Norm, normalise
from recscale.models.layers.per_token import Activation, PerTokenDense, PerTokenFFN
from recscale.models.layers.towers import tower_flops, tower_params
from recscale.models.options import require_positive, require_sizes
from recscale.models.sizing import dense_params, interpolate, solve_widths, widths_around

from .flattened import FieldTokenOptions, FieldTokens

# Token widths, heads' widths, ranks and hidden widths `size_space` prefers, by dense parameters.
_WIDTHS = {1e4: 4, 1e5: 12, 1e6: 64, 1e7: 128, 1e8: 384, 1e9: 768}
_KEYS = {1e4: 1, 1e5: 4, 1e6: 8, 1e7: 16, 1e8: 48, 1e9: 96}
_VALUES = {1e4: 1, 1e5: 4, 1e6: 16, 1e7: 64, 1e8: 128, 1e9: 384}
_KEY_RANKS = {1e4: 1, 1e5: 8, 1e6: 8, 1e7: 32, 1e8: 128, 1e9: 256}
_VALUE_RANKS = {1e4: 4, 1e5: 24, 1e6: 24, 1e7: 192, 1e8: 768, 1e9: 1024}
_HIDDEN = {1e4: 4, 1e5: 16, 1e6: 128, 1e7: 384, 1e8: 1536, 1e9: 3072}


@dataclasses.dataclass(frozen=True)
class HiFormerConfig(FieldTokenOptions):
    """width D, layers L, heads H, key_width d_k, value_width d_v, key_rank r_k, value_rank r_v, hidden F."""

    width: int = 128
    heads: int = 4
    key_width: int = 16
    value_width: int = 64
    key_rank: int = 128
    value_rank: int = 1024
    hidden: int = 512
    activation: Activation = "gelu"
    norm_place: Literal["post", "pre"] = "post"
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(norm_eps=self.norm_eps)
        require_sizes(heads=self.heads, key_width=self.key_width, value_width=self.value_width, hidden=self.hidden)
        require_sizes(key_rank=self.key_rank, value_rank=self.value_rank)

    def queries(self, tokens: int, tasks: int) -> list[int]:
        """Q of every layer."""
        return [tokens] * (self.layers - 1) + [tasks]


class HeterogeneousAttention(nnx.Module):
    """Attention of the last Q tokens to all T, composite projections: x [T, B, D] -> [Q, B, D]."""

    def __init__(
        self, tokens: int, queries: int, options: HiFormerConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        D, H, init, r_k, r_v = options.width, options.heads, options.init, options.key_rank, options.value_rank
        self.tokens, self.queries, self.heads, self.dtype = tokens, queries, H, dtype
        self.cuts = (r_k, 2 * r_k)
        self.scale = options.key_width**-0.5
        dense = functools.partial(Dense, use_bias=False, init=init, dtype=dtype, rngs=rngs)
        # flatten(X) times A_q, A_k and A_v is one product.
        self.compress = dense(tokens * D, 2 * r_k + r_v, axes=("embed", "rank"))
        self.query = dense(r_k, queries * H * options.key_width, axes=("rank", "heads"))
        self.key = dense(r_k, tokens * H * options.key_width, axes=("rank", "heads"))
        self.value = dense(r_v, tokens * H * options.value_width, axes=("rank", "heads"))
        values, axes = H * options.value_width, ("heads", "embed")
        self.out = PerTokenDense(queries, values, D, use_bias=False, axes=axes, init=init, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "T B D"]) -> Float[Array, "Q B D"]:
        codes = jnp.split(self.compress(flatten_token_major(x)), self.cuts, axis=-1)
        sides = ((self.query, self.queries), (self.key, self.tokens), (self.value, self.tokens))
        q, k, v = (
            project(code).reshape(x.shape[1], count, self.heads, -1).swapaxes(0, 1)
            for (project, count), code in zip(sides, codes, strict=True)
        )
        return self.out(attend_tokens(q, k, v, self.scale, self.dtype))


class HiFormerLayer(nnx.Module):
    """One layer: x [T, B, D] -> its last Q tokens, [Q, B, D]."""

    def __init__(
        self, tokens: int, queries: int, options: HiFormerConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        D, act, init = options.width, options.activation, options.init
        self.queries, self.place = queries, options.norm_place
        self.attention = HeterogeneousAttention(tokens, queries, options, dtype=dtype, rngs=rngs)
        self.ffn = PerTokenFFN(queries, D, options.hidden, activation=act, init=init, dtype=dtype, rngs=rngs)
        self.attention_norm = Norm(D, eps=options.norm_eps, dtype=dtype)
        self.ffn_norm = Norm(D, eps=options.norm_eps, dtype=dtype)

    def __call__(self, x: Float[Array, "T B D"]) -> Float[Array, "Q B D"]:
        own = x[x.shape[0] - self.queries :]
        if self.place == "pre":
            s = self.attention(self.attention_norm(x)) + own
            return self.ffn(self.ffn_norm(s)) + s
        s = self.attention_norm(self.attention(x) + own)
        return self.ffn_norm(self.ffn(s) + s)


class HiFormer(FieldTokens):
    """Tokenizer, task tokens, L layers, a tower on every task token.

    Args:
        plan: the resolved tokenizer (`plan_tokens`), task tokens not counted.
        tasks: Y.
    """

    def __init__(
        self, plan: TokenPlan, tasks: int, options: HiFormerConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        super().__init__(plan, options, dtype=dtype, rngs=rngs)
        tokens, D, pre = plan.tokens + tasks, options.width, options.norm_place == "pre"
        self.task_tokens = param.normal(rngs, (tasks, D), ("tasks", "embed"), D**-0.5)
        self.blocks = nnx.List(
            HiFormerLayer(tokens, queries, options, dtype=dtype, rngs=rngs)
            for queries in options.queries(tokens, tasks)
        )
        self.final_norm = Norm(D, eps=options.norm_eps, dtype=dtype) if pre else None
        self.dropout = options.hidden_dropout
        self.towers = options.towers(D, tasks, init=options.init, dtype=dtype, rngs=rngs)

    def logits(self, x: Float[Array, "T B D"], key: Array | None = None) -> Float[Array, "B Y"]:
        tasks, width = self.task_tokens.shape
        asked = jnp.broadcast_to(self.task_tokens[...][:, None].astype(x.dtype), (tasks, x.shape[1], width))
        x = jnp.concatenate([x, asked], axis=0)
        for block in self.blocks:
            x = block(x)
        return self.towers(dropout(normalise(self.final_norm, x), self.dropout, key), key)


def count_params(config: HiFormerConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Params:
    """Closed form of the parameter tree."""
    plan, Y = plan_tokens(schema, config, config.width, tokens), len(schema.tasks)
    T, D, F = plan.tokens + Y, config.width, config.hidden
    layers = 0
    for Q in config.queries(T, Y):
        layers += _composite(config, T, Q) + Q * config.heads * config.value_width * D + Q * (2 * D * F + F + D) + 4 * D
    tokenizer, head = plan.params(D), tower_params(D, Y, config.tower)
    dense = tokenizer + layers + Y * D + 2 * D * (config.norm_place == "pre") + head
    return Params(dense=dense, tokenizer=tokenizer, head=head)


def count_flops(config: HiFormerConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Flops:
    """Closed form of the matrix products: user tokens per request, all else per candidate."""
    plan, Y = plan_tokens(schema, config, config.width, tokens), len(schema.tasks)
    T, D, H = plan.tokens + Y, config.width, config.heads
    rest = tower_flops(D, Y, config.tower)
    for Q in config.queries(T, Y):
        attention = 2 * Q * T * H * (config.key_width + config.value_width) + 2 * Q * H * config.value_width * D
        rest += 2 * _composite(config, T, Q) + attention + 4 * Q * D * config.hidden
    return plan.flops(D) + Flops(candidate=rest)


def size_space(
    schema: Schema, config: HiFormerConfig, target_dense_params: float, tokens: TokenShape = NO_TOKENS
) -> Iterator[dict[str, Any]]:
    """Overrides of every size but layers and heads, near the target; the rank of the values is solved for each D."""
    params, target = dense_params(count_params, config, schema, tokens), target_dense_params
    names = ("key_width", "value_width", "key_rank", "hidden")
    ideals = [interpolate(target, points) for points in (_KEYS, _VALUES, _KEY_RANKS, _HIDDEN)]
    ideal, rank = interpolate(target, _WIDTHS), interpolate(target, _VALUE_RANKS)

    def shape(D: int) -> dict[str, int]:
        """Every other size in proportion to D; large ones are multiples of 16."""
        scaled = {name: x * D / ideal for name, x in zip(names, ideals, strict=True)}
        return {"width": D} | {name: 16 * round(x / 16) if x >= 80 else max(1, round(x)) for name, x in scaled.items()}

    shapes = ((shape(D), "value_rank", rank) for D in widths_around(ideal, target))
    yield from solve_widths(shapes, params, target, large=(64, 32, 16, 8))


def _composite(config: HiFormerConfig, T: int, Q: int) -> int:
    """Weights of the composite projections of one layer."""
    D, keys, values = config.width, config.heads * config.key_width, config.heads * config.value_width
    return config.key_rank * (2 * T * D + Q * keys + T * keys) + config.value_rank * (T * D + T * values)


HIFORMER = BackboneSpec(HiFormerConfig, token_builder(HiFormer), count_params, count_flops, size_space)
