"""Attention over a history inside a model: pre-norm blocks whose rows may be fewer than their keys, and target reads.

Block: rows O [R, Q, D] (or [R, C, Q, D]) look at several disjoint sets of keys at once,

    O' = O + softmax(N1(O) W_Q K^T / sqrt(d) + mask) V W_O            K, V = N1(X) W_K, N1(X) W_V of every set
    O'' = O' + act(N2(O') W_1 + b_1) W_2 + b_2

output_norm=True puts a norm of its own around what the attention adds, O' = O + N3(...).

Target read: one query per candidate, token = softmax(x W_Q (e W_K)^T / sqrt(d)) e W_V W_O, without norm and residual.

Letters: R requests, C candidates, Q rows, n keys, D width, H heads, d = D / H, F hidden width.
Block: 4*D^2 + 2*D*F parameters, 5*D + F biases, two norms; FLOPs 4*D^2 + 4*D*F per row, 4*D^2 per key, 4*D per pair.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from recscale.pallas_kernels.hybrid_attention import hybrid_attention, merge_attention

from .dense import Dense
from .norms import Norm, norm_params
from .per_token import activation


class KeyValues(NamedTuple):
    """k, v: [R, n, H, d] of a request, or [R, C, n, H, d] of a candidate's own rows."""

    k: Array
    v: Array


class Visible(NamedTuple):
    """A set of keys and the rule by which rows see them: `mode` and `q_pos` as in `hybrid_attention`.

    length: int32 [R], valid keys; None for all of them.
    """

    keys: KeyValues
    length: Int[Array, " R"] | None = None
    mode: str = "full"
    q_pos: Array | None = None


