"""Scorers of ADS (arXiv 2502.05523): how projected events e' and one query per chunk of events become a token.

    MHAScorer   per head, z_s = x'_s W_Q . e'_s W_K / sqrt(d), softmax over the valid s, sum_s z_s e'_s W_V
    a_s = MLP([e'_s, x'_s, e'_s - x'_s, e'_s * x'_s]),  sum_s a_s e'_s  is `ActivationUnit` of DIN
    CANScorer   x'_s holds the weights and biases of a small MLP on e'_s; all its layers' outputs are summed over s

Each has `prepare(events)`, what it needs of e' [R,S,A] or [R,C,S,A] whatever the candidate's query is, and
`read(queries, chunk, prepared, valid)` with queries [R,C,W,A_q], x' of event s being query s // chunk.

Letters: R requests, C candidates, S events, W chunks, A event width, A_q query width, H heads, d head width.
"""

from __future__ import annotations

import functools
from itertools import pairwise

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from recscale.models.baselines.encoding import masked_softmax, per_event, with_candidates
from recscale.models.layers.dense import Dense
from recscale.models.layers.matmul import contract
from recscale.models.layers.param import Init


class MHAScorer(nnx.Module):
    """Heads of one query per event: token [R, C, D_A]."""

    def __init__(
        self,
        event_width: int,
        query_width: int,
        width: int,
        heads: int,
        *,
        init: Init = "lecun_normal",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.heads, self.dtype = heads, dtype
        dense = functools.partial(
            Dense, out=width, use_bias=False, init=init, axes=("embed", "heads"), dtype=dtype, rngs=rngs
        )
        self.query = dense(query_width)
        self.key, self.value = (dense(event_width) for _ in range(2))

    def prepare(self, events: Float[Array, "*rows S A"]) -> tuple[Array, ...]:
        """e' [...,S,A] -> k, v [...,S,H,d]."""
        return tuple(f(events).reshape(*events.shape[:-1], self.heads, -1) for f in (self.key, self.value))

    def read(
        self, queries: Float[Array, "R C W q"], chunk: int, prepared: tuple[Array, ...], valid: Bool[Array, "R S"]
    ) -> Float[Array, "R C token"]:
        """queries [R,C,W,A_q], one per chunk of events -> [R,C,D_A]."""
        keys, values = prepared
        lead = "rc"[: keys.ndim - 3]
        q = self.query(queries).reshape(*queries.shape[:-1], self.heads, -1)
        q = per_event(q, chunk, valid.shape[1])
        scores = contract(f"rcshd,{lead}shd->rcsh", q, keys, self.dtype).astype(jnp.float32)
        weights = masked_softmax(scores * q.shape[-1] ** -0.5, valid[:, None, :, None], axis=2).astype(self.dtype)
        token = contract(f"rcsh,{lead}shd->rchd", weights, values, self.dtype)
        return token.reshape(*token.shape[:2], -1)


class CANScorer(nnx.Module):
    """x' as weights and biases of an MLP of widths `micro` on e', tanh between layers: token [R, C, sum of widths]."""

    def __init__(self, width: int, micro: tuple[int, ...], *, dtype: DTypeLike = jnp.float32):
        self.widths, self.dtype = (width, *micro), dtype

    def prepare(self, events: Float[Array, "*rows S A"]) -> tuple[Array, ...]:
        return (events,)

    def read(
        self, queries: Float[Array, "R C W q"], chunk: int, prepared: tuple[Array, ...], valid: Bool[Array, "R S"]
    ) -> Float[Array, "R C token"]:
        """queries [R,C,W,A_q]; the events of a chunk share its weights."""
        requests, candidates, chunks, _ = queries.shape
        x = with_candidates(prepared[0])
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
