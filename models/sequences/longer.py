"""LONGER (arXiv 2505.04421): merged events, global tokens, one cross-causal and L-1 self-causal layers.

1. Events:   e = W_2 gelu((events + pos) W_1 + b_1) + b_2, 0 on padding                         [R, S, A]
2. Merge:    P consecutive events, counted from the newest, go through InnerTrans (blocks of width A inside the group)
             and are joined: h [R, S_m, D], D = P*A, S_m = ceil(S/P), of which ceil(length/P) are valid.
3. Globals:  each set of fields has its own projection to D; a learnable one (CLS) is a vector.
4. One index space per candidate, [candidate globals ; user globals ; h]; key j is visible to row i iff j >= i and j is
   valid. Layer 1: rows are the m globals and K sampled events, keys are everything. Layers 2..L: rows and keys are the
   m + K rows. Every layer is a pre-norm block with a feed-forward network of ratio 4; a last norm follows.
5. Tokens out: the m globals and the mean of the valid event rows.

No event sees a global, and user globals do not see candidate globals. So `encode_user` finishes events and user
globals, and keeps K and V of every layer; `score` adds the rows of the candidate globals. Nothing of C*S_m*D exists.

Letters: R requests, C candidates, S events, A_in their width (time feature included), A event width, P merge size,
S_m merged events, D = P*A, m = m_c + m_u globals, K sampled rows, L layers, a = m_u + K, n keys.

Closed forms (norm="layer", use_bias=True):
    params        = S_max*A_in + A_in*A + A^2 + 2*A + inner*(12*A^2 + 13*A) + sum_g (in_g*D + D)
                    + L*(12*D^2 + 13*D) + 2*D
    front         = 2*S*(A_in*A + A^2) + inner*S_m*(24*P*A^2 + 4*P^2*A)
    per request   = front + 2*sum_user in_g*D + sum_l [20*a*D^2 + 4*(m_u + n_l)*D^2 + 4*D*(a*n_l + m_u^2)],
                    n_1 = S_m, then K
    per candidate = 2*sum_candidate in_g*D + sum_l [24*m_c*D^2 + 4*m_c*(m + n_l)*D]

Undisclosed -> flag (default): layers (2), n_global (m_c, m_u) (1, 3), head_dim (32), norm and use_bias ("layer", True),
activation ("gelu"), output_norm (False: no norm behind what attention adds), inner (1 block), inner_heads (4),
inner_extra_residual (False: the figure draws one around InnerTrans), inner_init (1: scale of the first weights of what
InnerTrans adds; at 0 it starts as plain joining), readout ("globals_mean"), init, the time feature. m_c = 2 splits
candidate from cross fields. User globals are the first fields one by one, the last of them with all remaining fields;
`cls` makes the second one the learnable vector (and more of them, where the schema has fewer user fields). A position
of a global would add nothing to the bias of its projection. globals_order="user_first" is the order the figure draws:
user globals then see the candidate, so all globals are computed per candidate. seq_sees_user_globals=True lets events
see user globals. readout="globals_newest" gives the newest event row in place of the mean, "flatten_all" all of them.
At 128 events readout="globals_newest" learns sooner than the default, with queries=8 and with the paper's share of
queries; a likely reason: a mean over so many rows starts with little of the newest events in it.
Ablations of the paper: merge, inner, query_strategy, queries.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from recscale.models.architecture import EncoderSpec
from recscale.models.baselines.encoding import builder
from recscale.models.counts import Flops, Params
from recscale.models.inputs import CandidateInputs, Field, Schema, UserInputs, join_fields
from recscale.models.inputs.history import (
    EventPlan,
    EventReader,
    HistoryOptions,
    HistoryView,
    Positions,
    TokenShape,
    plan_events,
)
from recscale.models.layers import param
from recscale.models.layers.dense import FFN, Dense
from recscale.models.layers.history_attention import (
    HistoryBlock,
    KeyValues,
    Visible,
    block_flops,
    block_params,
    check_heads,
    choose_heads,
)
from recscale.models.layers.norms import Norm, norm_params
from recscale.models.layers.per_token import Activation
from recscale.models.options import require_sizes
from recscale.models.ranker import EncodedHistory, SequenceEncoder
from recscale.models.sizing import sized_by

# The fields of each global token; () is the learnable vector.
Globals = tuple[tuple[Field, ...], ...]


@dataclasses.dataclass(frozen=True)
class LongerConfig(HistoryOptions):
    """event_width A, merge P, layers L; queries K, None for the share `query_share` of the merged events.

    max_length: S_max, length of the position table, None for the schema's; events beyond it are not read.
    remat: keep only block inputs for the backward pass. implementation: of the attention. The rest: see the file.
    """

    event_width: int = 8
    merge: int = 4
    inner: int = 1
    inner_heads: int = 4
    inner_extra_residual: bool = False
    inner_init: float = 1.0
    layers: int = 2
    head_dim: int = 32
    queries: int | None = None
    query_share: float = 0.4
    query_strategy: Literal["recent", "uniform", "recent_uniform", "learnable"] = "recent"
    n_global: tuple[int, ...] = (1, 3)
    cls: bool = True
    globals_order: Literal["candidate_first", "user_first"] = "candidate_first"
    seq_sees_user_globals: bool = False
    readout: Literal["globals_mean", "globals_newest", "globals", "flatten_all"] = "globals_mean"
    max_length: int | None = None
    norm: Literal["layer", "rms"] = "layer"
    output_norm: bool = False
    use_bias: bool = True
    activation: Activation = "gelu"
    init: param.Init = "lecun_normal"
    remat: bool = False
    implementation: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(event_width=self.event_width, merge=self.merge, layers=self.layers, queries=self.queries)
        require_sizes(max_length=self.max_length, inner_heads=self.inner_heads, head_dim=self.head_dim)
        if self.inner < 0:
            raise ValueError(f"inner is {self.inner}, expected at least 0")
        if self.inner_init < 0:
            raise ValueError(f"inner_init is {self.inner_init:g}, expected at least 0")
        if self.readout == "globals_newest" and self.query_strategy == "learnable":
            raise ValueError("readout='globals_newest' reads the newest event, and no learnable query is one")
        if len(self.n_global) != 2 or self.n_global[0] not in (1, 2) or self.n_global[1] < 0:
            raise ValueError(f"n_global is {self.n_global}, expected (m_c, m_u) with m_c 1 or 2 and m_u >= 0")
        if self.queries is None and not 0.0 < self.query_share <= 1.0:
            raise ValueError(f"query_share is {self.query_share}, expected a share in (0, 1]")
        if self.seq_sees_user_globals and not self.n_global[1]:
            raise ValueError("seq_sees_user_globals has no effect without user globals; set n_global=(m_c, m_u > 0)")
        if self.seq_sees_user_globals and self.globals_order == "user_first":
            raise ValueError("seq_sees_user_globals needs globals_order='candidate_first': else events see candidates")

    @property
    def width(self) -> int:
        """D."""
        return self.merge * self.event_width


class _Layer(NamedTuple):
    """What a layer's candidate rows look at: user globals (None if they are computed per candidate) and events."""

    globals: KeyValues | None
    events: KeyValues
    length: Array


