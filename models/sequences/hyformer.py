"""HyFormer (arXiv 2601.12681): several histories and the fields' tokens, decoded and boosted in turn.

Z [B,T_n,D] are the fields' tokens, S^j [R,S_j,D] the projected events of history j, 0 on padding. Queries, once:

    info = concat(Z_1..Z_Tn, meanpool(S^1)..meanpool(S^J))          q_i = W_b silu(W_a info + b_a) + b_b

and in each of L layers, with RMSNorm N and weights of their own per history j (Q_j queries each, T = T_n + sum_j Q_j):

    H_l = f_l(H_{l-1}),  H_0 = S^j          f: "full"    pre-norm block: attention over S_j, GELU network
                                               "longer"  the same, its rows the K newest; later layers on those
                                               "swiglu"  H + SwiGLU(N(H))
    q^j <- q^j + MHA(N(q^j), N(H_l) W_K, N(H_l) W_V) W_O                                    decode
    X = [q ; Z],  X_out = X + TokenFFN(N(mix(N(X)))),  split again into q and Z             boost, residual unmixed

    logits = towers(N(X_L) flattened)

No query enters an encoder, so every H_l, k and v is made once per request, and so are the user's tokens, the pools and
their part of info W_a; candidate tokens, queries, decoding and boosting are per candidate.

Letters: R requests, C candidates, B = R*C, J histories, S_j events, A event width (time feature included), T tokens,
D width, F hidden width of the token networks, F_q of the query generator, F_s of "swiglu", Q = J*queries, L layers.

Closed forms (n keys, n' = length of H_l; enc = 12*D^2 + 7*D, or 3*D*F_s + D for "swiglu"; head excluded):
    params        = J*(A*D + D) + T_n*(d*D + D) + Q*((T_n+J)*D*F_q + F_q + F_q*D + D)
                    + L*(J*(enc + 4*D^2 + 2*D) + T*(2*D*F + F + D) + 2*D) + D
    per request   = sum_j [2*S_j*A*D + sum_l (f_l + 4*n'*D^2)] + 2*T_u*d*D (+ 2*Q*(T_u+J)*D*F_q if split_info)
                    f_l: full 24*n*D^2 + 4*n^2*D;  longer 20*K*D^2 + 4*S_j*D^2 + 4*K*S_j*D, then 24*K*D^2 + 4*K^2*D;
                    swiglu 6*n*D*F_s
    per candidate = 2*T_c*d*D + 2*Q*((T_n+J)*D*F_q + F_q*D) + L*(sum_j (4*Q_j*D^2 + 4*Q_j*n'*D) + 4*T*D*F)

Undisclosed or contradictory -> flag (default): encoder ("longer"), encoder_causal (False), encoder_input ("stacked";
"raw" restarts every layer from S^j), ns_flow ("updated"; "raw" hands the first Z to every layer), decode_residual
(True), query_pools ("all"; "own", "none"), query_sources ("all"; "target" reads candidate tokens alone), query_hidden
F_q (D), readout ("all" tokens; "queries"), head_dim (32, or the largest divisor of D below), tokenizer ("cut"; the
paper's semantic groups are "group", which needs a D that T divides), the time feature, init, tower (()).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from recscale.models.architecture import RankerSpec, builder
from recscale.models.counts import Flops, Params
from recscale.models.inputs import CandidateInputs, Output, Schema, UserInputs
from recscale.models.inputs.history import EventPlan, EventReader, HistoryOptions, plan_events
from recscale.models.inputs.tokenizers import (
    AUTO_TOKENS,
    Tokenizer,
    TokenizerOptions,
    TokenPlan,
    UserTokens,
    plan_tokens,
    possible_tokens,
)
from recscale.models.layers.dense import Dense
from recscale.models.layers.history_attention import KeyValues, block_flops, block_params
from recscale.models.layers.mixing import flatten_token_major
from recscale.models.layers.norms import Norm, norm_params
from recscale.models.layers.towers import TowerOptions, Towers, tower_flops, tower_params
from recscale.models.options import require_sizes
from recscale.models.ranker import Ranker
from recscale.models.sizing import dense_params, token_choices, token_shapes

from .hyformer_block import Boost, DecodingOptions, QueryGenerator, StreamLayer


@dataclasses.dataclass(frozen=True)
class HyFormerConfig(DecodingOptions, TokenizerOptions, TowerOptions):
    """tokens T, queries included (None: the largest up to 16 that the fields allow and D is a multiple of); layers L,
    queries Q_j per history; sequences: names of the histories, () for all of the schema; the rest: see the file.
    """

    sequences: tuple[str, ...] = ()
    layers: int = 2
    queries: int = 1
    query_pools: Literal["all", "own", "none"] = "all"
    query_sources: Literal["all", "target"] = "all"
    encoder_input: Literal["stacked", "raw"] = "stacked"
    ns_flow: Literal["updated", "raw"] = "updated"
    readout: Literal["all", "queries"] = "all"
    recent: int | None = None
    time_feature: Literal["auto", "bucket", "none"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(layers=self.layers, queries=self.queries)


@dataclasses.dataclass(frozen=True)
class HyFormerPlan:
    """What a config becomes on one schema: the histories, the fields' tokens, and what one query is made from."""

    streams: tuple[EventPlan, ...]
    fields: TokenPlan
    queries: int
    user_sources: int
    candidate_sources: int

    @property
    def Q(self) -> int:
        return len(self.streams) * self.queries

    @property
    def T(self) -> int:
        return self.fields.tokens + self.Q


