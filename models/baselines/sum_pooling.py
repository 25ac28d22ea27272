"""Sum pooling of a history: the null control of every sequence model, blind to the candidate and to order.

    token = sum_s valid_s * e_s          pool="mean" divides by max(length, 1)

Letters: R requests, S events, A event width (time feature included). One user token [R, 1, A], no matrix product.
Parameters: 64*8 of the time buckets, if used. Flags: `recent` keeps the newest events only; `time_feature` as in
`recscale.models.inputs.history`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ..architecture import EncoderSpec
from ..counts import Flops, Params
from ..inputs.batch import UserInputs
from ..inputs.history import (
    TIME_BUCKETS,
    TIME_WIDTH,
    TimeFeature,
    TokenShape,
    choose_sequence,
    find_history,
    read_history,
    uses_time,
)
from ..inputs.schema import Schema
from ..ranker import EncodedHistory, SequenceEncoder

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class SumPoolingConfig:
    """sequence: which history, None if there is one; recent: keep the newest columns, None for all."""

    sequence: str | None = None
    pool: Literal["sum", "mean"] = "sum"
    recent: int | None = None
    time_feature: Literal["auto", "bucket", "none"] = "auto"


class SumPooling(SequenceEncoder):
    """The history called `sequence` -> one user token [R, 1, A]."""

    def __init__(
        self,
        sequence: str,
        *,
        pool: str = "sum",
        recent: int | None = None,
        use_time: bool = False,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.sequence, self.pool, self.recent, self.dtype = sequence, pool, recent, dtype
        self.time = TimeFeature(rngs=rngs) if use_time else None

    def encode_user(self, user: UserInputs) -> EncodedHistory:
        view = read_history(find_history(user, self.sequence), self.recent)
        view = view if self.time is None else self.time(view)
        token = view.events.astype(jnp.float32).sum(axis=1)
        if self.pool == "mean":
            token = token / jnp.maximum(view.valid.sum(axis=1, dtype=jnp.float32), 1.0)[:, None]
        return EncodedHistory(token[:, None].astype(self.dtype), None)


def build(config: SumPoolingConfig, schema: Schema, *, rngs: nnx.Rngs, dtype=jnp.float32) -> SumPooling:
    """The encoder of a config."""
    sequence = choose_sequence(schema, config.sequence)
    use_time = uses_time(sequence, config.time_feature)
    return SumPooling(sequence.name, pool=config.pool, recent=config.recent, use_time=use_time, dtype=dtype, rngs=rngs)


def token_shape(config: SumPoolingConfig, schema: Schema) -> TokenShape:
    """One user token; raw dense events without a time feature need no gradient."""
    sequence = choose_sequence(schema, config.sequence)
    use_time = uses_time(sequence, config.time_feature)
    trained = use_time or any(not field.is_dense for field in sequence.fields)
    return TokenShape(user=1, width=sequence.width + TIME_WIDTH * use_time, user_trained=trained)


def count_params(config: SumPoolingConfig, schema: Schema) -> Params:
    """The time buckets, if used."""
    use_time = uses_time(choose_sequence(schema, config.sequence), config.time_feature)
    return Params(dense=TIME_BUCKETS * TIME_WIDTH * use_time)


def count_flops(config: SumPoolingConfig, schema: Schema) -> Flops:
    """No matrix product."""
    return Flops()


SUM_POOLING = EncoderSpec(SumPoolingConfig, build, token_shape, count_params, count_flops)
