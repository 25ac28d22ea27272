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

`sasrec` (after arXiv 1808.09781) is the causal encoder whose newest row summarises the history:

    x_0 = e W + b + pos;  x_l = pre-norm causal block (an event sees itself and older ones), ReLU network of ratio 1
    token = norm(x_L)[0], zero without events

One user token [R, 1, D]: the candidate meets it in the backbone. Only row 0 is read, so the last layer computes no
other row. Here, as for every encoder, the ranking loss reaches it through the token; the paper trains on next events.
    params      = A*D + D + S_max*D + L*(6*D^2 + 10*D) + 2*D
    per request = 2*S*A*D + (L-1)*(12*S*D^2 + 4*S^2*D) + 8*D^2 + 4*S*D^2 + 4*S*D
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recscale.models.architecture import EncoderSpec
from recscale.models.counts import Flops, Params
from recscale.models.inputs import CandidateInputs, Schema, UserInputs
from recscale.models.inputs.history import EventReader, Positions, TokenShape, longest_history
from recscale.models.layers.dense import Dense
from recscale.models.layers.history_attention import HistoryBlock, TargetRead, Visible, block_flops, block_params
from recscale.models.layers.norms import Norm
from recscale.models.layers.per_token import Activation
from recscale.models.options import require_sizes
from recscale.models.ranker import EncodedHistory, SequenceEncoder

from .encoding import EncoderOptions, ReadingPlan, builder, candidate_token, plan_reading, sized_by_width


@dataclasses.dataclass(frozen=True)
class TransformerOptions(EncoderOptions):
    """layers L; max_length: S_max of the positions, None for the schema's length; implementation: of the attention."""

    layers: int = 2
    max_length: int | None = None
    implementation: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(layers=self.layers)


@dataclasses.dataclass(frozen=True)
class SequenceTransformerConfig(TransformerOptions):
    """positions: whether events have them; causal, target_in_sequence: see the file; remat: keep block inputs only."""

    positions: bool = True
    causal: bool = False
    target_in_sequence: bool = False
    remat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length is not None and not self.positions:
            raise ValueError("max_length has no effect without positions; set positions=True or leave it None")
        if self.causal and self.target_in_sequence:
            raise ValueError("causal and target_in_sequence exclude each other: a causal event never sees the target")


@dataclasses.dataclass(frozen=True)
class SASRecConfig(TransformerOptions):
    """One head by default; activation of the networks."""

    heads: int = 1
    activation: Activation = "relu"


