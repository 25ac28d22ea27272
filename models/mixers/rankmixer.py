"""RankMixer, dense (arXiv 2507.15551 v3): multi-head token mixing and one feed-forward network per token.

X_0 [B,T,D] comes from the tokenizer; each of the L blocks is post-norm (eq. 1-6):

    S = LN(mix(X) + X)                     mix: head h of token t -> slot t of token h, H = T heads
    X = LN(PFFN(S) + S)                    PFFN_t(s) = gelu(s W1_t + b1_t) W2_t + b2_t,  W1 [T,D,F]  W2 [T,F,D]
    logits = towers(mean_t X_L)

Letters: B rows, T tokens, D token width, F hidden width, L layers, Y tasks. Activations are token-major [T,B,D] inside.
Tokens are ordered user side first; user tokens are made once per request, everything after them is per candidate.

Closed forms (mixer="mix", ffn="per_token"):
    params = tokenizer + L*(T*(2*D*F + F + D) + 4*D) + Y*(D + 1)
    flops  = 2 * tokenizer weights + L*4*T*D*F + 2*D*Y          per row

Undisclosed -> flag (default): FFN ratio -> hidden; projection shared by tokens -> tokenizer_shared (False); norm gains
-> norm_affine (True), norm_per_token (False), norm_eps; GELU form -> activation ("gelu", tanh); head -> tower (());
dropout (0, on the output of the feed-forward network); init. Ablations of the paper: ffn="shared", residual=False,
norm=None, norm_place="pre" (adds a norm before the mean), and mixer:

    none            no mixing sub-layer (neither its skip nor its norm)
    self_attention  QKVO shared by all tokens instead of mix
    all_share       no mixing sub-layer; every PFFN_t reads the concatenation of all tokens, T*D -> F -> D
    all_concat      one MLP T*D -> F -> T*D replaces both sub-layers

Sparse experts (`experts`=E slices of every PFFN_t, flags of `SparseOptions`): see `rankmixer_moe.py`, which also says
how dense training and sparse inference meet. They add L*T*2*E*(D + 1) parameters of two ReLU routers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from recscale.models import sizing
from recscale.models.architecture import BackboneSpec
from recscale.models.counts import Flops, Params
from recscale.models.inputs.batch import CandidateInputs, Output, UserInputs
from recscale.models.inputs.history import NO_TOKENS, TokenShape
from recscale.models.inputs.schema import Schema
from recscale.models.inputs.tokenizers import (
    Tokenizer,
    TokenizerOptions,
    TokenPlan,
    UserTokens,
    plan_tokens,
    possible_tokens,
)
from recscale.models.layers.attention import SelfAttention
from recscale.models.layers.dense import FFN
from recscale.models.layers.dropout import dropout
from recscale.models.layers.mixing import mix_token_major
from recscale.models.layers.norms import Norm, norm_params
from recscale.models.layers.per_token import PerTokenFFN
from recscale.models.layers.towers import Towers, mean_tokens, tower_flops, tower_params
from recscale.models.options import require_sizes
from recscale.models.ranker import Backbone
from recscale.models.sizing import LARGE, grains

from . import rankmixer_moe as moe

Array = jax.Array

# Mixers that keep the first sub-layer of a block.
_MIXING = ("mix", "self_attention")

# F / D the sizing prefers: the ratio at which the paper's 100M row meets its printed parameters.
_HIDDEN_RATIO = 2.8


@dataclasses.dataclass(frozen=True)
class RankMixerConfig(moe.SparseOptions, TokenizerOptions):
    """width D, hidden F, layers L, heads (self_attention only; None: as many as tokens); the rest: see the file."""

    width: int = 128
    hidden: int = 512
    layers: int = 2
    mixer: Literal["mix", "none", "self_attention", "all_share", "all_concat"] = "mix"
    heads: int | None = None
    ffn: Literal["per_token", "shared"] = "per_token"
    activation: str = "gelu"
    residual: bool = True
    norm: Literal["layer", "rms", "none"] | None = "layer"
    norm_place: Literal["post", "pre"] = "post"
    norm_affine: bool = True
    norm_per_token: bool = False
    norm_eps: float = 1e-6
    dropout: float = 0.0
    init: str = "lecun_normal"
    tower: tuple[int, ...] = ()

    def __post_init__(self):
        require_sizes(width=self.width, hidden=self.hidden, layers=self.layers, heads=self.heads, tower=self.tower)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}, expected a share in [0, 1)")
        if self.ffn == "shared" and self.mixer in ("all_share", "all_concat"):
            raise ValueError(f"mixer={self.mixer!r} replaces the per-token network, so ffn must be 'per_token'")
        per_token = self.ffn == "per_token" and self.mixer not in ("all_share", "all_concat")
        moe.check(self, self.hidden, per_token=per_token)


def make_norm(
    tokens: int,
    width: int,
    *,
    norm: str | None = "layer",
    norm_affine: bool = True,
    norm_per_token: bool = False,
    norm_eps: float = 1e-6,
    dtype=jnp.float32,
) -> Norm | None:
    """The block's norm on [T, B, D], or None for norm=None, which a sweep writes "none"."""
    gains = tokens if norm_per_token else None
    return (
        None
        if norm in (None, "none")
        else Norm(width, kind=norm, affine=norm_affine, tokens=gains, eps=norm_eps, dtype=dtype)
    )


