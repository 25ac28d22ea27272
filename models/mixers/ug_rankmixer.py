"""UG-Sep on RankMixer (arXiv 2602.10455): the user's half of every block is computed once per request.

Tokens are split at the input, user tokens first; after mixing, the first T_u tokens read user tokens alone. What flows
from candidates to users is cut, the other direction stays. Per block (H = T heads, h and t count tokens):

    encode, per request    M_u[h, t] = head h of user token t, for h, t < T_u; slots t >= T_u are zero      [T_u, R, D]
                           IC  = compensation(M_u)                                                          [T_c, R, D]
                           S_u = LN(M_u + U);   U <- LN(PFFN_u(S_u) + S_u)
                           kept: heads h >= T_u of the incoming U, and IC
    score, per candidate   M_g[h] = kept user heads, then head h of the candidate tokens, for h >= T_u      [T_c, B, D]
                           S_g = LN(M_g + G + IC);   G <- LN(PFFN_g(S_g) + S_g)
    logits = towers((sum_u U + sum_g G) / T)

    compensation  "none"       IC = 0
                  "mean"       IC = (mean_u M_u) W                D^2 parameters
                  "per_token"  IC_g = sum_u A[g, u] M_u W         D^2 + T_c*T_u parameters
                  None         "per_token" if T_u > T/2, else "none": what is lost grows with the user's share
    W starts at 0 and A at 1/T_u, so a fresh model equals the uncompensated one and W has a gradient.

separated_residual=True replaces the shortcuts by masked attention from the branch's tokens to the block's input, the
form that still works where the number of tokens changes: S = LN(M + IC);  B = PFFN(S);  X <- LN(B + R) with
R = softmax(Q K^T / sqrt(D)) V,  Q = B W_Q,  K, V = X W_K, X W_V; users read users, candidates all (one head).

A reconstruction: the paper was described in words only, and these equations were built to have every stated property.
Where compensation enters, and its form, are ours. Masks are slices: nothing is multiplied by zero, so junk in one
candidate reaches neither users nor other candidates. Training with C candidates per request saves what serving saves.

Letters: R requests, C candidates, B = R*C rows, T = T_u + T_c tokens, D width, F hidden, L layers.

Closed forms: parameters and FLOPs per row are RankMixer's plus L times compensation's; per request
    flops = L*4*D*F*(T_u + C*T_c)   + compensation L*(2*T_u*D^2 + 2*T_c*T_u*D), "mean" L*2*D^2
    state = L*(T_u*T_c*D/T + T_c*D [with compensation; D with "mean"]) + D            elements
    separated_residual: + L*3*D^2 parameters; user + L*T_u*(6*D^2 + 4*T_u*D), candidate + L*T_c*(6*D^2 + 4*T*D) FLOPs;
                        state + L*2*T_u*D
so the blocks run up to C*T / (T_u + C*T_c) -> T/T_c times faster.

Flags: compensation; user_to_candidate=False cuts the other direction as well (two towers, the control); user_tokens and
global_token="split" of the tokenizer. Of RankMixer's flags those that keep tokens apart: not dropout (`encode_user`
has no key) and no mixer but "mix".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from recscale.models.architecture import BackboneSpec
from recscale.models.counts import Flops, Params
from recscale.models.inputs.batch import CandidateInputs, Output, UserInputs
from recscale.models.inputs.history import NO_TOKENS, TokenShape
from recscale.models.inputs.schema import Schema
from recscale.models.inputs.tokenizers import Tokenizer, TokenizerOptions, TokenPlan, UserTokens, plan_tokens
from recscale.models.layers.dense import FFN, repeat_user
from recscale.models.layers.mixing import mix_token_major
from recscale.models.layers.per_token import PerTokenFFN
from recscale.models.layers.separation import (
    Compensation,
    MaskedShortcut,
    SideNorm,
    compensation_flops,
    compensation_params,
    requests_first,
    to_rows,
)
from recscale.models.layers.towers import Towers, mean_tokens, tower_flops
from recscale.models.ranker import Backbone

from . import rankmixer
from .rankmixer import RankMixerConfig

Array = jax.Array

# RankMixer's flags that keep tokens apart, or can be computed on the two sides one after the other.
_SEPARABLE = ("width", "hidden", "layers", "ffn", "activation", "residual", "norm", "norm_place", "norm_affine")
_SEPARABLE += ("norm_per_token", "norm_eps", "init", "tower")


@dataclasses.dataclass(frozen=True)
class UGRankMixerConfig(RankMixerConfig):
    """RankMixer's flags (those named in the file), compensation, and whether users reach candidates at all."""

    compensation: Literal["none", "mean", "per_token"] | None = None
    user_to_candidate: bool = True
    separated_residual: bool = False

    def __post_init__(self):
        super().__post_init__()
        require_separable(self, RankMixerConfig, _SEPARABLE)
        if self.separated_residual and not self.residual:
            raise ValueError("separated_residual is a form of the residual, so residual must be True")
        check_compensation(self.compensation, self.user_to_candidate)


