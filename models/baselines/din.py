"""DIN (arXiv 1706.06978): events weighted by an MLP of event and candidate, summed without softmax.

    a_s = MLP([e_s, x, e_s - x, e_s * x])          token = sum_s valid_s * a_s * e_s

Letters: R requests, C candidates, S events, A event width (time feature included), F1 and F2 widths of the MLP.
One candidate token [R, C, 1, A]. The MLP's first layer is split exactly: with row blocks W_e, W_x, W_-, W_* it is
(W_e + W_-) e per request, (W_x - W_-) x per candidate, W_* (e * x) per pair.

The candidate vector x has the events' layout. candidate="match" (as in the paper, where both are item embeddings) takes
for every event field the candidate field that uses the same table, zeros where there is none; "project" maps all
candidate fields to width A.

Closed forms: params = 4*A*F1 + F1 + F1*F2 + 2*F2 + 1 (+ D_x*A + A projected, + 64*8 time buckets)
    per request 2*S*A*F1;  per candidate 2*A*F1 + S*(2*A*F1 + 2*F1*F2 + 2*F2) + 2*S*A (+ 2*D_x*A)

Undisclosed -> flag (default): widths -> hidden ((80, 40)); activation ("relu"; the paper's Dice is a batch statistic);
softmax (False, as printed); `recent` (None) keeps the newest events only.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from recscale.models.architecture import EncoderSpec
from recscale.models.counts import Flops, Params
from recscale.models.inputs.batch import CandidateInputs, UserInputs
from recscale.models.inputs.history import (
    TIME_WIDTH,
    EventPlan,
    EventReader,
    HistoryOptions,
    TokenShape,
    choose_sequence,
    plan_events,
)
from recscale.models.inputs.schema import Schema
from recscale.models.layers import param
from recscale.models.layers.dense import Dense
from recscale.models.layers.matmul import contract
from recscale.models.layers.per_token import activation
from recscale.models.ranker import EncodedHistory, SequenceEncoder

Array = jax.Array

# A score that leaves nothing after the softmax, and no infinity on the way.
_INVISIBLE = -1e30


@dataclasses.dataclass(frozen=True)
class DINConfig(HistoryOptions):
    """hidden = (F1, F2); the rest as in the file's docstring."""

    hidden: tuple[int, ...] = (80, 40)
    candidate: Literal["match", "project"] = "match"
    softmax: bool = False
    activation: str = "relu"
    init: str = "lecun_normal"

    def __post_init__(self):
        if len(self.hidden) != 2:
            raise ValueError(f"hidden is {self.hidden}, expected the two widths (F1, F2)")


@dataclasses.dataclass(frozen=True)
class CandidateLayout:
    """How candidate fields line up with events.

    parts: per event field (and the time feature) the matching candidate field or None, and the width.
    names, width: all candidate fields and their total width, used when they are projected.
    """

    parts: tuple[tuple[str | None, int], ...]
    names: tuple[str, ...]
    width: int


class _State(NamedTuple):
    events: Array
    valid: Array
    first: Array