class UserState(NamedTuple):
    """tokens: user field tokens; info: the request's part of the queries, [Q,R,F_q] if split, else its inputs;
    keys[layer][history]: k, v [R,n',H,d]; length[history]: valid rows of them, int32 [R]."""

    tokens: UserTokens
    info: Array | None
    keys: tuple[tuple[KeyValues, ...], ...]
    length: tuple[Array, ...]


class HyFormer(Ranker):
    """Tokenizer and query generator, L layers of encoding, decoding and boosting, towers.

    Args:
        plan: from `plan_hyformer`.
        tasks: Y.
    """

    def __init__(
        self,
        plan: HyFormerPlan,
        tasks: int,
        options: HyFormerConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        D, init, layers = options.width, options.init, options.layers
        self.plan, self.query_pools, self.readout = plan, options.query_pools, options.readout
        self.restart, self.raw_tokens = options.encoder_input == "raw", options.ns_flow == "raw"
        self.tokenizer = Tokenizer(plan.fields, D, init=init, dtype=dtype, rngs=rngs)
        self.readers = nnx.List(EventReader(events, rngs=rngs) for events in plan.streams)
        self.events = nnx.List(
            Dense(events.width, D, axes=("events", "embed"), init=init, dtype=dtype, rngs=rngs)
            for events in plan.streams
        )
        sources = (plan.user_sources, plan.candidate_sources)
        self.generator = QueryGenerator(plan.Q, *sources, options, dtype=dtype, rngs=rngs)
        self.streams = nnx.List(
            nnx.List(StreamLayer(options, dtype=dtype, rngs=rngs) for _ in plan.streams) for _ in range(layers)
        )
        self.boosts = nnx.List(Boost(plan.T, options, dtype=dtype, rngs=rngs) for _ in range(layers))
        self.norm = Norm(D, kind="rms", dtype=dtype)
        flat = _head_width(options, plan)
        self.towers = Towers(flat, tasks, tower=options.tower, init=init, dtype=dtype, rngs=rngs)

    def encode_user(self, user: UserInputs) -> UserState:
        """User tokens, every history's keys of every layer, and the request's part of the queries."""
        tokens = self.tokenizer.encode_user(user)
        views = [reader(user) for reader in self.readers]
        start = [
            jnp.where(view.valid[..., None], project(view.events), 0)
            for view, project in zip(views, self.events, strict=True)
        ]
        rows = [(h, view.length) for h, view in zip(start, views, strict=True)]
        keys = []
        for layer in self.streams:
            if self.restart:
                rows = [(h, view.length) for h, view in zip(start, views, strict=True)]
            rows = [stream.encode(h, length) for stream, (h, length) in zip(layer, rows, strict=True)]
            keys.append(tuple(stream.keys(h) for stream, (h, _) in zip(layer, rows, strict=True)))
        pools = [_mean(h, view.length) for h, view in zip(start, views, strict=True)]
        info = self.generator.encode_user(self._user_info(tokens, pools))
        return UserState(tokens, info, tuple(keys), tuple(length for _, length in rows))

    def score(self, state: UserState, candidates: CandidateInputs, *, key: Array | None = None) -> Output:
        own = self.tokenizer.candidate_tokens(state.tokens, candidates)
        _, requests, count, _ = own.shape
        z = x = first = self.tokenizer.join(state.tokens, own)
        q = self.generator(state.info, flatten_token_major(own.reshape(own.shape[0], requests * count, -1)), requests)
        per_stream = self.plan.queries
        for layer, boost, keys in zip(self.streams, self.boosts, state.keys, strict=True):
            decoded = [
                stream.decode(q[i * per_stream : (i + 1) * per_stream], keys[i], state.length[i])
                for i, stream in enumerate(layer)
            ]
            x = boost(jnp.concatenate([*decoded, first if self.raw_tokens else z], axis=0))
            q, z = x[: self.plan.Q], x[self.plan.Q :]
        x = self.norm(x if self.readout == "all" else q)
        return Output(logits=self.towers(flatten_token_major(x)).reshape(requests, count, -1))

    def _user_info(self, tokens: UserTokens, pools: list[Array]) -> Array | None:
        """[Q,R,d_u]: user tokens and the pools each query reads; None if there is neither."""
        if not self.plan.user_sources:
            return None
        user = [] if tokens.tokens is None else [flatten_token_major(tokens.tokens)]
        read = {"all": [pools] * len(pools), "own": [[pool] for pool in pools], "none": [[]] * len(pools)}
        rows = [jnp.concatenate([*user, *own], axis=-1) for own in read[self.query_pools]]
        return jnp.stack([row for row in rows for _ in range(self.plan.queries)])


def plan_hyformer(config: HyFormerConfig, schema: Schema) -> HyFormerPlan:
    """Resolves the flags for one schema.

    Raises:
        ValueError: no history, an unknown one, or a T that does not divide D.
    """
    names = config.sequences or tuple(sequence.name for sequence in schema.sequences)
    options = [HistoryOptions(name, config.recent, config.time_feature) for name in names or (None,)]
    streams = tuple(plan_events(schema, each) for each in options)
    Q = len(streams) * config.queries
    fields = _plan_fields(config, schema, Q)
    if config.width % (fields.tokens + Q):
        raise ValueError(
            f"T is {fields.tokens + Q} ({fields.tokens} field tokens, {Q} queries), which does not divide the width "
            f"{config.width}; make the width a multiple, or choose tokens with tokenizer='cut'"
        )
    pools = {"all": len(streams), "own": 1, "none": 0}[config.query_pools]
    user = 0 if config.query_sources == "target" else fields.user_tokens + pools
    return HyFormerPlan(streams, fields, config.queries, user, fields.candidate_tokens)


def count_params(config: HyFormerConfig, schema: Schema) -> Params:
    """Closed form of the parameter tree."""
    plan, D, F, F_q = plan_hyformer(config, schema), config.width, config.F, config.F_q
    J, Q, T, norm = len(plan.streams), plan.Q, plan.T, norm_params(D, kind="rms")
    tokenizer = plan.fields.params(D) + sum(each.width * D + D + each.params for each in plan.streams)
    sources = plan.user_sources + plan.candidate_sources
    generator = Q * (sources * D * F_q + F_q + F_q * D + D)
    encoder = 3 * D * config.F_s + norm
    if config.encoder != "swiglu":
        encoder = block_params(D, norm="rms", attention_bias=False)
    layer = J * (encoder + 4 * D * D + 2 * norm) + T * (2 * D * F + F + D) + 2 * norm
    head = tower_params(_head_width(config, plan), len(schema.tasks), config.tower)
    return Params(dense=tokenizer + generator + config.layers * layer + norm + head, tokenizer=tokenizer, head=head)


def count_flops(config: HyFormerConfig, schema: Schema) -> Flops:
    """Closed form of the matrix products: histories, user tokens and (if split) their queries' part per request."""
    plan, D, F, F_q = plan_hyformer(config, schema), config.width, config.F, config.F_q
    Q, Q_j = plan.Q, plan.queries
    info = 2 * Q * plan.user_sources * D * F_q
    user, unneeded = info * config.split_info, 0
    candidate = info * (not config.split_info) + 2 * Q * (plan.candidate_sources * D * F_q + F_q * D)
    candidate += config.layers * 4 * plan.T * D * F
    candidate += tower_flops(_head_width(config, plan), len(schema.tasks), config.tower)
    for each in plan.streams:
        projection = 2 * each.length * each.width * D
        user, unneeded = user + projection, unneeded + projection * (not each.trained)
        rows = each.length
        for _ in range(config.layers):
            before = each.length if config.encoder_input == "raw" else rows
            rows = min(config.keep, before) if config.encoder == "longer" else before
            attention = block_flops(D, rows, before, rows * before)
            user += 6 * rows * D * config.F_s if config.encoder == "swiglu" else attention
            user += 4 * rows * D * D
            candidate += 4 * Q_j * D * D + 4 * Q_j * rows * D
    return plan.fields.flops(D) + Flops(user, candidate, unneeded)


def size_space(schema: Schema, config: HyFormerConfig, target_dense_params: float) -> Iterator[dict[str, Any]]:
    """Overrides (tokens, width, hidden) near the target; layers and a given number of tokens stay as configured.

    Hidden widths near 4*D come first, then numbers of tokens that suit the size.
    """
    Q = len(config.sequences or schema.sequences) * config.queries
    if config.tokenizer != "cut":
        chosen = [(_plan_fields(config, schema, Q).tokens + Q, 0.0)]
    elif config.tokens is not None:
        chosen = [(config.tokens, 0.0)]
    else:
        chosen = token_choices((t + Q for t in possible_tokens(schema, config)), target_dense_params)
    choices = {T: (T, cost) for T, cost in chosen}
    yield from token_shapes(dense_params(count_params, config, schema), choices, target_dense_params, 4.0)


def _plan_fields(config: HyFormerConfig, schema: Schema, queries: int) -> TokenPlan:
    """The fields' tokens: `tokens` less the queries, chosen so that T divides D if it is not given."""
    tokens = config.tokens
    if tokens is None and config.tokenizer == "cut":
        possible = [t + queries for t in possible_tokens(schema, config)]
        allowed = [T for T in possible if T <= AUTO_TOKENS and config.width % T == 0]
        if not allowed:
            raise ValueError(
                f"no number of tokens from {possible[0]} to {min(AUTO_TOKENS, possible[-1])}, {queries} queries "
                f"included, divides width {config.width}; set tokens or another width"
            )
        tokens = allowed[-1]
    fields = dataclasses.replace(config, tokens=None if tokens is None else tokens - queries)
    return plan_tokens(schema, fields, config.width)


def _head_width(config: HyFormerConfig, plan: HyFormerPlan) -> int:
    return (plan.T if config.readout == "all" else plan.Q) * config.width


def _mean(h: Array, length: Array) -> Array:
    """h [R,S,D], 0 on padding -> the mean of the valid rows [R,D]; 0 if there are none."""
    total = h.astype(jnp.float32).sum(axis=1)
    return (total / jnp.maximum(length, 1).astype(jnp.float32)[:, None]).astype(h.dtype)


HYFORMER = RankerSpec(HyFormerConfig, builder(HyFormer, plan_hyformer), count_params, count_flops, size_space)
