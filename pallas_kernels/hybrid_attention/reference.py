"""Plain attention over a history in float32, one-shot, and its gradient written out: the oracle of the tests.

Rows are flat here: q [R, N, H, d], k [R, S, Hk, d], v [R, S, Hk, dv] or None, q_pos int32 [1 or R, N], lengths [R],
bias [R, S, H] or None. Row n of request r sees key j iff q_pos[r, n] <= j < lengths[r].
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# A score that leaves nothing after the softmax, and no infinity on the way.
INVISIBLE = -1e30


def visible(q_pos: Int[Array, "_ N"], lengths: Int[Array, " R"], keys: int) -> Bool[Array, "R N S"]:
    """bool [R, N, S]."""
    j = jnp.arange(keys, dtype=jnp.int32)[None, None]
    return (j >= q_pos[:, :, None]) & (j < lengths[:, None, None])


def within(x: Any, lengths: Int[Array, " R"]) -> Any:
    """Keys or values [R, S, _, w] with zeros beyond the lengths: 0 times a NaN there would be one. None stays None."""
    if x is None:
        return None
    j = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    return jnp.where((j < lengths[:, None])[..., None, None], x, jnp.zeros((), x.dtype))


def attention(
    q: Float[Array, "R N H d"],
    k: Float[Array, "R S Hk d"],
    v: Float[Array, "R S Hk dv"] | None,
    lengths: Int[Array, " R"],
    q_pos: Int[Array, "_ N"],
    bias: Float[Array, "R S H"] | None,
    scale: float,
) -> tuple[Float[Array, "R N H _"], Float[Array, "R N H"]]:
    """o [R, N, H, dv] in q's type and lse float32 [R, N, H]; differentiable."""
    seen = visible(q_pos, lengths, k.shape[1])[:, None]
    k, v = within(k, lengths), within(v, lengths)
    scores = jnp.where(seen, _scores(q, k, bias, scale), INVISIBLE)
    most = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(scores - most), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    some = total > 0
    safe = jnp.where(some, total, 1.0)
    o = _einsum("rhns,rshd->rnhd", weights / safe, _all_heads(k if v is None else v, q.shape[2]))
    lse = jnp.where(some, most + jnp.log(safe), INVISIBLE)[..., 0]
    return o.astype(q.dtype), lse.swapaxes(1, 2)


def gradient(q, k, v, lengths, q_pos, bias, scale: float, do, dlse):
    """(dq, dk, dv or None, dbias or None) in float32, from the cotangents of o and lse.

    p = exp(scale*q.k + bias - lse), delta = sum(do*o):  ds = p*(do.v - delta + dlse),  dq = scale*ds k,
    dk = scale*ds^T q,  dv = p^T do,  dbias = sum of ds over rows.  With v = k, dv is added to dk; with one key head
    both are summed over heads.
    """
    heads, do = q.shape[2], do.astype(jnp.float32)
    k, v = within(k, lengths), within(v, lengths)
    wide_v = None if v is None else v.astype(jnp.float32)
    o, lse = attention(q.astype(jnp.float32), k.astype(jnp.float32), wide_v, lengths, q_pos, bias, scale)
    values = _all_heads(k if v is None else v, heads)
    seen = visible(q_pos, lengths, k.shape[1])[:, None]
    scores = jnp.where(seen, _scores(q, k, bias, scale), INVISIBLE)
    p = jnp.where(seen, jnp.exp(scores - lse.swapaxes(1, 2)[..., None]), 0.0)
    delta = (jnp.sum(do * o, axis=-1) - dlse).swapaxes(1, 2)[..., None]
    ds = p * (_einsum("rnhd,rshd->rhns", do, values) - delta)
    dq = scale * _einsum("rhns,rshd->rnhd", ds, _all_heads(k, heads))
    dk = scale * _einsum("rhns,rnhd->rshd", ds, q.astype(jnp.float32))
    dv = _einsum("rhns,rnhd->rshd", p, do)
    if k.shape[2] == 1:
        dk, dv = dk.sum(axis=2, keepdims=True), dv.sum(axis=2, keepdims=True)
    dbias = None if bias is None else ds.sum(axis=2).swapaxes(1, 2)
    return (dq, dk + dv, None, dbias) if v is None else (dq, dk, dv, dbias)


def _einsum(spec: str, x: Array, y: Array) -> Array:
    return jnp.einsum(spec, x, y, precision=jax.lax.Precision.HIGHEST)


def _all_heads(x: Array, heads: int) -> Array:
    """float32 [R, S, H, d]."""
    return jnp.broadcast_to(x.astype(jnp.float32), (*x.shape[:2], heads, x.shape[3]))


def _scores(q: Array, k: Array, bias: Array | None, scale: float) -> Array:
    """float32 [R, H, N, S]."""
    scores = scale * _einsum("rnhd,rshd->rhns", q.astype(jnp.float32), _all_heads(k, q.shape[2]))
    return scores if bias is None else scores + bias.astype(jnp.float32).transpose(0, 2, 1)[:, :, None]
