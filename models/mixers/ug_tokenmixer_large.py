"""UG-Sep on TokenMixer-Large (arXiv 2602.10455 on 2602.06563): mix and revert are both cut, users first.

Blocks of residual_style "A" with H heads of width d = D/H; the first H_u = H*T_u/T mixed rows belong to the user (the
nearest integer from 1 to H - 1). User mixed rows read user tokens alone, user tokens read user mixed rows alone:

    encode, per request    X = RMS(U);   M_u[h, t] = head h of X_t,  h < H_u, t < T_u;  slots t >= T_u are zero
                           Y_u = F1_u(M_u)                              [H_u, R, W],  W = T*d
                           IC  = compensation(M_u)                      see `ug_rankmixer.py`
                           U_t <- U_t + [Y_u[h, t] for h < H_u, zeros];     U <- U + F2_u(RMS(U))
                           kept: heads h >= H_u of X, slots t >= T_u of Y_u, and IC
    score, per candidate   M_g[h] = kept heads, then head h of the candidate tokens' RMS,  h >= H_u
                           Y_g = F1_g(M_g)                              slots t >= T_u only
                           G_t <- G_t + [kept slots, Y_g[h, t] for h >= H_u] + IC_t;    G <- G + F2_g(RMS(G))
    logits = towers((sum_u RMS(U) + sum_g RMS(G)) / T)

Inputs beyond T_u*d of a user mixed row and outputs below it of a candidate one are dead: they meet zeros, or are never
read. drop_dead=True allocates live slices only (drawn as slices of the whole); False keeps full matrices and multiplies
the zeros, as a masked implementation would. Either way the function is the same. Equal parameters need a wider F1.

The inter-layer residual, gains and auxiliary heads act token by token and are separable; an auxiliary head adds the
user's sum at its block to the state. Experts, styles B and C and the other ablations are not separated here.

Letters as in `tokenmixer_large.py`; H_c = H - H_u. Closed forms (drop_dead, H_u/H = T_u/T):
    mixed half  3*D*F1*(T - T_u*T_c/T) parameters instead of 3*T*D*F1;  2 FLOPs each, once per request or candidate
    state       L*(2*T_u*T_c*D/T + T_c*D [compensation]) + D + D per auxiliary head          elements per request
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
from recscale.models.layers.auxiliary import auxiliary_params
from recscale.models.layers.mixing import mix_token_major, revert_token_major
from recscale.models.layers.norms import NormOptions
from recscale.models.layers.per_token import PerTokenSwiGLU
from recscale.models.layers.separation import (
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
from recscale.models.layers.towers import Towers, tower_flops, tower_params
from recscale.models.sizing import grains

from . import tokenmixer_large
from .tokenmixer_block import MixedBlockOptions
from .tokenmixer_large import TokenMixerLargeConfig


@dataclasses.dataclass(frozen=True)
class UGTokenMixerLargeConfig(SeparationOptions, TokenMixerLargeConfig):
    """TokenMixer-Large's flags (those named in the file), how sides are separated, and what is allocated."""

    drop_dead: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.check_separation(mixer=self.mixer, ffn=self.ffn, residual_style=self.residual_style)
        self.check_separation(residual=self.residual, sandwich_norm=self.sandwich_norm, dropout=self.dropout)
        self.check_separation(experts=self.experts)


@dataclasses.dataclass(frozen=True)
class Cut:
    """Sizes of a separated block: tokens and heads of the two sides, and the slices of F1 that are allocated.

    user_in, user_out: inputs and outputs of a user mixed row; candidate_in, candidate_out: of a candidate one.
    """

    tokens: tuple[int, int]
    heads: tuple[int, int]
    head_width: int
    user_in: int
    user_out: int
    candidate_in: int
    candidate_out: int

    @property
    def width(self) -> int:
        """D."""
        return sum(self.heads) * self.head_width

    @property
    def mixed_width(self) -> int:
        """W."""
        return sum(self.tokens) * self.head_width

    @property
    def mixed_weights(self) -> tuple[int, int]:
        """Weights of F1 per hidden unit: of the user's rows, of the candidates'."""
        return (
            self.heads[0] * (2 * self.user_in + self.user_out),
            self.heads[1] * (2 * self.candidate_in + self.candidate_out),
        )


def plan_cut(config: UGTokenMixerLargeConfig, plan: TokenPlan) -> Cut:
    """Sizes for a token plan.

    Raises:
        ValueError: no user token, or a single head.
    """
    require_user_tokens(plan)
    user, tokens = plan.user_tokens, plan.tokens
    heads, whole = config.mixed_shape(tokens, config.width)
    if heads < 2:
        raise ValueError(
            f"{tokens} tokens of width {config.width} mix in a single head, which cannot be shared between user and "
            f"candidates; make width a multiple of {tokens} or set heads"
        )
    own, d = min(max(round(heads * user / tokens), 1), heads - 1), config.width // heads
    candidates = tokens - user
    live = config.drop_dead
    across = config.user_to_candidate or not live
    return Cut(
        tokens=(user, candidates),
        heads=(own, heads - own),
        head_width=d,
        user_in=user * d if live else whole,
        user_out=whole if across else user * d,
        candidate_in=whole if across else candidates * d,
        candidate_out=candidates * d if live else whole,
    )


