"""TWIN-lite (after arXiv 2302.02352): the K best events of a long history, then target attention over them.

    alpha_hs = x W_Q^h . e_s W_K^h / sqrt(d) + sum_j (cross_sj . w_j) beta_jh
    stage 1: keep the K valid events with the largest sum_h alpha_hs (of equals the newer; no gradient)
    stage 2: token = softmax_h over those K of the same alpha_hs, times e_s W_V, times W_O

Letters: R requests, C candidates, S events, A event width (time feature included), D width, H heads, d = D / H, D_x
width of all candidate fields joined. One candidate token [R, C, 1, D]. Both stages share one scoring, as in the paper.
Its cross features (user by item, J of them) are the event fields named by `cross` (none by default): split off in front
of the projections, each becomes one number a_j -> 1 and a bias of every head. A counts the other fields.

values="selected" projects the values of the K events each candidate kept; "all" projects every event once per request
(cheaper if C*K > S).

Closed forms: params = D_x*D + 2*A*D + D^2;  per request 2*S*A*D ("all": 4*S*A*D)
    per candidate 2*D_x*D + 2*S*D + 2*K*D + 2*D^2 (+ 2*K*A*D "selected")
    cross: sum_j a_j + J*H more parameters, 2*S*(sum_j a_j + J*H) more per request

Flags (default): width (32), heads (4), selected K (50), init.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from recscale.models.architecture import EncoderSpec
from recscale.models.counts import Flops, Params
from recscale.models.inputs.batch import CandidateInputs, UserInputs
from recscale.models.inputs.flat import FlatPlan, plan_flat
from recscale.models.inputs.history import (
    EventPlan,
    EventReader,
    HistoryOptions,
    TokenShape,
    event_columns,
    plan_events,
)
from recscale.models.inputs.schema import Schema
from recscale.models.layers import param
from recscale.models.layers.dense import Dense
from recscale.models.layers.history_attention import check_heads, split_heads
from recscale.models.layers.matmul import contract
from recscale.models.ranker import EncodedHistory, SequenceEncoder

Array = jax.Array

# Below every score: never selected before a valid event, and without weight in the softmax.
_INVISIBLE = -1e30


@dataclasses.dataclass(frozen=True)
class TwinLiteConfig(HistoryOptions):
    """width D, heads H, selected K; values, cross: see the file."""

    width: int = 32
    heads: int = 4
    selected: int = 50
    values: Literal["selected", "all"] = "selected"
    cross: tuple[str, ...] = ()
    init: str = "lecun_normal"

    def __post_init__(self):
        if self.selected < 1:
            raise ValueError(f"selected is {self.selected}, expected at least 1 event")


class _State(NamedTuple):
    """keys [R, S, H, d]; events [R, S, A] or their values [R, S, D]; length [R]; bias [R, S, H] or None."""

    keys: Array
    events: Array
    length: Array
    bias: Array | None


class TwinLite(SequenceEncoder):
    """The history of `events` -> one candidate token [R, C, 1, D]; cross: columns of each cross feature."""

    def __init__(
        self,
        events: EventPlan,
        candidate: FlatPlan,
        width: int,
        heads: int,
        selected: int,
        *,
        values: str = "selected",
        cross: tuple[tuple[int, ...], ...] = (),
        init: str = "lecun_normal",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_heads(width, heads)
        self.candidate, self.heads, self.selected, self.dtype = candidate, heads, selected, dtype
        self.early = values == "all"
        kwargs = dict(use_bias=False, init=init, dtype=dtype, rngs=rngs)
        self.reader = EventReader(events, rngs=rngs)
        self.cross = cross
        self.kept = tuple(i for i in range(events.width) if i not in itertools.chain(*cross))
        self.query = Dense(candidate.candidate_width, width, axes=("features", "heads"), **kwargs)
        self.key = Dense(len(self.kept), width, axes=("embed", "heads"), **kwargs)
        self.value = Dense(len(self.kept), width, axes=("embed", "heads"), **kwargs)
        self.out = Dense(width, width, axes=("heads", "embed"), **kwargs)
        self.numbers = nnx.List(Dense(len(own), 1, axes=("embed", "features"), **kwargs) for own in cross)
        self.beta = param.kernel(rngs, (len(cross), heads), ("features", "heads"), init) if cross else None

    def encode_user(self, user: UserInputs) -> EncodedHistory:
        view, bias = self.reader(user), None
        events = view.events
        if self.cross:
            pairs = zip(self.numbers, self.cross, strict=True)
            numbers = [number(events[..., np.asarray(own)]) for number, own in pairs]
            bias = contract("rsj,jh->rsh", jnp.concatenate(numbers, axis=-1), self.beta[...], self.dtype)
            events = events[..., np.asarray(self.kept)]
        keys = split_heads(self.key(events), self.heads)
        events = self.value(events) if self.early else events.astype(self.dtype)
        return EncodedHistory(None, _State(keys, events, view.length, bias))

    def candidate_tokens(self, cache: _State, candidates: CandidateInputs) -> Array:
        q = split_heads(self.query(self.candidate.join_candidates(candidates)), self.heads)
        scores = contract("rchd,rshd->rchs", q, cache.keys, self.dtype).astype(jnp.float32) * q.shape[-1] ** -0.5
        if cache.bias is not None:
            scores = scores + cache.bias.astype(jnp.float32).swapaxes(1, 2)[:, None]
        valid = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None] < cache.length[:, None]
        index = select_events(scores.sum(axis=2), valid[:, None], self.selected)  # [R, C, K]
        kept = jnp.take_along_axis(scores, index[:, :, None], axis=-1)
        visible = jnp.take_along_axis(
            jnp.broadcast_to(valid[:, None], scores.shape[:2] + valid.shape[1:]), index, axis=-1
        )
        weights = jax.nn.softmax(jnp.where(visible[:, :, None], kept, _INVISIBLE), axis=-1)
        weights = jnp.where(visible[:, :, None], weights, 0.0)
        chosen = jax.vmap(lambda events, own: events[own])(cache.events, index)  # [R, C, K, A or D]
        values = split_heads(chosen if self.early else self.value(chosen), self.heads)
        mixed = contract("rchk,rckhd->rchd", weights, values, self.dtype)
        return self.out(mixed.reshape(*mixed.shape[:2], 1, -1))


def select_events(scores: Array, valid: Array, selected: int) -> Array:
    """Columns of the K = min(selected, S) largest valid scores [R, C, S], of equals the newer: int32 [R, C, K]."""
    scores = jnp.where(valid, jax.lax.stop_gradient(scores), _INVISIBLE)
    return jax.lax.top_k(scores, min(selected, scores.shape[-1]))[1]


def build(config: TwinLiteConfig, schema: Schema, *, rngs: nnx.Rngs, dtype=jnp.float32) -> TwinLite:
    """The encoder of a config."""
    flags = {name: getattr(config, name) for name in ("width", "heads", "selected", "values", "init")}
    events, cross, _ = _events(config, schema)
    return TwinLite(events, plan_flat(schema), cross=cross, dtype=dtype, rngs=rngs, **flags)


def token_shape(config: TwinLiteConfig, schema: Schema) -> TokenShape:
    """One candidate token of width D."""
    return TokenShape(candidate=1, width=config.width)


def count_params(config: TwinLiteConfig, schema: Schema) -> Params:
    """Closed form of the parameter tree."""
    (events, cross, A), D = _events(config, schema), config.width
    dense = events.params + plan_flat(schema).candidate_width * D + 2 * A * D + D * D
    return Params(dense=dense + events.width - A + len(cross) * config.heads)


def count_flops(config: TwinLiteConfig, schema: Schema) -> Flops:
    """Closed form of the matrix products."""
    (events, cross, A), candidate, D = _events(config, schema), plan_flat(schema), config.width
    S, early, each = events.length, config.values == "all", 2 * A * D
    K, query = min(config.selected, S), 2 * candidate.candidate_width * D
    user, late = S * each * (1 + early), K * each * (not early)
    user += 2 * S * (events.width - A)
    return Flops(
        user + 2 * S * len(cross) * config.heads,
        query + 2 * S * D + 2 * K * D + 2 * D * D + late,
        user * (not events.trained),
        query * (not candidate.candidate_trained) + late * (not events.trained),
    )


def _events(config: TwinLiteConfig, schema: Schema) -> tuple[EventPlan, tuple[tuple[int, ...], ...], int]:
    """(events, columns of the cross features, width A of what is left for keys and values)."""
    events = plan_events(schema, config)
    cross = event_columns(schema, events, config.cross, "cross")
    left = events.width - sum(map(len, cross))
    if len(set(config.cross)) < len(cross) or not left:
        raise ValueError(f"cross is {config.cross}, expected different event fields, and one that is not among them")
    return events, cross, left


TWIN_LITE = EncoderSpec(TwinLiteConfig, build, token_shape, count_params, count_flops)