class HistoryBlock(nnx.Module):
    """Rows and sets of keys -> rows; `keys` makes the keys of a set of rows.

    Args:
        width, heads: D, H; D must be a multiple of H.
        hidden: F; None is 4*D.
        norm: "layer" or "rms".
        attention_bias: whether the four projections have biases; None as the network, `use_bias`.
        output_norm: whether there is a norm behind `out`. out_scale: of the initial weights of `out` and `down`.
        implementation: of the attention, see `recscale.pallas_kernels.dispatch`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        hidden: int | None = None,
        norm: str = "layer",
        use_bias: bool = True,
        attention_bias: bool | None = None,
        output_norm: bool = False,
        activation: str = "gelu",
        init: str = "lecun_normal",
        out_scale: float = 1.0,
        implementation: str | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        F, attends = hidden or 4 * width, use_bias if attention_bias is None else attention_bias

        def dense(inputs: int, out: int, axes: tuple[str, str], biased: bool, scale: float = 1.0) -> Dense:
            own = {"use_bias": biased, "init": init, "std_scale": scale, "axes": axes}
            return Dense(inputs, out, **own, dtype=dtype, rngs=rngs)

        check_heads(width, heads)
        self.heads, self.act, self.implementation = heads, activation, implementation
        self.attention_norm = Norm(width, kind=norm, dtype=dtype)
        self.query = dense(width, width, ("embed", "heads"), attends)
        self.key = dense(width, width, ("embed", "heads"), attends)
        self.value = dense(width, width, ("embed", "heads"), attends)
        self.out = dense(width, width, ("heads", "embed"), attends, out_scale)
        self.output_norm = Norm(width, kind=norm, dtype=dtype) if output_norm else None
        self.ffn_norm = Norm(width, kind=norm, dtype=dtype)
        self.up = dense(width, F, ("embed", "hidden"), use_bias)
        self.down = dense(F, width, ("hidden", "embed"), use_bias, out_scale)

    def keys(self, x: Float[Array, "*lead n D"]) -> KeyValues:
        """x [..., n, D] -> k, v [..., n, H, d]."""
        x = self.attention_norm(x)
        return KeyValues(split_heads(self.key(x), self.heads), split_heads(self.value(x), self.heads))

    def __call__(self, x: Float[Array, "*lead Q D"], *seen: Visible) -> Float[Array, "*lead Q D"]:
        """x [R, Q, D] or [R, C, Q, D]; the sets in `seen` must be disjoint."""
        q = split_heads(self.query(self.attention_norm(x)), self.heads)
        read = self.out(attend(q, *seen, implementation=self.implementation))
        x = x + (read if self.output_norm is None else self.output_norm(read))
        return x + self.down(activation(self.act)(self.up(self.ffn_norm(x))))


class TargetRead(nnx.Module):
    """One query per candidate over a history: x [R, C, D_x], events [R, S, A] -> token [R, C, 1, D].

    D_x*D + 2*A*D + D^2 parameters (biases apart); 4*S*A*D FLOPs per request, 2*D_x*D + 4*S*D + 2*D^2 per candidate.
    """

    def __init__(
        self,
        query_width: int,
        event_width: int,
        width: int,
        heads: int,
        *,
        use_bias: bool = False,
        init: str = "lecun_normal",
        implementation: str | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def dense(inputs: int, axes: tuple[str, str]) -> Dense:
            return Dense(inputs, width, use_bias=use_bias, init=init, axes=axes, dtype=dtype, rngs=rngs)

        check_heads(width, heads)
        self.heads, self.implementation = heads, implementation
        self.query = dense(query_width, ("features", "heads"))
        self.key = dense(event_width, ("embed", "heads"))
        self.value = dense(event_width, ("embed", "heads"))
        self.out = dense(width, ("heads", "embed"))

    def keys(self, events: Float[Array, "R S A"]) -> KeyValues:
        return KeyValues(split_heads(self.key(events), self.heads), split_heads(self.value(events), self.heads))

    def __call__(
        self, x: Float[Array, "R C D_x"], keys: KeyValues, length: Int[Array, " R"]
    ) -> Float[Array, "R C 1 D"]:
        q = split_heads(self.query(x), self.heads)[:, :, None]
        return self.out(attend(q, Visible(keys, length), implementation=self.implementation))


def attend(q: Float[Array, "*lead H d"], *seen: Visible, implementation: str | None = None) -> Float[Array, "*lead Hd"]:
    """q [R, (C,) Q, H, d] over the union of disjoint sets of keys, scale 1/sqrt(d) -> [R, (C,) Q, H*d]."""
    parts = [_part(q, each, implementation) for each in seen]
    o = parts[0][0] if len(parts) == 1 else merge_attention(parts)[0]
    return o.reshape(*o.shape[:-2], -1)


def split_heads(x: Float[Array, "*lead D"], heads: int) -> Float[Array, "*lead H d"]:
    """[..., D] -> [..., H, D/H]."""
    return x.reshape(*x.shape[:-1], heads, -1)


def check_heads(width: int, heads: int) -> None:
    """ValueError if the width does not divide into equal heads."""
    if heads < 1 or width % heads:
        raise ValueError(f"width {width} does not divide into {heads} attention heads")


def choose_heads(width: int, head_dim: int) -> int:
    """H = D / head_dim; one head where the width is smaller than that.

    Raises:
        ValueError: the width is larger and no multiple.
    """
    if width > head_dim and width % head_dim:
        raise ValueError(f"width {width} is no multiple of head_dim {head_dim}; change one of them")
    return max(1, width // head_dim)


def block_params(
    width: int,
    *,
    hidden: int | None = None,
    norm: str = "layer",
    use_bias: bool = True,
    attention_bias: bool | None = None,
    output_norm: bool = False,
) -> int:
    """Parameters of `HistoryBlock`: 12*D^2 + 13*D with its defaults."""
    F = hidden or 4 * width
    biases = (width + F) * use_bias + 4 * width * (use_bias if attention_bias is None else attention_bias)
    return 4 * width * width + 2 * width * F + biases + (2 + output_norm) * norm_params(width, kind=norm)


def block_flops(width: int, rows: int, keys: int, pairs: int, hidden: int | None = None) -> int:
    """FLOPs of `HistoryBlock`: its rows, the keys it makes, and the (row, key) pairs, masked ones included."""
    row = 4 * width * width + 4 * width * (hidden or 4 * width)
    return rows * row + 4 * keys * width * width + 4 * pairs * width


def _part(q: Array, seen: Visible, implementation: str | None) -> tuple[Array, Array]:
    k, v = seen.keys
    lead = q.shape[: k.ndim - 3]
    if k.ndim == 5:  # keys of each candidate: every (request, candidate) pair is a request of its own
        q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    length = seen.length if seen.length is not None else jnp.full(k.shape[:1], k.shape[1], jnp.int32)
    o, lse = hybrid_attention(
        q,
        k,
        v,
        length,
        mode=seen.mode,
        q_pos=seen.q_pos,
        scale=q.shape[-1] ** -0.5,
        implementation=implementation,
    )
    if len(lead) == 2:
        o, lse = o.reshape(*lead, *o.shape[1:]), lse.reshape(*lead, *lse.shape[1:])
    return o, lse
