"""The parts of HyFormer (arXiv 2601.12681): query generation, one history's layer, boosting.

    q_i = W_b silu(W_a info_i + b_a) + b_b                               query generation, once
    H_l = f_l(H_{l-1});  q <- q + MHA(N(q), N(H_l) W_K, N(H_l) W_V) W_O  a history's encoder, and its decoding
    X_out = X + TokenFFN(N(mix(N(X))))                                   boosting of queries and field tokens

N is RMSNorm; attention projections have no bias, the GELU networks have. Letters: R requests, C candidates, B = R*C,
n rows of a history, Q queries, T tokens, D width, F_q hidden width of the generator. Tokens are token-major.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from recscale.models.layers import param
from recscale.models.layers.dense import Dense, SwiGLU
from recscale.models.layers.history_attention import HistoryBlock, KeyValues, Visible, attend, split_heads
from recscale.models.layers.matmul import contract
from recscale.models.layers.mixing import mix_token_major
from recscale.models.layers.norms import Norm
from recscale.models.layers.per_token import PerTokenDense, PerTokenFFN, activation

Array = jax.Array


class QueryGenerator(nnx.Module):
    """q_i = W_b silu(W_a info_i + b_a) + b_b, weights of its own for each of Q queries.

    info_i is [request's part ; candidate's part]. Args: sources of both in units of D; D; F_q.
    """

    def __init__(
        self, queries: int, user: int, candidate: int, width: int, hidden: int, *, split: bool, init, dtype, rngs
    ):
        self.user_width, self.split, self.dtype = user * width, split, dtype
        shape = (queries, (user + candidate) * width, hidden)
        self.kernel = param.kernel(rngs, shape, ("tokens", "embed", "hidden"), init)
        self.bias = param.constant((queries, hidden), ("tokens", "hidden"))
        self.out = PerTokenDense(queries, hidden, width, axes=("hidden", "embed"), init=init, dtype=dtype, rngs=rngs)

    def encode_user(self, info: Array | None) -> Array | None:
        """[Q,R,d_u] -> [Q,R,F_q], or as it came without split."""
        if info is None or not self.split:
            return info
        return contract("qrd,qdf->qrf", info, self.kernel[...][:, : self.user_width], self.dtype)

    def __call__(self, state: Array | None, own: Array, requests: int) -> Array:
        """own [B,d_c] -> queries [Q,B,D]."""
        rows = own.shape[0]
        if state is not None:
            queries, _, width = state.shape
            state = jnp.broadcast_to(state[:, :, None], (queries, requests, rows // requests, width))
            state = state.reshape(queries, rows, width)
        if self.split or state is None:
            h = contract("bd,qdf->qbf", own, self.kernel[...][:, self.user_width :], self.dtype)
            h = h if state is None else h + state
        else:
            own = jnp.broadcast_to(own[None], (state.shape[0], *own.shape)).astype(state.dtype)
            h = contract("qbd,qdf->qbf", jnp.concatenate([state, own], axis=-1), self.kernel[...], self.dtype)
        return self.out(activation("silu")(h + self.bias[...].astype(self.dtype)[:, None]))


class StreamLayer(nnx.Module):
    """One layer of one history: its encoder and its decoding by Q_j queries."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        encoder: str,
        causal: bool = False,
        keep: int | None = None,
        seq_hidden: int = 0,
        residual: bool = True,
        activation: str = "gelu",
        implementation: str | None = None,
        init: str = "lecun_normal",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kwargs = dict(init=init, dtype=dtype, rngs=rngs)
        self.heads, self.causal, self.residual, self.implementation = heads, causal, residual, implementation
        # Rows of "longer"; every other encoder keeps all of them.
        self.keep = keep if encoder == "longer" else None
        norm = functools.partial(Norm, width, kind="rms", dtype=dtype)
        if encoder == "swiglu":
            self.norm, self.encoder = norm(), SwiGLU(width, seq_hidden, **kwargs)
        else:
            self.norm, self.encoder = (
                None,
                HistoryBlock(
                    width,
                    heads,
                    norm="rms",
                    attention_bias=False,
                    activation=activation,
                    implementation=implementation,
                    **kwargs,
                ),
            )
        project = functools.partial(Dense, width, width, use_bias=False, **kwargs)
        self.history_norm, self.query_norm = norm(), norm()
        self.query, self.key, self.value = (project(axes=("embed", "heads")) for _ in range(3))
        self.out = project(axes=("heads", "embed"))

    def encode(self, h: Array, length: Array) -> tuple[Array, Array]:
        """H_{l-1} [R,n,D] with its valid rows -> H_l and its valid rows."""
        if self.norm is not None:
            return h + self.encoder(self.norm(h)), length
        seen = Visible(self.encoder.keys(h), length, "causal" if self.causal else "full")
        h = self.encoder(h[:, : self.keep], seen)
        return h, jnp.minimum(length, h.shape[1])

    def keys(self, h: Array) -> KeyValues:
        """H_l -> k, v for the decoding."""
        h = self.history_norm(h)
        return KeyValues(split_heads(self.key(h), self.heads), split_heads(self.value(h), self.heads))

    def decode(self, q: Array, keys: KeyValues, length: Array) -> Array:
        """q [Q_j,R*C,D] -> the same shape."""
        queries, rows, width = q.shape
        asked = self.query(self.query_norm(q)).reshape(queries, length.shape[0], -1, width)
        asked = split_heads(asked.transpose(1, 2, 0, 3), self.heads)
        found = attend(asked, Visible(keys, length), implementation=self.implementation)
        found = self.out(found.transpose(2, 0, 1, 3).reshape(queries, rows, width))
        return q + found if self.residual else found


class Boost(nnx.Module):
    """X + TokenFFN(N(mix(N(X)))) on [T,B,D]; T must divide D."""

    def __init__(self, tokens: int, width: int, hidden: int, *, activation: str, init: str, dtype, rngs: nnx.Rngs):
        self.token_norm = Norm(width, kind="rms", dtype=dtype)
        self.mixed_norm = Norm(width, kind="rms", dtype=dtype)
        self.ffn = PerTokenFFN(tokens, width, hidden, activation=activation, init=init, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return x + self.ffn(self.mixed_norm(mix_token_major(self.token_norm(x), x.shape[0])))
