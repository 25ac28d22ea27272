"""Exchange between tokens: of heads without parameters (RankMixer, arXiv 2507.15551, eq. 2-4), and by a linear map.

Row h, slot t of mix(X) is head h of token t:

    mix(X, H)[b, h, t*(D/H):(t+1)*(D/H)] = X[b, t, h*(D/H):(h+1)*(D/H)]          [B,T,D] -> [B,H,W],  W = T*D/H

`revert` is the inverse permutation; for H == T mix is its own inverse. Both exist for row-major [B,T,D] (public edges)
and token-major [T,B,D] (inside blocks, where per-token matmuls want it), and agree bit for bit.

`TokenLinear`: y_k = sum_t W[t,k] x_t, the same for every channel.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from . import param
from .layout import laid_out
from .matmul import contract


def mix(x: Float[Array, "*B T D"], heads: int) -> Float[Array, "*B H W"]:
    """[..., T, D] -> [..., H, T*D/H]."""
    *lead, tokens, width = x.shape
    _check(width, heads)
    parts = x.reshape(*lead, tokens, heads, width // heads).swapaxes(-3, -2)
    return parts.reshape(*lead, heads, tokens * (width // heads))


def revert(m: Float[Array, "*B H W"], tokens: int) -> Float[Array, "*B T D"]:
    """[..., H, W] -> [..., T, D], the inverse of `mix`: D = H*W/T."""
    return mix(m, tokens)


def mix_token_major(x: Float[Array, "T B D"], heads: int) -> Float[Array, "H B W"]:
    """[T, B, D] -> [H, B, T*D/H]: the same permutation on axes 0 and 2."""
    tokens, rows, width = x.shape
    _check(width, heads)
    # Devices that split the tokens exchange them here, forward and backward, and nowhere else.
    parts = laid_out(x.reshape(tokens, rows, heads, width // heads), "tokens", "batch", None, None)
    parts = laid_out(parts.transpose(2, 1, 0, 3), "tokens", "batch", None, None)
    return parts.reshape(heads, rows, tokens * (width // heads))


def revert_token_major(m: Float[Array, "H B W"], tokens: int) -> Float[Array, "T B D"]:
    """[H, B, W] -> [T, B, D], the inverse of `mix_token_major`."""
    return mix_token_major(m, tokens)


def mixed_shape(tokens: int, width: int, heads: int | None = None) -> tuple[int, int]:
    """(H, W) of mixed tokens; heads None is T, or the largest divisor of D below it."""
    heads = max(h for h in range(1, tokens + 1) if width % h == 0) if heads is None else heads
    if width % heads:
        raise ValueError(f"width {width} does not divide into {heads} heads; make it a multiple")
    return heads, tokens * width // heads


def flatten_token_major(x: Float[Array, "T B D"]) -> Float[Array, "B TD"]:
    """[T, B, D] -> [B, T*D]: the tokens of every row side by side."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)


class TokenLinear(nnx.Module):
    """x [T, B, D] -> [K, B, D]; T*K parameters, no bias, 2*T*K*D FLOPs per row.

    The kernel is stored [T, K], so that the fan of its initialiser is T.
    """

    def __init__(
        self, tokens: int, out: int, *, init: str = "lecun_normal", dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        self.dtype = dtype
        self.kernel = param.kernel(rngs, (tokens, out), ("tokens_in", "tokens"), init)

    def __call__(self, x: Float[Array, "T B D"]) -> Float[Array, "K B D"]:
        tokens, rows, width = x.shape
        # Flat, because XLA's CPU backend has no bfloat16 product of a matrix and an array of three axes.
        y = contract("tn,tk->kn", x.reshape(tokens, rows * width), self.kernel[...], self.dtype)
        return y.reshape(-1, rows, width)


def _check(width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"cannot cut tokens of width {width} into {heads} equal heads; make the width a multiple")
