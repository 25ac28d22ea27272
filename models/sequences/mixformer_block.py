"""One block of MixFormer (arXiv 2602.14110): per-head queries over a history shared by all heads.

    p = mix(N(X)) + X         q_t = SwiGLU_t(N(p_t)) + p_t                                  query mixer
    h = SwiGLU(N(s)) + s      k_t = N(h_t) K_t,  v_t = N(h_t) V_t                           history, once per request
    z_t = sum_s softmax_s(N(q_t) . k_st / sqrt(D)) v_st + q_t                               no W_Q, no W_O
    X_t = SwiGLU_t(N(z_t)) + z_t                                                            output fusion

The T heads are T_u user heads, finished once per request, and T_i item heads; T_u = 0 is the plain MixFormer. The
request's share of the work is `encode_user`, the candidates' is `score`; they exchange a `HeadState`.

Letters: R requests, C candidates, S events, T heads, D their width, F hidden width. Heads are token-major [t,B,D].
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from recscale.models.layers.attention import SelfAttention
from recscale.models.layers.dense import SwiGLU
from recscale.models.layers.matmul import contract
from recscale.models.layers.mixing import mix_token_major
from recscale.models.layers.norms import Norm
from recscale.models.layers.per_token import PerTokenDense, PerTokenSwiGLU
from recscale.pallas_kernels.hybrid_attention import hybrid_attention

Array = jax.Array


class HeadState(NamedTuple):
    """What one layer keeps of a request: the history as its item heads read it (k and v, or h alone), [R,T_i,S,D] each,
    and the user heads' part of the mixed item heads [T_i,R,T_u*D/T], None without user heads."""

    memory: tuple[Array, ...]
    mixed: Array | None