class _State(NamedTuple):
    """Kept per request: every layer's keys, and the user globals where they meet the candidate first."""

    layers: tuple[_Layer, ...]
    globals: Array | None


@dataclasses.dataclass(frozen=True)
class LongerPlan:
    """What a config becomes on one schema: the events, the global tokens of both sides, S_m and K."""

    events: EventPlan
    candidate: Globals
    user: Globals
    merged: int
    queries: int
    longest: int


class GlobalTokens(nnx.Module):
    """Global tokens of one side: fields -> [..., m, D], a projection for each, a vector for the learnable one."""

    def __init__(self, tokens: Globals, width: int, *, init: param.Init, dtype: DTypeLike, rngs: nnx.Rngs):
        self.plan = tuple(tuple(field.name for field in fields) for fields in tokens)
        self.width, self.dtype = width, dtype
        self.project = nnx.List(
            Dense(_width(fields), width, axes=("features", "embed"), init=init, dtype=dtype, rngs=rngs)
            if fields
            else None
            for fields in tokens
        )
        self.free = nnx.List(
            None if fields else param.normal(rngs, (width,), ("embed",), width**-0.5) for fields in tokens
        )

    def __call__(self, fields: Mapping[str, Array], lead: tuple[int, ...]) -> Float[Array, "*lead m D"]:
        """Of fields [*lead, width] each."""
        made = []
        for names, project, free in zip(self.plan, self.project, self.free, strict=True):
            if project is not None:
                made.append(project(join_fields(fields, names)))
            elif free is not None:
                made.append(jnp.broadcast_to(free[...].astype(self.dtype), (*lead, self.width)))
        return jnp.stack(made, axis=-2)


