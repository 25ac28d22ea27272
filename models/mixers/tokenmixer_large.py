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

from ..architecture import BackboneSpec
from ..counts import Flops, Params
from ..inputs.batch import CandidateInputs, Output, UserInputs
from ..inputs.history import NO_TOKENS, TokenShape
from ..inputs.schema import Schema
from ..inputs.tokenizers import Tokenizer, TokenizerOptions, TokenPlan, UserTokens, plan_tokens
from ..layers import param
from ..layers.dropout import dropout
from ..layers.gated import PerTokenSwiGLU, SwiGLU
from ..layers.mixing import mix_token_major, revert_token_major
from ..layers.norms import Norm
from ..layers.per_token import PerTokenFFN
from ..layers.per_token_moe import TopKMoE, TopKRouting, check_top_k
from ..layers.pooling import mean_tokens
from ..layers.towers import Towers, tower_flops, tower_params
from ..ranker import Backbone
from ..sizing import LARGE, grains
from .rankmixer import token_choices

Array = jax.Array

# F / D the sizing prefers: that of the largest starter sizes.
HIDDEN_RATIO = 1.25


@dataclasses.dataclass(frozen=True)
class TokenMixerLargeConfig(TokenizerOptions):
    """width D, hidden F2, mixed_hidden F1, layers L, heads H, experts E, active K; the rest: see the file."""

    tokenizer: Literal["cut", "group", "field", "identity"] = "group"
    global_token: bool | Literal["split"] = True
    width: int = 128
    hidden: int = 192
    mixed_hidden: int | None = None
    layers: int = 4
    heads: int | None = None
    mixer: Literal["mix", "none"] = "mix"
    ffn: Literal["per_token_swiglu", "shared_swiglu", "per_token_ffn"] = "per_token_swiglu"
    residual_style: Literal["A", "B", "C"] = "A"
    residual: bool = True
    sandwich_norm: bool = False
    norm_per_token: bool = False
    norm_eps: float = 1e-6
    final_norm: bool = True
    inter_residual_every: int = 2
    aux_mode: Literal["joint", "independent"] = "joint"
    aux_weight: float = 0.1
    aux_layers: tuple[int, ...] | None = None
    aux_stop_gradient: bool = False
    init: str = "xavier_normal"
    up_init_scale: float = 1.0
    down_init_scale: float = 0.01
    down_init_mode: Literal["std", "variance"] = "std"
    dropout: float = 0.0
    tower: tuple[int, ...] = ()
    experts: int | None = None
    active: int | None = None
    shared_expert: bool = True
    gate_scale: float | None = None
    gate_norm: Literal["selected", "all"] = "selected"
    expert_scope: Literal["token", "global"] = "token"
    expert_path: Literal["auto", "masked", "capacity", "ragged"] = "auto"
    capacity_factor: float = 1.25
    balance_weight: float = 0.0
    z_weight: float = 0.0

    def __post_init__(self):
        for name in ("width", "hidden", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}, expected a share in [0, 1)")
        wrong = [layer for layer in self.aux_layers or () if not 1 <= layer < self.layers]
        if wrong:
            raise ValueError(
                f"aux_layers names block {wrong[0]}, expected 1 to {self.layers - 1}: below the last block"
            )
        if self.sandwich_norm and self.residual_style != "A":
            raise ValueError("sandwich_norm belongs to residual_style 'A'; B and C place their norms elsewhere")
        if self.residual_style == "C" and self.inter_residual_every:
            raise ValueError(
                "inter_residual_every doubles the stream, which residual_style 'C' has just normalised; set it to 0"
            )
        if self.experts is None:
            if self.active is not None:
                raise ValueError(f"active is {self.active} without experts; set experts too")
            return
        if self.ffn != "per_token_swiglu":
            raise ValueError(f"experts are slices of per-token SwiGLUs, so ffn must be that, not {self.ffn!r}")
        for hidden in self.hiddens:
            check_top_k(hidden, self.experts, self.active_experts, shared=self.shared_expert, gate_norm=self.gate_norm)

    @property
    def hiddens(self) -> tuple[int, int]:
        """(F1, F2)."""
        return self.mixed_hidden or self.hidden, self.hidden

    @property
    def active_experts(self) -> int:
        """K: half of the experts unless given."""
        return self.active or (self.experts or 0) // 2

    @property
    def auxiliary(self) -> tuple[int, ...]:
        """Blocks with an auxiliary head."""
        if not self.aux_weight:
            return ()
        middle = (self.layers // 2,) if self.layers > 1 else ()
        return middle if self.aux_layers is None else self.aux_layers

    @property
    def down_std(self) -> float:
        """What the standard deviation of the last matrix of a half is multiplied with."""
        return self.down_init_scale if self.down_init_mode == "std" else math.sqrt(self.down_init_scale)

    def mixed_shape(self, tokens: int) -> tuple[int, int]:
        """(H, W) for T tokens."""
        if self.mixer == "none":
            return tokens, self.width
        heads = self.heads or max(h for h in range(1, tokens + 1) if self.width % h == 0)
        if self.width % heads:
            raise ValueError(f"width {self.width} does not divide into {heads} heads; make it a multiple")
        return heads, tokens * self.width // heads


class _Half(nnx.Module):
    """F1 or F2: x [G, B, w] -> [G, B, w] and, with experts, what the router reports."""

    def __init__(self, config: TokenMixerLargeConfig, groups: int, width: int, hidden: int, *, dtype, rngs: nnx.Rngs):
        self.pooled = config.expert_scope == "global"
        kwargs: dict[str, Any] = dict(init=config.init, dtype=dtype, rngs=rngs)
        if config.ffn == "per_token_ffn":
            self.net = PerTokenFFN(groups, width, hidden, **kwargs)
            return
        kwargs["scales"] = (config.up_init_scale, config.up_init_scale, config.down_std)
        if config.experts is None:
            own = config.ffn == "per_token_swiglu"
            self.net = PerTokenSwiGLU(groups, width, hidden, **kwargs) if own else SwiGLU(width, hidden, **kwargs)
            return
        pool = groups if self.pooled else 1
        self.net = TopKMoE(
            groups // pool,
            width,
            hidden * pool,
            experts=config.experts * pool,
            active=config.active_experts,
            shared=config.shared_expert,
            gate_scale=config.experts / config.active_experts if config.gate_scale is None else config.gate_scale,
            gate_norm=config.gate_norm,
            path=config.expert_path,
            capacity_factor=config.capacity_factor,
            fans=(width, hidden),
            **kwargs,
        )

    def __call__(self, x: Array, training: bool) -> tuple[Array, list[TopKRouting]]:
        if not isinstance(self.net, TopKMoE):
            return self.net(x), []
        groups, rows, width = x.shape
        y, routing = self.net(x.reshape(1, groups * rows, width) if self.pooled else x, training=training)
        return y.reshape(x.shape), [routing]


class TokenMixerLargeBlock(nnx.Module):
    """One block on token-major activations: x [T, B, D] -> [T, B, D]."""

    def __init__(self, config: TokenMixerLargeConfig, tokens: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.heads, mixed_width = config.mixed_shape(tokens)
        self.mixes, self.style, self.residual = config.mixer == "mix", config.residual_style, config.residual
        self.dropout = config.dropout

        def norm(groups: int, width: int) -> Norm:
            gains = groups if config.norm_per_token else None
            return Norm(width, kind="rms", tokens=gains, eps=config.norm_eps, dtype=dtype)

        mixed, plain = (self.heads, mixed_width), (tokens, config.width)
        self.mixed_ffn = _Half(config, *mixed, config.hiddens[0], dtype=dtype, rngs=rngs)
        self.ffn = _Half(config, *plain, config.hiddens[1], dtype=dtype, rngs=rngs)
        self.mixed_norm = norm(*(plain if self.style == "A" else mixed))
        self.ffn_norm = norm(*plain)
        self.mixed_end = norm(*plain) if config.sandwich_norm else None
        self.ffn_end = norm(*plain) if config.sandwich_norm else None

    def __call__(self, x: Array, *, key: Array | None = None) -> tuple[Array, list[TopKRouting]]:
        """The new x and, with experts, what the routers of F1 and F2 report."""
        routing: list[TopKRouting] = []

        def run(half: _Half, y: Array, fold: int) -> Array:
            z, found = half(y, key is not None)
            routing.extend(found)
            return dropout(z, self.dropout, None if key is None else jax.random.fold_in(key, fold))

        f1, f2 = functools.partial(run, self.mixed_ffn, fold=0), functools.partial(run, self.ffn, fold=1)
        if self.style == "A":
            u = self._add(_end(self.mixed_end, self.revert(f1(self.mix(self.mixed_norm(x))), x)), x)
            return self._add(_end(self.ffn_end, f2(self.ffn_norm(u))), u), routing
        m = self.mix(x)
        if self.style == "B":
            v = self.revert(self._add(f1(self.mixed_norm(m)), m), x)
            return self._add(f2(self.ffn_norm(v)), x), routing
        v = self.revert(self.mixed_norm(self._add(f1(m), m)), x)
        return self.ffn_norm(self._add(f2(v), x)), routing

    def mix(self, x: Array) -> Array:
        """[T, B, D] -> [H, B, W]; x itself without mixing."""
        return mix_token_major(x, self.heads) if self.mixes else x

    def revert(self, m: Array, like: Array) -> Array:
        """[H, B, W] -> [T, B, D], the shape of `like`."""
        return revert_token_major(m, like.shape[0]) if self.mixes else m

    def _add(self, branch: Array, x: Array) -> Array:
        return branch + x if self.residual else branch


class AuxiliaryHead(nnx.Module):
    """Logits of a lower block: norm, mean over tokens, towers."""

    def __init__(self, config: TokenMixerLargeConfig, tasks: int, *, dtype, rngs: nnx.Rngs):
        self.norm = Norm(config.width, kind="rms", eps=config.norm_eps, dtype=dtype)
        self.towers = Towers(config.width, tasks, tower=config.tower, init=config.init, dtype=dtype, rngs=rngs)
        param.training_only(self)

    def __call__(self, x: Array) -> Array:
        return self.towers(mean_tokens(self.norm(x)))


def auxiliary_logits(
    config: TokenMixerLargeConfig, logits: Array, low: list[Array], shape: tuple[int, ...]
) -> dict[str, tuple[float, Array]]:
    """`Output.loss_logits` of the main logits and those of the auxiliary heads, all [B, Y], brought to `shape`."""
    if not low:
        return {}
    found = {"main": (1.0, logits.reshape(shape))}
    high = jax.lax.stop_gradient(logits) if config.aux_stop_gradient else logits
    for layer, z in zip(config.auxiliary, low, strict=True):
        z = z + high if config.aux_mode == "joint" else z
        found[f"auxiliary_{layer}"] = (config.aux_weight / len(low), z.reshape(shape))
    return found


class _Trunk(NamedTuple):
    """What the blocks give: the last x [T, B, D], x after every block, and what every router reports."""

    x: Array
    after: list[Array]
    routing: list[TopKRouting]


class TokenMixerLarge(Backbone):
    """Tokenizer, L blocks with inter-layer residuals, norm, mean over tokens, towers; auxiliary heads in training.

    Args:
        config: flags and sizes. plan: the resolved tokenizer. tasks: Y.
    """

    def __init__(
        self, config: TokenMixerLargeConfig, plan: TokenPlan, tasks: int, *, dtype=jnp.float32, rngs: nnx.Rngs
    ):
        self.config = config
        self.tokenizer = Tokenizer(plan, config.width, init=config.init, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            TokenMixerLargeBlock(config, plan.tokens, dtype=dtype, rngs=rngs) for _ in range(config.layers)
        )
        self.norm = Norm(config.width, kind="rms", eps=config.norm_eps, dtype=dtype) if config.final_norm else None
        self.towers = Towers(config.width, tasks, tower=config.tower, init=config.init, dtype=dtype, rngs=rngs)
        self.auxiliary = nnx.List(AuxiliaryHead(config, tasks, dtype=dtype, rngs=rngs) for _ in config.auxiliary)

    def encode_user(self, user: UserInputs, tokens: Array | None = None) -> UserTokens:
        return self.tokenizer.encode_user(user, tokens)

    def score(
        self, state: UserTokens, candidates: CandidateInputs, tokens: Array | None = None, *, key: Array | None = None
    ) -> Output:
        own = self.tokenizer.candidate_tokens(state, candidates, tokens)
        trunk = self.run_blocks(self.tokenizer.join(state, own), key=key)
        logits = self.towers(mean_tokens(_end(self.norm, trunk.x)))
        lead = own.shape[1:3]
        losses, stats = self._routing_report(trunk.routing)
        return Output(
            logits=logits.reshape(*lead, -1),
            losses=losses,
            stats=stats,
            loss_logits={} if key is None else auxiliary_logits(self.config, logits, self._low(trunk), (*lead, -1)),
        )

    def run_blocks(self, x: Array, *, key: Array | None = None) -> _Trunk:
        """All blocks on x [T, B, D], with the inter-layer residual."""
        every, stream, routing = self.config.inter_residual_every, [x], []
        for i, block in enumerate(self.blocks, start=1):
            x, found = block(x, key=None if key is None else jax.random.fold_in(key, i))
            routing.extend(found)
            if every and i % every == 0 and i < len(self.blocks):
                x = x + stream[i - every]
            stream.append(x)
        return _Trunk(x, stream[1:], routing)

    def _low(self, trunk: _Trunk) -> list[Array]:
        """Logits of the auxiliary heads."""
        layers = self.config.auxiliary
        return [head(trunk.after[layer - 1]) for layer, head in zip(layers, self.auxiliary, strict=True)]

    def _routing_report(self, routing: list[TopKRouting]) -> tuple[dict[str, Array], dict[str, Array]]:
        """Losses and stats of L blocks' two routers each."""
        if not routing:
            return {}, {}
        mean = {name: jnp.stack([getattr(r, name) for r in routing]).mean() for name in ("balance", "z", "dropped")}
        losses = {
            f"router_{name}": weight * mean[name]
            for name, weight in (("balance", self.config.balance_weight), ("z", self.config.z_weight))
            if weight
        }
        stats = {
            "expert_load_mixed": jnp.stack([r.load for r in routing[::2]]),  # [L, H, E-1]
            "expert_load": jnp.stack([r.load for r in routing[1::2]]),  # [L, T, E-1]
            "dropped_share": mean["dropped"],
            "router_balance": mean["balance"],
            "router_z": mean["z"],
        }
        return losses, stats


def build(
    config: TokenMixerLargeConfig, schema: Schema, tokens: TokenShape = NO_TOKENS, *, rngs: nnx.Rngs, dtype=jnp.float32
) -> TokenMixerLarge:
    """The model of a config; `tokens` are those of a sequence encoder in front."""
    plan = plan_tokens(schema, config, config.width, tokens)
    return TokenMixerLarge(config, plan, len(schema.tasks), dtype=dtype, rngs=rngs)


def count_params(config: TokenMixerLargeConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Params:
    """Closed form of the parameter tree; `inactive` are the experts a row does not use."""
    plan = plan_tokens(schema, config, config.width, tokens)
    T, D, E, Y = plan.tokens, config.width, config.experts, len(schema.tasks)
    weights, routers = 0, 0
    halves = (config.mixed_shape(T), (T, D))
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
        training_only=len(config.auxiliary) * (D + head),
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
    for (G, w), F in zip((config.mixed_shape(T), (T, D)), config.hiddens, strict=True):
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
    for T, token_cost in token_choices(schema, config, target_dense_params, tokens):
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


def _end(norm: Norm | None, x: Array) -> Array:
    return x if norm is None else norm(x)


TOKENMIXER_LARGE = BackboneSpec(TokenMixerLargeConfig, build, count_params, count_flops, size_space)