class HeadGroup(nnx.Module):
    """The weights of t of the T heads of one block: all heads, the user heads or the item heads.

    Args:
        heads, width, hidden: t, D, F.
        reordered: which order of the attention.
        norms, mixing, query_ffn, output_ffn: as in `MixFormerConfig`; mixing says whether heads are mixed at all.
    """

    def __init__(
        self,
        heads: int,
        width: int,
        hidden: int,
        *,
        reordered: bool,
        norms: str = "figure",
        mixing: bool = True,
        query_ffn: bool = True,
        output_ffn: bool = True,
        implementation: str | None = None,
        init: str = "lecun_normal",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs = dict(init=init, dtype=dtype, rngs=rngs)
        self.heads, self.reordered, self.post, self.dtype = heads, reordered, norms == "post", dtype
        self.implementation = implementation
        norm = functools.partial(Norm, width, kind="layer" if self.post else "rms", tokens=heads, dtype=dtype)
        self.mixing_norm = norm() if mixing else None
        self.query_ffn_norm = norm() if query_ffn else None
        self.query_ffn = PerTokenSwiGLU(heads, width, hidden, **kwargs) if query_ffn else None
        self.query_norm = norm() if norms == "figure" else None
        self.history_norm = norm() if norms == "figure" else None
        project = functools.partial(PerTokenDense, heads, width, width, use_bias=False, **kwargs)
        self.key, self.value = project(axes=("embed", "heads")), project(axes=("embed", "heads"))
        self.attention_norm = norm() if self.post else None
        self.output_norm = norm()
        self.output_ffn = PerTokenSwiGLU(heads, width, hidden, **kwargs) if output_ffn else None

    def before(self, x: Array) -> Array:
        """What is mixed: N(X), or X itself under post-norm."""
        return x if self.post or self.mixing_norm is None else self.mixing_norm(x)

    def queries(self, x: Array, mixed: Array | None) -> Array:
        """X [t,B,D] and its mixed rows -> q [t,B,D]; mixed is None without mixing."""
        if mixed is not None:
            x = self._sum(mixed + x, self.mixing_norm)
        return x if self.query_ffn is None else self._residual(self.query_ffn, self.query_ffn_norm, x)

    def memory(self, h: Array) -> tuple[Array, ...]:
        """h [R,S,t*D], the heads' slices -> (h,) or (k, v), each [R,t,S,D]."""
        requests, events, _ = h.shape
        h = h.reshape(requests, events, self.heads, -1).transpose(2, 0, 1, 3)
        h = h if self.history_norm is None else self.history_norm(h)
        if self.reordered:
            return (h.swapaxes(0, 1),)
        rows = h.reshape(self.heads, requests * events, -1)
        return tuple(f(rows).reshape(h.shape).swapaxes(0, 1) for f in (self.key, self.value))

    def read(self, q: Array, memory: tuple[Array, ...], length: Array) -> Array:
        """q [t,R*n,D], n rows per request -> z [t,R*n,D]."""
        heads, rows, width = q.shape
        asked = q if self.query_norm is None else self.query_norm(q)
        if self.reordered:
            asked = contract("tbe,tde->tbd", asked, self.key.kernel[...], self.dtype)
        asked = asked.reshape(heads, length.shape[0], -1, width).transpose(1, 2, 0, 3)
        # The state is head-major, as the products of the attention want it; XLA drops the exchange of axes.
        keys, values = (*(x.swapaxes(1, 2) for x in memory), None)[:2]
        found, _ = hybrid_attention(asked, keys, values, length, scale=width**-0.5, implementation=self.implementation)
        found = found.transpose(2, 0, 1, 3).reshape(heads, rows, width)
        if self.reordered:
            found = self.value(found)
        return self._sum(found + q, self.attention_norm)

    def fuse(self, z: Array, shared: SwiGLU | None) -> Array:
        """z -> the heads of the next layer."""
        return self._residual(shared or self.output_ffn, self.output_norm, z)

    def _residual(self, branch: nnx.Module, norm: Norm, x: Array) -> Array:
        return norm(branch(x) + x) if self.post else branch(norm(x)) + x

    def _sum(self, x: Array, norm: Norm | None) -> Array:
        return norm(x) if self.post else x


class MixFormerBlock(nnx.Module):
    """One block: the user heads (none unless ui), the item heads, and what they share.

    Args:
        user_heads, item_heads: T_u and T_i, T together; user_heads = 0 makes the item heads all heads.
        attention: query_mixer="self_attention". The rest as in `HeadGroup`.
    """

    def __init__(
        self,
        user_heads: int,
        item_heads: int,
        width: int,
        hidden: int,
        *,
        query_mixer: str = "mix",
        output_ffn: str = "per_head",
        init: str = "lecun_normal",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
        **group: Any,
    ):
        kwargs = dict(init=init, dtype=dtype, rngs=rngs)
        self.tokens, self.user_heads, self.query_mixer = user_heads + item_heads, user_heads, query_mixer
        group |= kwargs | dict(mixing=query_mixer != "none", output_ffn=output_ffn == "per_head")
        self.user = HeadGroup(user_heads, width, hidden, **group) if user_heads else None
        self.item = HeadGroup(item_heads, width, hidden, **group)
        self.attention = SelfAttention(width, self.tokens, **kwargs) if query_mixer == "self_attention" else None
        self.shared_ffn = SwiGLU(width, hidden, **kwargs) if output_ffn == "shared" else None

    def encode_user(self, x: Array | None, h: Array, length: Array) -> tuple[Array | None, HeadState]:
        """User heads [T_u,R,D] or None and h [R,S,T*D] -> the next user heads, and what the item heads will need."""
        cut = self.user_heads * h.shape[-1] // self.tokens
        memory = self.item.memory(h[..., cut:])
        if self.user is None:
            return None, HeadState(memory, None)
        own = others = None
        if self.query_mixer == "mix":
            mixed = mix_token_major(self.user.before(x), self.tokens)
            others = mixed[self.user_heads :]
            # keep = 0: the part that would come from item heads.
            own = jnp.pad(mixed[: self.user_heads], [(0, 0), (0, 0), (0, x.shape[-1] - mixed.shape[-1])])
        z = self.user.read(self.user.queries(x, own), self.user.memory(h[..., :cut]), length)
        return self.user.fuse(z, self.shared_ffn), HeadState(memory, others)

    def score(self, x: Array, state: HeadState, length: Array) -> Array:
        """Item heads [T_i,R*C,D] -> the next item heads."""
        z = self.item.read(self.item.queries(x, self._mixed(x, state)), state.memory, length)
        return self.item.fuse(z, self.shared_ffn)

    def _mixed(self, x: Array, state: HeadState) -> Array | None:
        if self.query_mixer == "none":
            return None
        if self.attention is not None:
            return self.attention(self.item.before(x))
        mixed = mix_token_major(self.item.before(x), self.tokens)[self.user_heads :]
        if state.mixed is None:
            return mixed
        items, requests, width = state.mixed.shape
        candidates = x.shape[1] // requests
        user = jnp.broadcast_to(state.mixed[:, :, None], (items, requests, candidates, width))
        return jnp.concatenate([user.reshape(items, -1, width), mixed], axis=-1)


class HistoryFFN(nnx.Module):
    """h = SwiGLU(N(s)) + s on [R,S,T*D]; under post-norm N(SwiGLU(s) + s)."""

    def __init__(
        self, width: int, hidden: int, *, post: bool, init: str = "lecun_normal", dtype=jnp.float32, rngs: nnx.Rngs
    ):
        self.post = post
        self.norm = Norm(width, kind="layer" if post else "rms", dtype=dtype)
        self.ffn = SwiGLU(width, hidden, init=init, dtype=dtype, rngs=rngs)

    def __call__(self, s: Array) -> Array:
        return self.norm(self.ffn(s) + s) if self.post else self.ffn(self.norm(s)) + s