def require_separable(config: Any, base: type, allowed: tuple[str, ...]) -> None:
    """Refuses flags of the `base` config that are neither `allowed` nor the tokenizer's, unless at their defaults."""
    tokenizer = {field.name for field in dataclasses.fields(TokenizerOptions)}
    for field in dataclasses.fields(base):
        value = getattr(config, field.name)
        if field.name not in tokenizer and field.name not in allowed and value != field.default:
            raise ValueError(
                f"{field.name} is {value!r}: user and candidate tokens cannot be separated there; set {field.default!r}"
            )


def check_compensation(compensation: str | None, user_to_candidate: bool) -> None:
    """Raises ValueError for a compensation that would have nobody to go to."""
    if not user_to_candidate and compensation not in (None, "none"):
        raise ValueError(
            f"compensation={compensation!r} carries users to candidates, which user_to_candidate=False cuts"
        )


def choose_compensation(compensation: str | None, plan: TokenPlan, user_to_candidate: bool = True) -> str:
    """The default rule: "per_token" when more than half of the tokens are the user's."""
    if compensation is not None:
        return compensation
    return "per_token" if user_to_candidate and plan.user_tokens > plan.candidate_tokens else "none"


def require_user_tokens(plan: TokenPlan) -> None:
    """Raises ValueError for inputs without a user token."""
    if plan.user_tokens < 1:
        raise ValueError(
            f"none of the {plan.tokens} tokens is a user token, so there is nothing to separate; give the schema user "
            f"fields or use the backbone without UG-Sep"
        )


class Kept(NamedTuple):
    """What candidates read of one block, per request.

    heads [R, T_c, T_u*D/T]; compensation [R, T_c or 1, D]; keys, values [R, T_u, D] of a separated residual.
    """

    heads: Array | None
    compensation: Array | None
    keys: Array | None = None
    values: Array | None = None


class UGState(NamedTuple):
    """blocks: `Kept` of each block; pooled: sum over user tokens [R, D]; everything: the global token's user part.

    Every array has the requests first, so a flat batch reads `jax.tree.map(lambda x: jnp.take(x, request_id, 0), s)`.
    """

    blocks: tuple[Kept, ...]
    pooled: Array
    everything: Array | None


