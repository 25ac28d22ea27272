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

import dataclasses
import functools
from typing import Literal, NamedTuple, cast

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from recscale.models.layers.attention import SelfAttention
from recscale.models.layers.dense import SwiGLU
from recscale.models.layers.matmul import contract
from recscale.models.layers.mixing import mix_token_major
from recscale.models.layers.norms import Norm, normalise
from recscale.models.layers.param import Init
from recscale.models.layers.per_token import PerTokenDense, PerTokenSwiGLU
from recscale.models.layers.residuals import sub_layer
from recscale.models.options import Options, require_sizes
from recscale.pallas_kernels.hybrid_attention import hybrid_attention


class HeadState(NamedTuple):
    """What one layer keeps of a request: the history as its item heads read it (k and v, or h alone), [R,T_i,S,D] each,
    and the user heads' part of the mixed item heads [T_i,R,T_u*D/T], None without user heads."""

    memory: tuple[Array, ...]
    mixed: Array | None


@dataclasses.dataclass(frozen=True)
class BlockOptions(Options):
    """width D, hidden F (None: 4*D), seq_hidden F_s (None: 2*D); the rest as in the file of MixFormer; implementation:
    of the attention."""

    width: int = 64
    hidden: int | None = None
    seq_hidden: int | None = None
    norms: Literal["figure", "equations", "post"] = "figure"
    query_mixer: Literal["mix", "self_attention", "none"] = "mix"
    query_ffn: bool = True
    output_ffn: Literal["per_head", "shared"] = "per_head"
    init: Init = "lecun_normal"
    implementation: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(width=self.width, hidden=self.hidden, seq_hidden=self.seq_hidden)

    @property
    def F(self) -> int:
        return self.hidden or 4 * self.width

    @property
    def F_s(self) -> int:
        return self.seq_hidden or 2 * self.width

    @property
    def post(self) -> bool:
        """Whether norms stand behind the sums."""
        return self.norms == "post"

    @property
    def place(self) -> Literal["pre", "post"]:
        """The place of the norms, in the words of other architectures."""
        return "post" if self.post else "pre"


