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
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from recscale.models.layers import param
from recscale.models.layers.dense import Dense
from recscale.models.layers.per_token import PerTokenDense, activation
from recscale.pallas_kernels.product_key_topk import product_key_topk

from .axis_norm import make_axis_norm
from .options import MemoryOptions
from .value_table import Constant


class Found(NamedTuple):
    """scores float32 [N, H, K] descending, ids int32 [N, H, K] in [0, n*n)."""

    scores: Array
    ids: Array


class Query(nnx.Module):
    """x [T, B, D] -> [N, heads, 2, p], without biases; a layer of GELU units in between for query="mlp"."""

    def __init__(
        self, tokens: int, width: int, options: MemoryOptions, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        def layer(inputs: int, out: int, axes: tuple[str, str]) -> Dense | PerTokenDense:
            if options.query_per_token:
                return PerTokenDense(tokens, inputs, out, use_bias=False, axes=axes, dtype=dtype, rngs=rngs)
            return Dense(inputs, out, use_bias=False, axes=axes, dtype=dtype, rngs=rngs)

        self.shape = (options.query_heads, 2, options.key_width)
        out = math.prod(self.shape)
        if options.query == "linear":
            self.layers = nnx.List([layer(width, out, ("embed", "key"))])
        else:
            hidden = options.query_hidden or width
            self.layers = nnx.List([layer(width, hidden, ("embed", "hidden")), layer(hidden, out, ("hidden", "key"))])

    def __call__(self, x: Float[Array, "T B D"]) -> Float[Array, "N H 2 p"]:
        for i, layer in enumerate(self.layers):
            x = layer(x if i == 0 else activation("gelu")(x))
        return x.reshape(-1, *self.shape)


class SlotSearch(nnx.Module):
    """What both ways of addressing share: queries and the norms of queries and keys. Arguments: see `Addressing`."""

    def __init__(
        self, tokens: int, width: int, options: MemoryOptions, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        self.topk, self.heads, self.tokens = options.memory_topk, options.memory_heads, tokens
        self.query = Query(tokens, width, options, dtype=dtype, rngs=rngs)
        p, gain = options.key_width, options.key_width**-options.norm_gain_power
        self.query_norm = make_axis_norm(p, options.query_norm, heads=options.query_heads, gain=gain)
        self.key_norm = make_axis_norm(p, options.key_norm, gain=gain)

    def ask(self, x: Array, *, train: bool, valid: Array | None) -> Array:
        """q [N, heads, 2, p] of x [T, B, D]."""
        q = self.query(x)
        return q if self.query_norm is None else self.query_norm(q, train=train, valid=valid)

    def normed(self, keys: Array) -> Array:
        return keys if self.key_norm is None else self.key_norm(keys, sub_keys=True)


class Addressing(SlotSearch):
    """x [T, B, D] -> the slots every token reads.

    Args:
        tokens, width: T, D.
        options: sub-keys, heads, keys, theta and norms, see `MemoryOptions`.
    """

    def __init__(
        self, tokens: int, width: int, options: MemoryOptions, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        super().__init__(tokens, width, options, dtype=dtype, rngs=rngs)
        self.theta_kind, self.theta_order = options.theta, options.theta_order
        p, scale = options.key_width, options.score_scale
        self.scale = p**-0.5 if scale == "inv_sqrt" else 1.0
        self.learned_scale = param.constant((), (), p**-0.5) if scale == "learned" else None
        self.per_token = options.keys_per_token
        lead = ((tokens,) if self.per_token else ()) + (1 if options.keys_shared_by_heads else self.heads,)
        keys = draw_keys(rngs, (*lead, 2, options.virtual_sub_keys, p), options.key_init)
        axes = (*(("tokens",) if self.per_token else ()), "heads", "axes", "sub_keys", "key")
        self.keys = Constant(keys) if options.freeze_base_keys else param.matrix(keys, axes)
        theta = None
        if options.theta != "none":
            theta = self._draw_theta(keys.shape, axes, options.theta_noise, rngs)
        self.theta: nnx.Param | None = theta

    def effective_keys(self) -> Float[Array, "*T H 2 n p"]:
        """k~ [(T,) H, 2, n, p], float32."""
        keys = self.keys[...]
        if self.theta is None:
            return self.normed(keys)
        if self.theta_order == "ln_before":
            return self._mix(keys=self.normed(keys), theta=self.theta[...])
        return self.normed(self._mix(keys=keys, theta=self.theta[...]))

    def fold(self) -> None:
        """Replaces keys, theta and key norm by the constant k~, for serving; folding twice changes nothing."""
        self.keys = Constant(self.effective_keys())
        self.theta = self.key_norm = None

    def __call__(
        self, x: Float[Array, "T B D"], *, train: bool = False, valid: Bool[Array, " N"] | None = None
    ) -> Found:
        """valid: reads that count in batch statistics."""
        q = self.ask(x, train=train, valid=valid)
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
        return param.matrix(identity + drawn, (*axes[:-2], name, name))

    def _mix(self, *, keys: Array, theta: Array) -> Array:
        if self.theta_kind == "right_dxd":
            return jnp.einsum("...np,...pq->...nq", keys, theta)
        return jnp.einsum("...mn,...np->...mp", theta, keys)


def draw_keys(rngs: nnx.Rngs, shape: tuple[int, ...], kind: str) -> Array:
    """Keys of width p = shape[-1]: "normal" with standard deviation 1/sqrt p, "uniform" on +-1/sqrt p."""
    bound, flat = shape[-1] ** -0.5, (math.prod(shape),)
    if kind == "uniform":
        return jax.random.uniform(rngs.params(), flat, jnp.float32, -bound, bound).reshape(shape)
    return (bound * jax.random.normal(rngs.params(), flat, jnp.float32)).reshape(shape)


def freeze_module(module: nnx.Module) -> None:
    """Turns every parameter of a module into a constant: a control that is drawn and never trained."""
    for _, node in list(nnx.iter_graph(module)):
        if isinstance(node, nnx.Module):
            for name, value in list(vars(node).items()):
                if isinstance(value, nnx.Param):
                    setattr(node, name, Constant(value[...]))
