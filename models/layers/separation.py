"""Layers of two-phase blocks: user tokens once per request, candidate tokens per candidate (UG-Sep, arXiv 2602.10455).

Activations are token-major: the user's [T_u, R, D], the candidates' [T_c, B, D] with B = R*C rows.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from . import param
from .attention import attend_tokens
from .dense import Dense
from .matmul import contract
from .norms import Norm
from .towers import mean_tokens

Array = jax.Array


class SideNorm(nnx.Module):
    """A norm of both sides: gains shared by all tokens belong to one module, gains per token to one for each side.

    norm: "layer", "rms", or None (a sweep writes "none"); the other flags are those of `Norm`.
    """

    def __init__(
        self,
        user_tokens: int,
        candidate_tokens: int,
        width: int,
        *,
        norm: str | None = "layer",
        norm_affine: bool = True,
        norm_per_token: bool = False,
        norm_eps: float = 1e-6,
        dtype=jnp.float32,
    ):
        def make(tokens: int) -> Norm | None:
            gains = tokens if norm_per_token else None
            if norm in (None, "none"):
                return None
            return Norm(width, kind=norm, affine=norm_affine, tokens=gains, eps=norm_eps, dtype=dtype)

        self.user = make(user_tokens)
        self.own = make(candidate_tokens) if norm_per_token else None

    def of_user(self, x: Array) -> Array:
        """x [T_u, R, D]."""
        return x if self.user is None else self.user(x)

    def of_candidates(self, x: Array) -> Array:
        """x [T_c, B, D]."""
        return self.of_user(x) if self.own is None else self.own(x)


class Compensation(nnx.Module):
    """What candidate tokens get of masked user rows M [T_u, R, W], once per request.

        "mean"       (mean_u M_u) W_ic                    [1, R, D]        W*D parameters
        "per_token"  sum_u A[g, u] M_u W_ic               [T_c, R, D]      W*D + T_c*T_u parameters

    W_ic starts at 0 and A at 1/T_u, so a fresh model equals the uncompensated one and W_ic has a gradient.
    """

    def __init__(
        self,
        kind: Literal["mean", "per_token"],
        user_rows: int,
        candidate_tokens: int,
        inputs: int,
        width: int,
        *,
        dtype=jnp.float32,
    ):
        self.dtype = dtype
        self.kernel = param.constant((inputs, width), ("hidden", "embed"))
        shape, axes = (candidate_tokens, user_rows), ("tokens", "tokens_in")
        self.shares = param.constant(shape, axes, 1 / user_rows) if kind == "per_token" else None

    def __call__(self, mixed: Array) -> Array:
        if self.shares is None:
            mean = mean_tokens(mixed).astype(self.dtype)
            return contract("rw,wd->rd", mean, self.kernel[...], self.dtype)[None]
        projected = contract("urw,wd->urd", mixed, self.kernel[...], self.dtype)
        return contract("gu,urd->grd", self.shares[...], projected, self.dtype)


class MaskedShortcut(nnx.Module):
    """softmax(Q K^T / sqrt(D)) V, what a block adds to its branch instead of its input: one head, no bias.

    Queries come from the branch's tokens, keys and values from the block's input; who may read what is decided by the
    keys that are passed. 3*D^2 parameters; 2*D^2 FLOPs per query token, 4*D^2 per input token, 4*D per pair.
    """

    def __init__(self, width: int, *, init: str = "lecun_normal", dtype=jnp.float32, rngs: nnx.Rngs):
        self.scale, self.dtype = width**-0.5, dtype
        kwargs = dict(use_bias=False, init=init, dtype=dtype, rngs=rngs)
        self.query, self.key, self.value = (Dense(width, width, axes=("embed", "heads"), **kwargs) for _ in range(3))

    def memory(self, x: Array) -> tuple[Array, Array]:
        """Keys and values [T, B, D] of the block's input."""
        return self.key(x), self.value(x)

    def __call__(self, branch: Array, keys: Array, values: Array) -> Array:
        """[Q, B, D], for branch [Q, B, D] and the keys and values it may read."""
        q, k, v = (x[:, :, None] for x in (self.query(branch), keys, values))
        return attend_tokens(q, k, v, self.scale, self.dtype)


def compensation_params(kind: str, user_rows: int, candidate_tokens: int, inputs: int, width: int) -> int:
    """Parameters of one `Compensation`; 0 for "none"."""
    shares = candidate_tokens * user_rows if kind == "per_token" else 0
    return 0 if kind == "none" else inputs * width + shares


def compensation_flops(kind: str, user_rows: int, candidate_tokens: int, inputs: int, width: int) -> int:
    """FLOPs of one `Compensation` per request; 0 for "none"."""
    each = 2 * inputs * width
    return {"none": 0, "mean": each}.get(kind, user_rows * each + 2 * candidate_tokens * user_rows * width)


def to_rows(x: Array, candidates: int) -> Array:
    """[R, T, W] per request -> token-major rows [T, R*C, W]: every candidate sees its request's."""
    requests, tokens, width = x.shape
    rows = jnp.broadcast_to(x.swapaxes(0, 1)[:, :, None], (tokens, requests, candidates, width))
    return rows.reshape(tokens, requests * candidates, width)


def requests_first(x: Array | None) -> Array | None:
    """Token-major [T, R, W] -> [R, T, W], how states are kept; None stays None."""
    return None if x is None else x.swapaxes(0, 1)
