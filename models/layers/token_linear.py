"""Linear maps between tokens: y_k = sum_t W[t,k] x_t, the same for every channel; token-major."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from . import param
from .matmul import contract

Array = jax.Array


class TokenLinear(nnx.Module):
    """x [T, B, D] -> [K, B, D]; T*K parameters, no bias, 2*T*K*D FLOPs per row.

    The kernel is stored [T, K], so that the fan of its initialiser is T.
    """

    def __init__(self, tokens: int, out: int, *, init: str = "lecun_normal", dtype=jnp.float32, rngs: nnx.Rngs):
        self.dtype = dtype
        self.kernel = param.kernel(rngs, (tokens, out), ("tokens_in", "tokens"), init)

    def __call__(self, x: Array) -> Array:
        tokens, rows, width = x.shape
        # Flat, because XLA's CPU backend has no bfloat16 product of a matrix and an array of three axes.
        y = contract("tn,tk->kn", x.reshape(tokens, rows * width), self.kernel[...], self.dtype)
        return y.reshape(-1, rows, width)
