"""TWIN-lite (after arXiv 2302.02352): the K best events of a long history, then target attention over them.

    alpha_hs = x W_Q^h . e_s W_K^h / sqrt(d)
    stage 1: keep the K valid events with the largest sum_h alpha_hs (of equals the newer; no gradient)
    stage 2: token = softmax_h over those K of the same alpha_hs, times e_s W_V, times W_O

Letters: R requests, C candidates, S events, A event width (time feature included), D width, H heads, d = D / H, D_x
width of all candidate fields joined. One candidate token [R, C, 1, D]. Both stages share one scoring, as in the paper;
its cross features (user by item, split off in front of the projection) are not here, hence "lite".

values="selected" projects the values of the K events each candidate kept; "all" projects every event once per request
(cheaper if C*K > S).

Closed forms: params = D_x*D + 2*A*D + D^2;  per request 2*S*A*D ("all": 4*S*A*D)
    per candidate 2*D_x*D + 2*S*D + 2*K*D + 2*D^2 (+ 2*K*A*D "selected")

Flags (default): width (32), heads (4), selected K (50), init.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ..architecture import EncoderSpec
from ..counts import Flops, Params
from ..inputs.batch import CandidateInputs, UserInputs
from ..inputs.flat import FlatPlan, plan_flat
from ..inputs.history import EventPlan, EventReader, HistoryOptions, TokenShape, plan_events
from ..inputs.schema import Schema
from ..layers.dense import Dense
from ..layers.history_attention import check_heads, split_heads
from ..layers.matmul import contract
from ..ranker import EncodedHistory, SequenceEncoder

Array = jax.Array

# Below every score: never selected before a valid event, and without weight in the softmax.
_INVISIBLE = -1e30


@dataclasses.dataclass(frozen=True)
class TwinLiteConfig(HistoryOptions):
    """width D, heads H, selected K; values: see the file."""

    width: int = 32
    heads: int = 4
    selected: int = 50
    values: Literal["selected", "all"] = "selected"
    init: str = "lecun_normal"

    def __post_init__(self):
        if self.selected < 1:
            raise ValueError(f"selected is {self.selected}, expected at least 1 event")


class _State(NamedTuple):
    """keys [R, S, H, d]; events [R, S, A], or their values [R, S, D]; length [R]."""

    keys: Array
    events: Array
    length: Array


class TwinLite(SequenceEncoder):
    """The history of `events` -> one candidate token [R, C, 1, D]."""

    def __init__(
        self,
        events: EventPlan,
        candidate: FlatPlan,
        width: int,
        heads: int,
        selected: int,
        *,
        values: str = "selected",
        init: str = "lecun_normal",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_heads(width, heads)
        self.candidate, self.heads, self.selected, self.dtype = candidate, heads, selected, dtype
        self.early = values == "all"
        kwargs = dict(use_bias=False, init=init, dtype=dtype, rngs=rngs)
        self.reader = EventReader(events, rngs=rngs)
        self.query = Dense(candidate.candidate_width, width, axes=("features", "heads"), **kwargs)
        self.key = Dense(events.width, width, axes=("embed", "heads"), **kwargs)
        self.value = Dense(events.width, width, axes=("embed", "heads"), **kwargs)
        self.out = Dense(width, width, axes=("heads", "embed"), **kwargs)

    def encode_user(self, user: UserInputs) -> EncodedHistory:
        view = self.reader(user)
        events = self.value(view.events) if self.early else view.events.astype(self.dtype)
        return EncodedHistory(None, _State(split_heads(self.key(view.events), self.heads), events, view.length))

    def candidate_tokens(self, cache: _State, candidates: CandidateInputs) -> Array:
        q = split_heads(self.query(self.candidate.join_candidates(candidates)), self.heads)
        scores = contract("rchd,rshd->rchs", q, cache.keys, self.dtype).astype(jnp.float32) * q.shape[-1] ** -0.5
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
    return TwinLite(plan_events(schema, config), plan_flat(schema), dtype=dtype, rngs=rngs, **flags)


def token_shape(config: TwinLiteConfig, schema: Schema) -> TokenShape:
    """One candidate token of width D."""
    return TokenShape(candidate=1, width=config.width)


def count_params(config: TwinLiteConfig, schema: Schema) -> Params:
    """Closed form of the parameter tree."""
    events, D = plan_events(schema, config), config.width
    return Params(dense=events.params + plan_flat(schema).candidate_width * D + 2 * events.width * D + D * D)


def count_flops(config: TwinLiteConfig, schema: Schema) -> Flops:
    """Closed form of the matrix products."""
    events, candidate, D = plan_events(schema, config), plan_flat(schema), config.width
    S, early, each = events.length, config.values == "all", 2 * events.width * D
    K, query = min(config.selected, S), 2 * candidate.candidate_width * D
    user, late = S * each * (1 + early), K * each * (not early)
    return Flops(
        user,
        query + 2 * S * D + 2 * K * D + 2 * D * D + late,
        user * (not events.trained),
        query * (not candidate.candidate_trained) + late * (not events.trained),
    )


TWIN_LITE = EncoderSpec(TwinLiteConfig, build, token_shape, count_params, count_flops)
