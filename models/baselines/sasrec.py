"""SASRec-style causal encoder (after arXiv 1808.09781): the newest event's row summarises the history.

    x_0 = e W + b + pos;  x_l = pre-norm causal block (an event sees itself and older ones), feed-forward ratio 1
    token = norm(x_L)[0], zero without events

Letters: R requests, S events, A event width (time feature included), D width, H heads, L layers. One user token
[R, 1, D]: the candidate meets it in the backbone. Only row 0 is read, so the last layer computes no other row.

Closed forms: params = A*D + D + S_max*D + L*(6*D^2 + 10*D) + 2*D
    per request = 2*S*A*D + (L-1)*(12*S*D^2 + 4*S^2*D) + 8*D^2 + 4*S*D^2 + 4*S*D

Undisclosed here -> flag (default): width (32), heads (1), layers (2), init. The paper trains on next-event prediction;
here, as for every encoder, the ranking loss reaches it through the token.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from recscale.models.architecture import EncoderSpec
from recscale.models.counts import Flops, Params
from recscale.models.inputs.batch import UserInputs
from recscale.models.inputs.history import (
    EventPlan,
    EventReader,
    HistoryOptions,
    Positions,
    TokenShape,
    longest_history,
    plan_events,
)
from recscale.models.inputs.schema import Schema
from recscale.models.layers.dense import Dense
from recscale.models.layers.history_attention import HistoryBlock, Visible, block_flops, block_params
from recscale.models.layers.norms import Norm
from recscale.models.ranker import EncodedHistory, SequenceEncoder

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class SASRecConfig(HistoryOptions):
    """width D, heads H, layers L; max_length: S_max of the positions, None for the schema's length."""

    width: int = 32
    heads: int = 1
    layers: int = 2
    max_length: int | None = None
    activation: str = "relu"
    init: str = "lecun_normal"
    implementation: str | None = None


class SASRec(SequenceEncoder):
    """The history of `events` -> one user token [R, 1, D]."""

    def __init__(
        self,
        events: EventPlan,
        width: int,
        heads: int,
        layers: int,
        *,
        longest: int,
        activation: str = "relu",
        init: str = "lecun_normal",
        implementation: str | None = None,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs = dict(init=init, dtype=dtype, rngs=rngs)
        self.reader = EventReader(events, rngs=rngs)
        self.embed = Dense(events.width, width, **kwargs)
        self.positions = Positions(longest, width, rngs=rngs)
        block = dict(hidden=width, activation=activation, implementation=implementation, **kwargs)
        self.blocks = nnx.List(HistoryBlock(width, heads, **block) for _ in range(layers))
        self.final_norm = Norm(width, dtype=dtype)

    def encode_user(self, user: UserInputs) -> EncodedHistory:
        view = self.reader(user)
        x = self.positions(view._replace(events=self.embed(view.events))).events
        for i, block in enumerate(self.blocks):
            rows = x[:, :1] if i == len(self.blocks) - 1 else x
            x = block(rows, Visible(block.keys(x), view.length, "causal"))
        some = (view.length > 0)[:, None, None]
        return EncodedHistory(jnp.where(some, self.final_norm(x[:, :1]), 0), None)


def build(config: SASRecConfig, schema: Schema, *, rngs: nnx.Rngs, dtype=jnp.float32) -> SASRec:
    """The encoder of a config."""
    events = plan_events(schema, config)
    flags = ("width", "heads", "layers", "activation", "init", "implementation")
    values = {name: getattr(config, name) for name in flags}
    return SASRec(events, longest=longest_history(events, config.max_length), dtype=dtype, rngs=rngs, **values)


def token_shape(config: SASRecConfig, schema: Schema) -> TokenShape:
    """One user token of width D."""
    return TokenShape(user=1, width=config.width)


def count_params(config: SASRecConfig, schema: Schema) -> Params:
    """Closed form of the parameter tree."""
    events, D = plan_events(schema, config), config.width
    dense = events.params + events.width * D + D + longest_history(events, config.max_length) * D
    return Params(dense=dense + config.layers * block_params(D, hidden=D) + 2 * D)


def count_flops(config: SASRecConfig, schema: Schema) -> Flops:
    """Closed form of the matrix products."""
    events, D = plan_events(schema, config), config.width
    S, embed = events.length, 2 * events.length * events.width * D
    user = embed + (config.layers - 1) * block_flops(D, S, S, S * S, hidden=D) + block_flops(D, 1, S, S, hidden=D)
    return Flops(user, user_unneeded=embed * (not events.trained))


SASREC = EncoderSpec(SASRecConfig, build, token_shape, count_params, count_flops)
