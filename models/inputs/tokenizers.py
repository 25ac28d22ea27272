"""Tokenizers: fields (and the tokens of a sequence encoder) -> T tokens of width D, user side first.

    "cut"       (RankMixer, arXiv 2507.15551) the fields in schema order are cut into pieces, each projected:
                x_t = W_t piece_t + b_t.  cut_align="field" (default): a piece is a run of whole fields, padded to the
                side's widest piece; "exact": equal widths, a cut may split a field.
                tokenizer_shared=True uses one W for all pieces (the paper does not say; default False).
    "group"     (TokenMixer-Large, arXiv 2602.06563) one projection per semantic group.
    "field"     one projection per field.
    "identity"  fields are the tokens as they are; every field must have width D.
    "auto"      "identity" where every field is an embedding of width D, else "field". (A table already tells its field
                from the others; raw numbers need the projection for it.)

global_token=True adds a token projected from all fields (a candidate token: it sees the candidate); "split" adds a
second one projected from the user fields alone, which is a user token.
tokenizer_hidden=F puts a hidden GELU layer into every projection of fields (depth undisclosed; default None).

A token never straddles the two sides, so user tokens are made once per request (`encode_user`), candidate tokens once
per candidate. Token order: user fields, user history tokens, the user's global token; candidate fields, candidate
history tokens, global token.
History tokens are projected to D, each by its own matrix, and count in T.
Everything leaves here token-major: [T_u, R, D] and [T_c, R, C, D].

Weights d*D + D per piece of (padded) width d, 2*d*D FLOPs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recscale.models.counts import Flops
from recscale.models.layers.dense import FFN, Dense, SplitDense
from recscale.models.layers.layout import laid_out
from recscale.models.layers.per_token import PerTokenDense, PerTokenFFN, activation
from recscale.models.options import Options, group_of, require_sizes

from .batch import CandidateInputs, UserInputs, join_fields
from .history import NO_TOKENS, RequestTokens, RowTokens, TokenShape
from .schema import Field, Schema

Projection = Dense | FFN | PerTokenDense | PerTokenFFN

# The largest T that tokens=None chooses: the paper's 100M model has 16 tokens.
AUTO_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class TokenizerOptions(Options):
    """Flags every token architecture's config inherits.

    tokens: T, history and global tokens included. None: "cut" takes the largest T <= 16 that the fields allow and that
        divides D; the T of other tokenizers follows from the schema, and a number given here must agree with it.
    user_tokens: T_u, history tokens included. None shares the tokens in proportion to the widths of the two sides.
    """

    tokens: int | None = None
    user_tokens: int | None = None
    tokenizer: Literal["cut", "group", "field", "identity", "auto"] = "cut"
    cut_align: Literal["field", "exact"] = "field"
    tokenizer_shared: bool = False
    tokenizer_hidden: int | None = None
    global_token: bool | Literal["split"] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(tokens=self.tokens, tokenizer_hidden=self.tokenizer_hidden)
        if self.cut_align == "exact" and self.tokenizer != "cut":
            raise ValueError(f"cut_align='exact' has no effect with tokenizer={self.tokenizer!r}; set tokenizer='cut'")
        if self.tokenizer_shared and self.tokenizer != "cut":
            raise ValueError(f"tokenizer_shared needs pieces of one width: tokenizer='cut', not {self.tokenizer!r}")
        if self.tokenizer == "identity" and self.tokenizer_hidden is not None:
            raise ValueError("tokenizer='identity' has no projection, so tokenizer_hidden must be None")


@dataclasses.dataclass(frozen=True)
class SidePlan:
    """How the fields of one side become tokens.

    runs: the fields of each token; for an exact cut one run with all fields, cut into `exact` pieces.
    widths: the (unpadded) input width of each token.
    batched: inputs are padded to one width and projected by one batched matmul; else one matmul per token.
    trained: per run, whether it holds a field with a table, so that its gradient is needed.
    pad_to: the common width of batched inputs where it is not this side's widest.
    """

    runs: tuple[tuple[str, ...], ...]
    widths: tuple[int, ...]
    exact: bool
    batched: bool
    trained: tuple[bool, ...]
    pad_to: int = 0

    @property
    def tokens(self) -> int:
        return len(self.widths)

    @property
    def padded(self) -> tuple[int, ...]:
        """Input width of each token's projection."""
        if not (self.batched and self.widths):
            return self.widths
        return (self.pad_to or max(self.widths),) * self.tokens

    def flops(self, hidden: int | None, width: int) -> tuple[int, int]:
        """Forward FLOPs, and those of gradients nobody needs."""
        total = sum(_mlp_flops(d, hidden, width) for d in self.padded)
        first = [2 * d * (hidden or width) for d in self.padded]
        if self.batched:
            return total, 0 if any(self.trained) else sum(first)
        return total, sum(f for f, trained in zip(first, self.trained, strict=True) if not trained)


