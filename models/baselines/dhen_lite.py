"""DHEN-lite (after arXiv 2203.11014): layers that ensemble several interaction modules on the same tokens.

    X' = LN(sum_i module_i(X) + X)                          (eq. 3 with a sum as the ensemble)
    logits = towers(flatten X_L)

Modules on X [B,T,D], x = flatten X:
    linear      W X                                         W [T,T], mixes tokens
    attention   softmax(Q K^T / sqrt(d)) V W_O              QKVO [D,D], shared by all tokens, H heads
    cross       x * (x U V + b)                             U [T*D,rank]  V [rank,T*D]
    fm          flatten(X (X^T P)) W + b                    P [T,p]  W [T*p,T*D]

"Lite": the published ensembles also hold convolutions and other modules, and which modules each experiment used is
undisclosed -> modules (the four above), ensemble ("sum"; "weighted" learns one factor per module and layer, from 1).

Letters: B rows, T tokens, D token width, L layers, Y tasks, `rank` of the cross, p = `projections` of the factorisation
machine. Activations are token-major [T,B,D] inside.

Closed forms per layer:
    params = T^2 + 4*D^2 + (2*T*D*rank + T*D) + (T*p + T*p*T*D + T*D) + 2*D
    flops  = 2*T^2*D + (8*T*D^2 + 4*T^2*D) + 4*T*D*rank + (4*T*D*p + 2*T*p*T*D)
plus the tokenizer and Y*(T*D + 1). Further flags: heads, norm_eps, init, tower.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Literal, get_args

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recscale.models.architecture import BackboneSpec
from recscale.models.counts import Flops, Params
from recscale.models.inputs.history import NO_TOKENS, TokenShape
from recscale.models.inputs.schema import Schema
from recscale.models.inputs.tokenizers import plan_tokens
from recscale.models.layers import param
from recscale.models.layers.attention import SelfAttention
from recscale.models.layers.dense import Dense
from recscale.models.layers.matmul import contract
from recscale.models.layers.mixing import TokenLinear, flatten_token_major
from recscale.models.layers.norms import Norm
from recscale.models.layers.param import Init
from recscale.models.options import require_positive, require_sizes
from recscale.models.sizing import dense_params, interpolate, solve_widths, widths_around

from .flattened import FieldTokenOptions, flattened_builder, frame_flops, frame_params, raw_flops

Interaction = Literal["linear", "attention", "cross", "fm"]
MODULES: tuple[Interaction, ...] = get_args(Interaction)

# Token widths, ranks and projections `size_space` prefers, by dense parameters.
_WIDTHS = {1e4: 4, 1e5: 16, 1e6: 32, 1e7: 64, 1e8: 256, 1e9: 512}
_RANKS = {1e4: 8, 1e5: 32, 1e6: 112, 1e7: 256, 1e8: 768, 1e9: 2048}
_PROJECTIONS = {1e4: 1, 1e5: 4, 1e6: 8, 1e7: 20, 1e8: 48, 1e9: 112}


@dataclasses.dataclass(frozen=True)
class DHENLiteConfig(FieldTokenOptions):
    """width D, layers L, rank, projections p; modules of every layer."""

    modules: tuple[str, ...] = MODULES
    ensemble: Literal["sum", "weighted"] = "sum"
    heads: int = 1
    rank: int = 64
    projections: int = 8
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(norm_eps=self.norm_eps)
        require_sizes(heads=self.heads, rank=self.rank, projections=self.projections)
        unknown = [name for name in self.modules if name not in MODULES]
        if unknown or not self.modules or len(set(self.modules)) < len(self.modules):
            raise ValueError(f"modules is {self.modules}, expected one or more of {', '.join(MODULES)}, each once")
        if "attention" in self.modules and self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} attention heads")


class LowRankCross(nnx.Module):
    """x * (x U V + b) on the flattened tokens: x [T, B, D] -> [T, B, D]."""

    def __init__(self, flat: int, rank: int, *, init: Init, dtype: DTypeLike, rngs: nnx.Rngs):
        dense = functools.partial(Dense, init=init, dtype=dtype, rngs=rngs)
        self.inward = dense(flat, rank, use_bias=False, axes=("embed", "rank"))
        self.outward = dense(rank, flat, axes=("rank", "embed"))

    def __call__(self, x: Float[Array, "T B D"]) -> Float[Array, "T B D"]:
        flat = flatten_token_major(x)
        return _tokens(flat * self.outward(self.inward(flat)), x)


class FactorisationMachine(nnx.Module):
    """flatten(X (X^T P)) W + b: x [T, B, D] -> [T, B, D]."""

    def __init__(self, tokens: int, width: int, projections: int, *, init: Init, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dtype, axes = dtype, ("hidden", "embed")
        self.projection = TokenLinear(tokens, projections, init=init, dtype=dtype, rngs=rngs)
        self.out = Dense(tokens * projections, tokens * width, axes=axes, init=init, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "T B D"]) -> Float[Array, "T B D"]:
        z = contract("btd,bpd->btp", x.swapaxes(0, 1), self.projection(x).swapaxes(0, 1), self.dtype)
        return _tokens(self.out(z.reshape(x.shape[1], -1)), x)


class DHENLayer(nnx.Module):
    """LN(sum of the modules + X): x [T, B, D] -> [T, B, D]."""

    def __init__(self, tokens: int, options: DHENLiteConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        D, init = options.width, options.init

        def make(name: str) -> nnx.Module:
            if name == "linear":
                return TokenLinear(tokens, tokens, init=init, dtype=dtype, rngs=rngs)
            if name == "attention":
                return SelfAttention(D, options.heads, init=init, dtype=dtype, rngs=rngs)
            if name == "cross":
                return LowRankCross(tokens * D, options.rank, init=init, dtype=dtype, rngs=rngs)
            return FactorisationMachine(tokens, D, options.projections, init=init, dtype=dtype, rngs=rngs)

        self.modules = nnx.List(make(name) for name in options.modules)
        count = len(options.modules)
        self.factors = param.constant((count,), (None,), 1.0) if options.ensemble == "weighted" else None
        self.norm = Norm(D, eps=options.norm_eps, dtype=dtype)

    def __call__(self, x: Float[Array, "T B D"]) -> Float[Array, "T B D"]:
        y = x
        for i, module in enumerate(self.modules):
            made = module(x)
            y = y + (made if self.factors is None else made * self.factors[...][i].astype(made.dtype))
        return self.norm(y)


def count_params(config: DHENLiteConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Params:
    """Closed form of the parameter tree."""
    plan = plan_tokens(schema, config, config.width, tokens)
    T, D, rank, p = plan.tokens, config.width, config.rank, config.projections
    each = {
        "linear": T * T,
        "attention": 4 * D * D,
        "cross": 2 * T * D * rank + T * D,
        "fm": T * p + T * p * T * D + T * D,
    }
    layer = sum(each[name] for name in config.modules) + 2 * D
    layer += len(config.modules) * (config.ensemble == "weighted")
    frame = frame_params(plan, config, len(schema.tasks))
    return frame + Params(dense=config.layers * layer)


def count_flops(config: DHENLiteConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Flops:
    """Closed form of the matrix products: user tokens per request, all else per candidate."""
    plan = plan_tokens(schema, config, config.width, tokens)
    T, D, rank, p = plan.tokens, config.width, config.rank, config.projections
    # Products of the layer's input, and those of what came of it.
    each = {
        "linear": (2 * T * T * D, 0),
        "attention": (6 * T * D * D, 2 * T * D * D + 4 * T * T * D),
        "cross": (2 * T * D * rank, 2 * T * D * rank),
        "fm": (4 * T * D * p, 2 * T * p * T * D),
    }
    first, rest = (sum(each[name][i] for name in config.modules) for i in (0, 1))
    total = frame_flops(plan, config, len(schema.tasks)) + raw_flops(plan, first)
    return total + Flops(candidate=(config.layers - 1) * first + config.layers * rest)


def size_space(
    schema: Schema, config: DHENLiteConfig, target_dense_params: float, tokens: TokenShape = NO_TOKENS
) -> Iterator[dict[str, Any]]:
    """Overrides (width, projections, rank) near the target; modules and layers stay as configured.

    The rank of the cross is solved for each D and p; without a cross the projections are, without both only D varies.
    """
    params, target = dense_params(count_params, config, schema, tokens), target_dense_params
    ideal, rank, p = (interpolate(target, points) for points in (_WIDTHS, _RANKS, _PROJECTIONS))
    widths = widths_around(ideal, target, config.heads)
    if "cross" in config.modules:
        counts = sorted({max(1, round(p * ratio)) for ratio in (0.5, 0.75, 1, 1.5)}, key=lambda n: abs(n / p - 1))
        counts = counts if "fm" in config.modules else [config.projections]
        shapes = ((dict(width=D, projections=n), "rank", rank) for D in widths for n in counts)
        yield from solve_widths(shapes, params, target, large=(64, 32))
    elif "fm" in config.modules:
        yield from solve_widths(((dict(width=D), "projections", p) for D in widths), params, target, large=(4, 1))
    else:
        yield from solve_widths([({}, "width", ideal)], params, target, multiple=config.heads)


def _tokens(flat: Array, like: Array) -> Array:
    """[B, T*D] -> [T, B, D]."""
    tokens, rows, width = like.shape
    return flat.reshape(rows, tokens, width).swapaxes(0, 1)


DHEN_LITE = BackboneSpec(DHENLiteConfig, flattened_builder(DHENLayer), count_params, count_flops, size_space)
