"""STCA, stacked target cross-attention (arXiv 2511.06077): L target attentions in a chain, linear in the history.

    x' = x W_x + b_x,  e' = e W_e + b_e;   q^1 = LN(SwiGLU(x'))
    layer i:  X_i = LN(SwiGLU_i(e')) from the same e';  o^i = MHA(q^i, X_i) W_O^i
              q^{i+1} = LN(SwiGLU([o^1 .. o^i, x'] W_C^i))          token = SwiGLU([o^1 .. o^L, x'] W_Z), no norm

Letters: R requests, C candidates, S events, A event width (time feature included), D width, H heads, L layers, r ratio
of the SwiGLU's hidden width, D_x width of all candidate fields joined. One candidate token [R, C, 1, D].

Two exact orders of the attention. kv="materialised": keys and values once per request. kv="reordered": per head
u_h = q_h W_K^h^T meets X_i itself and the context goes through W_V^h; all heads share one history, so scores cost H
times more, which pays below C = S*D / ((H-1)*S + D) candidates.

Closed forms:
    params = A*D + D + D_x*D + D + (L+1)*3*r*D^2 + L*(3*r*D^2 + 2*D) + 2*L*D + 4*L*D^2 + sum_{i=2..L+1} i*D^2
    per request   = 2*S*A*D + L*6*S*r*D^2                              (+ L*4*S*D^2 materialised)
    per candidate = 2*D_x*D + (L+1)*6*r*D^2 + sum_{i=2..L+1} 2*i*D^2 + L*(4*D^2 + 4*S*D)
                    reordered: L*(8*D^2 + 4*H*S*D) instead of the last term

Known second-hand -> flag (default): width (32), heads (2), layers (2), ratio r (2), init.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from recscale.models.architecture import EncoderSpec
from recscale.models.counts import Flops, Params
from recscale.models.inputs.batch import CandidateInputs, UserInputs
from recscale.models.inputs.flat import FlatPlan, plan_flat
from recscale.models.inputs.history import EventPlan, EventReader, HistoryOptions, TokenShape, plan_events
from recscale.models.inputs.schema import Schema
from recscale.models.layers.dense import Dense, SwiGLU
from recscale.models.layers.history_attention import KeyValues, Visible, attend, check_heads, split_heads
from recscale.models.layers.matmul import contract
from recscale.models.layers.norms import Norm
from recscale.models.ranker import EncodedHistory, SequenceEncoder
from recscale.pallas_kernels.hybrid_attention import hybrid_attention

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class STCAConfig(HistoryOptions):
    """width D, heads H, layers L, ratio r; kv: order of the attention; implementation: of the attention."""

    width: int = 32
    heads: int = 2
    layers: int = 2
    ratio: int = 2
    kv: Literal["materialised", "reordered"] = "materialised"
    init: str = "lecun_normal"
    implementation: str | None = None


class _State(NamedTuple):
    """Per layer keys and values [R, S, H, d], or the one history [R, S, 1, D] and None; and the lengths [R]."""

    layers: tuple[KeyValues, ...]
    length: Array


class STCALayer(nnx.Module):
    """One target attention over a history of its own, and the join [o^1 .. o^i, x'] W of `inputs` = i + 1 vectors."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        inputs: int,
        *,
        reordered: bool,
        implementation: str | None,
        dtype,
        rngs: nnx.Rngs,
        init: str,
    ):
        self.heads, self.reordered, self.implementation, self.dtype = heads, reordered, implementation, dtype
        kwargs = dict(use_bias=False, init=init, dtype=dtype, rngs=rngs)
        self.history = SwiGLU(width, hidden, init=init, dtype=dtype, rngs=rngs)
        self.history_norm = Norm(width, dtype=dtype)
        self.query_norm = Norm(width, dtype=dtype)
        self.query = Dense(width, width, axes=("embed", "heads"), **kwargs)
        self.key = Dense(width, width, axes=("embed", "heads"), **kwargs)
        self.value = Dense(width, width, axes=("embed", "heads"), **kwargs)
        self.out = Dense(width, width, axes=("heads", "embed"), **kwargs)
        self.join = Dense(inputs * width, width, **kwargs)
        self.joined = SwiGLU(width, hidden, init=init, dtype=dtype, rngs=rngs)

    def keys(self, events: Array) -> KeyValues:
        x = self.history_norm(self.history(events))
        if self.reordered:
            return KeyValues(x[:, :, None], None)
        return KeyValues(split_heads(self.key(x), self.heads), split_heads(self.value(x), self.heads))

    def read(self, q: Array, keys: KeyValues, length: Array) -> Array:
        """q [R, C, D], before its norm -> o [R, C, D]."""
        q = split_heads(self.query(self.query_norm(q)), self.heads)
        if not self.reordered:
            return self.out(attend(q[:, :, None], Visible(keys, length), implementation=self.implementation)[:, :, 0])
        w_k, w_v = (f.kernel[...].reshape(-1, self.heads, q.shape[-1]) for f in (self.key, self.value))
        u = contract("rchd,ehd->rche", q, w_k, self.dtype)
        scale = q.shape[-1] ** -0.5
        context, _ = hybrid_attention(
            u[:, :, None], keys.k, None, length, scale=scale, implementation=self.implementation
        )
        o = contract("rche,ehd->rchd", context[:, :, 0], w_v, self.dtype)
        return self.out(o.reshape(*o.shape[:2], -1))

    def next(self, vectors: list[Array]) -> Array:
        """The next query before its norm, or the token: [R, C, D]."""
        return self.joined(self.join(jnp.concatenate(vectors, axis=-1)))