class RankMixerBlock(nnx.Module):
    """One block on token-major activations: x [T, B, D] -> [T, B, D].

    Args:
        tokens, width, hidden: T, D, F. mixer="mix" needs D divisible by T.
        heads: of mixer="self_attention".
        sparse: experts instead of a dense network per token, or None.
        norm: arguments of `make_norm`.
        The other flags are those of `RankMixerConfig`.
    """

    def __init__(
        self,
        tokens: int,
        width: int,
        hidden: int,
        *,
        mixer: str = "mix",
        heads: int | None = None,
        ffn: str = "per_token",
        activation: str = "gelu",
        residual: bool = True,
        norm_place: str = "post",
        dropout: float = 0.0,
        init: str = "lecun_normal",
        sparse: moe.SparseOptions | None = None,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
        **norm: Any,
    ):
        if mixer == "mix" and width % tokens:
            raise ValueError(f"width {width} does not divide into {tokens} heads, one per token; make it a multiple")
        self.mixer, self.residual, self.norm_place, self.dropout = mixer, residual, norm_place, dropout
        kwargs = dict(init=init, dtype=dtype, rngs=rngs)
        self.attention = SelfAttention(width, heads or tokens, **kwargs) if mixer == "self_attention" else None
        if sparse is not None and sparse.experts is not None:
            self.ffn = moe.make_experts(sparse, tokens, width, hidden, activation=activation, **kwargs)
        elif mixer == "all_concat":
            self.ffn = FFN(tokens * width, hidden, activation=activation, **kwargs)
        elif ffn == "shared":
            self.ffn = FFN(width, hidden, activation=activation, **kwargs)
        else:
            inputs = tokens * width if mixer == "all_share" else width
            self.ffn = PerTokenFFN(tokens, inputs, hidden, width, activation=activation, **kwargs)
        self.mixing_norm = make_norm(tokens, width, dtype=dtype, **norm) if mixer in _MIXING else None
        self.ffn_norm = make_norm(tokens, width, dtype=dtype, **norm)

    def __call__(self, x: Array, *, key: Array | None = None) -> Array:
        return self.with_routing(x, key=key)[0]

    def with_routing(self, x: Array, *, key: Array | None = None, **gating: Any) -> tuple[Array, moe.Routing | None]:
        """The new x and what a sparse network reports; `gating` are further arguments of a sparse network."""
        if self.mixer in _MIXING:
            x = self._sublayer(self._mix, self.mixing_norm, x)
        routing: list[moe.Routing] = []

        def branch(y: Array) -> Array:
            if moe.is_sparse(self.ffn):
                y, found = self.ffn(y, training=key is not None, **gating)
                routing.append(found)
            else:
                y = self._feed_forward(y)
            return dropout(y, self.dropout, key)

        x = self._sublayer(branch, self.ffn_norm, x)
        return x, routing[0] if routing else None

    def _sublayer(self, branch, norm: Norm | None, x: Array) -> Array:
        """post: norm(branch(x) + x);  pre: branch(norm(x)) + x."""
        norm = norm or (lambda y: y)
        y = branch(norm(x) if self.norm_place == "pre" else x)
        y = y + x if self.residual else y
        return norm(y) if self.norm_place == "post" else y

    def _mix(self, x: Array) -> Array:
        return mix_token_major(x, x.shape[0]) if self.attention is None else self.attention(x)

    def _feed_forward(self, x: Array) -> Array:
        if self.mixer not in ("all_share", "all_concat"):
            return self.ffn(x)
        tokens, rows, width = x.shape
        y = self.ffn(x.swapaxes(0, 1).reshape(rows, tokens * width))
        return y if self.mixer == "all_share" else y.reshape(rows, tokens, width).swapaxes(0, 1)


