"""What encoders share whose candidates read a history: sizes, the plan of both sides, and the one token they give.

Letters: S events, A event width (time feature included), D token width, H heads, D_x width of all candidate fields
joined.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from recscale.models.counts import Flops, Params
from recscale.models.inputs.flat import FlatPlan, plan_flat
from recscale.models.inputs.history import EventPlan, HistoryOptions, TokenShape, plan_events
from recscale.models.inputs.schema import Schema
from recscale.models.layers.param import Init
from recscale.models.options import require_sizes
from recscale.models.ranker import SequenceEncoder
from recscale.models.sizing import sized_by

# A score that leaves nothing after the softmax and is below every other, without an infinity on the way.
INVISIBLE = -1e30


@dataclasses.dataclass(frozen=True)
class EncoderOptions(HistoryOptions):
    """width D, heads H, init of the weights."""

    width: int = 32
    heads: int = 2
    init: Init = "lecun_normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(width=self.width, heads=self.heads)


@dataclasses.dataclass(frozen=True)
class ReadingPlan:
    """Which events are read, and the candidate fields that read them."""

    events: EventPlan
    candidate: FlatPlan

    def flops(self, embed: int, query: int, user: int = 0, candidate: int = 0) -> Flops:
        """FLOPs per request and per candidate.

        embed: products of the events as they are, and query: of the candidate fields, whose gradients nobody needs
        where they are raw numbers. user, candidate: all other products.
        """
        unneeded = embed * (not self.events.trained), query * (not self.candidate.candidate_trained)
        return Flops(embed + user, query + candidate, *unneeded)


def plan_reading(config: HistoryOptions, schema: Schema) -> ReadingPlan:
    """Both sides of a schema for one config."""
    return ReadingPlan(plan_events(schema, config), plan_flat(schema))


def builder(
    model: Callable[..., SequenceEncoder], plan: Callable[[Any, Schema], Any] = plan_reading
) -> Callable[..., SequenceEncoder]:
    """The `build` of an encoder that is made of a plan and its config."""

    def build(config: Any, schema: Schema, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> SequenceEncoder:
        return model(plan(config, schema), config, dtype=dtype, rngs=rngs)

    return build


def candidate_token(config: EncoderOptions, schema: Schema) -> TokenShape:
    """One candidate token of width D, the `token_shape` of most encoders."""
    return TokenShape(candidate=1, width=config.width)


def sized_by_width(count_params: Callable[..., Params]) -> Callable[..., Iterator[dict[str, Any]]]:
    """The `size_space` of most encoders: widths D of whole heads."""
    return sized_by(lambda config, width: {"width": width}, count_params, lambda config: config.heads)


def masked_softmax(
    scores: Float[Array, "*rows"], visible: Bool[Array, "*#rows"], axis: int = -1
) -> Float[Array, "*rows"]:
    """Softmax of the visible scores in float32, exactly 0 elsewhere and where nothing is visible."""
    weights = jax.nn.softmax(jnp.where(visible, scores.astype(jnp.float32), INVISIBLE), axis=axis)
    return jnp.where(visible, weights, 0.0)


def per_event(queries: Float[Array, "R C W *sizes"], chunk: int, events: int) -> Float[Array, "R C S *sizes"]:
    """[R,C,W,...] -> [R,C,S,...]: every event sees the row of its chunk of events."""
    return jnp.repeat(queries, chunk, axis=2)[:, :, :events]


def with_candidates(x: Float[Array, "*rows S F"]) -> Float[Array, "R C S F"]:
    """[R,S,F] of a request -> [R,1,S,F]; [R,C,S,F] stays."""
    return x[:, None] if x.ndim == 3 else x
