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
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from recscale.models.architecture import EncoderSpec
from recscale.models.counts import Flops, Params
from recscale.models.inputs import CandidateInputs, Field, Schema, Sequence, UserInputs
from recscale.models.inputs.history import (
    TIME_WIDTH,
    EventReader,
    HistoryOptions,
    TokenShape,
    choose_sequence,
    plan_events,
)
from recscale.models.layers import param
from recscale.models.layers.dense import Dense
from recscale.models.layers.matmul import contract
from recscale.models.layers.per_token import Activation, activation
from recscale.models.options import require_sizes
from recscale.models.ranker import EncodedHistory, SequenceEncoder
from recscale.models.sizing import sized_by

from .encoding import ReadingPlan, builder, masked_softmax, per_event, plan_reading, with_candidates


@dataclasses.dataclass(frozen=True)
class DINConfig(HistoryOptions):
    """hidden = (F1, F2); the rest as in the file's docstring."""

    hidden: tuple[int, ...] = (80, 40)
    candidate: Literal["match", "project"] = "match"
    softmax: bool = False
    activation: Activation = "relu"
    init: param.Init = "lecun_normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(hidden=self.hidden)
        if len(self.hidden) != 2:
            raise ValueError(f"hidden is {self.hidden}, expected the two widths (F1, F2)")


@dataclasses.dataclass(frozen=True)
class DINPlan(ReadingPlan):
    """Both sides of a schema, and how candidate fields line up with events.

    parts: per event field (and the time feature) the matching candidate field or None, and the width.
    matched: whether a matching field has a table, so that a gradient must flow back into it.
    """

    parts: tuple[tuple[str | None, int], ...]
    matched: bool