class SeparatedRankMixerBlock(nnx.Module):
    """One block in two phases: `encode_user` on [T_u, R, D], `score` on [T_c, B, D].

    Args:
        user_tokens, candidate_tokens, width, hidden: T_u, T_c, D, F; D divisible by T.
        compensation: "none" or a kind of `Compensation`. user_to_candidate: False cuts this direction too.
        norm: arguments of `SideNorm`. The other flags are those of `RankMixerConfig`.
    """

    def __init__(
        self,
        user_tokens: int,
        candidate_tokens: int,
        width: int,
        hidden: int,
        *,
        compensation: str = "none",
        user_to_candidate: bool = True,
        separated_residual: bool = False,
        ffn: str = "per_token",
        activation: str = "gelu",
        residual: bool = True,
        norm_place: str = "post",
        init: str = "lecun_normal",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
        **norm: Any,
    ):
        sides, tokens = (user_tokens, candidate_tokens), user_tokens + candidate_tokens
        if width % tokens:
            raise ValueError(f"width {width} does not divide into {tokens} heads, one per token; make it a multiple")
        self.tokens, self.residual, self.norm_place = sides, residual, norm_place
        self.user_columns = user_tokens * width // tokens
        self.user_to_candidate = user_to_candidate
        kwargs = dict(activation=activation, init=init, dtype=dtype, rngs=rngs)
        if ffn == "shared":
            self.user_ffn, self.candidate_ffn = FFN(width, hidden, **kwargs), None
        else:
            self.user_ffn, self.candidate_ffn = (PerTokenFFN(side, width, hidden, **kwargs) for side in sides)
        given = compensation != "none"
        self.compensation = Compensation(compensation, *sides, width, width, dtype=dtype) if given else None
        shortcut = dict(init=init, dtype=dtype, rngs=rngs)
        self.shortcut = MaskedShortcut(width, **shortcut) if separated_residual else None
        self.mixing_norm = SideNorm(*sides, width, dtype=dtype, **norm)
        self.ffn_norm = SideNorm(*sides, width, dtype=dtype, **norm)

    def encode_user(self, x: Array) -> tuple[Array, Kept]:
        """x [T_u, R, D] -> the next user tokens and what candidates read."""
        pre, post = self._norms(self.mixing_norm.of_user)
        source, cut = pre(x), self.user_columns
        mixed = mix_token_major(source[..., :cut], self.tokens[0])
        mixed = jnp.pad(mixed, ((0, 0), (0, 0), (0, x.shape[-1] - cut)))
        heads = mix_token_major(source[..., cut:], self.tokens[1]) if self.user_to_candidate else None
        compensation = None if self.compensation is None else self.compensation(mixed)
        kept = Kept(requests_first(heads), requests_first(compensation))
        if self.shortcut is None:
            s = post(self._add(mixed, x))
            return self._feed_forward(self.user_ffn, self.ffn_norm.of_user, s), kept
        keys, values = self.shortcut.memory(x)
        if self.user_to_candidate:
            kept = kept._replace(keys=requests_first(keys), values=requests_first(values))
        return self._attend(self.user_ffn, self.ffn_norm.of_user, post(mixed), keys, values), kept

    def score(self, x: Array, kept: Kept, candidates: int) -> Array:
        """x [T_c, R*C, D] -> the next candidate tokens."""
        pre, post = self._norms(self.mixing_norm.of_candidates)
        own = mix_token_major(pre(x)[..., self.user_columns :], self.tokens[1])
        if kept.heads is None:
            mixed = jnp.pad(own, ((0, 0), (0, 0), (self.user_columns, 0)))
        else:
            mixed = jnp.concatenate([to_rows(kept.heads, candidates), own], axis=-1)
        s = mixed if self.shortcut is not None else self._add(mixed, x)
        if kept.compensation is not None:
            s = s + to_rows(kept.compensation, candidates)
        ffn = self.user_ffn if self.candidate_ffn is None else self.candidate_ffn
        if self.shortcut is None:
            return self._feed_forward(ffn, self.ffn_norm.of_candidates, post(s))
        memory = self.shortcut.memory(x)
        if kept.keys is not None:
            user = (to_rows(part, candidates) for part in (kept.keys, kept.values))
            memory = tuple(jnp.concatenate(pair) for pair in zip(user, memory, strict=True))
        return self._attend(ffn, self.ffn_norm.of_candidates, post(s), *memory)

    def _attend(self, ffn, norm, s: Array, keys: Array, values: Array) -> Array:
        pre, post = self._norms(norm)
        branch = ffn(pre(s))
        return post(branch + self.shortcut(branch, keys, values))

    def _feed_forward(self, ffn, norm, x: Array) -> Array:
        pre, post = self._norms(norm)
        return post(self._add(ffn(pre(x)), x))

    def _add(self, y: Array, x: Array) -> Array:
        return y + x if self.residual else y

    def _norms(self, norm):
        """What is done before and after a sub-layer."""
        return (norm, _identity) if self.norm_place == "pre" else (_identity, norm)


class UGRankMixer(Backbone):
    """Tokenizer, L separated blocks, mean over all tokens, towers.

    Args:
        plan: the resolved tokenizer with at least one user token.
        width, hidden, layers, tasks: D, F, L, Y.
        norm: arguments of `SideNorm`; block: further flags of `SeparatedRankMixerBlock`.
    """

    def __init__(
        self,
        plan: TokenPlan,
        width: int,
        hidden: int,
        layers: int,
        tasks: int,
        *,
        tower: tuple[int, ...] = (),
        norm_place: str = "post",
        norm: Mapping[str, Any] | None = None,
        init: str = "lecun_normal",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
        **block: Any,
    ):
        norm = norm or {}
        require_user_tokens(plan)
        sides, kwargs = (plan.user_tokens, plan.candidate_tokens), dict(init=init, dtype=dtype, rngs=rngs)
        self.tokenizer = Tokenizer(plan, width, **kwargs)
        self.blocks = nnx.List(
            SeparatedRankMixerBlock(*sides, width, hidden, norm_place=norm_place, **norm, **block, **kwargs)
            for _ in range(layers)
        )
        self.final_norm = SideNorm(*sides, width, dtype=dtype, **norm) if norm_place == "pre" else None
        self.towers = Towers(width, tasks, tower=tower, **kwargs)

    def encode_user(self, user: UserInputs, tokens: Array | None = None) -> UGState:
        state = self.tokenizer.encode_user(user, tokens)
        x, kept = state.tokens, []
        for block in self.blocks:
            x, part = block.encode_user(x)
            kept.append(part)
        if self.final_norm is not None:
            x = self.final_norm.of_user(x)
        return UGState(tuple(kept), mean_tokens(x) * x.shape[0], state.everything)

    def score(
        self, state: UGState, candidates: CandidateInputs, tokens: Array | None = None, *, key: Array | None = None
    ) -> Output:
        own = self.tokenizer.candidate_tokens(UserTokens(None, state.everything), candidates, tokens)
        count, requests, each, width = own.shape
        x = own.reshape(count, requests * each, width)
        for block, kept in zip(self.blocks, state.blocks, strict=True):
            x = block.score(x, kept, each)
        if self.final_norm is not None:
            x = self.final_norm.of_candidates(x)
        total = mean_tokens(x) * count + repeat_user(state.pooled, each)
        return Output(logits=self.towers(total / self.tokenizer.plan.tokens).reshape(requests, each, -1))


