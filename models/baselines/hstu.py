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
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32

from recscale.models.architecture import EncoderSpec
from recscale.models.counts import Flops, Params
from recscale.models.inputs import CandidateInputs, Schema, UserInputs
from recscale.models.inputs.history import TIME_WIDTH, EventReader, HistoryView, event_columns, longest_history
from recscale.models.layers import param
from recscale.models.layers.dense import Dense
from recscale.models.layers.history_attention import check_heads, split_heads
from recscale.models.layers.matmul import contract
from recscale.models.layers.norms import Norm
from recscale.models.layers.per_token import activation
from recscale.models.options import require_sizes
from recscale.models.ranker import EncodedHistory, SequenceEncoder

from .encoding import EncoderOptions, ReadingPlan, builder, candidate_token, plan_reading, sized_by_width

# ln(seconds) per bucket.
_BUCKET_STEP = 0.301


@dataclasses.dataclass(frozen=True)
class HSTUConfig(EncoderOptions):
    """width D, heads H, query_width d_q, value_width d_v (None: D/H), layers L; max_length: S_max, None for the
    schema's length; time_buckets: of b_time, 0 for none; actions: event fields of the action rows; the rest: see the
    file."""

    query_width: int | None = None
    value_width: int | None = None
    layers: int = 2
    score_scale: float | None = 1.0
    time_buckets: int = 128
    max_length: int | None = None
    interleave: bool = False
    actions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(query_width=self.query_width, value_width=self.value_width, layers=self.layers)
        if self.time_buckets < 0:
            raise ValueError(f"time_buckets is {self.time_buckets}, expected 0 (none) or more")
        if None in (self.query_width, self.value_width):
            check_heads(self.width, self.heads)
        if self.interleave != bool(self.actions):
            raise ValueError(
                f"interleave is {self.interleave} and actions {self.actions}; interleave=True needs the event fields "
                "that describe the action, and only then are they named"
            )


@dataclasses.dataclass(frozen=True)
class HSTUPlan(ReadingPlan):
    """Both sides of a schema, head widths d_q and d_v, rows of positions and of time buckets, and the columns of the
    events' vectors that become rows of their own (() for one row an event)."""

    query_width: int
    value_width: int
    longest: int
    buckets: int
    actions: tuple[int, ...]


class _Pairs(NamedTuple):
    """Of events with each other and of the candidate row with the events: distances, time buckets, visibility."""

    distance: Array
    bucket: Array | None
    visible: Array


