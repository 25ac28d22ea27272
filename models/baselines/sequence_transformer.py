"""Transformer encoder over the events, read by target attention.

    x_0 = e W + b + pos                                                                      [R, S, D]
    x_l = pre-norm block (attention of all valid events to each other, feed-forward network of ratio 4)
    token = target attention of the candidate over norm(x_L)

Letters: R requests, C candidates, S events, A event width (time feature included), D width, H heads, L layers, D_x
width of all candidate fields joined. One candidate token [R, C, 1, D]; all but its query is computed once per request.

target_in_sequence=True puts the candidate in front of the events (position -1, projected by its own matrix) and its row
after L layers is the token. Nothing can then be reused: every candidate pays for S + 1 rows.

Closed forms (target_in_sequence=False):
    params        = A*D + D + S_max*D + L*(12*D^2 + 13*D) + 2*D + D_x*D + 3*D^2
    per request   = 2*S*A*D + L*(24*S*D^2 + 4*S^2*D) + 4*S*D^2;     per candidate = 2*D_x*D + 4*S*D + 2*D^2
target_in_sequence=True: params lose 3*D^2 and gain D; per request 2*S*A*D; with n = S + 1 (the last layer has one row)
    per candidate 2*D_x*D + (L-1)*(24*n*D^2 + 4*n^2*D) + 20*D^2 + 4*n*D^2 + 4*n*D

Undisclosed -> flag (default): width (32), heads (2), layers (2), positions (True), causal (False), init.
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
from recscale.models.layers.history_attention import HistoryBlock, TargetRead, Visible, block_flops, block_params
from recscale.models.layers.norms import Norm
from recscale.models.ranker import EncodedHistory, SequenceEncoder

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class SequenceTransformerConfig(HistoryOptions):
    """width D, heads H, layers L; max_length: S_max of the positions, None for the schema's length; see the file."""

    width: int = 32
    heads: int = 2
    layers: int = 2
    positions: bool = True
    causal: bool = False
    target_in_sequence: bool = False
    max_length: int | None = None
    init: str = "lecun_normal"
    remat: bool = False
    implementation: str | None = None

    def __post_init__(self):
        if self.causal and self.target_in_sequence:
            raise ValueError("causal and target_in_sequence exclude each other: a causal event never sees the target")


class SequenceTransformer(SequenceEncoder):
    """The history of `events`, encoded by L blocks; `longest` rows of positions, 0 for none."""

    def __init__(
        self,
        events: EventPlan,
        candidate: FlatPlan,
        width: int,
        heads: int,
        layers: int,
        *,
        longest: int,
        causal: bool = False,
        target_in_sequence: bool = False,
        remat: bool = False,
        init: str = "lecun_normal",
        implementation: str | None = None,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.candidate, self.mode, self.remat = candidate, "causal" if causal else "full", remat
        kwargs = dict(init=init, dtype=dtype, rngs=rngs)
        self.reader = EventReader(events, rngs=rngs)
        self.embed = Dense(events.width, width, **kwargs)
        self.positions = Positions(longest, width, rngs=rngs) if longest else None
        self.blocks = nnx.List(
            HistoryBlock(width, heads, implementation=implementation, **kwargs) for _ in range(layers)
        )
        self.final_norm = Norm(width, dtype=dtype)
        D_x = candidate.candidate_width
        self.target = Dense(D_x, width, axes=("features", "embed"), **kwargs) if target_in_sequence else None
        read = (
            None
            if target_in_sequence
            else TargetRead(D_x, width, width, heads, implementation=implementation, **kwargs)
        )
        self.read = read

    def encode_user(self, user: UserInputs) -> EncodedHistory:
        view = self.reader(user)
        view = view._replace(events=jnp.where(view.valid[..., None], self.embed(view.events), 0))
        x = view.events if self.positions is None else self.positions(view).events
        if self.target is not None:
            return EncodedHistory(None, (x, view.length))
        for block in self.blocks:
            x = self._run(block, x, view.length)
        return EncodedHistory(None, (self.read.keys(self.final_norm(x)), view.length))

    def candidate_tokens(self, cache, candidates: CandidateInputs) -> Array:
        x = self.candidate.join_candidates(candidates)
        if self.target is None:
            return self.read(x, *cache)
        events, length = cache
        requests, per_request, _ = x.shape
        target = self.target(x).reshape(requests * per_request, 1, -1)
        rows = jnp.concatenate([target, jnp.repeat(events, per_request, axis=0)], axis=1)
        length = jnp.repeat(length, per_request) + 1
        for i, block in enumerate(self.blocks):
            rows = self._run(block, rows, length, 1 if i == len(self.blocks) - 1 else None)
        return self.final_norm(rows).reshape(requests, per_request, 1, -1)

    def _run(self, block: HistoryBlock, x: Array, length: Array, rows: int | None = None) -> Array:
        """One block on the first `rows` rows."""

        def run():
            return block(x[:, :rows], Visible(block.keys(x), length, self.mode))

        return jax.checkpoint(run)() if self.remat else run()


def build(
    config: SequenceTransformerConfig, schema: Schema, *, rngs: nnx.Rngs, dtype=jnp.float32
) -> SequenceTransformer:
    """The encoder of a config."""
    flags = ("width", "heads", "layers", "causal", "target_in_sequence", "remat", "init", "implementation")
    return SequenceTransformer(
        plan_events(schema, config),
        plan_flat(schema),
        longest=_longest(config, schema),
        dtype=dtype,
        rngs=rngs,
        **{name: getattr(config, name) for name in flags},
    )


def token_shape(config: SequenceTransformerConfig, schema: Schema) -> TokenShape:
    """One candidate token of width D."""
    return TokenShape(candidate=1, width=config.width)


def count_params(config: SequenceTransformerConfig, schema: Schema) -> Params:
    """Closed form of the parameter tree."""
    events, D = plan_events(schema, config), config.width
    dense = events.params + events.width * D + D + _longest(config, schema) * D
    dense += config.layers * block_params(D) + 2 * D + plan_flat(schema).candidate_width * D
    return Params(dense=dense + (D if config.target_in_sequence else 3 * D * D))


def count_flops(config: SequenceTransformerConfig, schema: Schema) -> Flops:
    """Closed form of the matrix products."""
    events, candidate, D, L = plan_events(schema, config), plan_flat(schema), config.width, config.layers
    S, embed, query = events.length, 2 * events.length * events.width * D, 2 * candidate.candidate_width * D
    unneeded = dict(
        user_unneeded=embed * (not events.trained), candidate_unneeded=query * (not candidate.candidate_trained)
    )
    if config.target_in_sequence:
        n = S + 1
        rows = (L - 1) * block_flops(D, n, n, n * n) + block_flops(D, 1, n, n)
        return Flops(embed, query + rows, **unneeded)
    user = embed + L * block_flops(D, S, S, S * S) + 4 * S * D * D
    return Flops(user, query + 4 * S * D + 2 * D * D, **unneeded)


def _longest(config: SequenceTransformerConfig, schema: Schema) -> int:
    return longest_history(plan_events(schema, config), config.max_length) if config.positions else 0


SEQUENCE_TRANSFORMER = EncoderSpec(SequenceTransformerConfig, build, token_shape, count_params, count_flops)
