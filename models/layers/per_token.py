"""Layers with separate weights per token, as one batched matmul on token-major activations [T,B,D].

    dense:  y_t = x_t W_t + b_t                               W [T,D,F]  b [T,F]
    ffn:    y_t = act(x_t W1_t + b1_t) W2_t + b2_t            W1 [T,D,F]  W2 [T,F,D]
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from . import param
from .matmul import contract

Array = jax.Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),  # the tanh form
    "gelu_erf": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "identity": lambda x: x,
}


def activation(name: str) -> Callable[[Array], Array]:
    """The elementwise function called `name`; ValueError lists the known ones."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}, expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class PerTokenDense(nnx.Module):
    """x [T, B, in] -> [T, B, out], one matrix per token; T*(in*out + out) parameters, 2*T*in*out FLOPs per row.

    x [B, in] is read by every token.
    """

    def __init__(
        self, tokens: int, width: int, out: int, *, use_bias: bool = True, init: str = "lecun_normal",
        std_scale: float = 1.0, axes: tuple[str, str] = ("embed", "hidden"), dtype=jnp.float32, rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        self.kernel = param.kernel(rngs, (tokens, width, out), ("tokens", *axes), init, std_scale)
        self.bias = param.constant((tokens, out), ("tokens", axes[1])) if use_bias else None

    def __call__(self, x: Array) -> Array:
        y = contract("tbd,tdf->tbf" if x.ndim == 3 else "bd,tdf->tbf", x, self.kernel[...], self.dtype)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)[:, None, :]


class PerTokenFFN(nnx.Module):
    """x [T, B, in] (or [B, in], read by every token) -> [T, B, out] through a hidden width F, both layers biased."""

    def __init__(
        self, tokens: int, width: int, hidden: int, out: int | None = None, *, activation: str = "gelu",
        init: str = "lecun_normal", dtype=jnp.float32, rngs: nnx.Rngs,
    ):
        self.act = activation
        out = out or width
        self.up = PerTokenDense(tokens, width, hidden, init=init, dtype=dtype, rngs=rngs)
        self.down = PerTokenDense(tokens, hidden, out, init=init, axes=("hidden", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.down(activation(self.act)(self.up(x)))