def make_block(
    width: int, heads: int, options: LongerConfig, *, out_scale: float = 1.0, dtype: DTypeLike, rngs: nnx.Rngs
) -> HistoryBlock:
    """One block, with the flags that all blocks share."""
    return HistoryBlock(
        width,
        heads,
        norm=options.norm,
        output_norm=options.output_norm,
        out_scale=out_scale,
        use_bias=options.use_bias,
        activation=options.activation,
        init=options.init,
        implementation=options.implementation,
        dtype=dtype,
        rngs=rngs,
    )


class TokenMerge(nnx.Module):
    """Events [R, S, A_in] -> merged tokens h [R, S_m, D] and the number of valid ones [R] (steps 1 and 2)."""

    def __init__(self, plan: LongerPlan, options: LongerConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        A, A_in, act = options.event_width, plan.events.width, options.activation
        self.merge, self.width, self.extra_residual = options.merge, A, options.inner_extra_residual
        self.positions = Positions(plan.longest, A_in, rngs=rngs)
        self.mlp = FFN(A_in, A, A, activation=act, init=options.init, dtype=dtype, rngs=rngs)
        own = functools.partial(make_block, A, options.inner_heads, options, out_scale=options.inner_init, dtype=dtype)
        self.blocks = nnx.List(own(rngs=rngs) for _ in range(options.inner))

    def __call__(self, view: HistoryView) -> tuple[Float[Array, "R S_m D"], Int[Array, " R"]]:
        P, A = self.merge, self.width
        e = self.mlp(self.positions(view).events)
        e = jnp.where(view.valid[..., None], e, 0)
        requests, columns, _ = e.shape
        groups = -(-columns // P)
        e = jnp.pad(e, [(0, 0), (0, groups * P - columns), (0, 0)]).reshape(requests * groups, P, A)
        # Valid events of each group: groups are counted from the newest event, so only the last one is partly filled.
        first = P * jnp.arange(groups, dtype=jnp.int32)
        length = jnp.clip(view.length[:, None] - first[None], 0, P).reshape(-1)
        valid = jnp.arange(P, dtype=jnp.int32)[None] < length[:, None]
        x = e
        for block in self.blocks:
            x = jnp.where(valid[..., None], block(x, Visible(block.keys(x), length)), 0)
        x = x + e if self.extra_residual else x
        return x.reshape(requests, groups, P * A), -(-view.length // P)


class Longer(SequenceEncoder):
    """The history of `plan` -> user tokens [R, t_u, D] and candidate globals [R, C, t_c, D]."""

    def __init__(self, plan: LongerPlan, options: LongerConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        D, init, self.queries, self.strategy = options.width, options.init, plan.queries, options.query_strategy
        self.readout, self.remat = options.readout, options.remat
        self.user_first, self.sees = options.globals_order == "user_first", options.seq_sees_user_globals
        self.reader = EventReader(plan.events, rngs=rngs)
        self.front = TokenMerge(plan, options, dtype=dtype, rngs=rngs)
        tokens = functools.partial(GlobalTokens, width=D, init=init, dtype=dtype, rngs=rngs)
        self.candidate_globals = tokens(plan.candidate)
        self.user_globals = tokens(plan.user) if plan.user else None
        learnable = self.strategy == "learnable"
        self.free = param.normal(rngs, (plan.queries, D), ("tokens", "embed"), D**-0.5) if learnable else None
        heads = choose_heads(D, options.head_dim)
        self.blocks = nnx.List(make_block(D, heads, options, dtype=dtype, rngs=rngs) for _ in range(options.layers))
        self.final_norm = Norm(D, kind=options.norm, dtype=dtype)

    def encode_user(self, user: UserInputs) -> EncodedHistory:
        h, length = self._run(self.front, self.reader(user))
        own = None if self.user_globals is None else self.user_globals(user.fields, h.shape[:1])
        rows = None if self.user_first else own
        events, visible, kept = self._sample(h, length)
        source, layers = h, []
        for block, last in zip(self.blocks, self._lasts(), strict=True):
            keys = _Layer(None if rows is None else block.keys(rows), block.keys(source), length)
            layers.append(keys)
            seen = Visible(keys.events, length, *visible)
            beside = (Visible(keys.globals),) if self.sees and keys.globals is not None else ()
            if last and self.readout == "globals_newest":
                # No other row is read: the newest event, at every strategy the first row.
                events, kept = events[:, :1], jnp.minimum(kept, 1)
                seen = seen._replace(q_pos=None if seen.q_pos is None else seen.q_pos[:, :1])
            if not (last and self.readout == "globals"):
                events = self._run(block, events, seen, *beside)
            if rows is not None and keys.globals is not None:
                rows = self._run(block, rows, Visible(keys.globals, mode="causal"), Visible(keys.events, length))
            source, length = events, kept
            visible = ("full", None) if self.free is not None else ("causal", None)
        cache = _State(tuple(layers), own if self.user_first else None)
        return EncodedHistory(self._user_tokens(rows, events, kept), cache)

    def candidate_tokens(self, cache: _State, candidates: CandidateInputs) -> Float[Array, "R C t D"]:
        lead = next(iter(candidates.fields.values())).shape[:2]
        x = self.candidate_globals(candidates.fields, lead)
        if cache.globals is not None:
            shape = (*lead, *cache.globals.shape[1:])
            x = jnp.concatenate([jnp.broadcast_to(cache.globals[:, None], shape), x], axis=2)
        for block, kept in zip(self.blocks, cache.layers, strict=True):
            seen = [Visible(block.keys(x), mode="causal"), Visible(kept.events, kept.length)]
            if kept.globals is not None:
                seen.append(Visible(kept.globals))
            x = self._run(block, x, *seen)
        return self.final_norm(x)

    def _run(self, function, *args):
        return jax.checkpoint(lambda: function(*args))() if self.remat else function(*args)

    def _lasts(self) -> list[bool]:
        return [i == len(self.blocks) - 1 for i in range(len(self.blocks))]

    def _sample(self, h: Array, length: Array) -> tuple[Array, tuple[str, Array | None], Array]:
        """Event rows [R, K, D] of layer 1, how they see the merged events, and how many of them are valid [R]."""
        requests, columns, width = h.shape
        if self.free is not None:
            rows = jnp.broadcast_to(self.free[...].astype(h.dtype)[None], (requests, self.queries, width))
            return rows, ("full", None), jnp.full((requests,), self.queries, jnp.int32)
        K = min(self.queries, columns)
        if self.strategy == "recent":
            return h[:, :K], ("causal", None), jnp.minimum(length, K)
        position = sample_positions(self.strategy, K, length)
        rows = jnp.take_along_axis(h, jnp.minimum(position, columns - 1)[..., None], axis=1)
        return rows, ("positions", position), jnp.minimum(length, K)

    def _user_tokens(self, rows: Array | None, events: Array, kept: Array) -> Array | None:
        """[R, t_u, D]; None if there is no token."""
        tokens = [] if rows is None else [self.final_norm(rows)]
        if self.readout != "globals":
            events = self.final_norm(events)
            valid = jnp.arange(events.shape[1], dtype=jnp.int32)[None] < kept[:, None]
            events = jnp.where(valid[..., None], events, 0)
            if self.readout == "globals_mean":
                share = 1.0 / jnp.maximum(kept, 1).astype(jnp.float32)
                mean = events.astype(jnp.float32).sum(axis=1, keepdims=True) * share[:, None, None]
                events = mean.astype(events.dtype)
            elif self.readout == "flatten_all" and events.shape[1] < self.queries:
                # A batch may have fewer columns than the schema; the number of tokens is the schema's.
                events = jnp.pad(events, [(0, 0), (0, self.queries - events.shape[1]), (0, 0)])
            tokens.append(events)
        return jnp.concatenate(tokens, axis=1) if tokens else None


def sample_positions(strategy: str, rows: int, length: Int[Array, " R"]) -> Int[Array, "R K"]:
    """Which of the n = length[r] merged events row r = 0..K-1 takes: int32 [R, K], increasing; length [R].

        recent            r
        uniform           floor(r*n/K)
        recent_uniform    half of the rows the newest, the others spread over the rest

    With n <= K every strategy takes event r, and rows r >= n are not valid. The padded length plays no role.
    """
    r, n = jnp.arange(rows, dtype=jnp.int32)[None], length[:, None].astype(jnp.int32)
    newest = {"recent": rows, "uniform": 0, "recent_uniform": -(-rows // 2)}[strategy]
    spread = newest + (r - newest) * (n - newest) // max(rows - newest, 1)
    return jnp.where((n <= rows) | (r < newest), r, spread)


def token_shape(config: LongerConfig, schema: Schema) -> TokenShape:
    """The globals, and what `readout` makes of the event rows."""
    rows = {"globals_mean": 1, "globals_newest": 1, "globals": 0, "flatten_all": plan_longer(config, schema).queries}
    events = rows[config.readout]
    per_candidate, per_request = _split_globals(config)
    return TokenShape(user=per_request + events, candidate=per_candidate, width=config.width)


def count_params(config: LongerConfig, schema: Schema) -> Params:
    """Closed form of the parameter tree."""
    plan, A, D = plan_longer(config, schema), config.event_width, config.width
    flags = {"norm": config.norm, "use_bias": config.use_bias, "output_norm": config.output_norm}
    inner, layer = (block_params(width, **flags) for width in (A, D))
    dense = plan.events.params + plan.longest * plan.events.width
    dense += plan.events.width * A + A * A + 2 * A + config.inner * inner
    dense += sum((_width(fields) + 1) * D for fields in (*plan.candidate, *plan.user))
    dense += config.layers * layer + norm_params(D, kind=config.norm)
    dense += plan.queries * D * (config.query_strategy == "learnable")
    return Params(dense=dense, positions=plan.longest * plan.events.width)


def count_flops(config: LongerConfig, schema: Schema) -> Flops:
    """Closed form of the matrix products."""
    plan, D, (m_c, m_u) = plan_longer(config, schema), config.width, _split_globals(config)
    merged, K = plan.merged, plan.queries

    def tokens(side: Globals) -> tuple[int, int]:
        """FLOPs of one side's global tokens, and those whose gradient nobody needs."""
        raw = [fields for fields in side if all(field.is_dense for field in fields)]
        return 2 * D * sum(map(_width, side)), 2 * D * sum(map(_width, raw))

    (user, raw_user), (candidate, raw_candidate) = tokens(plan.user), tokens(plan.candidate)
    total = Flops(front_flops(config, plan.events) + user, candidate, raw_user, raw_candidate)
    for layer in range(config.layers):
        n = merged if layer == 0 else K
        rows = {"globals": 0, "globals_newest": 1}.get(config.readout, K) if layer == config.layers - 1 else K
        pairs = (m_u + rows) * n + m_u * m_u + rows * m_u * config.seq_sees_user_globals
        total += Flops(block_flops(D, m_u + rows, m_u + n, pairs), block_flops(D, m_c, m_c, m_c * (m_c + m_u + n)))
    return total


def front_flops(config: LongerConfig, events: EventPlan) -> int:
    """FLOPs of steps 1 and 2 per request."""
    A, P, S = config.event_width, config.merge, events.length
    merged = -(-S // P)
    return 2 * S * (events.width * A + A * A) + config.inner * merged * block_flops(A, P, P, P * P)


def plan_longer(config: LongerConfig, schema: Schema) -> LongerPlan:
    """Resolves the flags for one schema.

    Raises:
        ValueError: no history, global tokens that the schema has no fields for, or heads that do not divide A.
    """
    limits = [limit for limit in (config.recent, config.max_length) if limit is not None]
    events = plan_events(schema, dataclasses.replace(config, recent=min(limits, default=None)))
    merged = -(-events.length // config.merge)
    share = math.ceil(round(config.query_share * merged, 6))
    queries = max(1, share) if config.queries is None else config.queries
    if config.query_strategy != "learnable":
        queries = min(queries, merged)
    candidate, user = _candidate_globals(config, schema), _user_globals(config, schema)
    check_heads(config.event_width, config.inner_heads if config.inner else 1)
    return LongerPlan(events, candidate, user, merged, queries, config.max_length or events.length)


def _candidate_globals(config: LongerConfig, schema: Schema) -> Globals:
    if config.n_global[0] == 1:
        return (schema.candidate_fields,)
    sides = (schema.side("candidate"), schema.side("cross"))
    if not all(sides):
        raise ValueError("n_global asks for 2 candidate globals, which needs candidate and cross fields; set (1, m_u)")
    return sides


def _user_globals(config: LongerConfig, schema: Schema) -> Globals:
    """Fields one by one, the last ones together; the second global is the learnable one (the first, if alone).

    Where the schema has too few user fields, more learnable vectors fill up.
    """
    m_u, fields = config.n_global[1], schema.user_fields
    wanted = m_u - (config.cls and m_u > 0)
    projected = min(wanted, len(fields))
    if projected < wanted and not config.cls:
        raise ValueError(f"n_global asks for {wanted} user globals, the schema has {len(fields)} user fields; set cls")
    made = [fields[i : i + 1] for i in range(projected - 1)] + [fields[projected - 1 :]] * (projected > 0)
    return (*made[:1], *[()] * (m_u - projected), *made[1:])


def _split_globals(config: LongerConfig) -> tuple[int, int]:
    """How many globals are computed per candidate, and how many per request."""
    m_c, m_u = config.n_global
    return (m_c + m_u, 0) if config.globals_order == "user_first" else (m_c, m_u)


def _width(fields: tuple[Field, ...]) -> int:
    return sum(field.width for field in fields)


_WIDTHS = sized_by(lambda config, width: {"event_width": width}, count_params, lambda config: config.inner_heads)


def size_space(schema: Schema, config: LongerConfig, target: float) -> Iterator[dict[str, Any]]:
    """Event widths near a number of dense parameters that make merged tokens of whole heads."""
    for sizes in _WIDTHS(schema, config, target):
        width = dataclasses.replace(config, **sizes).width
        if width <= config.head_dim or not width % config.head_dim:
            yield sizes


LONGER = EncoderSpec(
    LongerConfig,
    builder(Longer, plan_longer),
    token_shape,
    count_params,
    count_flops,
    size_space,
)
