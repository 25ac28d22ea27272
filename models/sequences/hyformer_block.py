"""The parts of HyFormer (arXiv 2601.12681): query generation, one history's layer, boosting.

    q_i = W_b silu(W_a info_i + b_a) + b_b                               query generation, once
    H_l = f_l(H_{l-1});  q <- q + MHA(N(q), N(H_l) W_K, N(H_l) W_V) W_O  a history's encoder, and its decoding
    X_out = X + TokenFFN(N(mix(N(X))))                                   boosting of queries and field tokens

N is RMSNorm; attention projections have no bias, the GELU networks have. Letters: R requests, C candidates, B = R*C,
n rows of a history, Q queries, T tokens, D width, F_q hidden width of the generator. Tokens are token-major.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from recscale.models.layers import param
from recscale.models.layers.dense import Dense, SwiGLU
from recscale.models.layers.history_attention import HistoryBlock, KeyValues, Visible, attend, split_heads
from recscale.models.layers.matmul import contract
from recscale.models.layers.mixing import mix_token_major
from recscale.models.layers.norms import Norm, normalise
from recscale.models.layers.per_token import Activation, PerTokenDense, PerTokenFFN, activation
from recscale.models.options import Options, require_sizes


@dataclasses.dataclass(frozen=True)
class DecodingOptions(Options):
    """width D, hidden F (None: 4*D), query_hidden F_q (None: D), seq_hidden F_s (None: 4*D), head_dim of the attention.

    split_info: whether the request's part of info W_a is computed once per request (exact) or again per candidate.
    encoder: f, one of the file's; encoder_causal: whether its rows see older ones only; keep K: rows of "longer".
    decode_residual: whether decoding adds to the queries. implementation: of the attention.
    """

    width: int = 128
    hidden: int | None = None
    query_hidden: int | None = None
    seq_hidden: int | None = None
    head_dim: int | None = None
    split_info: bool = True
    encoder: Literal["full", "longer", "swiglu"] = "longer"
    encoder_causal: bool = False
    keep: int = 128
    decode_residual: bool = True
    activation: Activation = "gelu"
    init: param.Init = "lecun_normal"
    implementation: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(width=self.width, keep=self.keep, head_dim=self.head_dim)
        require_sizes(hidden=self.hidden, query_hidden=self.query_hidden, seq_hidden=self.seq_hidden)
        if self.head_dim is not None and self.width % self.head_dim:
            raise ValueError(f"width {self.width} is no multiple of head_dim {self.head_dim}; change one of them")
        if self.encoder == "swiglu" and self.encoder_causal:
            raise ValueError("encoder='swiglu' has no attention, so encoder_causal must be False")

    @property
    def F(self) -> int:
        return self.hidden or 4 * self.width

    @property
    def F_q(self) -> int:
        return self.query_hidden or self.width

    @property
    def F_s(self) -> int:
        return self.seq_hidden or 4 * self.width

    @property
    def heads(self) -> int:
        d = self.head_dim or max(d for d in range(1, 33) if self.width % d == 0)
        return self.width // d


class QueryGenerator(nnx.Module):
    """q_i = W_b silu(W_a info_i + b_a) + b_b, weights of its own for each of Q queries.

    info_i is [request's part ; candidate's part], `user` and `candidate` times D wide.
    """

    def __init__(
        self,
        queries: int,
        user: int,
        candidate: int,
        options: DecodingOptions,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        D, F_q, init = options.width, options.F_q, options.init
        self.user_width, self.split, self.dtype = user * D, options.split_info, dtype
        shape = (queries, (user + candidate) * D, F_q)
        self.kernel = param.kernel(rngs, shape, ("tokens", "embed", "hidden"), init)
        self.bias = param.constant((queries, F_q), ("tokens", "hidden"))
        self.out = PerTokenDense(queries, F_q, D, axes=("hidden", "embed"), init=init, dtype=dtype, rngs=rngs)

    def encode_user(self, info: Float[Array, "Q R d"] | None) -> Float[Array, "Q R _"] | None:
        """[Q,R,d_u] -> [Q,R,F_q], or as it came without split."""
        if info is None or not self.split:
            return info
        return contract("qrd,qdf->qrf", info, self.kernel[...][:, : self.user_width], self.dtype)

    def __call__(
        self, state: Float[Array, "Q R _"] | None, own: Float[Array, "B d"], requests: int
    ) -> Float[Array, "Q B D"]:
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

    def __init__(self, options: DecodingOptions, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        width, heads, init, kernel = options.width, options.heads, options.init, options.implementation
        self.heads, self.causal, self.residual = heads, options.encoder_causal, options.decode_residual
        self.implementation = kernel
        # Rows of "longer"; every other encoder keeps all of them.
        self.keep = options.keep if options.encoder == "longer" else None
        norm = functools.partial(Norm, width, kind="rms", dtype=dtype)
        if options.encoder == "swiglu":
            self.norm, self.encoder = norm(), SwiGLU(width, options.F_s, init=init, dtype=dtype, rngs=rngs)
        else:
            self.norm = None
            self.encoder = HistoryBlock(
                width,
                heads,
                norm="rms",
                attention_bias=False,
                activation=options.activation,
                init=init,
                implementation=kernel,
                dtype=dtype,
                rngs=rngs,
            )
        project = functools.partial(Dense, width, width, use_bias=False, init=init, dtype=dtype, rngs=rngs)
        self.history_norm, self.query_norm = norm(), norm()
        self.query, self.key, self.value = (project(axes=("embed", "heads")) for _ in range(3))
        self.out = project(axes=("heads", "embed"))

    def encode(
        self, h: Float[Array, "R n D"], length: Int[Array, " R"]
    ) -> tuple[Float[Array, "R kept D"], Int[Array, " R"]]:
        """H_{l-1} [R,n,D] with its valid rows -> H_l and its valid rows."""
        if isinstance(self.encoder, SwiGLU):
            return h + self.encoder(normalise(self.norm, h)), length
        seen = Visible(self.encoder.keys(h), length, "causal" if self.causal else "full")
        h = self.encoder(h[:, : self.keep], seen)
        return h, jnp.minimum(length, h.shape[1])

    def keys(self, h: Float[Array, "R n D"]) -> KeyValues:
        """H_l -> k, v for the decoding."""
        h = self.history_norm(h)
        return KeyValues(split_heads(self.key(h), self.heads), split_heads(self.value(h), self.heads))

    def decode(self, q: Float[Array, "Q B D"], keys: KeyValues, length: Int[Array, " R"]) -> Float[Array, "Q B D"]:
        """q [Q_j,R*C,D] -> the same shape."""
        queries, rows, width = q.shape
        asked = self.query(self.query_norm(q)).reshape(queries, length.shape[0], -1, width)
        asked = split_heads(asked.transpose(1, 2, 0, 3), self.heads)
        found = attend(asked, Visible(keys, length), implementation=self.implementation)
        found = self.out(found.transpose(2, 0, 1, 3).reshape(queries, rows, width))
        return q + found if self.residual else found


class Boost(nnx.Module):
    """X + TokenFFN(N(mix(N(X)))) on [T,B,D]; T must divide D."""

    def __init__(self, tokens: int, options: DecodingOptions, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        D, act, init = options.width, options.activation, options.init
        self.token_norm = Norm(D, kind="rms", dtype=dtype)
        self.mixed_norm = Norm(D, kind="rms", dtype=dtype)
        self.ffn = PerTokenFFN(tokens, D, options.F, activation=act, init=init, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "T B D"]) -> Float[Array, "T B D"]:
        return x + self.ffn(self.mixed_norm(mix_token_major(self.token_norm(x), x.shape[0])))
