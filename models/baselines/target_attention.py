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

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recscale.models.architecture import EncoderSpec
from recscale.models.counts import Flops, Params
from recscale.models.inputs import CandidateInputs, Schema, UserInputs
from recscale.models.inputs.history import EventReader
from recscale.models.layers.history_attention import KeyValues, TargetRead
from recscale.models.ranker import EncodedHistory, SequenceEncoder

from .encoding import EncoderOptions, ReadingPlan, builder, candidate_token, plan_reading, sized_by_width


@dataclasses.dataclass(frozen=True)
class TargetAttentionConfig(EncoderOptions):
    """width D, heads H; implementation: of the attention."""

    implementation: str | None = None


class TargetAttention(SequenceEncoder):
    """The events of `plan`, read by its candidate fields."""

    def __init__(
        self,
        plan: ReadingPlan,
        options: TargetAttentionConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.candidate = plan.candidate
        self.reader = EventReader(plan.events, rngs=rngs)
        self.read = TargetRead(
            plan.candidate.candidate_width,
            plan.events.width,
            options.width,
            options.heads,
            init=options.init,
            implementation=options.implementation,
            dtype=dtype,
            rngs=rngs,
        )

    def encode_user(self, user: UserInputs) -> EncodedHistory:
        view = self.reader(user)
        return EncodedHistory(None, (self.read.keys(view.events), view.length))

    def candidate_tokens(self, cache: tuple[KeyValues, Array], candidates: CandidateInputs) -> Float[Array, "R C 1 D"]:
        return self.read(self.candidate.join_candidates(candidates), *cache)


def count_params(config: TargetAttentionConfig, schema: Schema) -> Params:
    """Closed form of the parameter tree."""
    plan, D = plan_reading(config, schema), config.width
    return Params(dense=plan.events.params + (plan.candidate.candidate_width + 2 * plan.events.width + D) * D)


def count_flops(config: TargetAttentionConfig, schema: Schema) -> Flops:
    """Closed form of the matrix products."""
    plan, S, D = plan_reading(config, schema), plan_reading(config, schema).events.length, config.width
    keys, query = 4 * S * plan.events.width * D, 2 * plan.candidate.candidate_width * D
    return plan.flops(keys, query, candidate=4 * S * D + 2 * D * D)


TARGET_ATTENTION = EncoderSpec(
    TargetAttentionConfig,
    builder(TargetAttention),
    candidate_token,
    count_params,
    count_flops,
    sized_by_width(count_params),
)
