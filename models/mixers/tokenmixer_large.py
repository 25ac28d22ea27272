"""TokenMixer-Large (arXiv 2602.06563 v2): mixing and reverting around per-token SwiGLUs, deep and pre-norm.

X [B,T,D] comes from the tokenizer: one token per semantic group and a global token projected from all groups. In each
of L blocks F1 acts on the H mixed tokens of width W = T*D/H, F2 on the T tokens of width D; mix and revert are the
permutations of `layers/mixing.py`; F(x)_t = (silu(x_t Wg_t) * (x_t Wu_t)) Wo_t without biases:

    "A"  U = X + revert(F1(mix(RMS(X))))                            Y = U + F2(RMS(U))           the drawn block
    "B"  M = mix(X);  h = M + F1(RMS(M));  V = revert(h)            Y = X + F2(RMS(V))           printed, pre-norm
    "C"  M = mix(X);  h = RMS(F1(M) + M);  V = revert(h)            Y = RMS(F2(V) + X)           printed, post-norm

Inter-layer residual: after block l, X_l += X_{l-r} where r divides l and l < L. Auxiliary heads on lower blocks l see
the mean of X_l through a norm and towers of their own; only training has them:

    aux_mode "joint"        task loss + aux_weight * mean_l BCE(y, z_L + z_l)        low blocks learn what is left over
             "independent"  task loss + aux_weight * mean_l BCE(y, z_l)

    logits = towers(mean over all T tokens of RMS(X_L))

Sparse per-token experts (`experts`=E, `active`=K): F1 and F2 are cut into E sub-experts, one always on, K - 1 of the
others selected by the token's own router; see `layers/per_token_moe.py`. Tune dense, then sparsify at the same widths.

Closed forms (per-token SwiGLU, F1 and F2 absolute widths; H*W = T*D):
    params = tokenizer + L*(3*T*D*(F1 + F2) + 2*D) + D + Y*(D + 1)          style B, C: W + D instead of 2*D
    flops  = 2 * tokenizer weights + L*6*T*D*(F1 + F2) + 2*D*Y              per row
    experts: + L*(H*W + T*D)*(E - 1) parameters; flops L*(6*T*D*(F1 + F2)*K/E + 4*T*D*(E - 1))
    auxiliary heads: n*(D + Y*(D + 1)) parameters, counted apart

Letters: B rows, T tokens, D width, H heads, W width of a mixed token, F1/F2 hidden widths, L layers, E experts, K
active experts with the shared one, Y tasks.

Undisclosed -> flag (default): block wiring -> residual_style ("A"; B and C are the printed equations); sizes -> width,
hidden (F2), mixed_hidden (F1; None: the same), layers, heads (None: T, or the largest divisor of D below it); norm
before pooling -> final_norm; gains -> norm_per_token; r -> inter_residual_every (2; 0 is off); auxiliary form, weight,
blocks -> aux_mode, aux_weight (0.1; 0 is off), aux_layers (None: L//2), aux_stop_gradient (joint: z_L is a constant
there); init -> "xavier_normal", the last matrix times down_init_scale (body of the paper: std * 0.01, "std"; appendix:
variance * 0.01, "variance"), the other two times up_init_scale; E, K, alpha -> experts, active, gate_scale (E/K),
gate_norm, balance_weight, z_weight; dropout (0), tower (()).

Ablations: mixer="none"; ffn="shared_swiglu" or "per_token_ffn" (GELU, biases); residual=False; sandwich_norm (style A:
a second norm at the end of each branch); shared_expert=False (K of E are routed); expert_scope="global": all tokens
choose from one pool of T*E experts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from recscale.models.architecture import BackboneSpec, token_builder
from recscale.models.counts import Flops, Params
from recscale.models.inputs.batch import CandidateInputs, Output, UserInputs
from recscale.models.inputs.history import NO_TOKENS, TokenShape
from recscale.models.inputs.schema import Schema
from recscale.models.inputs.tokenizers import Tokenizer, TokenizerOptions, TokenPlan, UserTokens, plan_tokens
from recscale.models.layers.auxiliary import AuxiliaryHeads, AuxiliaryOptions, auxiliary_params
from recscale.models.layers.norms import Norm, normalise
from recscale.models.layers.per_token_moe import TopKRouting, top_k_report
from recscale.models.layers.residuals import inter_residual
from recscale.models.layers.towers import TowerOptions, Towers, mean_tokens, tower_flops, tower_params
from recscale.models.options import require_sizes
from recscale.models.ranker import Backbone
from recscale.models.sizing import LARGE, grains, tokenizer_choices

from .tokenmixer_block import MixedBlockOptions, SubExpertOptions, TokenMixerLargeBlock

# F / D the sizing prefers: that of the largest starter sizes.
HIDDEN_RATIO = 1.25


@dataclasses.dataclass(frozen=True)
class TokenMixerLargeConfig(MixedBlockOptions, SubExpertOptions, AuxiliaryOptions, TowerOptions, TokenizerOptions):
    """width D, hidden F2, mixed_hidden F1, layers L, heads H, experts E, active K; the rest: see the file."""

    tokenizer: Literal["cut", "group", "field", "identity"] = "group"
    global_token: bool | Literal["split"] = True
    width: int = 128
    hidden: int = 192
    mixed_hidden: int | None = None
    layers: int = 4
    final_norm: bool = True
    inter_residual_every: int = 2

    def __post_init__(self):
        super().__post_init__()
        require_sizes(width=self.width, hidden=self.hidden, layers=self.layers, mixed_hidden=self.mixed_hidden)
        require_sizes(heads=self.heads, experts=self.experts, active=self.active)
        if self.inter_residual_every < 0:
            raise ValueError(f"inter_residual_every is {self.inter_residual_every}, expected 0 (off) or more")
        self.check_auxiliary(self.layers)
        if self.residual_style == "C" and self.inter_residual_every:
            raise ValueError(
                "inter_residual_every doubles the stream, which residual_style 'C' has just normalised; set it to 0"
            )
        if self.experts is not None and self.ffn != "per_token_swiglu":
            raise ValueError(f"experts are slices of per-token SwiGLUs, so ffn must be that, not {self.ffn!r}")
        self.check_experts(*self.hiddens)

    @property
    def hiddens(self) -> tuple[int, int]:
        """(F1, F2)."""
        return self.hidden if self.mixed_hidden is None else self.mixed_hidden, self.hidden

    @property
    def auxiliary(self) -> tuple[int, ...]:
        """Blocks with an auxiliary head."""
        return self.auxiliary_blocks(self.layers)


class _Trunk(NamedTuple):
    """What the blocks give: the last x [T, B, D], x before the first and after every block, and what every router
    reports."""

    x: Array
    stream: list[Array]
    routing: list[TopKRouting]


class TokenMixerLarge(Backbone):
    """Tokenizer, L blocks with inter-layer residuals, norm, mean over tokens, towers; auxiliary heads in training.

    Args:
        plan: the resolved tokenizer (`plan_tokens`); T is `plan.tokens`. tasks: Y.
    """

    def __init__(
        self,
        plan: TokenPlan,
        tasks: int,
        options: TokenMixerLargeConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        D, init, eps = options.width, options.init, options.norm_eps
        self.inter_residual_every = options.inter_residual_every
        self.balance_weight, self.z_weight = options.balance_weight, options.z_weight
        self.tokenizer = Tokenizer(plan, D, init=init, dtype=dtype, rngs=rngs)
        block = functools.partial(TokenMixerLargeBlock, plan.tokens, D, options.hidden, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            block(mixed_hidden=options.mixed_hidden, options=options, sparse=options) for _ in range(options.layers)
        )
        self.norm = Norm(D, kind="rms", eps=eps, dtype=dtype) if options.final_norm else None
        self.towers = Towers(D, tasks, tower=options.tower, init=init, dtype=dtype, rngs=rngs)
        self.auxiliary = make_heads(options, tasks, dtype=dtype, rngs=rngs)

    def encode_user(self, user: UserInputs, tokens: Float[Array, "R t A"] | None = None) -> UserTokens:
        return self.tokenizer.encode_user(user, tokens)

    def score(
        self,
        state: UserTokens,
        candidates: CandidateInputs,
        tokens: Float[Array, "R C t A"] | None = None,
        *,
        key: Array | None = None,
    ) -> Output:
        own = self.tokenizer.candidate_tokens(state, candidates, tokens)
        trunk = self.run_blocks(self.tokenizer.join(state, own), key=key, valid=candidates.valid_rows)
        logits = self.towers(mean_tokens(normalise(self.norm, trunk.x)))
        shape = (*own.shape[1:3], -1)
        low = [] if key is None else self.auxiliary.each(lambda head, x: head(x), trunk.stream)
        losses, stats = self._routing_report(trunk.routing)
        loss_logits = self.auxiliary.loss_logits(logits, low, shape)
        return Output(logits=logits.reshape(shape), losses=losses, stats=stats, loss_logits=loss_logits)

    def run_blocks(
        self, x: Float[Array, "T B D"], *, key: Array | None = None, valid: Bool[Array, " B"] | None = None
    ) -> _Trunk:
        """All blocks on x [T, B, D], with the inter-layer residual; `valid` says which rows are no padding."""
        stream, routing = [x], []
        for i, block in enumerate(self.blocks, start=1):
            x, found = block(x, key=None if key is None else jax.random.fold_in(key, i), valid=valid)
            routing.extend(found)
            x = inter_residual(x, stream, every=self.inter_residual_every, layers=len(self.blocks))
            stream.append(x)
        return _Trunk(x, stream, routing)

    def _routing_report(self, routing: list[TopKRouting]) -> tuple[dict[str, Array], dict[str, Array]]:
        """Losses and stats of L blocks' two routers each."""
        losses, stats = top_k_report(routing, {"balance": self.balance_weight, "z": self.z_weight})
        if routing:
            stats["expert_load_mixed"] = jnp.stack([r.load for r in routing[::2]])  # [L, H, E-1]
            stats["expert_load"] = jnp.stack([r.load for r in routing[1::2]])  # [L, T, E-1]
        return losses, stats