class EventTransformer(SequenceEncoder):
    """Base class: events brought to width D, with positions, and L blocks.

    Args:
        plan: the events.
        mode: which events a row sees, "full" or "causal". hidden: of the networks, None for 4*D.
    """

    def __init__(
        self,
        plan: ReadingPlan,
        options: TransformerOptions,
        *,
        mode: str,
        positions: bool = True,
        hidden: int | None = None,
        activation: Activation = "gelu",
        remat: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        D, init = options.width, options.init
        self.mode, self.remat = mode, remat
        self.reader = EventReader(plan.events, rngs=rngs)
        self.embed = Dense(plan.events.width, D, init=init, dtype=dtype, rngs=rngs)
        longest = longest_history(plan.events, options.max_length)
        self.positions = Positions(longest, D, rngs=rngs) if positions else None
        self.blocks = nnx.List(
            HistoryBlock(
                D,
                options.heads,
                hidden=hidden,
                activation=activation,
                init=init,
                implementation=options.implementation,
                dtype=dtype,
                rngs=rngs,
            )
            for _ in range(options.layers)
        )
        self.final_norm = Norm(D, dtype=dtype)

    def embedded(self, user: UserInputs) -> tuple[Float[Array, "R S D"], Array]:
        """x_0, 0 on padding, and the lengths [R]."""
        view = self.reader(user)
        view = view._replace(events=jnp.where(view.valid[..., None], self.embed(view.events), 0))
        return (view if self.positions is None else self.positions(view)).events, view.length

    def encode(self, x: Float[Array, "N n D"], length: Array, *, first: bool = False) -> Float[Array, "N rows D"]:
        """norm(x_L) of all rows, or of row 0 alone, which is all that the last layer then computes."""
        for i, block in enumerate(self.blocks):
            rows = 1 if first and i == len(self.blocks) - 1 else None

            def run(x: Array, block: HistoryBlock = block, rows: int | None = rows) -> Array:
                return block(x[:, :rows], Visible(block.keys(x), length, self.mode))

            x = jax.checkpoint(run)(x) if self.remat else run(x)
        return self.final_norm(x[:, :1] if first else x)


class SASRec(EventTransformer):
    """The history of `plan` -> one user token [R, 1, D]."""

    def __init__(self, plan: ReadingPlan, options: SASRecConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        act, hidden = options.activation, options.width
        super().__init__(plan, options, mode="causal", hidden=hidden, activation=act, dtype=dtype, rngs=rngs)

    def encode_user(self, user: UserInputs) -> EncodedHistory:
        x, length = self.embedded(user)
        return EncodedHistory(jnp.where((length > 0)[:, None, None], self.encode(x, length, first=True), 0), None)


class SequenceTransformer(EventTransformer):
    """The history of `plan`, read by its candidate fields, or with them in front of the events."""

    def __init__(
        self, plan: ReadingPlan, options: SequenceTransformerConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        super().__init__(
            plan,
            options,
            mode="causal" if options.causal else "full",
            positions=options.positions,
            remat=options.remat,
            dtype=dtype,
            rngs=rngs,
        )
        self.candidate, D, D_x, init = plan.candidate, options.width, plan.candidate.candidate_width, options.init
        target = read = None
        if options.target_in_sequence:
            target = Dense(D_x, D, axes=("features", "embed"), init=init, dtype=dtype, rngs=rngs)
        else:
            kernel = options.implementation
            read = TargetRead(D_x, D, D, options.heads, init=init, implementation=kernel, dtype=dtype, rngs=rngs)
        self.target, self.read = target, read

    def encode_user(self, user: UserInputs) -> EncodedHistory:
        x, length = self.embedded(user)
        return EncodedHistory(None, (x if self.read is None else self.read.keys(self.encode(x, length)), length))

    def candidate_tokens(self, cache: tuple[Any, Array], candidates: CandidateInputs) -> Float[Array, "R C 1 D"]:
        x, (events, length) = self.candidate.join_candidates(candidates), cache
        if self.read is not None:
            return self.read(x, events, length)
        requests, count, _ = x.shape
        target = cast(Dense, self.target)(x).reshape(requests * count, 1, -1)
        rows = jnp.concatenate([target, jnp.repeat(events, count, axis=0)], axis=1)
        return self.encode(rows, jnp.repeat(length, count) + 1, first=True).reshape(requests, count, 1, -1)


def user_token(config: SASRecConfig, schema: Schema) -> TokenShape:
    """One user token of width D."""
    return TokenShape(user=1, width=config.width)


def count_params(config: TransformerOptions, schema: Schema) -> Params:
    """Closed form of the parameter tree of both encoders."""
    plan, D = plan_reading(config, schema), config.width
    longest = longest_history(plan.events, config.max_length)
    positions = longest * D if not isinstance(config, SequenceTransformerConfig) or config.positions else 0
    dense = plan.events.params + plan.events.width * D + D + positions + 2 * D
    if not isinstance(config, SequenceTransformerConfig):
        return Params(dense=dense + config.layers * block_params(D, hidden=D), positions=positions)
    dense += config.layers * block_params(D) + plan.candidate.candidate_width * D
    return Params(dense=dense + (D if config.target_in_sequence else 3 * D * D), positions=positions)


def count_flops(config: TransformerOptions, schema: Schema) -> Flops:
    """Closed form of the matrix products of both encoders."""
    plan, D, L = plan_reading(config, schema), config.width, config.layers
    S = plan.events.length
    embed, query = 2 * S * plan.events.width * D, 2 * plan.candidate.candidate_width * D
    if not isinstance(config, SequenceTransformerConfig):
        rows = (L - 1) * block_flops(D, S, S, S * S, hidden=D) + block_flops(D, 1, S, S, hidden=D)
        return plan.flops(embed, 0, user=rows)
    if config.target_in_sequence:
        n = S + 1
        return plan.flops(embed, query, candidate=(L - 1) * block_flops(D, n, n, n * n) + block_flops(D, 1, n, n))
    user = L * block_flops(D, S, S, S * S) + 4 * S * D * D
    return plan.flops(embed, query, user, 4 * S * D + 2 * D * D)


_SIZES = sized_by_width(count_params)
SEQUENCE_TRANSFORMER = EncoderSpec(
    SequenceTransformerConfig, builder(SequenceTransformer), candidate_token, count_params, count_flops, _SIZES
)
SASREC = EncoderSpec(SASRecConfig, builder(SASRec), user_token, count_params, count_flops, _SIZES)