class RankMixer(Backbone):
    """Tokenizer, L blocks, mean over tokens, towers.

    Args:
        plan: the resolved tokenizer (`plan_tokens`); T is `plan.tokens`.
        width, hidden, layers, tasks: D, F, L, Y.
        norm: arguments of `make_norm`; block: further flags of `RankMixerBlock`.
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
        sparse: moe.SparseOptions | None = None,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
        **block: Any,
    ):
        norm, block = norm or {}, block | {"sparse": sparse}
        kwargs = dict(init=init, dtype=dtype, rngs=rngs)
        self.tokenizer = Tokenizer(plan, width, **kwargs)
        self.blocks = nnx.List(
            RankMixerBlock(plan.tokens, width, hidden, norm_place=norm_place, **norm, **block, **kwargs)
            for _ in range(layers)
        )
        # A pre-norm stack never normalises its last sum, so the mean over tokens needs one more norm.
        self.final_norm = make_norm(plan.tokens, width, dtype=dtype, **norm) if norm_place == "pre" else None
        self.towers = Towers(width, tasks, tower=tower, **kwargs)
        self.experts = moe.ExpertControl(sparse, layers, plan.tokens) if sparse and sparse.experts else None

    def encode_user(self, user: UserInputs, tokens: Array | None = None) -> UserTokens:
        return self.tokenizer.encode_user(user, tokens)

    def score(
        self, state: UserTokens, candidates: CandidateInputs, tokens: Array | None = None, *, key: Array | None = None
    ) -> Output:
        own = self.tokenizer.candidate_tokens(state, candidates, tokens)
        x, (requests, candidates) = self.tokenizer.join(state, own), own.shape[1:3]
        passes = [{}] if self.experts is None else self.experts.passes(requests, candidates, training=key is not None)
        found = [self._pass(x, key, gating) for gating in passes]
        logits = [z.reshape(requests, candidates, -1) for z, _ in found]
        if self.experts is None:
            return Output(logits=logits[0])
        return self.experts.output(logits, [routing for _, routing in found], training=key is not None)

    def _pass(self, x: Array, key: Array | None, gating: Mapping[str, Any]) -> tuple[Array, list[Any]]:
        """Logits [B, Y] of tokens [T, B, D], and what the experts of every block report."""
        found = []
        for i, block in enumerate(self.blocks):
            own_key = None if key is None else jax.random.fold_in(key, i)
            x, routing = block.with_routing(x, key=own_key, **gating)
            found.append(routing)
        if self.final_norm is not None:
            x = self.final_norm(x)
        return self.towers(mean_tokens(x)), found


def build(
    config: RankMixerConfig, schema: Schema, tokens: TokenShape = NO_TOKENS, *, rngs: nnx.Rngs, dtype=jnp.float32
) -> RankMixer:
    """The model of a config; `tokens` are those of a sequence encoder in front."""
    flags = ("mixer", "heads", "ffn", "activation", "residual", "norm_place", "dropout", "init", "tower")
    norms = ("norm", "norm_affine", "norm_per_token", "norm_eps")
    return RankMixer(
        plan_tokens(schema, config, config.width, tokens),
        config.width,
        config.hidden,
        config.layers,
        len(schema.tasks),
        norm={name: getattr(config, name) for name in norms},
        sparse=config,
        dtype=dtype,
        rngs=rngs,
        **{name: getattr(config, name) for name in flags},
    )


def count_params(config: RankMixerConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Params:
    """Closed form of the parameter tree."""
    plan = plan_tokens(schema, config, config.width, tokens)
    T, D, F = plan.tokens, config.width, config.hidden
    ffn = {
        "all_share": T * (T * D * F + F + F * D + D),
        "all_concat": 2 * T * D * F + F + T * D,
    }.get(config.mixer, (T if config.ffn == "per_token" else 1) * (2 * D * F + F + D))
    attention = 4 * D * D if config.mixer == "self_attention" else 0
    gains = T if config.norm_per_token else None
    norm = norm_params(D, kind=config.norm, affine=config.norm_affine, tokens=gains)
    norms = config.layers * (2 if config.mixer in _MIXING else 1) + (config.norm_place == "pre")
    tokenizer, head = plan.params(D), tower_params(D, len(schema.tasks), config.tower)
    routers, inactive = moe.count_params(config, T, D, F)
    dense = tokenizer + config.layers * (ffn + attention + routers) + norms * norm + head
    return Params(dense=dense, tokenizer=tokenizer, head=head, inactive=config.layers * inactive)


def count_flops(config: RankMixerConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Flops:
    """Closed form of the matrix products: user tokens per request, all else per candidate.

    With experts the forward pass is the served one (the budgeted share of experts, unless expert_path is "masked").
    """
    plan = plan_tokens(schema, config, config.width, tokens)
    T, D, F = plan.tokens, config.width, config.hidden
    ffn = T * (2 * T * D * F + 2 * F * D) if config.mixer == "all_share" else 4 * T * D * F
    attention = 8 * T * D * D + 4 * T * T * D if config.mixer == "self_attention" else 0
    head = tower_flops(D, len(schema.tasks), config.tower)
    served, training = moe.count_flops(config, T, D, F, ffn)
    passes = moe.training_passes(config)
    rest = config.layers * (served + attention) + head
    more = passes * (config.layers * (training + attention) + head) - rest
    return plan.flops(D) + Flops(candidate=rest, candidate_training=more)


def size_space(
    schema: Schema, config: RankMixerConfig, target_dense_params: float, tokens: TokenShape = NO_TOKENS
) -> Iterator[dict[str, Any]]:
    """Overrides (tokens, width, hidden) near the target; layers and a given number of tokens stay as configured.

    For each T and D the hidden width that meets the target is solved for. First come shapes with F/D near 2.8, the
    number of tokens that suits the size, and hidden widths that are multiples of 64 (8 below 1e7 parameters).
    """
    found = []
    for T, token_cost in token_choices(schema, config, target_dense_params, tokens):
        step = math.lcm(T or 1, 128 if target_dense_params >= LARGE else 4)
        ideal = math.sqrt(target_dense_params / (2 * _HIDDEN_RATIO * config.layers * (T or 16)))
        for D in range(step, int(3 * ideal) + step + 1, step):
            shape = dataclasses.replace(config, tokens=T, width=D)
            for i, hidden in enumerate(_hidden_choices(shape, schema, target_dense_params, tokens)):
                ratio_cost = abs(math.log2(hidden / D / _HIDDEN_RATIO))
                found.append((ratio_cost + token_cost + i / 4, T or 0, D, hidden))
    for _, T, D, hidden in sorted(found):
        yield {"tokens": T or None, "width": D, "hidden": hidden}


def _hidden_choices(config: RankMixerConfig, schema: Schema, target: float, tokens: TokenShape) -> list[int]:
    """Multiples of each grain, coarsest first, at which the parameters (affine in F) come nearest to the target."""
    unit = config.experts or 1
    one, two = (count_params(dataclasses.replace(config, hidden=unit * F), schema, tokens).dense for F in (1, 2))
    exact = unit * (1 + (target - one) / (two - one))
    steps = [math.lcm(grain, unit) for grain in grains(target)]
    return list(dict.fromkeys(grain * round(exact / grain) for grain in steps if exact >= grain / 2 + 1e-9))


def token_choices(
    schema: Schema, config: TokenizerOptions, target: float, tokens: TokenShape
) -> list[tuple[int | None, float]]:
    """T as configured, or those `sizing.token_choices` offers; each with its cost."""
    if config.tokens is not None or config.tokenizer != "cut":
        return [(config.tokens, 0.0)]
    return list(sizing.token_choices(possible_tokens(schema, config, tokens), target))


RANKMIXER = BackboneSpec(RankMixerConfig, build, count_params, count_flops, size_space)