def make_heads(options: TokenMixerLargeConfig, tasks: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> AuxiliaryHeads:
    """The auxiliary heads of a config."""
    tower, eps, init = options.tower, options.norm_eps, options.init
    heads = functools.partial(AuxiliaryHeads, tower=tower, norm_eps=eps, init=init, dtype=dtype, rngs=rngs)
    return heads(options.width, tasks, layers=options.auxiliary, options=options)


def count_params(config: TokenMixerLargeConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Params:
    """Closed form of the parameter tree; `inactive` are the experts a row does not use."""
    plan = plan_tokens(schema, config, config.width, tokens)
    T, D, E, Y = plan.tokens, config.width, config.experts, len(schema.tasks)
    weights, routers = 0, 0
    halves = (config.mixed_shape(T, D), (T, D))
    for (G, w), F in zip(halves, config.hiddens, strict=True):
        weights += {
            "per_token_swiglu": G * 3 * w * F,
            "shared_swiglu": 3 * w * F,
            "per_token_ffn": G * (2 * w * F + F + w),
        }[config.ffn]
        if E:
            pool = G if config.expert_scope == "global" else 1
            routers += G // pool * w * (pool * E - config.shared_expert)
    normed = [halves[1] if config.residual_style == "A" else halves[0], halves[1]] * (1 + config.sandwich_norm)
    norms = sum(G * w if config.norm_per_token else w for G, w in normed)
    head, tokenizer = tower_params(D, Y, config.tower), plan.params(D)
    return Params(
        dense=tokenizer + config.layers * (weights + routers + norms) + D * config.final_norm + head,
        tokenizer=tokenizer,
        head=head,
        inactive=config.layers * weights * (E - config.active_experts) // E if E else 0,
        training_only=len(config.auxiliary) * auxiliary_params(D, Y, config.tower),
    )


def count_flops(
    config: TokenMixerLargeConfig,
    schema: Schema,
    tokens: TokenShape = NO_TOKENS,
    *,
    path: Literal["sparse", "masked"] | None = None,
) -> Flops:
    """Closed form of the matrix products: user tokens per request, all else per candidate.

    Args:
        path: "sparse" counts the K experts a row uses, "masked" all E; None follows `expert_path`. Empty places of
            a fixed capacity are not useful work and not counted.
    """
    plan = plan_tokens(schema, config, config.width, tokens)
    T, D, E, Y = plan.tokens, config.width, config.experts, len(schema.tasks)
    masked = (path or ("masked" if config.expert_path == "masked" else "sparse")) == "masked"
    block = 0
    for (G, w), F in zip((config.mixed_shape(T, D), (T, D)), config.hiddens, strict=True):
        products = (4 if config.ffn == "per_token_ffn" else 6) * G * w * F
        if E:
            # A pool holds the experts of all tokens; computed as a whole, every token runs through all of it.
            pool = G if config.expert_scope == "global" else 1
            products = products * pool if masked else products * config.active_experts // E
            products += 2 * G * w * (pool * E - config.shared_expert)
        block += products
    head = tower_flops(D, Y, config.tower)
    return plan.flops(D) + Flops(
        candidate=config.layers * block + head, candidate_training=len(config.auxiliary) * head
    )


def size_space(
    schema: Schema, config: TokenMixerLargeConfig, target_dense_params: float, tokens: TokenShape = NO_TOKENS
) -> Iterator[dict[str, Any]]:
    """Overrides (tokens, width, mixed_hidden, hidden) near the target; layers stay as configured.

    For each width F1 + F2 is solved for and shared evenly. First come shapes with F/D near 1.25, widths that T heads
    divide, and hidden widths that are multiples of 64 (8 below 1e7 parameters), times the experts.
    """
    found = []
    for T, token_cost in tokenizer_choices(schema, config, target_dense_params, tokens):
        count = plan_tokens(schema, dataclasses.replace(config, tokens=T), config.width, tokens).tokens
        step = 128 if target_dense_params >= LARGE else 1
        ideal = math.sqrt(target_dense_params / (6 * HIDDEN_RATIO * config.layers * count))
        for D in range(step, int(4 * ideal) + 2 * step, step):
            shape = dataclasses.replace(config, tokens=T, width=D)
            if config.heads is not None and D % config.heads:
                continue
            # Friendly widths are multiples of T, then of 8, 4, 2.
            width_cost = 0.5 * (D % count > 0) + (0.0 if D % 8 == 0 else 0.5 if D % 4 == 0 else 1.0)
            for i, hiddens in enumerate(_hidden_choices(shape, schema, target_dense_params, tokens)):
                ratio_cost = abs(math.log2(sum(hiddens) / (2 * D) / HIDDEN_RATIO))
                found.append((ratio_cost + token_cost + width_cost + i / 4, T or 0, D, hiddens))
    for _, T, D, (mixed, hidden) in sorted(found):
        yield {"tokens": T or None, "width": D, "mixed_hidden": mixed, "hidden": hidden}


def _hidden_choices(
    config: TokenMixerLargeConfig, schema: Schema, target: float, tokens: TokenShape
) -> Iterator[tuple[int, int]]:
    """(F1, F2) in multiples of each grain, coarsest first; the parameters are affine in both."""
    unit = config.experts or 1

    def params(mixed: int, hidden: int) -> int:
        shape = dataclasses.replace(config, mixed_hidden=unit * mixed, hidden=unit * hidden)
        return count_params(shape, schema, tokens).dense

    base = params(1, 1)
    first, second = params(2, 1) - base, params(1, 2) - base
    exact = 1 + (target - base) / (first + second)
    seen = set()
    for grain in grains(target):
        grain = max(1, grain // unit)
        hidden = grain * max(1, round(exact / grain))
        rest = 1 + (target - base - second * (hidden - 1)) / first
        mixed = grain * round(rest / grain)
        if exact >= grain / 2 and mixed >= 1 and (mixed, hidden) not in seen:
            seen.add((mixed, hidden))
            yield unit * mixed, unit * hidden


TOKENMIXER_LARGE = BackboneSpec(
    TokenMixerLargeConfig, token_builder(TokenMixerLarge), count_params, count_flops, size_space
)