class HeadGroup(nnx.Module):
    """The weights of t of the T heads of one block: all heads, the user heads or the item heads.

    Args:
        heads: t.
        reordered: which order of the attention.
    """

    def __init__(
        self,
        heads: int,
        options: BlockOptions,
        *,
        reordered: bool,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        width, hidden = options.width, options.F
        self.heads, self.reordered, self.post, self.dtype = heads, reordered, options.post, dtype
        self.place = options.place
        self.implementation, init, figure = options.implementation, options.init, options.norms == "figure"
        norm = functools.partial(Norm, width, kind="layer" if self.post else "rms", tokens=heads, dtype=dtype)
        ffn = functools.partial(PerTokenSwiGLU, heads, width, hidden, init=init, dtype=dtype, rngs=rngs)
        self.mixing_norm = norm() if options.query_mixer != "none" else None
        self.query_ffn_norm = norm() if options.query_ffn else None
        self.query_ffn = ffn() if options.query_ffn else None
        self.query_norm = norm() if figure else None
        self.history_norm = norm() if figure else None
        project = functools.partial(
            PerTokenDense, heads, width, width, use_bias=False, init=init, dtype=dtype, rngs=rngs
        )
        self.key, self.value = project(axes=("embed", "heads")), project(axes=("embed", "heads"))
        self.attention_norm = norm() if self.post else None
        self.output_norm = norm()
        self.output_ffn = ffn() if options.output_ffn == "per_head" else None

    def before(self, x: Float[Array, "t B D"]) -> Float[Array, "t B D"]:
        """What is mixed: N(X), or X itself under post-norm."""
        return x if self.post else normalise(self.mixing_norm, x)

    def queries(self, x: Float[Array, "t B D"], mixed: Float[Array, "t B D"] | None) -> Float[Array, "t B D"]:
        """X [t,B,D] and its mixed rows -> q [t,B,D]; mixed is None without mixing."""
        if mixed is not None:
            x = self._sum(mixed + x, self.mixing_norm)
        return x if self.query_ffn is None else sub_layer(self.query_ffn, self.query_ffn_norm, x, place=self.place)

    def memory(self, h: Float[Array, "R S tD"]) -> tuple[Array, ...]:
        """h [R,S,t*D], the heads' slices -> (h,) or (k, v), each [R,t,S,D]."""
        requests, events, _ = h.shape
        h = h.reshape(requests, events, self.heads, -1).transpose(2, 0, 1, 3)
        h = normalise(self.history_norm, h)
        if self.reordered:
            return (h.swapaxes(0, 1),)
        rows = h.reshape(self.heads, requests * events, -1)
        return tuple(f(rows).reshape(h.shape).swapaxes(0, 1) for f in (self.key, self.value))

    def read(
        self, q: Float[Array, "t B D"], memory: tuple[Array, ...], length: Int[Array, " R"]
    ) -> Float[Array, "t B D"]:
        """q [t,R*n,D], n rows per request -> z [t,R*n,D]."""
        heads, rows, width = q.shape
        asked = normalise(self.query_norm, q)
        if self.reordered:
            asked = contract("tbe,tde->tbd", asked, self.key.kernel[...], self.dtype)
        asked = asked.reshape(heads, length.shape[0], -1, width).transpose(1, 2, 0, 3)
        # The state is head-major, as the products of the attention want it; XLA drops the exchange of axes.
        keys, values = memory[0].swapaxes(1, 2), None if self.reordered else memory[1].swapaxes(1, 2)
        found, _ = hybrid_attention(asked, keys, values, length, scale=width**-0.5, implementation=self.implementation)
        found = found.transpose(2, 0, 1, 3).reshape(heads, rows, width)
        if self.reordered:
            found = self.value(found)
        return self._sum(found + q, self.attention_norm)

    def fuse(self, z: Float[Array, "t B D"], shared: SwiGLU | None) -> Float[Array, "t B D"]:
        """z -> the heads of the next layer."""
        branch = cast(SwiGLU | PerTokenSwiGLU, self.output_ffn if shared is None else shared)
        return sub_layer(branch, self.output_norm, z, place=self.place)

    def _sum(self, x: Array, norm: Norm | None) -> Array:
        return normalise(norm, x) if self.post else x


class MixFormerBlock(nnx.Module):
    """One block: the user heads (none unless ui), the item heads, and what they share.

    Args:
        user_heads, item_heads: T_u and T_i, T together; user_heads = 0 makes the item heads all heads.
        reordered: which order of the attention.
    """

    def __init__(
        self,
        user_heads: int,
        item_heads: int,
        options: BlockOptions,
        *,
        reordered: bool,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.tokens, self.user_heads, self.query_mixer = user_heads + item_heads, user_heads, options.query_mixer
        init, attention, shared = options.init, options.query_mixer == "self_attention", options.output_ffn == "shared"

        def group(heads: int) -> HeadGroup:
            return HeadGroup(heads, options, reordered=reordered, dtype=dtype, rngs=rngs)

        self.user = group(user_heads) if user_heads else None
        self.item = group(item_heads)
        self.attention = (
            SelfAttention(options.width, self.tokens, init=init, dtype=dtype, rngs=rngs) if attention else None
        )
        self.shared_ffn = SwiGLU(options.width, options.F, init=init, dtype=dtype, rngs=rngs) if shared else None

    def encode_user(
        self, x: Float[Array, "t B D"] | None, h: Float[Array, "R S TD"], length: Int[Array, " R"]
    ) -> tuple[Float[Array, "t B D"] | None, HeadState]:
        """User heads [T_u,R,D] or None and h [R,S,T*D] -> the next user heads, and what the item heads will need."""
        cut = self.user_heads * h.shape[-1] // self.tokens
        memory = self.item.memory(h[..., cut:])
        if self.user is None or x is None:
            return None, HeadState(memory, None)
        own = others = None
        if self.query_mixer == "mix":
            mixed = mix_token_major(self.user.before(x), self.tokens)
            others = mixed[self.user_heads :]
            # keep = 0: the part that would come from item heads.
            own = jnp.pad(mixed[: self.user_heads], [(0, 0), (0, 0), (0, x.shape[-1] - mixed.shape[-1])])
        z = self.user.read(self.user.queries(x, own), self.user.memory(h[..., :cut]), length)
        return self.user.fuse(z, self.shared_ffn), HeadState(memory, others)

    def score(self, x: Float[Array, "t B D"], state: HeadState, length: Int[Array, " R"]) -> Float[Array, "t B D"]:
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

    def __init__(self, heads: int, options: BlockOptions, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        width, self.place = heads * options.width, options.place
        self.norm = Norm(width, kind="layer" if options.post else "rms", dtype=dtype)
        self.ffn = SwiGLU(width, options.F_s, init=options.init, dtype=dtype, rngs=rngs)

    def __call__(self, s: Float[Array, "R S TD"]) -> Float[Array, "R S TD"]:
        return sub_layer(self.ffn, self.norm, s, place=self.place)
