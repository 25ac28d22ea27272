"""Gated feed-forward networks, without biases.

    SwiGLU(x) = ((x W_u) * silu(x W_g)) W_o            W_u, W_g [D,F]  W_o [F,D]

3*D*F parameters and 6*D*F FLOPs per row, times T where every token has its own weights.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from .dense import Dense
from .per_token import PerTokenDense, activation

Array = jax.Array


class SwiGLU(nnx.Module):
    """x [..., D] -> [..., D], the same weights for every row. `scales` multiply the std of (up, gate, out)."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        init: str = "lecun_normal",
        scales: tuple[float, float, float] = (1.0, 1.0, 1.0),
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs = dict(use_bias=False, init=init, dtype=dtype, rngs=rngs)
        self.up = Dense(width, hidden, std_scale=scales[0], **kwargs)
        self.gate = Dense(width, hidden, std_scale=scales[1], **kwargs)
        self.out = Dense(hidden, width, std_scale=scales[2], axes=("hidden", "embed"), **kwargs)

    def __call__(self, x: Array) -> Array:
        return self.out(self.up(x) * activation("silu")(self.gate(x)))


class PerTokenSwiGLU(nnx.Module):
    """x [T, B, D] -> [T, B, D] (or `out`), own weights for every token; W_o is stored [T, D, F] as in `PerTokenFFN`.

    `scales` multiply the standard deviations of (up, gate, out); `fans` are the (D, F) of the whole layer where this is
    a slice of one.
    """

    def __init__(
        self,
        tokens: int,
        width: int,
        hidden: int,
        out: int | None = None,
        *,
        init: str = "lecun_normal",
        scales: tuple[float, float, float] = (1.0, 1.0, 1.0),
        fans: tuple[int, int] | None = None,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs = dict(use_bias=False, init=init, dtype=dtype, rngs=rngs)
        self.up = PerTokenDense(tokens, width, hidden, std_scale=scales[0], fans=fans, **kwargs)
        self.gate = PerTokenDense(tokens, width, hidden, std_scale=scales[1], fans=fans, **kwargs)
        kwargs |= dict(axes=("hidden", "embed"), transposed=True, fans=fans and fans[::-1])
        self.out = PerTokenDense(tokens, hidden, out or width, std_scale=scales[2], **kwargs)

    def __call__(self, x: Array) -> Array:
        return self.out(self.up(x) * activation("silu")(self.gate(x)))