@dataclasses.dataclass(frozen=True)
class TokenPlan:
    """The resolved tokenizer of one schema: what `Tokenizer` builds and what is counted."""

    user: SidePlan
    candidate: SidePlan
    sequence: TokenShape = NO_TOKENS
    projected: bool = True
    shared: bool = False
    hidden: int | None = None
    everything: tuple[SidePlan, SidePlan] | None = None
    user_everything: SidePlan | None = None

    @property
    def user_tokens(self) -> int:
        """T_u."""
        return self.user.tokens + self.sequence.user + (self.user_everything is not None)

    @property
    def candidate_tokens(self) -> int:
        """T_c."""
        return self.candidate.tokens + self.sequence.candidate + (self.everything is not None)

    @property
    def tokens(self) -> int:
        """T."""
        return self.user_tokens + self.candidate_tokens

    @property
    def trained(self) -> bool:
        """Whether a gradient must flow into the tokens: not if all of them are raw numbers as they are."""
        sides = any((*self.user.trained, *self.candidate.trained))
        return self.projected or sides or self.sequence.tokens > 0 or self.everything is not None

    def params(self, width: int) -> int:
        """Parameters for tokens of width D."""
        inputs = [] if not self.projected else [*self.user.padded, *self.candidate.padded]
        if self.shared:
            inputs = inputs[:1]
        if self.everything is not None:
            inputs.append(sum(side.widths[0] for side in self.everything))
        if self.user_everything is not None:
            inputs.append(self.user_everything.widths[0])
        fields = sum(_mlp_params(d, self.hidden, width) for d in inputs)
        return fields + self.sequence.tokens * (self.sequence.width * width + width)

    def flops(self, width: int) -> Flops:
        """FLOPs for tokens of width D."""
        total = Flops()
        if self.projected:
            user, candidate = self.user.flops(self.hidden, width), self.candidate.flops(self.hidden, width)
            total += Flops(user[0], candidate[0], user[1], candidate[1])
        if self.everything is not None:
            first = [2 * side.widths[0] * (self.hidden or width) for side in self.everything]
            unneeded = [f * (not side.trained[0]) for f, side in zip(first, self.everything, strict=True)]
            total += Flops(first[0], first[1] + (2 * self.hidden * width if self.hidden else 0), *unneeded)
        if self.user_everything is not None:
            user, unneeded_user = self.user_everything.flops(self.hidden, width)
            total += Flops(user=user, user_unneeded=unneeded_user)
        s, each = self.sequence, 2 * self.sequence.width * width
        return total + Flops(
            s.user * each,
            s.candidate * each,
            s.user * each * (not s.user_trained),
            s.candidate * each * (not s.candidate_trained),
        )


class UserTokens(NamedTuple):
    """What is kept per request: tokens [T_u, R, D] (None if T_u = 0), and the user part of the global token [R, .]."""

    tokens: Float[Array, "T R D"] | None
    everything: Float[Array, "R _"] | None


