"""Which slots a token reads: query, keys, theta, and the exact search over two axes of sub-keys.

    q   [N,H,2,p] = norm_q(query(x))
    k~  [H,2,n,p] = norm_k(theta K)  (ln_after)  or  theta norm_k(K)  (ln_before)
    s   [N,H,2,n] = scale * q . k~                 best K pairs by s_row[i] + s_col[j]; id = i*n + j

theta (arXiv 2602.07526) starts as the identity: "right_dxd" mixes features, K theta_a with theta_a [p,p], so a read
moves every key; "left_nxn" mixes keys, theta_a K with theta_a [n,n], where row i learns only if key i was read.
`fold` replaces keys and theta by the constant k~.

Letters: N reads (token-major, t*B + b), H heads, n sub-keys per axis, p key width, K slots per head.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from recscale.models.layers import param
from recscale.models.layers.dense import Dense
from recscale.models.layers.per_token import PerTokenDense, activation
from recscale.pallas_kernels.product_key_topk import product_key_topk

from .axis_norm import AxisNorm
from .value_table import Constant

Array = jax.Array

QUERIES = ("linear", "mlp")
THETAS = ("none", "right_dxd", "left_nxn")
THETA_ORDERS = ("ln_after", "ln_before")
SCORE_SCALES = ("inv_sqrt", "none", "learned")


def require_known(*settings: tuple[str, str, tuple[str, ...]]) -> None:
    """ValueError for the first (name, value, known values) whose value is not known."""
    for name, value, known in settings:
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")


class Found(NamedTuple):
    """scores float32 [N, H, K] descending, ids int32 [N, H, K] in [0, n*n)."""

    scores: Array
    ids: Array


class Query(nnx.Module):
    """x [T, B, D] -> [N, heads, 2, p], without biases; a layer of GELU units in between for "mlp"."""

    def __init__(
        self,
        tokens: int,
        width: int,
        heads: int,
        key_width: int,
        *,
        kind: str = "linear",
        hidden: int | None = None,
        per_token: bool = False,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        require_known(("query", kind, QUERIES))
        self.shape = (heads, 2, key_width)
        widths = [width, *([hidden or width] if kind == "mlp" else []), 2 * heads * key_width]
        kwargs = dict(use_bias=False, dtype=dtype, rngs=rngs)
        layers = []
        for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
            axes = ("embed" if i == 0 else "hidden", "key" if i == len(widths) - 2 else "hidden")
            layers.append(
                PerTokenDense(tokens, a, b, axes=axes, **kwargs) if per_token else Dense(a, b, axes=axes, **kwargs)
            )
        self.layers = nnx.List(layers)

    def __call__(self, x: Array) -> Array:
        for i, layer in enumerate(self.layers):
            x = layer(x if i == 0 else activation("gelu")(x))
        return x.reshape(-1, *self.shape)


class Addressing(nnx.Module):
    """x [T, B, D] -> the slots every token reads.

    Args:
        tokens, width: T, D.
        sub_keys, topk, heads, key_width: n, K, H, p.
        query, query_hidden, query_per_token, query_shared_by_heads: see `Query`; one query for all heads.
        query_norm, key_norm: kinds of `AxisNorm` or None. norm_gain_power: gains start at p^-g.
        score_scale: "inv_sqrt", "none" or "learned".
        keys_per_token, keys_shared_by_heads: whose keys they are.
        theta, theta_order, theta_noise, freeze_base_keys: see the file's head.
        key_init: "normal" or "uniform".
    """

    def __init__(
        self,
        tokens: int,
        width: int,
        sub_keys: int,
        topk: int,
        heads: int,
        key_width: int,
        *,
        query: str = "linear",
        query_hidden: int | None = None,
        query_per_token: bool = False,
        query_shared_by_heads: bool = False,
        query_norm: str | None = "layer",
        key_norm: str | None = "layer",
        norm_gain_power: float = 0.0,
        score_scale: str = "inv_sqrt",
        keys_per_token: bool = False,
        keys_shared_by_heads: bool = False,
        theta: str = "none",
        theta_order: str = "ln_after",
        theta_noise: float = 0.0,
        freeze_base_keys: bool = False,
        key_init: str = "normal",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if topk > sub_keys:
            raise ValueError(f"topk is {topk}, but an axis has only {sub_keys} sub-keys; lower it or add slots")
        require_known(("theta", theta, THETAS), ("theta_order", theta_order, THETA_ORDERS))
        require_known(("score_scale", score_scale, SCORE_SCALES))
        if theta == "left_nxn" and freeze_base_keys:
            raise ValueError("theta='left_nxn' with frozen base keys never moves a key that was not read; train keys")
        self.topk, self.heads, self.tokens = topk, heads, tokens
        self.theta_kind, self.theta_order = theta, theta_order
        query_heads = 1 if query_shared_by_heads else heads
        self.query = Query(
            tokens, width, query_heads, key_width, kind=query, hidden=query_hidden, per_token=query_per_token,
            dtype=dtype, rngs=rngs,
        )  # fmt: skip
        gain = key_width**-norm_gain_power
        self.query_norm = query_norm and AxisNorm(key_width, query_norm, heads=query_heads, gain=gain)
        self.key_norm = key_norm and AxisNorm(key_width, key_norm, gain=gain)
        self.scale = key_width**-0.5 if score_scale == "inv_sqrt" else 1.0
        self.learned_scale = param.constant((), (), key_width**-0.5) if score_scale == "learned" else None
        self.per_token = keys_per_token
        lead = ((tokens,) if keys_per_token else ()) + (1 if keys_shared_by_heads else heads,)
        keys = draw_keys(rngs, (*lead, 2, sub_keys, key_width), key_init)
        axes = (*(("tokens",) if keys_per_token else ()), "heads", "axes", "sub_keys", "key")
        self.keys = Constant(keys) if freeze_base_keys else nnx.Param(keys, logical_axes=axes)
        self.theta = self._draw_theta(keys.shape, axes, theta_noise, rngs) if theta != "none" else None

    def effective_keys(self) -> Array:
        """k~ [(T,) H, 2, n, p], float32."""
        keys = self.keys[...]
        norm = (lambda k: k) if self.key_norm is None else (lambda k: self.key_norm(k, sub_keys=True))
        if self.theta is None:
            return norm(keys)
        if self.theta_order == "ln_before":
            return self._mix(norm(keys))
        return norm(self._mix(keys))

    def fold(self) -> None:
        """Replaces keys, theta and key norm by the constant k~, for serving; folding twice changes nothing."""
        self.keys = Constant(self.effective_keys())
        self.theta = self.key_norm = None

    def __call__(self, x: Array, *, train: bool = False, valid: Array | None = None) -> Found:
        """valid: bool [N], reads that count in batch statistics."""
        q = self.query(x)
        if self.query_norm is not None:
            q = self.query_norm(q, train=train, valid=valid)
        if self.learned_scale is not None:
            q = q * self.learned_scale[...]
        keys = self.effective_keys()
        q = jnp.broadcast_to(q, (q.shape[0], self.heads, *q.shape[2:]))
        keys = keys.astype(jnp.float32)
        if keys.shape[-4] == 1 and self.heads > 1:
            keys = jnp.squeeze(keys, axis=-4)

        def search(q, keys):
            return product_key_topk(q, keys, self.topk, scale=self.scale)

        if not self.per_token:
            return Found(*search(q.astype(jnp.float32), keys))
        found = jax.vmap(search)(q.astype(jnp.float32).reshape(self.tokens, -1, *q.shape[1:]), keys)
        return Found(*(part.reshape(-1, *part.shape[2:]) for part in found))

    def _draw_theta(self, shape: tuple[int, ...], axes: tuple[str, ...], noise: float, rngs: nnx.Rngs) -> nnx.Param:
        """The identity plus noise, for keys of a shape [..., n, p]."""
        side, name = (shape[-1], "key") if self.theta_kind == "right_dxd" else (shape[-2], "sub_keys")
        drawn = noise * jax.random.normal(rngs.params(), (*shape[:-2], side, side))
        identity = jnp.broadcast_to(jnp.eye(side), drawn.shape)
        return nnx.Param(identity + drawn, logical_axes=(*axes[:-2], name, name))

    def _mix(self, keys: Array) -> Array:
        if self.theta_kind == "right_dxd":
            return jnp.einsum("...np,...pq->...nq", keys, self.theta[...])
        return jnp.einsum("...mn,...np->...mp", self.theta[...], keys)


def draw_keys(rngs: nnx.Rngs, shape: tuple[int, ...], kind: str) -> Array:
    """Keys of width p = shape[-1]: "normal" with standard deviation 1/sqrt p, "uniform" on +-1/sqrt p."""
    bound, flat = shape[-1] ** -0.5, (math.prod(shape),)
    if kind == "uniform":
        return jax.random.uniform(rngs.params(), flat, jnp.float32, -bound, bound).reshape(shape)
    if kind != "normal":
        raise ValueError(f"key_init is {kind!r}, expected normal or uniform")
    return (bound * jax.random.normal(rngs.params(), flat, jnp.float32)).reshape(shape)


def freeze_module(module: nnx.Module) -> None:
    """Turns every parameter of a module into a constant: a control that is drawn and never trained."""
    for _, node in list(nnx.iter_graph(module)):
        if isinstance(node, nnx.Module):
            for name, value in list(vars(node).items()):
                if isinstance(value, nnx.Param):
                    setattr(node, name, Constant(value[...]))
