"""MixFormer and UI-MixFormer (arXiv 2602.14110): heads are feature tokens, and each head queries the history itself.

All fields, concatenated in schema order and cut into T equal pieces, give the heads X [B,T,D] (no bias); the events
give s = events W_s, [R,S,T*D], which every layer reads again. Block l, with RMSNorm and without biases:

    p = mix(N(X)) + X         q_t = SwiGLU_t(N(p_t)) + p_t                                  query mixer
    h = SwiGLU(N(s)) + s      k_t = N(h_t) K_t,  v_t = N(h_t) V_t                           history, once per request
    z_t = sum_s softmax_s(N(q_t) . k_st / sqrt(D)) v_st + q_t                               no W_Q, no W_O
    X_t = SwiGLU_t(N(z_t)) + z_t                                                            output fusion
    logits = towers(X_L flattened)

Letters: R requests, C candidates, B = R*C, S events, A event width (time feature included), T heads, D their width,
F hidden width of the per-head networks, L layers. Activations of heads are token-major.

Two exact orders of the attention: "materialised" makes k and v once per request (4*S*T*D^2); "reordered" takes
u_t = N(q_t) K_t^T to the history and the context through V_t (4*T*D^2 per candidate). They cost the same at C = S.

UI-MixFormer (ui=True): the first T_u heads are cut from user fields alone, the others from candidate and cross fields,
and mix(N(X)) of a user head is set to 0 where it comes from an item head. By induction user heads never see a
candidate, so `encode_user` finishes them, and hands every layer's part of them to the item heads.

Closed forms (ui=False, norms="figure", d pieces' width, F_s = seq_hidden, head excluded):
    params        = A*T*D + T*d*D + L*(6*T*D*F + 2*T*D^2 + 3*T*D*F_s + 6*T*D)
    per request   = 2*S*A*T*D + L*6*S*T*D*F_s  (+ L*4*S*T*D^2 materialised)
    per candidate = 2*T*d*D + L*(12*T*D*F + 4*S*T*D)  (+ L*4*T*D^2 reordered)
With ui, T_u of the T heads move their share to the request.

Undisclosed -> flag (default): F/D -> hidden (4*D); F_s -> seq_hidden (2*D); norms of q and h, drawn but not printed ->
norms ("figure"; "equations" drops them); the norm of h is per head; the head -> tower (one hidden layer of T*D/4);
share of the heads -> user_heads (T/2; "width" is T - floor(T * item width / total width)); init. Positions of events:
none, `time_feature` as in `recscale.models.inputs.history`. Ablations of the paper: query_mixer, query_ffn,
history_ffn="shared", output_ffn="shared", norms="post" (LayerNorm after every sum).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recscale.models.architecture import RankerSpec, builder
from recscale.models.counts import Flops, Params
from recscale.models.inputs import CandidateInputs, Field, Output, Schema, UserInputs, join_fields
from recscale.models.inputs.history import EventPlan, EventReader, HistoryOptions, plan_events
from recscale.models.inputs.tokenizers import AUTO_TOKENS
from recscale.models.layers.dense import Dense, repeat_user
from recscale.models.layers.mixing import flatten_token_major
from recscale.models.layers.norms import norm_params
from recscale.models.layers.per_token import PerTokenDense
from recscale.models.layers.towers import Towers, tower_flops, tower_params
from recscale.models.options import require_sizes
from recscale.models.ranker import Ranker
from recscale.models.sizing import dense_params, token_choices, token_shapes

from .mixformer_block import BlockOptions, HeadState, HistoryFFN, MixFormerBlock


@dataclasses.dataclass(frozen=True)
class MixFormerConfig(BlockOptions, HistoryOptions):
    """tokens T (None: the largest up to 16 that divides D), width D, hidden F (None: 4*D), seq_hidden F_s (None: 2*D),
    layers L; the rest: see the file.

    kv: order of the attention; "auto" is "reordered" if fewer
    `candidates` per request are expected than the history has events. tower: None is one hidden layer of T*D/4.
    """

    tokens: int | None = None
    layers: int = 2
    kv: Literal["auto", "reordered", "materialised"] = "auto"
    candidates: int = 1
    ui: bool = False
    user_heads: int | Literal["width"] | None = None
    history_ffn: Literal["per_layer", "shared"] = "per_layer"
    tower: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(tokens=self.tokens, layers=self.layers, candidates=self.candidates, tower=self.tower)
        if self.user_heads != "width":
            require_sizes(user_heads=self.user_heads)
        if self.width % self.T:
            near = self.T * max(1, round(self.width / self.T))
            raise ValueError(f"width {self.width} does not divide into {self.T} heads; the nearest that does is {near}")
        if self.user_heads is not None and not self.ui:
            raise ValueError("user_heads has no effect without user heads of their own; set ui=True or leave it None")
        if self.ui and self.query_mixer == "self_attention":
            raise ValueError("ui=True masks the mixing of heads; query_mixer='self_attention' has no such mask")

    @property
    def T(self) -> int:
        return self.tokens or max(t for t in range(1, AUTO_TOKENS + 1) if self.width % t == 0)

    @property
    def towers(self) -> tuple[int, ...]:
        return (max(1, self.T * self.width // 4),) if self.tower is None else self.tower


@dataclasses.dataclass(frozen=True)
class UIMixFormerConfig(MixFormerConfig):
    """As `MixFormerConfig`, with ui=True."""

    ui: bool = True


@dataclasses.dataclass(frozen=True)
class Cut:
    """`heads` equal pieces of the concatenated fields `names`, each `piece` wide, the last padded with zeros."""

    names: tuple[str, ...]
    heads: int
    piece: int
    trained: bool

    def __call__(self, fields: Mapping[str, Array]) -> Float[Array, "t *rows piece"]:
        """[..., width] each -> [heads, ..., piece]."""
        x = join_fields(fields, self.names)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, self.heads * self.piece - x.shape[-1])])
        return jnp.moveaxis(x.reshape(*x.shape[:-1], self.heads, self.piece), -2, 0)


class UserState(NamedTuple):
    """length int32 [R]; layers; the finished user heads [T_u,R,D], None without; else the user fields, which then wait
    for the candidates: heads that mix both sides need them."""

    length: Array
    layers: tuple[HeadState, ...]
    heads: Array | None
    fields: dict[str, Array]


class MixFormerPlan(NamedTuple):
    """How the fields become heads (user is None unless ui, and item then holds candidate fields only), the history, and
    which order of the attention is taken."""

    user: Cut | None
    item: Cut
    events: EventPlan
    reordered: bool


class MixFormer(Ranker):
    """Heads of the fields, L blocks over one history, towers on the flattened heads, for Y tasks."""

    def __init__(
        self,
        plan: MixFormerPlan,
        tasks: int,
        options: MixFormerConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        (user, item, events, reordered), D, init, layers = plan, options.width, options.init, options.layers
        self.user_cut, self.item_cut = user, item
        user_heads, flat = user.heads if user else 0, options.T * D

        def project(cut: Cut) -> PerTokenDense:
            axes = ("features", "embed")
            return PerTokenDense(cut.heads, cut.piece, D, use_bias=False, axes=axes, init=init, dtype=dtype, rngs=rngs)

        self.user_heads, self.item_heads = project(user) if user else None, project(item)
        self.reader = EventReader(events, rngs=rngs)
        axes = ("events", "embed")
        self.events = Dense(events.width, flat, use_bias=False, axes=axes, init=init, dtype=dtype, rngs=rngs)
        self.histories = nnx.List(
            HistoryFFN(options.T, options, dtype=dtype, rngs=rngs)
            for _ in range(1 if options.history_ffn == "shared" else layers)
        )
        self.blocks = nnx.List(
            MixFormerBlock(user_heads, item.heads, options, reordered=reordered, dtype=dtype, rngs=rngs)
            for _ in range(layers)
        )
        self.towers = Towers(flat, tasks, tower=options.towers, init=init, dtype=dtype, rngs=rngs)

    def encode_user(self, user: UserInputs) -> UserState:
        """The history of every layer, and the user heads of every layer if there are any."""
        view = self.reader(user)
        s = self.events(view.events)
        histories = [history(s) for history in self.histories]
        x = None
        if self.user_cut is not None and self.user_heads is not None:
            x = self.user_heads(self.user_cut(user.fields))
        layers = []
        for i, block in enumerate(self.blocks):
            x, state = block.encode_user(x, histories[i % len(histories)], view.length)
            layers.append(state)
        waiting = {name: value for name, value in user.fields.items() if name in self.item_cut.names}
        return UserState(view.length, tuple(layers), x, waiting)

    def score(self, state: UserState, candidates: CandidateInputs, *, key: Array | None = None) -> Output:
        requests, count = next(iter(candidates.fields.values())).shape[:2]
        shared = {n: jnp.broadcast_to(v[:, None], (requests, count, v.shape[-1])) for n, v in state.fields.items()}
        pieces = self.item_cut({**candidates.fields, **shared})
        x = self.item_heads(pieces.reshape(pieces.shape[0], requests * count, -1))
        for block, layer in zip(self.blocks, state.layers, strict=True):
            x = block.score(x, layer, state.length)
        flat = flatten_token_major(x)
        if state.heads is not None:
            flat = jnp.concatenate([repeat_user(flatten_token_major(state.heads), count), flat], axis=-1)
        return Output(logits=self.towers(flat).reshape(requests, count, -1))


def plan_mixformer(config: MixFormerConfig, schema: Schema) -> MixFormerPlan:
    """Resolves the flags for one schema; raises as `cut_fields` does."""
    return MixFormerPlan(*cut_fields(config, schema), plan_events(schema, config), _reordered(config, schema))


def cut_fields(config: MixFormerConfig, schema: Schema) -> tuple[Cut | None, Cut]:
    """How the fields become heads: (None, all fields) or, with ui, (user fields, candidate and cross fields).

    Raises:
        ValueError: no candidate field, fewer inputs than heads, or user heads without user fields.
    """
    if not schema.candidate_fields:
        raise ValueError("the schema has no candidate or cross field, so there is nothing to rank")
    if not config.ui:
        return None, _cut(schema.fields, config.T)
    if not schema.user_fields or config.T < 2:
        raise ValueError("ui=True cuts heads from user fields and from candidate fields; it needs both, and two heads")
    item_width = sum(field.width for field in schema.candidate_fields)
    share = config.T - math.floor(config.T * item_width / schema.width)
    user_heads = share if config.user_heads == "width" else config.user_heads
    user_heads = config.T // 2 if user_heads is None else user_heads
    if not 0 < user_heads < config.T:
        raise ValueError(f"user_heads is {user_heads}, expected 1 to {config.T - 1} of {config.T} heads")
    return _cut(schema.user_fields, user_heads), _cut(schema.candidate_fields, config.T - user_heads)


def count_params(config: MixFormerConfig, schema: Schema) -> Params:
    """Closed form of the parameter tree."""
    T, D, F, L = config.T, config.width, config.F, config.layers
    events = plan_events(schema, config)
    inputs = sum(cut.heads * cut.piece * D for cut in cut_fields(config, schema) if cut)
    inputs += events.width * T * D + events.params
    post = config.norms == "post"
    norms = (config.query_mixer != "none") + config.query_ffn + 2 * (config.norms == "figure") + post + 1
    ffns = T * config.query_ffn + (T if config.output_ffn == "per_head" else 1)
    block = 3 * D * F * ffns + 2 * T * D * D + 4 * D * D * (config.query_mixer == "self_attention")
    norm = norm_params(T * D, kind="layer" if post else "rms")
    history = 3 * T * D * config.F_s + norm
    head = tower_params(T * D, len(schema.tasks), config.towers)
    dense = inputs + L * (block + norms * norm) + (L if config.history_ffn == "per_layer" else 1) * history + head
    return Params(dense=dense, tokenizer=inputs, head=head)


def count_flops(config: MixFormerConfig, schema: Schema) -> Flops:
    """Closed form of the matrix products: histories and user heads per request, all else per candidate."""
    T, D, F, L = config.T, config.width, config.F, config.layers
    plan, reordered = plan_events(schema, config), _reordered(config, schema)
    S = plan.length
    user, item = cut_fields(config, schema)
    events = 2 * S * plan.width * T * D
    history = 6 * S * T * D * config.F_s * (L if config.history_ffn == "per_layer" else 1)
    history += 0 if reordered else L * 4 * S * T * D * D
    head = 6 * D * F * (config.query_ffn + 1) + 4 * S * D + 4 * D * D * reordered
    attention = L * (8 * T * D * D + 4 * T * T * D) * (config.query_mixer == "self_attention")
    pieces = [2 * cut.heads * cut.piece * D if cut else 0 for cut in (user, item)]
    return Flops(
        events + history + pieces[0] + L * head * (user.heads if user else 0),
        pieces[1] + L * head * item.heads + attention + tower_flops(T * D, len(schema.tasks), config.towers),
        events * (not plan.trained) + pieces[0] * (user is not None and not user.trained),
        pieces[1] * (not item.trained),
    )


def size_space(schema: Schema, config: MixFormerConfig, target_dense_params: float) -> Iterator[dict[str, Any]]:
    """Overrides (tokens, width, hidden) near the target; layers, F_s / D and a given number of heads stay as they are.

    Hidden widths near 4*D come first, then numbers of heads that suit the size.
    """
    least = 2 if config.ui else 1
    most = min(sum(f.width for f in fields) for fields in _sides(config, schema)) * least
    chosen = [(config.tokens, 0.0)] if config.tokens else token_choices(range(least, most + 1), target_dense_params)
    choices = {T: (T, cost) for T, cost in chosen}
    yield from token_shapes(dense_params(count_params, config, schema), choices, target_dense_params, 4.0)


def _sides(config: MixFormerConfig, schema: Schema) -> list[tuple[Field, ...]]:
    return [schema.user_fields, schema.candidate_fields] if config.ui else [schema.fields]


def _cut(fields: tuple[Field, ...], heads: int) -> Cut:
    width = sum(field.width for field in fields)
    if width < heads:
        raise ValueError(f"fields of total width {width} cannot be cut into {heads} heads; set fewer tokens")
    trained = any(not field.is_dense for field in fields)
    return Cut(tuple(field.name for field in fields), heads, -(-width // heads), trained)


def _reordered(config: MixFormerConfig, schema: Schema) -> bool:
    if config.kv == "auto":
        return config.candidates < plan_events(schema, config).length
    return config.kv == "reordered"


build = builder(MixFormer, plan_mixformer)
MIXFORMER = RankerSpec(MixFormerConfig, build, count_params, count_flops, size_space)
UI_MIXFORMER = RankerSpec(UIMixFormerConfig, build, count_params, count_flops, size_space)
