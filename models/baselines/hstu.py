"""HSTU (arXiv 2402.17152): pointwise gated attention without softmax and without a feed-forward network.

    [U, V, Q, K] = split(silu(LN(X) W_1 + b_1))
    A_ij = silu(s * Q_i K_j^T + b_pos[|i-j|] + b_time[bucket |t_i - t_j|]) / N * visible_ij,  N = S_max + 1
    X' = X + (LN(A V) * U) W_2 + b_2

X_0 = e W + b are the events (all their fields together), newest first: event i sees itself and older events. The
candidate (all candidate fields, projected) is one more row at position -1, at the time of the request: it sees every
event and itself, and no event sees it. So K and V of all layers are computed once per request. N is a constant: the
padded length would let padding change the result. Bucket of a time difference: clip(floor(ln(max(1, s)) / 0.301), 0,
buckets - 1).

interleave=True makes two rows of every event, as the paper does in ranking: the one of its `actions` fields, and behind
it (older) the one of all others; each has a projection of its own, and S, S_max below are twice as many.

Letters: R requests, C candidates, S events, A event width (time feature included), D width, H heads, d_q and d_v head
widths, L layers, D_x width of all candidate fields joined. One candidate token [R, C, 1, D], its row after L layers.

Closed forms, G = 2*H*(d_q + d_v):
    params = A*D + D + D_x*D + D + L*((D + 1)*G + H*d_v*D + D + 2*D + 2*H*d_v + S_max + 1 + buckets)
    layer on n rows: 2*n*D*G + 2*n^2*H*(d_q + d_v) + 2*n*H*d_v*D
    per request   = 2*S*A*D (of S events) + (L-1) layers on S rows + K and V of the last: 2*S*D*H*(d_q + d_v)
    per candidate = 2*D_x*D + L*(2*D*G + 2*(S + 1)*H*(d_q + d_v) + 2*H*d_v*D)

Undisclosed or varying -> flag (default): width (32), heads (2), query_width d_q and value_width d_v (D/H), layers (2),
score_scale s (1, as printed; None is 1/sqrt(d_q)), time_buckets (128), init. Without timestamps there is no b_time.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from recscale.models.architecture import EncoderSpec
from recscale.models.counts import Flops, Params
from recscale.models.inputs.batch import CandidateInputs, UserInputs
from recscale.models.inputs.flat import FlatPlan, plan_flat
from recscale.models.inputs.history import (
    TIME_WIDTH,
    EventPlan,
    EventReader,
    HistoryOptions,
    HistoryView,
    TokenShape,
    event_columns,
    longest_history,
    plan_events,
)
from recscale.models.inputs.schema import Schema
from recscale.models.layers import param
from recscale.models.layers.dense import Dense
from recscale.models.layers.history_attention import check_heads, split_heads
from recscale.models.layers.matmul import contract
from recscale.models.layers.norms import Norm
from recscale.models.layers.per_token import activation
from recscale.models.ranker import EncodedHistory, SequenceEncoder

Array = jax.Array

# ln(seconds) per bucket.
_BUCKET_STEP = 0.301


@dataclasses.dataclass(frozen=True)
class HSTUConfig(HistoryOptions):
    """width D, heads H, query_width d_q, value_width d_v (None: D/H), layers L; max_length: S_max, None for the
    schema's length; time_buckets: of b_time, 0 for none; actions: event fields of the action rows; the rest: see the
    file."""

    width: int = 32
    heads: int = 2
    query_width: int | None = None
    value_width: int | None = None
    layers: int = 2
    score_scale: float | None = 1.0
    time_buckets: int = 128
    max_length: int | None = None
    interleave: bool = False
    actions: tuple[str, ...] = ()
    init: str = "lecun_normal"

    def __post_init__(self):
        if self.interleave != bool(self.actions):
            raise ValueError(
                f"interleave is {self.interleave} and actions {self.actions}; interleave=True needs the event fields "
                "that describe the action, and only then are they named"
            )


class _Pairs(NamedTuple):
    """Of events with each other and of the candidate row with the events: distances, time buckets, visibility."""

    distance: Array
    bucket: Array | None
    visible: Array


class HSTUBlock(nnx.Module):
    """One layer; rows and keys may differ. `pairs` describe them: distance [Q, n], bucket and visible [R, Q, n]."""

    def __init__(
        self,
        width: int,
        heads: int,
        query_width: int,
        value_width: int,
        longest: int,
        buckets: int,
        *,
        score_scale: float,
        init: str,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.heads, self.cut, self.scale, self.dtype = (
            heads,
            (heads * value_width, heads * query_width),
            score_scale,
            dtype,
        )
        self.normaliser = longest + 1
        kwargs = dict(init=init, dtype=dtype, rngs=rngs)
        self.norm = Norm(width, dtype=dtype)
        self.kernel = param.kernel(rngs, (width, 2 * sum(self.cut)), ("embed", "heads"), init)
        self.bias = param.constant((2 * sum(self.cut),), ("heads",))
        self.position = param.constant((longest + 1,), ("events",))
        self.time = param.constant((buckets,), ("buckets",)) if buckets else None
        self.out_norm = Norm(heads * value_width, dtype=dtype)
        self.out = Dense(heads * value_width, width, axes=("heads", "embed"), **kwargs)

    def project(self, x: Array, parts: str) -> list[Array]:
        """The asked parts of U, V, Q, K (in that order): [..., H*d_v] and [..., H, d]."""
        v, q = self.cut
        ends = np.cumsum([0, v, v, q, q])
        x = self.norm(x)
        flat, made = x.reshape(-1, x.shape[-1]), []
        first, last = "UVQK".index(parts[0]), "UVQK".index(parts[-1])
        columns = slice(int(ends[first]), int(ends[last + 1]))
        y = contract("bd,df->bf", flat, self.kernel[...][:, columns], self.dtype)
        y = activation("silu")(y + self.bias[...][columns].astype(self.dtype)[None])
        y = y.reshape(*x.shape[:-1], -1)
        for part in parts:
            i = "UVQK".index(part)
            made.append(y[..., int(ends[i]) - columns.start : int(ends[i + 1]) - columns.start])
        return made

    def weights(self, q: Array, k: Array, pairs: _Pairs) -> Array:
        """q [R, Q, H, d], k [R, n, H, d] -> A [R, H, Q, n]; 0 where invisible."""
        scores = self.scale * contract("rqhd,rkhd->rhqk", q, k, self.dtype).astype(jnp.float32)
        return self.gate(scores, pairs)

    def gate(self, scores: Array, pairs: _Pairs) -> Array:
        """silu(scores + biases) / N on visible pairs: scores [R, H, Q, n], float32."""
        scores = scores + self.position[...][pairs.distance][None, None]
        if self.time is not None:
            scores = scores + self.time[...][pairs.bucket][:, None]
        return jnp.where(pairs.visible[:, None], jax.nn.silu(scores) / self.normaliser, 0.0).astype(self.dtype)

    def finish(self, x: Array, mixed: Array, u: Array) -> Array:
        """x + (LN(A V) * U) W_2 + b_2; mixed [..., H, d_v]."""
        return x + self.out(self.out_norm(mixed.reshape(*x.shape[:-1], -1)) * u)


class HSTU(SequenceEncoder):
    """The history of `events` -> one candidate token [R, C, 1, D]; b_time exists if buckets > 0.

    actions: columns of the events' vectors that become rows of their own; () for one row an event.
    """

    def __init__(
        self,
        events: EventPlan,
        candidate: FlatPlan,
        width: int,
        layers: int,
        *,
        actions: tuple[int, ...] = (),
        init: str = "lecun_normal",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
        **block,
    ):
        self.candidate, self.dtype, self.buckets = candidate, dtype, block["buckets"]
        self.actions, self.items = actions, tuple(i for i in range(events.width) if i not in actions)
        kwargs = dict(init=init, dtype=dtype, rngs=rngs)
        self.reader = EventReader(events, rngs=rngs)
        self.embed = Dense(len(self.items), width, **kwargs)
        self.embed_action = Dense(len(actions), width, **kwargs) if actions else None
        self.target = Dense(candidate.candidate_width, width, axes=("features", "embed"), **kwargs)
        self.blocks = nnx.List(HSTUBlock(width, **block, **kwargs) for _ in range(layers))

    def encode_user(self, user: UserInputs) -> EncodedHistory:
        view = self._rows(self.reader(user))
        pairs, own = _pairs(view, self.buckets)
        x, cached = view.events, []
        for i, block in enumerate(self.blocks):
            if i == len(self.blocks) - 1:
                v, k = block.project(x, "V")[0], block.project(x, "K")[0]
                cached.append((split_heads(v, block.heads), split_heads(k, block.heads)))
                break
            u, *rest = block.project(x, "UVQK")
            v, q, k = (split_heads(y, block.heads) for y in rest)
            mixed = contract("rhqk,rkhd->rqhd", block.weights(q, k, pairs), v, self.dtype)
            x = block.finish(x, mixed, u)
            cached.append((v, k))
        return EncodedHistory(None, (tuple(cached), own))

    def _rows(self, view: HistoryView) -> HistoryView:
        """The projected rows [R, S, D], or of S events the 2*S rows action, item, action, item, ..."""
        if self.embed_action is None:
            return view._replace(events=self.embed(view.events))
        parts = ((self.embed_action, self.actions), (self.embed, self.items))
        rows = jnp.stack([embed(view.events[..., np.asarray(columns)]) for embed, columns in parts], axis=2)
        return HistoryView(
            events=rows.reshape(rows.shape[0], -1, rows.shape[-1]),
            valid=jnp.repeat(view.valid, 2, axis=1),
            position=jnp.arange(2 * rows.shape[1], dtype=jnp.int32),
            delta_s=None if view.delta_s is None else jnp.repeat(view.delta_s, 2, axis=1),
            length=2 * view.length,
        )

    def candidate_tokens(self, cache, candidates: CandidateInputs) -> Array:
        layers, pairs = cache
        x = self.target(self.candidate.join_candidates(candidates))
        for block, (v, k) in zip(self.blocks, layers, strict=True):
            u, *rest = block.project(x, "UVQK")
            own_v, q, own_k = (split_heads(y, block.heads) for y in rest)
            weights = block.weights(q, k, pairs)  # the C candidate rows of a request all stand at position -1
            mixed = contract("rhqk,rkhd->rqhd", weights, v, self.dtype)
            itself = block.scale * contract("rchd,rchd->rch", q, own_k, self.dtype).astype(jnp.float32)
            at_once = jnp.zeros((1, 1), jnp.int32)
            alone = _Pairs(at_once, at_once[None], jnp.ones((1, 1, 1), bool))
            weight = block.gate(itself.swapaxes(1, 2)[..., None], alone)[..., 0].swapaxes(1, 2)
            mixed = mixed + contract("rch,rchd->rchd", weight, own_v, self.dtype)
            x = block.finish(x, mixed, u)
        return x[:, :, None]


def time_bucket(seconds: Array, buckets: int) -> Array:
    """clip(floor(ln(max(1, seconds)) / 0.301), 0, buckets - 1), int32; exact, by comparing with integer bounds."""
    ends = [math.ceil(math.exp(_BUCKET_STEP * i)) for i in range(1, buckets)]
    starts = jnp.asarray([end for end in ends if end < 2**31], jnp.int32)
    return jnp.searchsorted(starts, seconds, side="right", method="scan_unrolled").astype(jnp.int32)


def _pairs(view: HistoryView, buckets: int) -> tuple[_Pairs, _Pairs]:
    """Pairs of events, and of the candidate row (position -1, age 0) with the events."""
    j = view.position
    ages, bucket, own = view.delta_s, None, None
    if buckets:
        bucket = time_bucket(jnp.abs(ages[:, :, None] - ages[:, None, :]), buckets)
        own = time_bucket(ages, buckets)[:, None]
    visible = (j[None, :] >= j[:, None])[None] & view.valid[:, None]
    return (
        _Pairs(jnp.abs(j[:, None] - j[None, :]), bucket, visible),
        _Pairs((j + 1)[None], own, view.valid[:, None]),
    )


def build(config: HSTUConfig, schema: Schema, *, rngs: nnx.Rngs, dtype=jnp.float32) -> HSTU:
    """The encoder of a config."""
    events, d_q, d_v, longest, buckets = _sizes(config, schema)
    return HSTU(
        events,
        plan_flat(schema),
        config.width,
        config.layers,
        heads=config.heads,
        query_width=d_q,
        value_width=d_v,
        longest=longest,
        buckets=buckets,
        actions=tuple(itertools.chain(*event_columns(schema, events, config.actions, "actions"))),
        score_scale=d_q**-0.5 if config.score_scale is None else config.score_scale,
        init=config.init,
        dtype=dtype,
        rngs=rngs,
    )


def token_shape(config: HSTUConfig, schema: Schema) -> TokenShape:
    """One candidate token of width D."""
    return TokenShape(candidate=1, width=config.width)


def count_params(config: HSTUConfig, schema: Schema) -> Params:
    """Closed form of the parameter tree."""
    (events, d_q, d_v, longest, buckets), D, H = _sizes(config, schema), config.width, config.heads
    layer = (D + 1) * 2 * H * (d_q + d_v) + H * d_v * D + D + 2 * D + 2 * H * d_v + longest + 1 + buckets
    dense = events.params + (events.width + plan_flat(schema).candidate_width + 2 + config.interleave) * D
    return Params(dense=dense + config.layers * layer)


def count_flops(config: HSTUConfig, schema: Schema) -> Flops:
    """Closed form of the matrix products."""
    (events, d_q, d_v, _, _), D, H = _sizes(config, schema), config.width, config.heads
    S, candidate, both = events.length * (1 + config.interleave), plan_flat(schema), H * (d_q + d_v)
    embed, query = 2 * events.length * events.width * D, 2 * candidate.candidate_width * D
    layer = 4 * S * D * both + 2 * S * S * both + 2 * S * H * d_v * D
    one = 4 * D * both + 2 * (S + 1) * both + 2 * H * d_v * D
    return Flops(
        embed + (config.layers - 1) * layer + 2 * S * D * both,
        query + config.layers * one,
        embed * (not events.trained),
        query * (not candidate.candidate_trained),
    )


def _sizes(config: HSTUConfig, schema: Schema) -> tuple[EventPlan, int, int, int, int]:
    """(events, d_q, d_v, S_max, number of time buckets)."""
    if None in (config.query_width, config.value_width):
        check_heads(config.width, config.heads)
    events, share = plan_events(schema, config), config.width // config.heads
    actions = event_columns(schema, events, config.actions, "actions")
    if len(set(itertools.chain(*actions))) == events.width - TIME_WIDTH * events.use_time:
        raise ValueError("actions names every event field, which leaves nothing for the item rows")
    longest = longest_history(events, config.max_length) * (1 + config.interleave)
    buckets = config.time_buckets * events.timestamps
    return events, config.query_width or share, config.value_width or share, longest, buckets


HSTU_SPEC = EncoderSpec(HSTUConfig, build, token_shape, count_params, count_flops)
