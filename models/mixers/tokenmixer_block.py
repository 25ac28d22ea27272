"""The block of TokenMixer-Large, dense or with sparse sub-experts; equations and letters: see `tokenmixer_large.py`."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from recscale.models.layers.dense import SwiGLU
from recscale.models.layers.dropout import dropout
from recscale.models.layers.mixing import mix_token_major, mixed_shape, revert_token_major
from recscale.models.layers.norms import Norm, normalise
from recscale.models.layers.param import Init
from recscale.models.layers.per_token import PerTokenFFN, PerTokenSwiGLU
from recscale.models.layers.per_token_moe import ExpertOptions, TopKMoE, TopKRouting, check_top_k
from recscale.models.options import Options, refuse_unused, require_positive, require_share


@dataclasses.dataclass(frozen=True)
class MixedBlockOptions(Options):
    """Flags of a block: see the file."""

    heads: int | None = None
    mixer: Literal["mix", "none"] = "mix"
    ffn: Literal["per_token_swiglu", "shared_swiglu", "per_token_ffn"] = "per_token_swiglu"
    residual_style: Literal["A", "B", "C"] = "A"
    residual: bool = True
    sandwich_norm: bool = False
    norm_per_token: bool = False
    norm_eps: float = 1e-6
    dropout: float = 0.0
    init: Init = "xavier_normal"
    up_init_scale: float = 1.0
    down_init_scale: float = 0.01
    down_init_mode: Literal["std", "variance"] = "std"

    def __post_init__(self):
        super().__post_init__()
        require_share(dropout=self.dropout)
        require_positive(norm_eps=self.norm_eps)
        if self.sandwich_norm and self.residual_style != "A":
            raise ValueError("sandwich_norm belongs to residual_style 'A'; B and C place their norms elsewhere")
        if self.mixer == "none":
            refuse_unused(self, "mixer='none' exchanges no heads; set mixer='mix'", heads=self.heads)
        if self.ffn == "per_token_ffn":
            reason = "ffn='per_token_ffn' is initialised by init alone; take a SwiGLU"
            refuse_unused(self, reason, up_init_scale=self.up_init_scale, down_init_scale=self.down_init_scale)
            refuse_unused(self, reason, down_init_mode=self.down_init_mode)

    @property
    def scales(self) -> tuple[float, float, float]:
        """What the standard deviations of (up, gate, down) of both halves are multiplied with."""
        down = self.down_init_scale if self.down_init_mode == "std" else math.sqrt(self.down_init_scale)
        return self.up_init_scale, self.up_init_scale, down

    def mixed_shape(self, tokens: int, width: int) -> tuple[int, int]:
        """(H, W) for T tokens of width D."""
        return (tokens, width) if self.mixer == "none" else mixed_shape(tokens, width, self.heads)


@dataclasses.dataclass(frozen=True)
class SubExpertOptions(ExpertOptions):
    """Flags of sparse halves, off by default. experts E, None is dense; active K, None is half of them."""

    experts: int | None = None
    active: int | None = None
    shared_expert: bool = True
    gate_scale: float | None = None
    gate_norm: Literal["selected", "all"] = "selected"
    expert_scope: Literal["token", "global"] = "token"
    z_weight: float = 0.0

    @property
    def active_experts(self) -> int:
        """K: half of the experts unless given."""
        return (self.experts or 0) // 2 if self.active is None else self.active

    def check_experts(self, *hiddens: int) -> None:
        """ValueError for networks of these hidden widths that such experts cannot be slices of."""
        if self.experts is None:
            if self.active is not None:
                raise ValueError(f"active is {self.active} without experts; set experts too")
            reason = "there are no experts; set experts"
            refuse_unused(self, reason, shared_expert=self.shared_expert, gate_scale=self.gate_scale)
            refuse_unused(self, reason, gate_norm=self.gate_norm, expert_scope=self.expert_scope)
            refuse_unused(self, reason, expert_path=self.expert_path, capacity_factor=self.capacity_factor)
            refuse_unused(self, reason, balance_weight=self.balance_weight, z_weight=self.z_weight)
            return
        self.check_capacity()
        for hidden in hiddens:
            check_top_k(hidden, self.experts, self.active_experts, shared=self.shared_expert, gate_norm=self.gate_norm)


class TokenMixerLargeBlock(nnx.Module):
    """One block on token-major activations: x [T, B, D] -> [T, B, D].

    Args:
        tokens, width, hidden: T, D, F2. mixed_hidden: F1, None for the same.
        options: see the file.
        sparse: experts in the place of dense networks, or None.
    """

    def __init__(
        self,
        tokens: int,
        width: int,
        hidden: int,
        *,
        mixed_hidden: int | None = None,
        options: MixedBlockOptions = MixedBlockOptions(),  # noqa: B008
        sparse: SubExpertOptions | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.heads, mixed_width = options.mixed_shape(tokens, width)
        self.mixes, self.style = options.mixer == "mix", options.residual_style
        self.residual, self.dropout = options.residual, options.dropout

        def norm(groups: int, width: int) -> Norm:
            gains = groups if options.norm_per_token else None
            return Norm(width, kind="rms", tokens=gains, eps=options.norm_eps, dtype=dtype)

        def half(groups: int, width: int, hidden: int) -> PerTokenFFN | TopKMoE | PerTokenSwiGLU | SwiGLU:
            init, scales = options.init, options.scales
            if options.ffn == "per_token_ffn":
                return PerTokenFFN(groups, width, hidden, init=init, dtype=dtype, rngs=rngs)
            if sparse is not None and sparse.experts is not None:
                return TopKMoE(
                    groups,
                    width,
                    hidden,
                    experts=sparse.experts,
                    active=sparse.active_experts,
                    shared=sparse.shared_expert,
                    pooled=sparse.expert_scope == "global",
                    gate_scale=sparse.gate_scale,
                    gate_norm=sparse.gate_norm,
                    init=init,
                    scales=scales,
                    path=sparse.expert_path,
                    capacity_factor=sparse.capacity_factor,
                    dtype=dtype,
                    rngs=rngs,
                )
            if options.ffn == "per_token_swiglu":
                return PerTokenSwiGLU(groups, width, hidden, init=init, scales=scales, dtype=dtype, rngs=rngs)
            return SwiGLU(width, hidden, init=init, scales=scales, dtype=dtype, rngs=rngs)

        mixed, plain = (self.heads, mixed_width), (tokens, width)
        self.mixed_ffn = half(*mixed, hidden if mixed_hidden is None else mixed_hidden)
        self.ffn = half(*plain, hidden)
        self.mixed_norm = norm(*(plain if self.style == "A" else mixed))
        self.ffn_norm = norm(*plain)
        self.mixed_end = norm(*plain) if options.sandwich_norm else None
        self.ffn_end = norm(*plain) if options.sandwich_norm else None

    def __call__(
        self, x: Float[Array, "T B D"], *, key: Array | None = None, valid: Bool[Array, " B"] | None = None
    ) -> tuple[Float[Array, "T B D"], list[TopKRouting]]:
        """The new x and, with experts, what the routers of F1 and F2 report; `valid`: rows that are no padding."""
        routing: list[TopKRouting] = []

        def run(half: Any, y: Array, fold: int) -> Array:
            if isinstance(half, TopKMoE):
                y, found = half(y, training=key is not None, valid=valid)
                routing.append(found)
            else:
                y = half(y)
            return dropout(y, self.dropout, None if key is None else jax.random.fold_in(key, fold))

        f1, f2 = functools.partial(run, self.mixed_ffn, fold=0), functools.partial(run, self.ffn, fold=1)
        if self.style == "A":
            u = self._add(normalise(self.mixed_end, self.revert(f1(self.mix(self.mixed_norm(x))), x)), x)
            return self._add(normalise(self.ffn_end, f2(self.ffn_norm(u))), u), routing
        m = self.mix(x)
        if self.style == "B":
            v = self.revert(self._add(f1(self.mixed_norm(m)), m), x)
            return self._add(f2(self.ffn_norm(v)), x), routing
        v = self.revert(self.mixed_norm(self._add(f1(m), m)), x)
        return self.ffn_norm(self._add(f2(v), x)), routing

    def mix(self, x: Float[Array, "T B D"]) -> Float[Array, "H B W"]:
        """[T, B, D] -> [H, B, W]; x itself without mixing."""
        return mix_token_major(x, self.heads) if self.mixes else x

    def revert(self, m: Float[Array, "H B W"], like: Float[Array, "T B D"]) -> Float[Array, "T B D"]:
        """[H, B, W] -> [T, B, D], the shape of `like`."""
        return revert_token_major(m, like.shape[0]) if self.mixes else m

    def _add(self, branch: Array, x: Array) -> Array:
        return branch + x if self.residual else branch