class DIN(SequenceEncoder):
    """The history of `events`, read by every candidate: one candidate token [R, C, 1, A]."""

    def __init__(
        self,
        events: EventPlan,
        layout: CandidateLayout,
        hidden: tuple[int, int],
        *,
        project: bool = False,
        softmax: bool = False,
        activation: str = "relu",
        init: str = "lecun_normal",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        A, (F1, F2), kwargs = events.width, hidden, dict(init=init, dtype=dtype, rngs=rngs)
        self.layout, self.softmax, self.act, self.dtype = layout, softmax, activation, dtype
        self.reader = EventReader(events, rngs=rngs)
        self.project = Dense(layout.width, A, axes=("features", "embed"), **kwargs) if project else None
        self.kernel = param.kernel(rngs, (4 * A, F1), ("embed", "hidden"), init)
        self.bias = param.constant((F1,), ("hidden",))
        self.second = Dense(F1, F2, **kwargs)
        self.out = Dense(F2, 1, **kwargs)

    def encode_user(self, user: UserInputs) -> EncodedHistory:
        view = self.reader(user)
        events = view.events.astype(self.dtype)
        own, _, difference, _ = self._blocks()
        first = contract("rsa,af->rsf", events, own + difference, self.dtype)
        return EncodedHistory(None, _State(events, view.valid, first))

    def candidate_tokens(self, cache: _State, candidates: CandidateInputs) -> Array:
        _, other, difference, product = self._blocks()
        x = self._candidate(candidates).astype(self.dtype)
        pairs = cache.events[:, None] * x[:, :, None]
        h = contract("rcsa,af->rcsf", pairs, product, self.dtype) + cache.first[:, None]
        h = h + contract("rca,af->rcf", x, other - difference, self.dtype)[:, :, None]
        h = activation(self.act)(h + self.bias[...].astype(self.dtype)[None, None, None])
        weights = self._weights(self.out(activation(self.act)(self.second(h)))[..., 0], cache.valid)
        return contract("rcs,rsa->rca", weights, cache.events, self.dtype)[:, :, None]

    def _blocks(self) -> list[Array]:
        """W_e, W_x, W_-, W_*, each [A, F1]."""
        return jnp.split(self.kernel[...], 4, axis=0)

    def _candidate(self, candidates: CandidateInputs) -> Array:
        """x [R, C, A]."""
        fields = candidates.fields
        if self.project is not None:
            return self.project(jnp.concatenate([fields[name] for name in self.layout.names], axis=-1))
        like = fields[self.layout.names[0]]
        return jnp.concatenate(
            [
                fields[name] if name else jnp.zeros((*like.shape[:2], width), like.dtype)
                for name, width in self.layout.parts
            ],
            axis=-1,
        )

    def _weights(self, scores: Array, valid: Array) -> Array:
        """[R, C, S], exactly 0 on padding."""
        visible = valid[:, None]
        if self.softmax:
            scores = jax.nn.softmax(jnp.where(visible, scores.astype(jnp.float32), _INVISIBLE), axis=-1)
        return jnp.where(visible, scores, 0).astype(self.dtype)


def build(config: DINConfig, schema: Schema, *, rngs: nnx.Rngs, dtype=jnp.float32) -> DIN:
    """The encoder of a config."""
    events = plan_events(schema, config)
    return DIN(
        events,
        _layout(config, schema, events),
        config.hidden,
        project=config.candidate == "project",
        softmax=config.softmax,
        activation=config.activation,
        init=config.init,
        dtype=dtype,
        rngs=rngs,
    )


def token_shape(config: DINConfig, schema: Schema) -> TokenShape:
    """One candidate token of the events' width."""
    return TokenShape(candidate=1, width=plan_events(schema, config).width)


def count_params(config: DINConfig, schema: Schema) -> Params:
    """Closed form of the parameter tree."""
    events = plan_events(schema, config)
    layout, A, (F1, F2) = _layout(config, schema, events), events.width, config.hidden
    dense = events.params + 4 * A * F1 + F1 + F1 * F2 + 2 * F2 + 1
    return Params(dense=dense + (layout.width * A + A) * (config.candidate == "project"))


def count_flops(config: DINConfig, schema: Schema) -> Flops:
    """Closed form of the matrix products."""
    events, (F1, F2), project = plan_events(schema, config), config.hidden, config.candidate == "project"
    layout, A, S = _layout(config, schema, events), events.width, events.length
    tables = {field.name: not field.is_dense for field in schema.candidate_fields}
    fields = any(tables[name] for name in layout.names)
    x = project or any(tables[name] for name, _ in layout.parts if name)
    projection = 2 * layout.width * A * project
    unneeded = projection * (not fields) + 2 * A * F1 * (not x)
    unneeded += 2 * S * A * F1 * (not (x or events.trained)) + 2 * S * A * (not events.trained)
    per_candidate = 2 * A * F1 + S * (2 * A * F1 + 2 * F1 * F2 + 2 * F2) + 2 * S * A + projection
    return Flops(2 * S * A * F1, per_candidate, 2 * S * A * F1 * (not events.trained), unneeded)


def _layout(config: DINConfig, schema: Schema, events: EventPlan) -> CandidateLayout:
    sequence = choose_sequence(schema, events.sequence)
    by_table = {field.table_name: field for field in reversed(schema.candidate_fields)}
    partners = [by_table.get(field.table_name) for field in sequence.fields]
    parts = [(p.name if p else None, field.width) for p, field in zip(partners, sequence.fields, strict=True)]
    if events.use_time:
        parts.append((None, TIME_WIDTH))
    if config.candidate == "match" and not any(partners):
        raise ValueError(
            f"candidate='match' found no candidate field that shares a table with an event field of "
            f"{sequence.name!r} ({', '.join(field.table_name for field in sequence.fields)}); use candidate='project'"
        )
    names = tuple(field.name for field in schema.candidate_fields)
    return CandidateLayout(tuple(parts), names, sum(field.width for field in schema.candidate_fields))


DIN_SPEC = EncoderSpec(DINConfig, build, token_shape, count_params, count_flops)