class HSTUBlock(nnx.Module):
    """One layer; rows and keys may differ. `pairs` describe them: distance [Q, n], bucket and visible [R, Q, n]."""

    def __init__(self, plan: HSTUPlan, options: HSTUConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        D, H, init = options.width, options.heads, options.init
        self.heads, self.cut, self.dtype = H, (H * plan.value_width, H * plan.query_width), dtype
        self.scale = plan.query_width**-0.5 if options.score_scale is None else options.score_scale
        self.normaliser = plan.longest + 1
        self.norm = Norm(D, dtype=dtype)
        self.kernel = param.kernel(rngs, (D, 2 * sum(self.cut)), ("embed", "heads"), init)
        self.bias = param.constant((2 * sum(self.cut),), ("heads",))
        self.position = param.constant((plan.longest + 1,), ("events",))
        self.time = param.constant((plan.buckets,), ("buckets",)) if plan.buckets else None
        self.out_norm = Norm(self.cut[0], dtype=dtype)
        self.out = Dense(self.cut[0], D, axes=("heads", "embed"), init=init, dtype=dtype, rngs=rngs)

    def project(self, x: Array, parts: str) -> list[Array]:
        """The asked parts, a piece of "UVQK": [..., H*d_v] and [..., H*d_q] each."""
        v, q = self.cut
        ends = [int(end) for end in np.cumsum([0, v, v, q, q])]
        first, last = "UVQK".index(parts[0]), "UVQK".index(parts[-1])
        columns, x = slice(ends[first], ends[last + 1]), self.norm(x)
        y = contract("bd,df->bf", x.reshape(-1, x.shape[-1]), self.kernel[...][:, columns], self.dtype)
        y = activation("silu")(y + self.bias[...][columns].astype(self.dtype)[None]).reshape(*x.shape[:-1], -1)
        return jnp.split(y, [end - ends[first] for end in ends[first + 1 : last + 1]], axis=-1)

    def weights(self, q: Array, k: Array, pairs: _Pairs) -> Array:
        """q [R, Q, H, d], k [R, n, H, d] -> A [R, H, Q, n]; 0 where invisible."""
        scores = self.scale * contract("rqhd,rkhd->rhqk", q, k, self.dtype).astype(jnp.float32)
        return self.gate(scores, pairs)

    def gate(self, scores: Array, pairs: _Pairs) -> Array:
        """silu(scores + biases) / N on visible pairs: scores [R, H, Q, n], float32."""
        scores = scores + self.position[...][pairs.distance][None, None]
        if self.time is not None and pairs.bucket is not None:
            scores = scores + self.time[...][pairs.bucket][:, None]
        return jnp.where(pairs.visible[:, None], jax.nn.silu(scores) / self.normaliser, 0.0).astype(self.dtype)

    def finish(self, x: Array, mixed: Array, u: Array) -> Array:
        """x + (LN(A V) * U) W_2 + b_2; mixed [..., H, d_v]."""
        return x + self.out(self.out_norm(mixed.reshape(*x.shape[:-1], -1)) * u)


class HSTU(SequenceEncoder):
    """The history of `plan` -> one candidate token [R, C, 1, D]; b_time exists if there are time buckets."""

    def __init__(self, plan: HSTUPlan, options: HSTUConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.candidate, self.dtype, self.buckets, D = plan.candidate, dtype, plan.buckets, options.width
        self.actions = plan.actions
        self.items = tuple(i for i in range(plan.events.width) if i not in plan.actions)
        dense = functools.partial(Dense, init=options.init, dtype=dtype, rngs=rngs)
        self.reader = EventReader(plan.events, rngs=rngs)
        self.embed = dense(len(self.items), D)
        self.embed_action = dense(len(self.actions), D) if self.actions else None
        self.target = dense(plan.candidate.candidate_width, D, axes=("features", "embed"))
        self.blocks = nnx.List(HSTUBlock(plan, options, dtype=dtype, rngs=rngs) for _ in range(options.layers))

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

    def candidate_tokens(self, cache: Any, candidates: CandidateInputs) -> Float[Array, "R C 1 D"]:
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


def time_bucket(seconds: Int[Array, "*rows"], buckets: int) -> Int32[Array, "*rows"]:
    """clip(floor(ln(max(1, seconds)) / 0.301), 0, buckets - 1), int32; exact, by comparing with integer bounds."""
    ends = [math.ceil(math.exp(_BUCKET_STEP * i)) for i in range(1, buckets)]
    starts = jnp.asarray([end for end in ends if end < 2**31], jnp.int32)
    return jnp.searchsorted(starts, seconds, side="right", method="scan_unrolled").astype(jnp.int32)


def _pairs(view: HistoryView, buckets: int) -> tuple[_Pairs, _Pairs]:
    """Pairs of events, and of the candidate row (position -1, age 0) with the events."""
    j = view.position
    ages, bucket, own = view.delta_s, None, None
    if buckets and ages is not None:
        bucket = time_bucket(jnp.abs(ages[:, :, None] - ages[:, None, :]), buckets)
        own = time_bucket(ages, buckets)[:, None]
    visible = (j[None, :] >= j[:, None])[None] & view.valid[:, None]
    return (
        _Pairs(jnp.abs(j[:, None] - j[None, :]), bucket, visible),
        _Pairs((j + 1)[None], own, view.valid[:, None]),
    )


def plan_hstu(config: HSTUConfig, schema: Schema) -> HSTUPlan:
    """Resolves the flags for one schema.

    Raises:
        ValueError: `actions` names what is no event field, or all of them; or a history longer than `max_length`.
    """
    plan, share = plan_reading(config, schema), config.width // config.heads
    actions = tuple(itertools.chain(*event_columns(schema, plan.events, config.actions, "actions")))
    if len(set(actions)) == plan.events.width - TIME_WIDTH * plan.events.use_time:
        raise ValueError("actions names every event field, which leaves nothing for the item rows")
    return HSTUPlan(
        plan.events,
        plan.candidate,
        config.query_width or share,
        config.value_width or share,
        longest=longest_history(plan.events, config.max_length) * (1 + config.interleave),
        buckets=config.time_buckets * plan.events.timestamps,
        actions=actions,
    )


def count_params(config: HSTUConfig, schema: Schema) -> Params:
    """Closed form of the parameter tree."""
    plan, D, H = plan_hstu(config, schema), config.width, config.heads
    both, values = H * (plan.query_width + plan.value_width), H * plan.value_width
    layer = (D + 1) * 2 * both + values * D + D + 2 * D + 2 * values + plan.longest + 1 + plan.buckets
    dense = plan.events.params + (plan.events.width + plan.candidate.candidate_width + 2 + config.interleave) * D
    return Params(dense=dense + config.layers * layer, positions=config.layers * (plan.longest + 1))


def count_flops(config: HSTUConfig, schema: Schema) -> Flops:
    """Closed form of the matrix products."""
    plan, D, H, L = plan_hstu(config, schema), config.width, config.heads, config.layers
    S, both, values = plan.events.length, H * (plan.query_width + plan.value_width), H * plan.value_width
    embed, query = 2 * S * plan.events.width * D, 2 * plan.candidate.candidate_width * D
    S *= 1 + config.interleave
    layer = 4 * S * D * both + 2 * S * S * both + 2 * S * values * D
    one = 4 * D * both + 2 * (S + 1) * both + 2 * values * D
    return plan.flops(embed, query, (L - 1) * layer + 2 * S * D * both, L * one)


HSTU_SPEC = EncoderSpec(
    HSTUConfig,
    builder(HSTU, plan_hstu),
    candidate_token,
    count_params,
    count_flops,
    sized_by_width(count_params),
)