class Tokenizer(nnx.Module):
    """Fields -> tokens, as the `plan` says.

    Args:
        plan: from `plan_tokens`.
        width: D.
    """

    def __init__(
        self,
        plan: TokenPlan,
        width: int,
        *,
        init: str = "lecun_normal",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.plan, self.width, self.dtype = plan, width, dtype
        make = functools.partial(_projection, hidden=plan.hidden, width=width, init=init, dtype=dtype, rngs=rngs)
        own = plan.projected and not plan.shared
        self.shared = make(0, plan.candidate.padded[0]) if plan.shared else None
        self.user = _side_projections(plan.user, make) if own else None
        self.candidate = _side_projections(plan.candidate, make) if own else None
        everything = everything_out = None
        if plan.everything is not None:
            user, candidate = (side.widths[0] for side in plan.everything)
            everything = SplitDense(user, candidate, plan.hidden or width, init=init, dtype=dtype, rngs=rngs)
            if plan.hidden is not None:
                axes = ("hidden", "embed")
                everything_out = Dense(plan.hidden, width, axes=axes, init=init, dtype=dtype, rngs=rngs)
        self.everything, self.everything_out = everything, everything_out
        self.user_everything = make(0, plan.user_everything.widths[0]) if plan.user_everything else None
        s = plan.sequence
        project = functools.partial(PerTokenDense, axes=("events", "embed"), init=init, dtype=dtype, rngs=rngs)
        self.user_history = project(s.user, s.width, width) if s.user else None
        self.candidate_history = project(s.candidate, s.width, width) if s.candidate else None

    def encode_user(self, user: UserInputs, history: RequestTokens | None = None) -> UserTokens:
        """history: [R, t_u, A], tokens of a sequence encoder."""
        made = self._fields(self.plan.user, self.user, user.fields)
        made += self._history(self.user_history, history, self.plan.sequence.user)
        if self.user_everything is not None and self.plan.user_everything is not None:
            made.append(self.user_everything(join_fields(user.fields, self.plan.user_everything.runs[0]))[None])
        everything = None
        if self.everything is not None and self.plan.everything is not None and self.everything.user_width:
            everything = self.everything.encode_user(join_fields(user.fields, self.plan.everything[0].runs[0]))
        return UserTokens(jnp.concatenate(made, axis=0) if made else None, everything)

    def candidate_tokens(
        self, state: UserTokens, candidates: CandidateInputs, history: RowTokens | None = None
    ) -> Float[Array, "T R C D"]:
        """[T_c, R, C, D]; history: [R, C, t_c, A]."""
        fields = candidates.fields
        made = self._fields(self.plan.candidate, self.candidate, fields)
        made += self._history(self.candidate_history, history, self.plan.sequence.candidate)
        if self.everything is not None and self.plan.everything is not None:
            x = join_fields(fields, self.plan.everything[1].runs[0])
            token = self.everything.score(state.everything, x)
            if self.everything_out is not None:
                token = self.everything_out(activation("gelu")(token))
            made.append(token.reshape(1, *x.shape[:2], self.width))
        return jnp.concatenate(made, axis=0)

    def join(self, state: UserTokens, candidate_tokens: Float[Array, "T R C D"]) -> Float[Array, "all B D"]:
        """All T tokens of every row, token-major: [T_u, R, D] and [T_c, R, C, D] -> [T, R*C, D]."""
        _, requests, candidates, width = candidate_tokens.shape
        rows = candidate_tokens.reshape(-1, requests * candidates, width)
        if state.tokens is None:
            return laid_out(rows, None, "batch", None)
        user = jnp.broadcast_to(state.tokens[:, :, None], (state.tokens.shape[0], requests, candidates, width))
        return laid_out(
            jnp.concatenate([user.reshape(-1, requests * candidates, width), rows], axis=0), None, "batch", None
        )

    def _fields(
        self, side: SidePlan, projections: Projection | nnx.List[Projection] | None, fields: Mapping[str, Array]
    ) -> list[Array]:
        """Tokens of one side's fields: a list of [t, ..., D]."""
        if not side.tokens:
            return []
        pieces = _pieces(side, fields)
        if isinstance(projections, nnx.List):
            return [project(piece)[None] for project, piece in zip(projections, pieces, strict=True)]
        d = side.padded[0]
        x = jnp.stack([jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, d - x.shape[-1])]) for x in pieces])
        if self.shared is not None:
            return [self.shared(x)]
        if projections is None:
            return [x.astype(self.dtype)]
        tokens, *lead, _ = x.shape
        return [projections(x.reshape(tokens, -1, d)).reshape(tokens, *lead, self.width)]

    def _history(self, project: PerTokenDense | None, history: Array | None, expected: int) -> list[Array]:
        found = 0 if history is None else history.shape[-2]
        if found != expected:
            raise ValueError(f"the model was built for {expected} history tokens, the sequence encoder gave {found}")
        if project is None or history is None:
            return []
        *lead, tokens, width = history.shape
        x = jnp.moveaxis(history, -2, 0).reshape(tokens, -1, width)
        return [project(x).reshape(tokens, *lead, self.width)]


