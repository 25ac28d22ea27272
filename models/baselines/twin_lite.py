"""TWIN-lite (after arXiv 2302.02352): the K best events of a long history, then target attention over them.

    alpha_hs = x W_Q^h . e_s W_K^h / sqrt(d) + sum_j (cross_sj . w_j) beta_jh
    stage 1: keep the K valid events with the largest sum_h alpha_hs (of equals the newer; no gradient)
    stage 2: token = softmax_h over those K of the same alpha_hs, times e_s W_V, times W_O

Letters: R requests, C candidates, S events, A event width (time feature included), D width, H heads, d = D / H, D_x
width of all candidate fields joined. One candidate token [R, C, 1, D]. Both stages share one scoring, as in the paper.
Its cross features (user by item, J of them) are the event fields named by `cross` (none by default): split off in front
of the projections, each becomes one number a_j -> 1 and a bias of every head. A counts the other fields.

values="selected" projects the values of the K events each candidate kept; "all" projects every event once per request
(cheaper if C*K > S).

Closed forms: params = D_x*D + 2*A*D + D^2;  per request 2*S*A*D ("all": 4*S*A*D)
    per candidate 2*D_x*D + 2*S*D + 2*K*D + 2*D^2 (+ 2*K*A*D "selected")
    cross: sum_j a_j + J*H more parameters, 2*S*(sum_j a_j + J*H) more per request

Flags (default): width (32), heads (4), selected K (50), init.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

from recscale.models.architecture import EncoderSpec
from recscale.models.counts import Flops, Params
from recscale.models.inputs import CandidateInputs, Schema, UserInputs
from recscale.models.inputs.history import EventReader, event_columns
from recscale.models.layers import param
from recscale.models.layers.dense import Dense
from recscale.models.layers.history_attention import check_heads, split_heads
from recscale.models.layers.matmul import contract
from recscale.models.options import require_sizes
from recscale.models.ranker import EncodedHistory, SequenceEncoder

from .encoding import (
    INVISIBLE,
    EncoderOptions,
    ReadingPlan,
    builder,
    candidate_token,
    masked_softmax,
    plan_reading,
    sized_by_width,
)


@dataclasses.dataclass(frozen=True)
class TwinLiteConfig(EncoderOptions):
    """width D, heads H, selected K; values, cross: see the file."""

    heads: int = 4
    selected: int = 50
    values: Literal["selected", "all"] = "selected"
    cross: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(selected=self.selected)
        check_heads(self.width, self.heads)


@dataclasses.dataclass(frozen=True)
class TwinLitePlan(ReadingPlan):
    """Both sides of a schema, and which columns of the events each cross feature is made of."""

    cross: tuple[tuple[int, ...], ...]

    @property
    def A(self) -> int:
        """Width of what is left for keys and values."""
        return self.events.width - sum(map(len, self.cross))


class _State(NamedTuple):
    """keys [R, S, H, d]; events [R, S, A] or their values [R, S, D]; length [R]; bias [R, S, H] or None."""

    keys: Array
    events: Array
    length: Array
    bias: Array | None


class TwinLite(SequenceEncoder):
    """The history of `plan` -> one candidate token [R, C, 1, D]."""

    def __init__(
        self,
        plan: TwinLitePlan,
        options: TwinLiteConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        D, init = options.width, options.init
        self.candidate, self.heads, self.selected, self.dtype = plan.candidate, options.heads, options.selected, dtype
        self.early = options.values == "all"
        self.reader = EventReader(plan.events, rngs=rngs)
        self.cross = cross = plan.cross
        self.kept = tuple(i for i in range(plan.events.width) if i not in itertools.chain(*cross))
        dense = functools.partial(Dense, use_bias=False, init=init, dtype=dtype, rngs=rngs)
        self.query = dense(plan.candidate.candidate_width, D, axes=("features", "heads"))
        self.key, self.value = (dense(len(self.kept), D, axes=("embed", "heads")) for _ in range(2))
        self.out = dense(D, D, axes=("heads", "embed"))
        self.numbers = nnx.List(dense(len(own), 1, axes=("embed", "features")) for own in cross)
        axes = ("features", "heads")
        self.beta = param.kernel(rngs, (len(cross), options.heads), axes, init) if cross else None

    def encode_user(self, user: UserInputs) -> EncodedHistory:
        view, bias = self.reader(user), None
        events = view.events
        if self.beta is not None:
            pairs = zip(self.numbers, self.cross, strict=True)
            numbers = [number(events[..., np.asarray(own)]) for number, own in pairs]
            bias = contract("rsj,jh->rsh", jnp.concatenate(numbers, axis=-1), self.beta[...], self.dtype)
            events = events[..., np.asarray(self.kept)]
        keys = split_heads(self.key(events), self.heads)
        events = self.value(events) if self.early else events.astype(self.dtype)
        return EncodedHistory(None, _State(keys, events, view.length, bias))

    def candidate_tokens(self, cache: _State, candidates: CandidateInputs) -> Float[Array, "R C 1 D"]:
        q = split_heads(self.query(self.candidate.join_candidates(candidates)), self.heads)
        scores = contract("rchd,rshd->rchs", q, cache.keys, self.dtype).astype(jnp.float32) * q.shape[-1] ** -0.5
        if cache.bias is not None:
            scores = scores + cache.bias.astype(jnp.float32).swapaxes(1, 2)[:, None]
        valid = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None] < cache.length[:, None]
        index = select_events(scores.sum(axis=2), valid[:, None], self.selected)  # [R, C, K]
        kept = jnp.take_along_axis(scores, index[:, :, None], axis=-1)
        visible = jnp.take_along_axis(
            jnp.broadcast_to(valid[:, None], scores.shape[:2] + valid.shape[1:]), index, axis=-1
        )
        weights = masked_softmax(kept, visible[:, :, None])
        chosen = jax.vmap(lambda events, own: events[own])(cache.events, index)  # [R, C, K, A or D]
        values = split_heads(chosen if self.early else self.value(chosen), self.heads)
        mixed = contract("rchk,rckhd->rchd", weights, values, self.dtype)
        return self.out(mixed.reshape(*mixed.shape[:2], 1, -1))


def select_events(scores: Float[Array, "R C S"], valid: Bool[Array, "R 1 S"], selected: int) -> Int32[Array, "R C K"]:
    """Columns of the K = min(selected, S) largest valid scores [R, C, S], of equals the newer: int32 [R, C, K]."""
    scores = jnp.where(valid, jax.lax.stop_gradient(scores), INVISIBLE)
    return jax.lax.top_k(scores, min(selected, scores.shape[-1]))[1]


def count_params(config: TwinLiteConfig, schema: Schema) -> Params:
    """Closed form of the parameter tree."""
    plan, D = plan_twin_lite(config, schema), config.width
    A, numbers = plan.A, len(plan.cross)
    dense = plan.events.params + plan.candidate.candidate_width * D + 2 * A * D + D * D
    return Params(dense=dense + plan.events.width - A + numbers * config.heads)


def count_flops(config: TwinLiteConfig, schema: Schema) -> Flops:
    """Closed form of the matrix products."""
    plan, D = plan_twin_lite(config, schema), config.width
    A, S = plan.A, plan.events.length
    early, each = config.values == "all", 2 * A * D
    K, query = min(config.selected, S), 2 * plan.candidate.candidate_width * D
    embed, late = S * each * (1 + early) + 2 * S * (plan.events.width - A), K * each * (not early)
    total = plan.flops(embed, query, 2 * S * len(plan.cross) * config.heads, 2 * S * D + 2 * K * D + 2 * D * D + late)
    return total + Flops(candidate_unneeded=late * (not plan.events.trained))


def plan_twin_lite(config: TwinLiteConfig, schema: Schema) -> TwinLitePlan:
    """Resolves the flags for one schema.

    Raises:
        ValueError: `cross` names what is no event field, a field twice, or all of them.
    """
    both = plan_reading(config, schema)
    plan = TwinLitePlan(both.events, both.candidate, event_columns(schema, both.events, config.cross, "cross"))
    if len(set(config.cross)) < len(config.cross) or not plan.A:
        raise ValueError(f"cross is {config.cross}, expected different event fields, and one that is not among them")
    return plan


TWIN_LITE = EncoderSpec(
    TwinLiteConfig,
    builder(TwinLite, plan_twin_lite),
    candidate_token,
    count_params,
    count_flops,
    sized_by_width(count_params),
)
