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
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recscale.models.architecture import BackboneSpec, token_builder
from recscale.models.counts import Flops, Params
from recscale.models.inputs.history import NO_TOKENS, TokenShape
from recscale.models.inputs.schema import Schema
from recscale.models.inputs.tokenizers import Tokenizer, TokenPlan, plan_tokens
from recscale.models.layers.dense import FFN
from recscale.models.layers.mixing import mix_token_major
from recscale.models.layers.per_token import PerTokenFFN
from recscale.models.layers.residuals import Step, sub_layer
from recscale.models.layers.separation import (
    MaskedShortcut,
    SeparatedBackbone,
    SeparationOptions,
    SideNorm,
    compensation_flops,
    compensation_params,
    compensation_state,
    global_token_state,
    make_compensation,
    requests_first,
    require_user_tokens,
    to_rows,
)
from recscale.models.layers.towers import Towers, tower_flops

from . import rankmixer
from .rankmixer import BlockOptions, RankMixerConfig


@dataclasses.dataclass(frozen=True)
class RankMixerSeparation(SeparationOptions):
    """separated_residual: masked attention in the place of the shortcuts, see the file."""

    separated_residual: bool = False


@dataclasses.dataclass(frozen=True)
class UGRankMixerConfig(RankMixerSeparation, RankMixerConfig):
    """RankMixer's flags (those named in the file) and how its sides are separated."""

    def __post_init__(self):
        super().__post_init__()
        if self.separated_residual and not self.residual:
            raise ValueError("separated_residual is a form of the residual, so residual must be True")
        self.check_separation(mixer=self.mixer, heads=self.heads, dropout=self.dropout, experts=self.experts)


class Kept(NamedTuple):
    """What candidates read of one block, per request.

    heads [R, T_c, T_u*D/T]; compensation [R, T_c or 1, D]; keys, values [R, T_u, D] of a separated residual.
    """

    heads: Array | None
    compensation: Array | None
    keys: Array | None = None
    values: Array | None = None


class SeparatedRankMixerBlock(nnx.Module):
    """One block in two phases: `encode_user` on [T_u, R, D], `score` on [T_c, B, D].

    Args:
        user_tokens, candidate_tokens, width, hidden: T_u, T_c, D, F; D divisible by T.
        options: of the block; separation: how its sides are separated.
    """

    def __init__(
        self,
        user_tokens: int,
        candidate_tokens: int,
        width: int,
        hidden: int,
        options: BlockOptions = BlockOptions(),  # noqa: B008
        separation: RankMixerSeparation = RankMixerSeparation(),  # noqa: B008
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        sides, tokens = (user_tokens, candidate_tokens), user_tokens + candidate_tokens
        if width % tokens:
            raise ValueError(f"width {width} does not divide into {tokens} heads, one per token; make it a multiple")
        self.tokens, self.residual, self.norm_place = sides, options.residual, options.norm_place
        self.user_columns = user_tokens * width // tokens
        self.user_to_candidate = separation.user_to_candidate
        act, init, separated = options.activation, options.init, separation.separated_residual
        self.user_ffn: FFN | PerTokenFFN
        self.candidate_ffn: PerTokenFFN | None
        if options.ffn == "shared":
            self.user_ffn = FFN(width, hidden, activation=act, init=init, dtype=dtype, rngs=rngs)
            self.candidate_ffn = None
        else:
            self.user_ffn, self.candidate_ffn = (
                PerTokenFFN(side, width, hidden, activation=act, init=init, dtype=dtype, rngs=rngs) for side in sides
            )
        self.compensation = make_compensation(separation, *sides, *sides, width, width, dtype=dtype)
        self.shortcut = MaskedShortcut(width, init=init, dtype=dtype, rngs=rngs) if separated else None
        self.mixing_norm = SideNorm(*sides, width, options, dtype=dtype)
        self.ffn_norm = SideNorm(*sides, width, options, dtype=dtype)

    def encode_user(self, x: Float[Array, "T_u R D"]) -> tuple[Float[Array, "T_u R D"], Kept]:
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

    def score(self, x: Float[Array, "T_c B D"], kept: Kept, candidates: int) -> Float[Array, "T_c B D"]:
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
            assert kept.values is not None
            user = (to_rows(part, candidates) for part in (kept.keys, kept.values))
            memory = tuple(jnp.concatenate(pair) for pair in zip(user, memory, strict=True))
        return self._attend(ffn, self.ffn_norm.of_candidates, post(s), *memory)

    def _attend(self, ffn: Step, norm: Step, s: Array, keys: Array, values: Array) -> Array:
        pre, post = self._norms(norm)
        branch = ffn(pre(s))
        assert self.shortcut is not None
        return post(branch + self.shortcut(branch, keys, values))

    def _feed_forward(self, ffn: Step, norm: Step, x: Array) -> Array:
        return sub_layer(ffn, norm, x, place=self.norm_place, residual=self.residual)

    def _add(self, y: Array, x: Array) -> Array:
        return y + x if self.residual else y

    def _norms(self, norm: Step) -> tuple[Step, Step]:
        """What is done before and after a sub-layer."""
        return (norm, _identity) if self.norm_place == "pre" else (_identity, norm)


class UGRankMixer(SeparatedBackbone):
    """Tokenizer, L separated blocks, mean over all tokens, towers.

    Args:
        plan: the resolved tokenizer with at least one user token. tasks: Y.
    """

    def __init__(
        self, plan: TokenPlan, tasks: int, options: UGRankMixerConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        require_user_tokens(plan)
        sides, D, init = (plan.user_tokens, plan.candidate_tokens), options.width, options.init
        self.tokenizer = Tokenizer(plan, D, init=init, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            SeparatedRankMixerBlock(*sides, D, options.hidden, options, options, dtype=dtype, rngs=rngs)
            for _ in range(options.layers)
        )
        pre = options.norm_place == "pre"
        self.final_norm = SideNorm(*sides, D, options, dtype=dtype) if pre else None
        self.towers = Towers(D, tasks, tower=options.tower, init=init, dtype=dtype, rngs=rngs)

    def last_norm(self) -> SideNorm | None:
        return self.final_norm


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
    compensation = compensation_state(
        config.compensation_of(plan.user_tokens, plan.candidate_tokens), plan.candidate_tokens, D
    )
    kept = 0
    if config.user_to_candidate:
        kept = plan.user_tokens * plan.candidate_tokens * D // plan.tokens
        kept += 2 * plan.user_tokens * D * config.separated_residual
    return config.layers * (kept + compensation) + D + global_token_state(plan, D)


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
    return (
        config.compensation_of(plan.user_tokens, plan.candidate_tokens),
        plan.user_tokens,
        plan.candidate_tokens,
        config.width,
        config.width,
    )


def _identity(x: Array) -> Array:
    return x


UG_RANKMIXER = BackboneSpec(UGRankMixerConfig, token_builder(UGRankMixer), count_params, count_flops, size_space)