def plan_tokens(schema: Schema, options: TokenizerOptions, width: int, sequence: TokenShape = NO_TOKENS) -> TokenPlan:
    """Resolves the flags for one schema; `options` may be any config that inherits `TokenizerOptions`.

    Raises:
        ValueError: flags that contradict each other or the schema, with the numbers that would fit.
    """
    return _plan(schema, group_of(options, TokenizerOptions), width, sequence)


def possible_tokens(schema: Schema, options: TokenizerOptions, sequence: TokenShape = NO_TOKENS) -> range:
    """The numbers of tokens T a "cut" tokenizer can make of this schema: every field side present gets one or more."""
    sides = (schema.user_fields, schema.candidate_fields)
    most = _most_tokens(sides, options.cut_align)
    extra = sequence.tokens + sum(_global_tokens(options))
    return range(sum(min(1, m) for m in most) + extra, sum(most) + extra + 1)


@functools.lru_cache(maxsize=256)
def _plan(schema: Schema, options: TokenizerOptions, width: int, sequence: TokenShape) -> TokenPlan:
    if options.tokenizer == "auto":
        plain = all(field.width == width and not field.is_dense for field in schema.fields)
        chosen = "identity" if plain and options.tokenizer_hidden is None else "field"
        options = dataclasses.replace(options, tokenizer=chosen)
    kind = options.tokenizer
    _check_options(schema, options, width)
    sides = (schema.user_fields, schema.candidate_fields)
    if kind == "cut":
        per_side = _share_tokens(schema, options, width, sequence)
        plans = [_cut(fields, tokens, options.cut_align) for fields, tokens in zip(sides, per_side, strict=True)]
    else:
        plans = [_by_group(fields, kind) for fields in sides]
    if options.tokenizer_shared:
        widest = max(d for plan in plans for d in plan.padded)
        plans = [dataclasses.replace(plan, pad_to=widest) for plan in plans]
    user, candidate = (_side([fields], batched=False) for fields in sides)
    plan = TokenPlan(
        *plans,
        sequence=sequence,
        projected=kind != "identity",
        shared=options.tokenizer_shared,
        hidden=options.tokenizer_hidden,
        everything=(user, candidate) if options.global_token else None,
        user_everything=user if options.global_token == "split" else None,
    )
    for name, wanted, found in (
        ("tokens", options.tokens, plan.tokens),
        ("user_tokens", options.user_tokens, plan.user_tokens),
    ):
        if wanted is not None and wanted != found:
            raise ValueError(f"{name} is {wanted}, but tokenizer={kind!r} makes {found} of this schema; set {found}")
    return plan


def _check_options(schema: Schema, options: TokenizerOptions, width: int) -> None:
    if not schema.candidate_fields:
        raise ValueError("the schema has no candidate or cross field, so there is nothing to rank")
    if options.global_token == "split" and not schema.user_fields:
        raise ValueError("global_token='split' makes a token of the user fields, and the schema has none; use True")
    if options.tokenizer == "identity":
        other = [f"{field.name} ({field.width})" for field in schema.fields if field.width != width]
        if other:
            raise ValueError(f"tokenizer='identity' needs fields of width {width}; other widths: {', '.join(other)}")


def _global_tokens(options: TokenizerOptions) -> tuple[int, int]:
    """How many global tokens the user and the candidate side get."""
    return int(options.global_token == "split"), int(bool(options.global_token))


def _most_tokens(sides: tuple[tuple[Field, ...], ...], align: str) -> list[int]:
    return [sum(field.width for field in fields) if align == "exact" else len(fields) for fields in sides]


def _share_tokens(schema: Schema, options: TokenizerOptions, width: int, sequence: TokenShape) -> tuple[int, int]:
    """How many tokens the user and the candidate fields get."""
    possible = possible_tokens(schema, options, sequence)
    tokens = options.tokens
    if tokens is None:
        allowed = [t for t in possible if t <= AUTO_TOKENS and width % t == 0]
        if not allowed:
            raise ValueError(
                f"no number of tokens from {possible[0]} to {min(AUTO_TOKENS, possible[-1])} divides width {width}; "
                f"set tokens or another width"
            )
        tokens = allowed[-1]
    if tokens not in possible:
        raise ValueError(
            f"tokens={tokens}, but tokenizer='cut' with cut_align={options.cut_align!r} can make {possible[0]} to "
            f"{possible[-1]} of this schema ('field' never splits a field)"
        )
    sides = (schema.user_fields, schema.candidate_fields)
    widths = [sum(field.width for field in fields) for fields in sides]
    most = _most_tokens(sides, options.cut_align)
    extra = sequence.user + _global_tokens(options)[0]
    free = tokens - sequence.tokens - sum(_global_tokens(options))
    low, high = max(min(1, most[0]), free - most[1]), min(most[0], free - 1)
    if options.user_tokens is None:
        user = min(max(round(free * widths[0] / sum(widths)), low), high)
        return user, free - user
    user = options.user_tokens - extra
    if not low <= user <= high:
        raise ValueError(
            f"user_tokens={options.user_tokens} of tokens={tokens} does not fit; expected {low + extra} to "
            f"{high + extra}"
        )
    return user, free - user


