"""OneTrans-lite (after arXiv 2510.26104): feature tokens and events in one causal Transformer.

    index space  [T_c candidate tokens ; T_u user tokens ; events newest first],  key j is visible to row i iff j >= i

the mirror of the published order (oldest event first, feature tokens last, j <= i). Pre-RMSNorm blocks of attention and
a GELU network without biases; all events share one set of weights, every feature token has its own.

Pyramid: layer l sees the S_l newest rows of events, S_1 = S falling linearly to about T in the last layer, multiples of
32; only rows that a later layer sees are computed, so the last layer computes feature tokens alone.
logits = towers(mean of the T feature tokens after a last norm).

Candidate tokens come first, so nothing else depends on them: `encode_user` finishes events and user tokens and keeps
K and V of every layer, `score` adds T_c rows per candidate.

Letters: R requests, C candidates, B = R*C, S events, S_l rows of events in layer l (S_{L+1} = 0), A event width (time
feature included), T = T_c + T_u tokens, D width, H heads, F hidden width, L layers, a_l = S_{l+1} + T_u, Y tasks.

Closed forms (F = 4*D):
    params        = A*D + D + tokenizer + L*(12*T*D^2 + 2*D per side) + (L-1)*(12*D^2 + 2*D) + 2*D^2 + D + D + Y*(D + 1)
    per request   = 2*S*A*D + user tokenizer + sum_l [4*(S_l + T_u)*D^2 + 20*a_l*D^2 + 4*D*(a_l*S_l + T_u^2)]
    per candidate = candidate tokenizer + sum_l [24*T_c*D^2 + 4*T_c*(T + S_l)*D] + 2*D*Y

A reconstruction. Undisclosed -> flag (default): gains of the norms are shared within a side; the event projection is
linear; pyramid (True); readout (mean); width (32), heads (2), layers (2), hidden (None: 4*D), init, tower (()).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recscale.models.architecture import RankerSpec, builder
from recscale.models.counts import Flops, Params
from recscale.models.inputs import CandidateInputs, Output, Schema, UserInputs
from recscale.models.inputs.history import EventPlan, EventReader, HistoryOptions, plan_events
from recscale.models.inputs.tokenizers import (
    Tokenizer,
    TokenizerOptions,
    TokenPlan,
    UserTokens,
    plan_tokens,
)
from recscale.models.layers.dense import Dense
from recscale.models.layers.dropout import dropout
from recscale.models.layers.hidden import DropoutOptions
from recscale.models.layers.history_attention import (
    HistoryBlock,
    KeyValues,
    Visible,
    attend,
    block_flops,
    check_heads,
    split_heads,
)
from recscale.models.layers.norms import Norm
from recscale.models.layers.param import Init
from recscale.models.layers.per_token import Activation, PerTokenDense, activation
from recscale.models.layers.towers import mean_tokens, tower_flops, tower_params
from recscale.models.options import require_sizes
from recscale.models.ranker import Ranker
from recscale.models.sizing import counted_choices, dense_params, token_shapes

# Rows of the pyramid are multiples of this.
_ROWS = 32


@dataclasses.dataclass(frozen=True)
class OneTransLiteConfig(HistoryOptions, TokenizerOptions, DropoutOptions):
    """width D, heads H, layers L, hidden F (None: 4*D); pyramid=False keeps every event row in every layer."""

    width: int = 32
    heads: int = 2
    layers: int = 2
    hidden: int | None = None
    pyramid: bool = True
    activation: Activation = "gelu"
    init: Init = "lecun_normal"
    implementation: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(width=self.width, heads=self.heads, layers=self.layers, hidden=self.hidden)

    @property
    def F(self) -> int:
        return self.hidden or 4 * self.width


class _State(NamedTuple):
    """Kept per request: the tokenizer's state with the finished user tokens, and every layer's keys."""

    tokens: UserTokens
    layers: tuple[tuple[KeyValues | None, KeyValues, Array], ...]


class TokenBlock(nnx.Module):
    """A block with weights per token: x [T, B, D], seen from rows [*lead, T] with B = product of `lead`."""

    def __init__(self, tokens: int, options: OneTransLiteConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        D, F = options.width, options.F
        self.heads, self.act, self.implementation = options.heads, options.activation, options.implementation
        dense = functools.partial(PerTokenDense, tokens, use_bias=False, init=options.init, dtype=dtype, rngs=rngs)
        self.attention_norm, self.ffn_norm = (Norm(D, kind="rms", dtype=dtype) for _ in range(2))
        self.query, self.key, self.value = (dense(D, D, axes=("embed", "heads")) for _ in range(3))
        self.out = dense(D, D, axes=("heads", "embed"))
        self.up = dense(D, F)
        self.down = dense(F, D, axes=("hidden", "embed"), transposed=True)

    def keys(self, x: Float[Array, "T B D"], lead: Sequence[int]) -> KeyValues:
        """[*lead, T, H, d] each."""
        x = self.attention_norm(x)
        return KeyValues(self._rows(self.key(x), lead), self._rows(self.value(x), lead))

    def __call__(self, x: Float[Array, "T B D"], lead: Sequence[int], *seen: Visible) -> Float[Array, "T B D"]:
        q = self._rows(self.query(self.attention_norm(x)), lead)
        o = attend(q, *seen, implementation=self.implementation)
        x = x + self.out(jnp.moveaxis(o, -2, 0).reshape(x.shape))
        return x + self.down(activation(self.act)(self.up(self.ffn_norm(x))))

    def _rows(self, x: Array, lead: Sequence[int]) -> Array:
        x = x.reshape(x.shape[0], *lead, x.shape[-1])
        return split_heads(jnp.moveaxis(x, 0, -2), self.heads)


class OneTransLite(Ranker):
    """Tokenizer, event projection, L layers, mean over feature tokens, towers.

    Args:
        sizes: the history, the resolved tokenizer, and S_1 ... S_L of the history's rows.
        tasks: Y.
    """

    def __init__(
        self,
        sizes: tuple[EventPlan, TokenPlan, tuple[int, ...]],
        tasks: int,
        options: OneTransLiteConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        (events, plan, rows), D, H, init = sizes, options.width, options.heads, options.init
        check_heads(D, H)
        self.rows = (*rows, 0)
        self.reader = EventReader(events, rngs=rngs)
        self.embed = Dense(events.width, D, init=init, dtype=dtype, rngs=rngs)
        self.tokenizer = Tokenizer(plan, D, init=init, dtype=dtype, rngs=rngs)
        # The last layer computes no event row: its event weights make keys and values only.
        self.events = nnx.List(
            HistoryBlock(
                D,
                H,
                hidden=options.F,
                norm="rms",
                use_bias=False,
                activation=options.activation,
                init=init,
                implementation=options.implementation,
                dtype=dtype,
                rngs=rngs,
            )
            for _ in rows[1:]
        )
        self.last_norm = Norm(D, kind="rms", dtype=dtype)
        axes = ("embed", "heads")
        self.last_key, self.last_value = (
            Dense(D, D, use_bias=False, axes=axes, init=init, dtype=dtype, rngs=rngs) for _ in range(2)
        )
        self.heads = H

        def blocks(tokens: int) -> nnx.List[TokenBlock]:
            count = len(rows) if tokens else 0
            return nnx.List(TokenBlock(tokens, options, dtype=dtype, rngs=rngs) for _ in range(count))

        self.user, self.candidate = blocks(plan.user_tokens), blocks(plan.candidate_tokens)
        self.final_norm = Norm(D, kind="rms", dtype=dtype)
        self.dropout = options.hidden_dropout
        self.towers = options.towers(D, tasks, init=init, dtype=dtype, rngs=rngs)

    def encode_user(self, user: UserInputs) -> _State:
        view = self.reader(user)
        made = self.tokenizer.encode_user(user)
        x, tokens, layers = self.embed(view.events), made.tokens, []
        lead = x.shape[:1]
        for i in range(len(self.rows) - 1):
            x = x[:, : self.rows[i]]
            length = jnp.minimum(view.length, x.shape[1])
            keys = self._event_keys(i, x)
            own = None
            if tokens is not None:
                own = self.user[i].keys(tokens, lead)
                tokens = self.user[i](tokens, lead, Visible(own, mode="causal"), Visible(keys, length))
            layers.append((own, keys, length))
            if self.rows[i + 1]:
                x = self.events[i](x[:, : self.rows[i + 1]], Visible(keys, length, "causal"))
        return _State(made._replace(tokens=tokens), tuple(layers))

    def score(self, state: _State, candidates: CandidateInputs, *, key: Array | None = None) -> Output:
        tokens = self.tokenizer.candidate_tokens(state.tokens, candidates)
        T_c, *lead, width = tokens.shape
        x = tokens.reshape(T_c, -1, width)
        for block, (user, events, length) in zip(self.candidate, state.layers, strict=True):
            seen = [Visible(block.keys(x, lead), mode="causal"), Visible(events, length)]
            x = block(x, lead, *seen, *([] if user is None else [Visible(user)]))
        x = self.tokenizer.join(state.tokens, x.reshape(tokens.shape))
        logits = self.towers(dropout(mean_tokens(self.final_norm(x)), self.dropout, key), key)
        return Output(logits=logits.reshape(*lead, -1))

    def _event_keys(self, layer: int, x: Array) -> KeyValues:
        if layer < len(self.events):
            return self.events[layer].keys(x)
        x = self.last_norm(x)
        return KeyValues(split_heads(self.last_key(x), self.heads), split_heads(self.last_value(x), self.heads))


def pyramid_rows(events: int, tokens: int, layers: int, pyramid: bool = True) -> tuple[int, ...]:
    """S_1 ... S_L: from S linearly to about T in the last layer, rounded up to multiples of 32, never above S."""
    if not pyramid or layers == 1:
        return (events,) * layers
    rows = []
    for i in range(layers):
        exact = events + (min(tokens, events) - events) * i / (layers - 1)
        rows.append(min(events, -(-round(exact) // _ROWS) * _ROWS))
    return tuple(rows)


def count_params(config: OneTransLiteConfig, schema: Schema) -> Params:
    """Closed form of the parameter tree."""
    (events, plan, _), D, F, L = _sizes(config, schema), config.width, config.F, config.layers
    each, sides = 4 * D * D + 2 * D * F, (plan.user_tokens > 0) + 1
    blocks = L * plan.tokens * each + L * 2 * D * sides + (L - 1) * (each + 2 * D) + 2 * D * D + D
    tokenizer, head = plan.params(D), tower_params(D, len(schema.tasks), config.tower)
    dense = events.params + events.width * D + D + tokenizer + blocks + D + head
    return Params(dense=dense, tokenizer=tokenizer, head=head)


def count_flops(config: OneTransLiteConfig, schema: Schema) -> Flops:
    """Closed form of the matrix products."""
    (events, plan, rows), D, F = _sizes(config, schema), config.width, config.F
    T, T_u, T_c = plan.tokens, plan.user_tokens, plan.candidate_tokens
    embed = 2 * events.length * events.width * D
    total = plan.flops(D) + Flops(embed, user_unneeded=embed * (not events.trained))
    for n, kept in zip(rows, (*rows[1:], 0), strict=True):
        user = block_flops(D, kept, n, kept * n, F) + block_flops(D, T_u, T_u, T_u * (T_u + n), F)
        total += Flops(user, block_flops(D, T_c, T_c, T_c * (T + n), F))
    return total + Flops(candidate=tower_flops(D, len(schema.tasks), config.tower))


def size_space(schema: Schema, config: OneTransLiteConfig, target_dense_params: float) -> Iterator[dict[str, Any]]:
    """Overrides (tokens, width, hidden) near the target; layers and a given number of tokens stay as configured."""
    choices = counted_choices(schema, config, target_dense_params)
    for shape in token_shapes(dense_params(count_params, config, schema), choices, target_dense_params, 4.0):
        if shape["width"] % config.heads == 0:
            yield shape


def _sizes(config: OneTransLiteConfig, schema: Schema) -> tuple[EventPlan, TokenPlan, tuple[int, ...]]:
    """(events, tokens, S_1 ... S_L)."""
    events, plan = plan_events(schema, config), plan_tokens(schema, config, config.width)
    rows = pyramid_rows(events.length, plan.tokens, config.layers, config.pyramid)
    return events, plan, rows


build = builder(OneTransLite, _sizes)
ONETRANS_LITE = RankerSpec(OneTransLiteConfig, build, count_params, count_flops, size_space)
