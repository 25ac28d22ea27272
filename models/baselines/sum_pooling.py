"""Sum pooling of a history: the null control of every sequence model, blind to the candidate and to order.

    token = sum_s valid_s * e_s          pool="mean" divides by max(length, 1)

Letters: R requests, S events, A event width (time feature included). One user token [R, 1, A], no matrix product.
Parameters: 64*8 of the time buckets, if used. Flags: `recent` keeps the newest events only; `time_feature` as in
`recscale.models.inputs.history`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from recscale.models.architecture import EncoderSpec
from recscale.models.counts import Flops, Params
from recscale.models.inputs import Schema, UserInputs
from recscale.models.inputs.history import EventReader, HistoryOptions, TokenShape, plan_events
from recscale.models.ranker import EncodedHistory, SequenceEncoder

from .encoding import ReadingPlan, builder


@dataclasses.dataclass(frozen=True)
class SumPoolingConfig(HistoryOptions):
    """pool: whether the sum is divided by the number of events."""

    pool: Literal["sum", "mean"] = "sum"


class SumPooling(SequenceEncoder):
    """The history of `plan` -> one user token [R, 1, A]."""

    def __init__(self, plan: ReadingPlan, options: SumPoolingConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.pool, self.dtype = options.pool, dtype
        self.reader = EventReader(plan.events, rngs=rngs)

    def encode_user(self, user: UserInputs) -> EncodedHistory:
        view = self.reader(user)
        token = view.events.astype(jnp.float32).sum(axis=1)
        if self.pool == "mean":
            token = token / jnp.maximum(view.valid.sum(axis=1, dtype=jnp.float32), 1.0)[:, None]
        return EncodedHistory(token[:, None].astype(self.dtype), None)


def token_shape(config: SumPoolingConfig, schema: Schema) -> TokenShape:
    """One user token; raw dense events without a time feature need no gradient."""
    events = plan_events(schema, config)
    return TokenShape(user=1, width=events.width, user_trained=events.trained)


def count_params(config: SumPoolingConfig, schema: Schema) -> Params:
    """The time buckets, if used."""
    return Params(dense=plan_events(schema, config).params)


def count_flops(config: SumPoolingConfig, schema: Schema) -> Flops:
    """No matrix product."""
    return Flops()


SUM_POOLING = EncoderSpec(
    SumPoolingConfig,
    builder(SumPooling),
    token_shape,
    count_params,
    count_flops,
)