def _cut(fields: tuple[Field, ...], tokens: int, align: str) -> SidePlan:
    if align == "exact":
        width = -(-sum(field.width for field in fields) // tokens) if tokens else 0
        side = _side([fields] if tokens else [], batched=True)
        return dataclasses.replace(side, widths=(width,) * tokens, exact=True)
    return _side(_balanced_runs(fields, tokens), batched=True)


def _balanced_runs(fields: tuple[Field, ...], tokens: int) -> list[tuple[Field, ...]]:
    """Consecutive non-empty runs whose ends lie nearest to equal shares of the width."""
    ends = [0]
    for field in fields:
        ends.append(ends[-1] + field.width)
    cuts = [0]
    for i in range(1, tokens):
        allowed = range(cuts[-1] + 1, len(fields) - (tokens - i) + 1)
        cuts.append(min(allowed, key=lambda j: abs(ends[j] * tokens - i * ends[-1])))
    return [fields[a:b] for a, b in zip(cuts, [*cuts[1:], len(fields)], strict=True)] if tokens else []


def _by_group(fields: tuple[Field, ...], kind: str) -> SidePlan:
    runs: dict[str, tuple[Field, ...]] = {}
    for field in fields:
        name = field.group if kind == "group" else field.name
        runs[name] = (*runs.get(name, ()), field)
    side = _side(runs.values(), batched=False)
    # One batched matmul wherever no padding is needed for it.
    return dataclasses.replace(side, batched=len(set(side.widths)) <= 1)


def _side(runs: Iterable[tuple[Field, ...]], *, batched: bool) -> SidePlan:
    return SidePlan(
        runs=tuple(tuple(field.name for field in run) for run in runs),
        widths=tuple(sum(field.width for field in run) for run in runs),
        exact=False,
        batched=batched,
        trained=tuple(any(not field.is_dense for field in run) for run in runs),
    )


def _projection(
    tokens: int, d: int, *, hidden: int | None, width: int, init: str, dtype: DTypeLike, rngs: nnx.Rngs
) -> Projection:
    """tokens 0: one matrix for whatever comes; else one per token."""
    if tokens and hidden:
        return PerTokenFFN(tokens, d, hidden, width, init=init, dtype=dtype, rngs=rngs)
    if tokens:
        # Devices that split tokens each make all of them: how many a side has is not how many a device holds.
        axes = ("features", "embed")
        return PerTokenDense(tokens, d, width, axes=axes, per="fields", init=init, dtype=dtype, rngs=rngs)
    if hidden:
        return FFN(d, hidden, width, init=init, dtype=dtype, rngs=rngs)
    return Dense(d, width, axes=("features", "embed"), init=init, dtype=dtype, rngs=rngs)


def _side_projections(
    side: SidePlan, make: Callable[[int, int], Projection]
) -> Projection | nnx.List[Projection] | None:
    if not side.tokens:
        return None
    return make(side.tokens, side.padded[0]) if side.batched else nnx.List(make(0, d) for d in side.widths)


def _pieces(side: SidePlan, fields: Mapping[str, Array]) -> list[Array]:
    """Inputs of the projections, [..., d_t] each."""
    runs = [join_fields(fields, run) for run in side.runs]
    if not side.exact:
        return runs
    x, short = runs[0], side.widths[0] * side.tokens - runs[0].shape[-1]
    return jnp.split(jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)]), side.tokens, axis=-1)


def _mlp_params(d: int, hidden: int | None, width: int) -> int:
    return d * width + width if hidden is None else d * hidden + hidden + hidden * width + width


def _mlp_flops(d: int, hidden: int | None, width: int) -> int:
    return 2 * (d * width if hidden is None else d * hidden + hidden * width)