def build(
    config: UGRankMixerConfig, schema: Schema, tokens: TokenShape = NO_TOKENS, *, rngs: nnx.Rngs, dtype=jnp.float32
) -> UGRankMixer:
    """The model of a config; `tokens` are those of a sequence encoder in front."""
    flags = ("ffn", "activation", "residual", "norm_place", "init", "tower", "user_to_candidate", "separated_residual")
    norms = ("norm", "norm_affine", "norm_per_token", "norm_eps")
    plan = plan_tokens(schema, config, config.width, tokens)
    return UGRankMixer(
        plan,
        config.width,
        config.hidden,
        config.layers,
        len(schema.tasks),
        norm={name: getattr(config, name) for name in norms},
        compensation=choose_compensation(config.compensation, plan, config.user_to_candidate),
        dtype=dtype,
        rngs=rngs,
        **{name: getattr(config, name) for name in flags},
    )


def count_params(config: UGRankMixerConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Params:
    """Closed form of the parameter tree: RankMixer's, the compensation's and the separated residual's."""
    return rankmixer.count_params(config, schema, tokens) + Params(dense=_extra_params(config, schema, tokens))


def count_flops(config: UGRankMixerConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Flops:
    """Closed form of the matrix products: user tokens' blocks and compensation per request, the rest per candidate."""
    plan = plan_tokens(schema, config, config.width, tokens)
    each = 4 * config.width * config.hidden
    compensation = compensation_flops(*_compensation_shape(config, schema, tokens))
    user, candidate = each, each
    if config.separated_residual:
        D, readable = config.width, plan.tokens if config.user_to_candidate else plan.candidate_tokens
        user += 6 * D * D + 4 * plan.user_tokens * D
        candidate += 6 * D * D + 4 * readable * D
    head = tower_flops(config.width, len(schema.tasks), config.tower)
    return plan.flops(config.width) + Flops(
        user=config.layers * (plan.user_tokens * user + compensation),
        candidate=config.layers * plan.candidate_tokens * candidate + head,
    )


def count_state(config: UGRankMixerConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> int:
    """Elements of `encode_user`'s state per request."""
    plan, D = plan_tokens(schema, config, config.width, tokens), config.width
    kind = choose_compensation(config.compensation, plan, config.user_to_candidate)
    compensation = {"none": 0, "mean": D}.get(kind, plan.candidate_tokens * D)
    kept = 0
    if config.user_to_candidate:
        kept = plan.user_tokens * plan.candidate_tokens * D // plan.tokens
        kept += 2 * plan.user_tokens * D * config.separated_residual
    return config.layers * (kept + compensation) + D + global_token_state(plan, D)


def global_token_state(plan: TokenPlan, width: int) -> int:
    """Elements per request that a global token's first product keeps of the user's fields."""
    return (plan.hidden or width) if plan.everything and plan.everything[0].widths[0] else 0


def size_space(
    schema: Schema, config: UGRankMixerConfig, target_dense_params: float, tokens: TokenShape = NO_TOKENS
) -> Iterator[dict[str, Any]]:
    """RankMixer's overrides near the target, with hidden widths that make room for the compensation."""
    for overrides in rankmixer.size_space(schema, config, target_dense_params, tokens):
        shape = dataclasses.replace(config, **overrides)
        extra = _extra_params(shape, schema, tokens)
        if extra:
            wider = dataclasses.replace(shape, hidden=shape.hidden + 1)
            step = rankmixer.count_params(wider, schema, tokens).dense
            step -= rankmixer.count_params(shape, schema, tokens).dense
            overrides = overrides | {"hidden": shape.hidden - round(extra / step)}
        if overrides["hidden"] >= 1:
            yield overrides


def _extra_params(config: UGRankMixerConfig, schema: Schema, tokens: TokenShape) -> int:
    """What the separated model has beyond RankMixer's parameters."""
    compensation = compensation_params(*_compensation_shape(config, schema, tokens))
    return config.layers * (compensation + 3 * config.width**2 * config.separated_residual)


def _compensation_shape(
    config: UGRankMixerConfig, schema: Schema, tokens: TokenShape
) -> tuple[str, int, int, int, int]:
    plan = plan_tokens(schema, config, config.width, tokens)
    kind = choose_compensation(config.compensation, plan, config.user_to_candidate)
    return kind, plan.user_tokens, plan.candidate_tokens, config.width, config.width


def _identity(x: Array) -> Array:
    return x


UG_RANKMIXER = BackboneSpec(UGRankMixerConfig, build, count_params, count_flops, size_space)
