"""Mix and Revert: parameter-free exchange of token heads (RankMixer, arXiv 2507.15551, eq. 2-4).

Row h, slot t of mix(X) is head h of token t:

    mix(X, H)[b, h, t*(D/H):(t+1)*(D/H)] = X[b, t, h*(D/H):(h+1)*(D/H)]          [B,T,D] -> [B,H,W],  W = T*D/H

`revert` is the inverse permutation; for H == T mix is its own inverse. Both exist for row-major [B,T,D] (public edges)
and token-major [T,B,D] (inside blocks, where per-token matmuls want it), and agree bit for bit.
"""

from __future__ import annotations

import jax

Array = jax.Array


def mix(x: Array, heads: int) -> Array:
    """[..., T, D] -> [..., H, T*D/H]."""
    *lead, tokens, width = x.shape
    _check(width, heads)
    parts = x.reshape(*lead, tokens, heads, width // heads).swapaxes(-3, -2)
    return parts.reshape(*lead, heads, tokens * (width // heads))


def revert(m: Array, tokens: int) -> Array:
    """[..., H, W] -> [..., T, D], the inverse of `mix`: D = H*W/T."""
    return mix(m, tokens)


def mix_token_major(x: Array, heads: int) -> Array:
    """[T, B, D] -> [H, B, T*D/H]: the same permutation on axes 0 and 2."""
    tokens, rows, width = x.shape
    _check(width, heads)
    parts = x.reshape(tokens, rows, heads, width // heads).transpose(2, 1, 0, 3)
    return parts.reshape(heads, rows, tokens * (width // heads))


def revert_token_major(m: Array, tokens: int) -> Array:
    """[H, B, W] -> [T, B, D], the inverse of `mix_token_major`."""
    return mix_token_major(m, tokens)


def mixed_shape(tokens: int, width: int, heads: int | None = None) -> tuple[int, int]:
    """(H, W) of mixed tokens; heads None is T, or the largest divisor of D below it."""
    heads = max(h for h in range(1, tokens + 1) if width % h == 0) if heads is None else heads
    if width % heads:
        raise ValueError(f"width {width} does not divide into {heads} heads; make it a multiple")
    return heads, tokens * width // heads


def flatten_token_major(x: Array) -> Array:
    """[T, B, D] -> [B, T*D]: the tokens of every row side by side."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)


def _check(width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"cannot cut tokens of width {width} into {heads} equal heads; make the width a multiple")
