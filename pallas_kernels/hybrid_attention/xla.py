"""Attention over a history in plain JAX, arranged for memory: query rows in chunks, weights never kept for all rows.

A chunk holds as many rows as keep its scores [R, H, rows, S] within `_CHUNK_BYTES`. One chunk: its weights are kept for
the backward pass. Several: the backward pass computes the scores of one chunk at a time again, from o and lse, and sums
dk and dv in float32. The operands of every product are in the input type, its sums in float32.

Shapes as in `reference`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from recscale.pallas_kernels.mixed_precision import einsum_float32

from .reference import INVISIBLE, visible, within

Array = jax.Array

_CHUNK_BYTES = 2**25


def attention(q, k, v, lengths, q_pos, bias, scale: float) -> tuple[Array, Array]:
    """o [R, N, H, dv] in q's type and lse float32 [R, N, H]."""
    return _attention(q, k, v, bias, lengths, jnp.broadcast_to(q_pos, q.shape[:2]), scale)


def rows_per_chunk(requests: int, rows: int, heads: int, keys: int) -> int:
    """How many of N query rows are worked on at once; N if all fit, or if their number is a symbol (an export)."""
    if not all(isinstance(size, int) for size in (requests, rows)):
        return rows
    most = max(1, _CHUNK_BYTES // (4 * requests * heads * keys))
    chunks = -(-rows // most)
    return -(-rows // chunks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(q, k, v, bias, lengths, q_pos, scale):
    return _forward(q, k, v, bias, lengths, q_pos, scale)[0]


def _forward(q, k, v, bias, lengths, q_pos, scale):
    R, N, H, _ = q.shape
    rows, values = rows_per_chunk(R, N, H, k.shape[1]), within(k if v is None else v, lengths)
    if rows == N:
        o, lse, weights = _chunk(q, q_pos, k, values, bias, lengths, scale)
        return (o, lse), (q, k, v, bias, lengths, q_pos, o, lse, weights)
    parts = (_cut(q, rows), _cut(q_pos, rows, k.shape[1]))
    o, lse = jax.lax.map(lambda part: _chunk(part[0], part[1], k, values, bias, lengths, scale)[:2], parts)
    o, lse = _join(o, N), _join(lse, N)
    return (o, lse), (q, k, v, bias, lengths, q_pos, o, lse, None)


def _backward(scale, saved, cotangents):
    q, k, v, bias, lengths, q_pos, o, lse, weights = saved
    do, dlse = cotangents
    N = q.shape[1]
    held = within(k, lengths), within(v, lengths)
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1) - dlse
    if weights is not None:
        dq, sums = _chunk_gradient(q, do.astype(q.dtype), delta, weights, *held, bias, scale)
    else:
        rows = rows_per_chunk(q.shape[0], N, q.shape[2], k.shape[1])
        parts = [_cut(x, rows) for x in (q, do.astype(q.dtype), delta, lse)] + [_cut(q_pos, rows, k.shape[1])]

        def add(sums, part):
            q, do, delta, lse, q_pos = part
            weights = _weights_again(q, q_pos, lse, k, bias, lengths, scale)
            dq, more = _chunk_gradient(q, do, delta, weights, *held, bias, scale)
            return jax.tree.map(jnp.add, sums, more), dq

        sums, dq = jax.lax.scan(add, _zeros(k, v, bias), tuple(parts))
        dq = _join(dq, N)
    dk, dv, dbias = sums
    cast = [None if x is None else x.astype(like.dtype) for x, like in ((dk, k), (dv, v), (dbias, bias))]
    return dq.astype(q.dtype), *cast, None, None


_attention.defvjp(_forward, _backward)


def _chunk(q, q_pos, k, values, bias, lengths, scale):
    """o, lse and the weights [R, H, n, S] (input type) of n query rows."""
    seen = visible(q_pos, lengths, k.shape[1])[:, None]
    scores = jnp.where(seen, _scores(q, k, bias, scale), INVISIBLE)
    most = scores.max(axis=-1, keepdims=True)
    weights = jnp.where(seen, jnp.exp(scores - most), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    safe = jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, most + jnp.log(safe), INVISIBLE)[..., 0].swapaxes(1, 2)
    weights = (weights / safe).astype(q.dtype)
    o = einsum_float32("rhns,rshd->rnhd" if values.shape[2] > 1 else "rhns,rsd->rnhd", weights, _squeeze(values))
    return o.astype(q.dtype), lse, weights


def _weights_again(q, q_pos, lse, k, bias, lengths, scale):
    # The scope's name tells the FLOP counter that this is not useful work.
    with jax.named_scope("rematted_computation"):
        scores = _scores(q, k, bias, scale)
    seen = visible(q_pos, lengths, k.shape[1])[:, None]
    scores = jnp.where(seen, scores, INVISIBLE)
    return jnp.where(seen, jnp.exp(scores - lse.swapaxes(1, 2)[..., None]), 0.0).astype(q.dtype)


def _chunk_gradient(q, do, delta, weights, k, v, bias, scale):
    """dq of a chunk, and its float32 contributions (dk, dv or None, dbias or None)."""
    values = k if v is None else v
    to_keys, to_rows = ("rshd", "rshd") if values.shape[2] > 1 else ("rsd", "rsd")
    dp = einsum_float32(f"rnhd,{to_keys}->rhns", do, _squeeze(values))
    ds = weights.astype(jnp.float32) * (dp - delta.swapaxes(1, 2)[..., None])
    low = ds.astype(q.dtype)
    dq = scale * einsum_float32(f"rhns,{to_rows}->rnhd", low, _squeeze(k))
    dk = scale * einsum_float32(f"rhns,rnhd->{to_keys}", low, q).reshape(k.shape)
    dv = einsum_float32(f"rhns,rnhd->{to_keys}", weights, do).reshape(values.shape)
    dbias = None if bias is None else ds.sum(axis=2).swapaxes(1, 2)
    return dq, ((dk + dv, None, dbias) if v is None else (dk, dv, dbias))


def _scores(q, k, bias, scale):
    """float32 [R, H, n, S]."""
    scores = scale * einsum_float32("rnhd,rshd->rhns" if k.shape[2] > 1 else "rnhd,rsd->rhns", q, _squeeze(k))
    return scores if bias is None else scores + bias.astype(jnp.float32).transpose(0, 2, 1)[:, :, None]


def _squeeze(x: Array) -> Array:
    """A single key head loses its axis."""
    return x[:, :, 0] if x.shape[2] == 1 else x


def _cut(x: Array, rows: int, fill: int = 0) -> Array:
    """[R, N, ...] -> [chunks, R, rows, ...], the last chunk filled up."""
    chunks = -(-x.shape[1] // rows)
    padding = [(0, 0), (0, chunks * rows - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, padding, constant_values=fill)
    return jnp.moveaxis(x.reshape(x.shape[0], chunks, rows, *x.shape[2:]), 1, 0)


def _join(x: Array, rows: int) -> Array:
    """[chunks, R, n, ...] -> [R, N, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :rows]


def _zeros(k, v, bias):
    return tuple(None if x is None else jnp.zeros(x.shape, jnp.float32) for x in (k, v, bias))