class KeptMixed(NamedTuple):
    """What candidates read of one block: heads [R, H_c, T_u*d], slots [R, T_c, H_u*d], compensation [R, T_c or 1, D].

    Without a way from user to candidate all three are None.
    """

    heads: Array | None
    slots: Array | None
    compensation: Array | None


class SeparatedMixedBlock(nnx.Module):
    """One block in two phases: `encode_user` on [T_u, R, D], `score` on [T_c, B, D].

    Args:
        cut: sizes of the two sides. mixed_hidden, hidden: F1, F2.
        options: norms, init and its scales; separation: how the sides are separated.
    """

    def __init__(
        self,
        cut: Cut,
        mixed_hidden: int,
        hidden: int,
        options: MixedBlockOptions = MixedBlockOptions(),  # noqa: B008
        separation: SeparationOptions = SeparationOptions(),  # noqa: B008
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def network(
            rows: int, inputs: int, hidden: int, out: int, fans: tuple[int, int] | None = None
        ) -> PerTokenSwiGLU:
            init, scales = options.init, options.scales
            return PerTokenSwiGLU(
                rows, inputs, hidden, out, init=init, scales=scales, fans=fans, dtype=dtype, rngs=rngs
            )

        self.cut, self.user_to_candidate = cut, separation.user_to_candidate
        (users, candidates), (own, other) = cut.tokens, cut.heads
        fans = (cut.mixed_width, mixed_hidden)
        self.user_mixed = network(own, cut.user_in, mixed_hidden, cut.user_out, fans)
        self.candidate_mixed = network(other, cut.candidate_in, mixed_hidden, cut.candidate_out, fans)
        self.user_ffn = network(users, cut.width, hidden, cut.width)
        self.candidate_ffn = network(candidates, cut.width, hidden, cut.width)
        sizes = (own, candidates, cut.user_in, cut.width)
        self.compensation = make_compensation(separation, users, candidates, *sizes, dtype=dtype)
        norm = NormOptions(norm="rms", norm_per_token=options.norm_per_token, norm_eps=options.norm_eps)
        self.mixed_norm = SideNorm(*cut.tokens, cut.width, norm, dtype=dtype)
        self.ffn_norm = SideNorm(*cut.tokens, cut.width, norm, dtype=dtype)

    def encode_user(self, x: Float[Array, "T_u R D"]) -> tuple[Float[Array, "T_u R D"], KeptMixed]:
        """x [T_u, R, D] -> the next user tokens and what candidates read."""
        cut, d = self.cut, self.cut.head_width
        (users, candidates), (own, other) = cut.tokens, cut.heads
        normed = self.mixed_norm.of_user(x)
        mixed = _pad_after(mix_token_major(normed[..., : own * d], own), cut.user_in)
        y = self.user_mixed(mixed)
        back = revert_token_major(y[..., : users * d], users)
        kept = KeptMixed(None, None, None)
        if self.user_to_candidate:
            heads = mix_token_major(normed[..., own * d :], other)
            slots = revert_token_major(y[..., users * d :], candidates)
            compensation = None if self.compensation is None else self.compensation(mixed)
            kept = KeptMixed(requests_first(heads), requests_first(slots), requests_first(compensation))
        x = x + _pad_after(back, cut.width)
        return x + self.user_ffn(self.ffn_norm.of_user(x)), kept

    def score(self, x: Float[Array, "T_c B D"], kept: KeptMixed, count: int) -> Float[Array, "T_c B D"]:
        """x [T_c, R*C, D] -> the next candidate tokens; count: C."""
        cut, d = self.cut, self.cut.head_width
        candidates, (own, other) = cut.tokens[1], cut.heads
        mixed = mix_token_major(self.mixed_norm.of_candidates(x)[..., own * d :], other)
        if kept.heads is not None:
            mixed = jnp.concatenate([to_rows(kept.heads, count), mixed], axis=-1)
        y = self.candidate_mixed(_pad_before(mixed, cut.candidate_in))
        back = revert_token_major(y[..., -candidates * d :], candidates)
        if kept.slots is not None:
            back = jnp.concatenate([to_rows(kept.slots, count), back], axis=-1)
        x = x + _pad_before(back, cut.width)
        if kept.compensation is not None:
            x = x + to_rows(kept.compensation, count)
        return x + self.candidate_ffn(self.ffn_norm.of_candidates(x))


class UGTokenMixerLarge(SeparatedBackbone):
    """Tokenizer, L separated blocks with inter-layer residuals, norm, mean over all tokens, towers.

    Args:
        plan: the resolved tokenizer with at least one user token. tasks: Y.
    """

    def __init__(
        self,
        plan: TokenPlan,
        tasks: int,
        options: UGTokenMixerLargeConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        cut, D, init = plan_cut(options, plan), options.width, options.init
        self.inter_residual_every = options.inter_residual_every
        self.tokenizer = Tokenizer(plan, D, init=init, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            SeparatedMixedBlock(cut, *options.hiddens, options, options, dtype=dtype, rngs=rngs)
            for _ in range(options.layers)
        )
        norm = NormOptions(norm="rms", norm_eps=options.norm_eps)
        self.norm = SideNorm(*cut.tokens, D, norm, dtype=dtype) if options.final_norm else None
        self.towers = Towers(D, tasks, tower=options.tower, init=init, dtype=dtype, rngs=rngs)
        self.auxiliary = tokenmixer_large.make_heads(options, tasks, dtype=dtype, rngs=rngs)

    def last_norm(self) -> SideNorm | None:
        return self.norm


def count_params(config: UGTokenMixerLargeConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Params:
    """Closed form of the parameter tree."""
    plan = plan_tokens(schema, config, config.width, tokens)
    T, D, (mixed, hidden) = plan.tokens, config.width, config.hiddens
    cut = plan_cut(config, plan)
    gains = 2 * D * (T if config.norm_per_token else 1)
    block = mixed * sum(cut.mixed_weights) + 3 * T * D * hidden + gains
    block += compensation_params(*_compensation_shape(config, plan, cut))
    head, tokenizer = tower_params(D, len(schema.tasks), config.tower), plan.params(D)
    return Params(
        dense=tokenizer + config.layers * block + D * config.final_norm + head,
        tokenizer=tokenizer,
        head=head,
        training_only=len(config.auxiliary) * auxiliary_params(D, len(schema.tasks), config.tower),
    )


def count_flops(config: UGTokenMixerLargeConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Flops:
    """Closed form of the matrix products: user tokens' blocks and compensation per request, the rest per candidate."""
    plan = plan_tokens(schema, config, config.width, tokens)
    cut, (mixed, hidden) = plan_cut(config, plan), config.hiddens
    user, candidate = (
        2 * weights * mixed + 6 * side * config.width * hidden
        for weights, side in zip(cut.mixed_weights, cut.tokens, strict=True)
    )
    user += compensation_flops(*_compensation_shape(config, plan, cut))
    head = tower_flops(config.width, len(schema.tasks), config.tower)
    return plan.flops(config.width) + Flops(
        user=config.layers * user,
        candidate=config.layers * candidate + head,
        candidate_training=len(config.auxiliary) * head,
    )


def count_state(config: UGTokenMixerLargeConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> int:
    """Elements of `encode_user`'s state per request."""
    plan = plan_tokens(schema, config, config.width, tokens)
    cut, D = plan_cut(config, plan), config.width
    kept = 0
    if config.user_to_candidate:
        kept = cut.head_width * (cut.heads[1] * cut.tokens[0] + cut.tokens[1] * cut.heads[0])
        kept += compensation_state(config.compensation_of(plan.user_tokens, plan.candidate_tokens), cut.tokens[1], D)
    return config.layers * kept + D * (1 + len(config.auxiliary)) + global_token_state(plan, D)


def size_space(
    schema: Schema, config: UGTokenMixerLargeConfig, target_dense_params: float, tokens: TokenShape = NO_TOKENS
) -> Iterator[dict[str, Any]]:
    """TokenMixer-Large's overrides near the target, with F1 and F2 widened by what dead slices leave free."""
    for overrides in tokenmixer_large.size_space(schema, config, target_dense_params, tokens):
        shape = dataclasses.replace(config, **overrides)
        plan = plan_tokens(schema, shape, shape.width, tokens)
        if shape.mixed_shape(plan.tokens, shape.width)[0] < 2:
            continue
        (mixed, hidden), cut = shape.hiddens, plan_cut(shape, plan)
        grain = next(g for g in grains(target_dense_params, (64, 1)) if mixed % g == 0 and hidden % g == 0)
        first, second = config.layers * sum(cut.mixed_weights), config.layers * 3 * plan.tokens * shape.width
        free = target_dense_params - count_params(shape, schema, tokens).dense
        both = grain * round(free / (first + second) / grain)
        rest = grain * round((free - both * (first + second)) / second / grain)
        if min(mixed + both, hidden + both + rest) >= 1:
            yield overrides | {"mixed_hidden": mixed + both, "hidden": hidden + both + rest}


def _compensation_shape(config: UGTokenMixerLargeConfig, plan: TokenPlan, cut: Cut) -> tuple[str, int, int, int, int]:
    return (
        config.compensation_of(plan.user_tokens, plan.candidate_tokens),
        cut.heads[0],
        cut.tokens[1],
        cut.user_in,
        cut.width,
    )


def _pad_after(x: Array, width: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, 0), (0, width - x.shape[-1])))


def _pad_before(x: Array, width: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, 0), (width - x.shape[-1], 0)))


UG_TOKENMIXER_LARGE = BackboneSpec(
    UGTokenMixerLargeConfig, token_builder(UGTokenMixerLarge), count_params, count_flops, size_space
)