class STCA(SequenceEncoder):
    """The history of `events` -> one candidate token [R, C, 1, D]."""

    def __init__(
        self,
        events: EventPlan,
        candidate: FlatPlan,
        width: int,
        heads: int,
        layers: int,
        ratio: int,
        *,
        kv: str = "materialised",
        init: str = "lecun_normal",
        implementation: str | None = None,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_heads(width, heads)
        self.candidate = candidate
        kwargs = dict(init=init, dtype=dtype, rngs=rngs)
        self.reader = EventReader(events, rngs=rngs)
        self.embed = Dense(events.width, width, **kwargs)
        self.target = Dense(candidate.candidate_width, width, axes=("features", "embed"), **kwargs)
        self.first = SwiGLU(width, ratio * width, **kwargs)
        layer = dict(reordered=kv == "reordered", implementation=implementation, **kwargs)
        self.layers = nnx.List(STCALayer(width, heads, ratio * width, i + 2, **layer) for i in range(layers))

    def encode_user(self, user: UserInputs) -> EncodedHistory:
        view = self.reader(user)
        events = self.embed(view.events)
        return EncodedHistory(None, _State(tuple(layer.keys(events) for layer in self.layers), view.length))

    def candidate_tokens(self, cache: _State, candidates: CandidateInputs) -> Array:
        x = self.target(self.candidate.join_candidates(candidates))
        q, outputs = self.first(x), []
        for layer, keys in zip(self.layers, cache.layers, strict=True):
            outputs.append(layer.read(q, keys, cache.length))
            q = layer.next([*outputs, x])
        return q[:, :, None]


def build(config: STCAConfig, schema: Schema, *, rngs: nnx.Rngs, dtype=jnp.float32) -> STCA:
    """The encoder of a config."""
    flags = ("width", "heads", "layers", "ratio", "kv", "init", "implementation")
    values = {name: getattr(config, name) for name in flags}
    return STCA(plan_events(schema, config), plan_flat(schema), dtype=dtype, rngs=rngs, **values)


def token_shape(config: STCAConfig, schema: Schema) -> TokenShape:
    """One candidate token of width D."""
    return TokenShape(candidate=1, width=config.width)


def count_params(config: STCAConfig, schema: Schema) -> Params:
    """Closed form of the parameter tree."""
    events, D, L, r = plan_events(schema, config), config.width, config.layers, config.ratio
    dense = events.params + (events.width + plan_flat(schema).candidate_width + 2) * D + (2 * L + 1) * 3 * r * D * D
    return Params(dense=dense + 4 * L * D + 4 * L * D * D + sum(range(2, L + 2)) * D * D)


def count_flops(config: STCAConfig, schema: Schema) -> Flops:
    """Closed form of the matrix products."""
    events, candidate, D, L, r = (
        plan_events(schema, config),
        plan_flat(schema),
        config.width,
        config.layers,
        config.ratio,
    )
    S, reordered = events.length, config.kv == "reordered"
    embed, query = 2 * S * events.width * D, 2 * candidate.candidate_width * D
    read = 8 * D * D + 4 * config.heads * S * D if reordered else 4 * D * D + 4 * S * D
    return Flops(
        embed + L * (6 * S * r * D * D + 4 * S * D * D * (not reordered)),
        query + (L + 1) * 6 * r * D * D + 2 * sum(range(2, L + 2)) * D * D + L * read,
        embed * (not events.trained),
        query * (not candidate.candidate_trained),
    )


STCA_SPEC = EncoderSpec(STCAConfig, build, token_shape, count_params, count_flops)
