"""Target attention (multi-head): every candidate reads the events with one query.

    token = softmax(x W_Q (e W_K)^T / sqrt(d)) e W_V W_O                                     no norm, no residual

Letters: R requests, C candidates, S events, A event width (time feature included), D token width, H heads, d = D / H,
D_x width of all candidate fields joined, which are x. One candidate token [R, C, 1, D]; blind to order without a time
feature. Keys and values are made once per request.

Closed forms: params = D_x*D + 2*A*D + D^2;  per request 4*S*A*D;  per candidate 2*D_x*D + 4*S*D + 2*D^2

Undisclosed -> flag (default): width (32), heads (2), init.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from recscale.models.architecture import EncoderSpec
from recscale.models.counts import Flops, Params
from recscale.models.inputs.batch import CandidateInputs, UserInputs
from recscale.models.inputs.flat import FlatPlan, plan_flat
from recscale.models.inputs.history import EventPlan, EventReader, HistoryOptions, TokenShape, plan_events
from recscale.models.inputs.schema import Schema
from recscale.models.layers.history_attention import KeyValues, TargetRead
from recscale.models.ranker import EncodedHistory, SequenceEncoder

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class TargetAttentionConfig(HistoryOptions):
    """width D, heads H; implementation: of the attention."""

    width: int = 32
    heads: int = 2
    init: str = "lecun_normal"
    implementation: str | None = None


class TargetAttention(SequenceEncoder):
    """The history of `events`, read by the joined fields of `candidate`."""

    def __init__(
        self,
        events: EventPlan,
        candidate: FlatPlan,
        width: int,
        heads: int,
        *,
        init: str = "lecun_normal",
        implementation: str | None = None,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.candidate = candidate
        self.reader = EventReader(events, rngs=rngs)
        kwargs = dict(init=init, implementation=implementation, dtype=dtype, rngs=rngs)
        self.read = TargetRead(candidate.candidate_width, events.width, width, heads, **kwargs)

    def encode_user(self, user: UserInputs) -> EncodedHistory:
        view = self.reader(user)
        return EncodedHistory(None, (self.read.keys(view.events), view.length))

    def candidate_tokens(self, cache: tuple[KeyValues, Array], candidates: CandidateInputs) -> Array:
        return self.read(self.candidate.join_candidates(candidates), *cache)


def build(config: TargetAttentionConfig, schema: Schema, *, rngs: nnx.Rngs, dtype=jnp.float32) -> TargetAttention:
    """The encoder of a config."""
    flags = {name: getattr(config, name) for name in ("width", "heads", "init", "implementation")}
    return TargetAttention(plan_events(schema, config), plan_flat(schema), dtype=dtype, rngs=rngs, **flags)


def token_shape(config: TargetAttentionConfig, schema: Schema) -> TokenShape:
    """One candidate token of width D."""
    return TokenShape(candidate=1, width=config.width)


def count_params(config: TargetAttentionConfig, schema: Schema) -> Params:
    """Closed form of the parameter tree."""
    events, D = plan_events(schema, config), config.width
    return Params(dense=events.params + plan_flat(schema).candidate_width * D + 2 * events.width * D + D * D)


def count_flops(config: TargetAttentionConfig, schema: Schema) -> Flops:
    """Closed form of the matrix products."""
    events, candidate, D = plan_events(schema, config), plan_flat(schema), config.width
    keys, query = 4 * events.length * events.width * D, 2 * candidate.candidate_width * D
    return Flops(
        keys,
        query + 4 * events.length * D + 2 * D * D,
        keys * (not events.trained),
        query * (not candidate.candidate_trained),
    )


TARGET_ATTENTION = EncoderSpec(TargetAttentionConfig, build, token_shape, count_params, count_flops)