class ActivationUnit(nnx.Module):
    """a_s = MLP([e_s, x, e_s - x, e_s * x]) and sum_s valid_s * a_s * e_s, the first layer split as in the file.

    Events are [R,S,A], or [R,C,S,A] where they differ by candidate; queries x [R,C,W,A] are one per chunk of events.
    """

    def __init__(
        self,
        width: int,
        hidden: tuple[int, ...],
        *,
        softmax: bool = False,
        activation: Activation = "relu",
        init: param.Init = "lecun_normal",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        F1, F2 = hidden
        self.softmax, self.act, self.dtype = softmax, activation, dtype
        self.kernel = param.kernel(rngs, (4 * width, F1), ("embed", "hidden"), init)
        self.bias = param.constant((F1,), ("hidden",))
        self.second = Dense(F1, F2, init=init, dtype=dtype, rngs=rngs)
        self.out = Dense(F2, 1, init=init, dtype=dtype, rngs=rngs)

    def prepare(self, events: Float[Array, "*rows S A"]) -> tuple[Array, ...]:
        """The events and their part of the first layer."""
        own, _, difference, _ = jnp.split(self.kernel[...], 4, axis=0)
        rows = events.reshape(-1, events.shape[-1])
        first = contract("ba,af->bf", rows, own + difference, self.dtype)
        return events, first.reshape(*events.shape[:-1], -1)

    def read(
        self, queries: Float[Array, "R C W A"], chunk: int, prepared: tuple[Array, ...], valid: Bool[Array, "R S"]
    ) -> Float[Array, "R C A"]:
        """The sum for x of event s being query s // chunk."""
        events, first = (with_candidates(x) for x in prepared)
        _, other, difference, product = jnp.split(self.kernel[...], 4, axis=0)
        from_query = contract("rcwa,af->rcwf", queries, other - difference, self.dtype)
        pairs = events * per_event(queries, chunk, valid.shape[1])
        h = contract("rcsa,af->rcsf", pairs, product, self.dtype) + first
        h = h + per_event(from_query, chunk, valid.shape[1])
        h = activation(self.act)(h + self.bias[...].astype(self.dtype)[None, None, None])
        weights, visible = self.out(activation(self.act)(self.second(h)))[..., 0], valid[:, None]
        weights = masked_softmax(weights, visible) if self.softmax else jnp.where(visible, weights, 0)
        lead = "rc"[: prepared[0].ndim - 2]
        return contract(f"rcs,{lead}sa->rca", weights.astype(self.dtype), prepared[0], self.dtype)


class _State(NamedTuple):
    events: tuple[Array, ...]
    valid: Array


class DIN(ActivationUnit, SequenceEncoder):
    """The history of `plan`, read by every candidate: one candidate token [R, C, 1, A]."""

    def __init__(self, plan: DINPlan, options: DINConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        A, D_x, init, self.plan, project = plan.events.width, plan.candidate.candidate_width, options.init, plan, None
        self.reader = EventReader(plan.events, rngs=rngs)
        if options.candidate == "project":
            project = Dense(D_x, A, axes=("features", "embed"), init=init, dtype=dtype, rngs=rngs)
        self.project = project
        super().__init__(
            A,
            options.hidden,
            softmax=options.softmax,
            activation=options.activation,
            init=init,
            dtype=dtype,
            rngs=rngs,
        )

    def encode_user(self, user: UserInputs) -> EncodedHistory:
        view = self.reader(user)
        return EncodedHistory(None, _State(self.prepare(view.events.astype(self.dtype)), view.valid))

    def candidate_tokens(self, cache: _State, candidates: CandidateInputs) -> Float[Array, "R C 1 A"]:
        x = self._candidate(candidates).astype(self.dtype)
        return self.read(x[:, :, None], cache.valid.shape[1], cache.events, cache.valid)[:, :, None]

    def _candidate(self, candidates: CandidateInputs) -> Array:
        """x [R, C, A]."""
        x = self.plan.candidate.join_candidates(candidates)
        if self.project is not None:
            return self.project(x)
        parts = [
            candidates.fields[name] if name else jnp.zeros((*x.shape[:2], width), x.dtype)
            for name, width in self.plan.parts
        ]
        return jnp.concatenate(parts, axis=-1)


def unit_params(width: int, hidden: tuple[int, ...]) -> int:
    """Parameters of `ActivationUnit`."""
    F1, F2 = hidden
    return 4 * width * F1 + F1 + F1 * F2 + 2 * F2 + 1


def token_shape(config: DINConfig, schema: Schema) -> TokenShape:
    """One candidate token of the events' width."""
    return TokenShape(candidate=1, width=plan_events(schema, config).width)


def count_params(config: DINConfig, schema: Schema) -> Params:
    """Closed form of the parameter tree."""
    plan, A = plan_din(config, schema), plan_events(schema, config).width
    projected = (plan.candidate.candidate_width * A + A) * (config.candidate == "project")
    return Params(dense=plan.events.params + unit_params(A, config.hidden) + projected)


def count_flops(config: DINConfig, schema: Schema) -> Flops:
    """Closed form of the matrix products."""
    plan, (F1, F2), project = plan_din(config, schema), config.hidden, config.candidate == "project"
    events, A, S, x = plan.events, plan.events.width, plan.events.length, project or plan.matched
    projection = 2 * plan.candidate.candidate_width * A * project
    unneeded = projection * (not plan.candidate.candidate_trained) + 2 * A * F1 * (not x)
    unneeded += 2 * S * A * F1 * (not (x or events.trained)) + 2 * S * A * (not events.trained)
    per_candidate = 2 * A * F1 + S * (2 * A * F1 + 2 * F1 * F2 + 2 * F2) + 2 * S * A + projection
    return Flops(2 * S * A * F1, per_candidate, 2 * S * A * F1 * (not events.trained), unneeded)


def plan_din(config: DINConfig, schema: Schema) -> DINPlan:
    """Resolves the flags for one schema.

    Raises:
        ValueError: candidate="match" and no candidate field has a table of an event field.
    """
    both = plan_reading(config, schema)
    sequence = choose_sequence(schema, both.events.sequence)
    partners = partner_fields(schema, sequence, needed=config.candidate == "match")
    parts = [(p.name if p else None, field.width) for p, field in zip(partners, sequence.fields, strict=True)]
    if both.events.use_time:
        parts.append((None, TIME_WIDTH))
    matched = any(partner is not None and not partner.is_dense for partner in partners)
    return DINPlan(both.events, both.candidate, tuple(parts), matched)


def partner_fields(schema: Schema, sequence: Sequence, *, needed: bool) -> list[Field | None]:
    """Of every event field the candidate field that shares its table; ValueError if one is `needed` and none does."""
    by_table = {field.table_name: field for field in reversed(schema.candidate_fields)}
    partners = [by_table.get(field.table_name) for field in sequence.fields]
    if needed and not any(partners):
        raise ValueError(
            f"candidate='match' found no candidate field that shares a table with an event field of {sequence.name!r} "
            f"({', '.join(field.table_name for field in sequence.fields)}); use candidate='project'"
        )
    return partners


def _hidden(config: DINConfig, width: int) -> dict[str, Any]:
    """Hidden layers of which the first is so wide, in the ratio they are configured in."""
    return {"hidden": tuple(max(1, round(width * each / config.hidden[0])) for each in config.hidden)}


build = builder(DIN, plan_din)
DIN_SPEC = EncoderSpec(DINConfig, build, token_shape, count_params, count_flops, sized_by(_hidden, count_params))
