"""Scorers of ADS (arXiv 2502.05523): how projected events e' and one query per chunk of events become a token.

    MHAScorer   per head, z_s = x'_s W_Q . e'_s W_K / sqrt(d), softmax over the valid s, sum_s z_s e'_s W_V
    DINScorer   a_s = MLP([e'_s, x'_s, e'_s - x'_s, e'_s * x'_s]),  sum_s a_s e'_s                  no softmax
    CANScorer   x'_s holds the weights and biases of a small MLP on e'_s; all its layers' outputs are summed over s

Each has `prepare(events)`, what it needs of e' [R,S,A] or [R,C,S,A] whatever the candidate's query is, and
`scorer(queries, chunk, prepared, valid)` with queries [R,C,W,A_q], x' of event s being query s // chunk.

Letters: R requests, C candidates, S events, W chunks, A event width, A_q query width, H heads, d head width.
"""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from recscale.models.layers import param
from recscale.models.layers.dense import Dense
from recscale.models.layers.matmul import contract
from recscale.models.layers.per_token import activation

Array = jax.Array

# A score that leaves nothing after the softmax, and no infinity on the way.
_INVISIBLE = -1e30


class MHAScorer(nnx.Module):
    """Heads of one query per event: token [R, C, D_A]."""

    def __init__(self, event_width: int, query_width: int, width: int, heads: int, *, init, dtype, rngs):
        self.heads, self.dtype = heads, dtype
        kwargs = dict(use_bias=False, init=init, axes=("embed", "heads"), dtype=dtype, rngs=rngs)
        self.query = Dense(query_width, width, **kwargs)
        self.key, self.value = (Dense(event_width, width, **kwargs) for _ in range(2))

    def prepare(self, events: Array) -> tuple[Array, ...]:
        """e' [...,S,A] -> k, v [...,S,H,d]."""
        return tuple(f(events).reshape(*events.shape[:-1], self.heads, -1) for f in (self.key, self.value))

    def __call__(self, queries: Array, chunk: int, prepared: tuple[Array, ...], valid: Array) -> Array:
        """queries [R,C,W,A_q], one per chunk of events -> [R,C,D_A]."""
        keys, values = prepared
        lead = "rc"[: keys.ndim - 3]
        q = self.query(queries).reshape(*queries.shape[:-1], self.heads, -1)
        q = _per_event(q, chunk, valid.shape[1])
        scores = contract(f"rcshd,{lead}shd->rcsh", q, keys, self.dtype).astype(jnp.float32)
        visible = valid[:, None, :, None]
        weights = jax.nn.softmax(jnp.where(visible, scores * q.shape[-1] ** -0.5, _INVISIBLE), axis=2)
        weights = jnp.where(visible, weights, 0).astype(self.dtype)
        token = contract(f"rcsh,{lead}shd->rchd", weights, values, self.dtype)
        return token.reshape(*token.shape[:2], -1)


class DINScorer(nnx.Module):
    """DIN's unit on e' and x': token [R, C, A], no softmax. Its first layer is split as in `baselines.din`."""

    def __init__(self, width: int, hidden: tuple[int, int], *, activation: str, init, dtype, rngs):
        F1, F2, kwargs = *hidden, dict(init=init, dtype=dtype, rngs=rngs)
        self.act, self.dtype = activation, dtype
        self.kernel = param.kernel(rngs, (4 * width, F1), ("embed", "hidden"), init)
        self.bias = param.constant((F1,), ("hidden",))
        self.second, self.out = Dense(F1, F2, **kwargs), Dense(F2, 1, **kwargs)

    def prepare(self, events: Array) -> tuple[Array, ...]:
        """e' and its part of the first layer."""
        own, _, difference, _ = jnp.split(self.kernel[...], 4, axis=0)
        rows = events.reshape(-1, events.shape[-1])
        first = contract("ba,af->bf", rows, own + difference, self.dtype)
        return events, first.reshape(*events.shape[:-1], -1)

    def __call__(self, queries: Array, chunk: int, prepared: tuple[Array, ...], valid: Array) -> Array:
        events, first = (_with_candidates(x) for x in prepared)
        _, other, difference, product = jnp.split(self.kernel[...], 4, axis=0)
        from_query = contract("rcwa,af->rcwf", queries, other - difference, self.dtype)
        pairs = events * _per_event(queries, chunk, valid.shape[1])
        h = contract("rcsa,af->rcsf", pairs, product, self.dtype) + first
        h = h + _per_event(from_query, chunk, valid.shape[1])
        h = activation(self.act)(h + self.bias[...].astype(self.dtype)[None, None, None])
        weights = self.out(activation(self.act)(self.second(h)))[..., 0]
        weights = jnp.where(valid[:, None], weights, 0)
        lead = "rc"[: prepared[0].ndim - 2]
        return contract(f"rcs,{lead}sa->rca", weights, prepared[0], self.dtype)


class CANScorer(nnx.Module):
    """x' as weights and biases of an MLP of widths `micro` on e', tanh between layers: token [R, C, sum of widths]."""

    def __init__(self, width: int, micro: tuple[int, ...], *, dtype):
        self.widths, self.dtype = (width, *micro), dtype

    def prepare(self, events: Array) -> tuple[Array, ...]:
        return (events,)

    def __call__(self, queries: Array, chunk: int, prepared: tuple[Array, ...], valid: Array) -> Array:
        """queries [R,C,W,A_q]; the events of a chunk share its weights."""
        requests, candidates, chunks, _ = queries.shape
        x = _with_candidates(prepared[0])
        x = jnp.pad(x, [(0, 0)] * 2 + [(0, chunks * chunk - x.shape[2]), (0, 0)])
        x = jnp.broadcast_to(x, (requests, candidates, *x.shape[2:])).reshape(*queries.shape[:3], chunk, -1)
        visible, used, sums = valid[:, None, :, None], 0, []
        for a, b in pairwise(self.widths):
            weights = queries[..., used : used + a * b].reshape(*queries.shape[:3], a, b)
            bias = queries[..., used + a * b : used + a * b + b].astype(self.dtype)
            used += a * b + b
            x = jnp.tanh(contract("rcwka,rcwab->rcwkb", x, weights, self.dtype) + bias[..., None, :])
            rows = x.reshape(requests, candidates, chunks * chunk, b)[:, :, : valid.shape[1]]
            sums.append(jnp.where(visible, rows, 0).astype(jnp.float32).sum(axis=2))
        return jnp.concatenate(sums, axis=-1).astype(self.dtype)


def can_params(width: int, micro: tuple[int, ...]) -> int:
    """Width A_q of a query that holds the weights and biases of the small MLP of `CANScorer`."""
    return sum(a * b + b for a, b in pairwise((width, *micro)))


def _per_event(x: Array, chunk: int, events: int) -> Array:
    """[R,C,W,...] -> [R,C,S,...]: every event of a chunk sees its chunk's row."""
    return jnp.repeat(x, chunk, axis=2)[:, :, :events]


def _with_candidates(x: Array) -> Array:
    """[R,S,F] -> [R,1,S,F]; [R,C,S,F] stays."""
    return x[:, None] if x.ndim == 3 else x
