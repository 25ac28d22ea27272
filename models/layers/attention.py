"""Multi-head attention over feature tokens, token-major.

    softmax(Q K^T / sqrt(d)) V W_O,   Q, K, V = X W_Q, X W_K, X W_V,   d = D / H          no bias, shared by all tokens

4*D^2 parameters, 8*T*D^2 + 4*T^2*D FLOPs per row. Scores and softmax are float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .dense import Dense
from .matmul import contract


def attend_tokens(
    q: Float[Array, "Q B H d"],
    k: Float[Array, "T B H d"],
    v: Float[Array, "T B H e"],
    scale: float,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "Q B He"]:
    """softmax(scale * q k^T) v per head: q [Q, B, H, d], k [T, B, H, d], v [T, B, H, e] -> [Q, B, H*e].

    2*Q*T*H*(d + e) FLOPs per row.
    """
    # Rows and heads lead: XLA's CPU backend has no bfloat16 product with batch axes elsewhere.
    q, k, v = (x.transpose(1, 2, 0, 3) for x in (q, k, v))
    scores = contract("bhqd,bhkd->bhqk", q, k, dtype).astype(jnp.float32)
    weights = jax.nn.softmax(scores * scale, axis=-1)
    mixed = contract("bhqk,bhke->bhqe", weights, v, dtype).transpose(2, 0, 1, 3)
    return mixed.reshape(*mixed.shape[:2], -1)


class SelfAttention(nnx.Module):
    """x [T, B, D] -> [T, B, D]."""

    def __init__(
        self, width: int, heads: int, *, init: str = "lecun_normal", dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        def dense(axes: tuple[str, str] = ("embed", "heads")) -> Dense:
            return Dense(width, width, use_bias=False, init=init, axes=axes, dtype=dtype, rngs=rngs)

        if width % heads:
            raise ValueError(f"width {width} does not divide into {heads} attention heads")
        self.heads, self.dtype = heads, dtype
        self.query, self.key, self.value, self.out = dense(), dense(), dense(), dense(("heads", "embed"))

    def __call__(self, x: Float[Array, "T B D"]) -> Float[Array, "T B D"]:
        tokens, rows, width = x.shape
        split = (tokens, rows, self.heads, width // self.heads)
        q, k, v = (f(x).reshape(split) for f in (self.query, self.key, self.value))
        return self.out(attend_tokens(q, k, v, split[-1] ** -0.5, self.dtype))
