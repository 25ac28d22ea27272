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
import functools
from typing import Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recscale.models.architecture import EncoderSpec
from recscale.models.counts import Flops, Params
from recscale.models.inputs import CandidateInputs, Schema, UserInputs
from recscale.models.inputs.history import EventReader
from recscale.models.layers.dense import Dense, SwiGLU
from recscale.models.layers.history_attention import KeyValues, Visible, attend, check_heads, split_heads
from recscale.models.layers.matmul import contract
from recscale.models.layers.norms import Norm
from recscale.models.options import require_sizes
from recscale.models.ranker import EncodedHistory, SequenceEncoder
from recscale.pallas_kernels.hybrid_attention import hybrid_attention

from .encoding import EncoderOptions, ReadingPlan, builder, candidate_token, plan_reading, sized_by_width


@dataclasses.dataclass(frozen=True)
class STCAConfig(EncoderOptions):
    """width D, heads H, layers L, ratio r; kv: order of the attention; implementation: of the attention."""

    layers: int = 2
    ratio: int = 2
    kv: Literal["materialised", "reordered"] = "materialised"
    implementation: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(layers=self.layers, ratio=self.ratio)
        check_heads(self.width, self.heads)


class _State(NamedTuple):
    """Per layer keys and values [R, S, H, d], or the one history [R, S, 1, D]; and the lengths [R]."""

    layers: tuple[tuple[Array, ...], ...]
    length: Array


class STCALayer(nnx.Module):
    """One target attention over a history of its own, and the join [o^1 .. o^i, x'] W of `inputs` = i + 1 vectors."""

    def __init__(self, inputs: int, options: STCAConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        D, init = options.width, options.init
        self.heads, self.reordered = options.heads, options.kv == "reordered"
        self.implementation, self.dtype = options.implementation, dtype
        hidden = options.ratio * D
        dense = functools.partial(Dense, use_bias=False, init=init, dtype=dtype, rngs=rngs)
        self.history = SwiGLU(D, hidden, init=init, dtype=dtype, rngs=rngs)
        self.history_norm = Norm(D, dtype=dtype)
        self.query_norm = Norm(D, dtype=dtype)
        self.query, self.key, self.value = (dense(D, D, axes=("embed", "heads")) for _ in range(3))
        self.out = dense(D, D, axes=("heads", "embed"))
        self.join = dense(inputs * D, D)
        self.joined = SwiGLU(D, hidden, init=init, dtype=dtype, rngs=rngs)

    def keys(self, events: Float[Array, "R S D"]) -> tuple[Array, ...]:
        """k, v [R, S, H, d], or the one history [R, S, 1, D] if the attention is reordered."""
        x = self.history_norm(self.history(events))
        if self.reordered:
            return (x[:, :, None],)
        return split_heads(self.key(x), self.heads), split_heads(self.value(x), self.heads)

    def read(self, q: Float[Array, "R C D"], keys: tuple[Array, ...], length: Array) -> Float[Array, "R C D"]:
        """q [R, C, D], before its norm -> o [R, C, D]."""
        q = split_heads(self.query(self.query_norm(q)), self.heads)
        if not self.reordered:
            seen = Visible(KeyValues(*keys), length)
            return self.out(attend(q[:, :, None], seen, implementation=self.implementation)[:, :, 0])
        w_k, w_v = (f.kernel[...].reshape(-1, self.heads, q.shape[-1]) for f in (self.key, self.value))
        u = contract("rchd,ehd->rche", q, w_k, self.dtype)
        scale = q.shape[-1] ** -0.5
        context, _ = hybrid_attention(
            u[:, :, None], keys[0], None, length, scale=scale, implementation=self.implementation
        )
        o = contract("rche,ehd->rchd", context[:, :, 0], w_v, self.dtype)
        return self.out(o.reshape(*o.shape[:2], -1))

    def next(self, vectors: list[Array]) -> Float[Array, "R C D"]:
        """The next query before its norm, or the token: [R, C, D]."""
        return self.joined(self.join(jnp.concatenate(vectors, axis=-1)))


class STCA(SequenceEncoder):
    """The history of `plan` -> one candidate token [R, C, 1, D]."""

    def __init__(self, plan: ReadingPlan, options: STCAConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.candidate, D = plan.candidate, options.width
        dense = functools.partial(Dense, init=options.init, dtype=dtype, rngs=rngs)
        self.reader = EventReader(plan.events, rngs=rngs)
        self.embed = dense(plan.events.width, D)
        self.target = dense(plan.candidate.candidate_width, D, axes=("features", "embed"))
        self.first = SwiGLU(D, options.ratio * D, init=options.init, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(STCALayer(i + 2, options, dtype=dtype, rngs=rngs) for i in range(options.layers))

    def encode_user(self, user: UserInputs) -> EncodedHistory:
        view = self.reader(user)
        events = self.embed(view.events)
        return EncodedHistory(None, _State(tuple(layer.keys(events) for layer in self.layers), view.length))

    def candidate_tokens(self, cache: _State, candidates: CandidateInputs) -> Float[Array, "R C 1 D"]:
        x = self.target(self.candidate.join_candidates(candidates))
        q, outputs = self.first(x), []
        for layer, keys in zip(self.layers, cache.layers, strict=True):
            outputs.append(layer.read(q, keys, cache.length))
            q = layer.next([*outputs, x])
        return q[:, :, None]


def count_params(config: STCAConfig, schema: Schema) -> Params:
    """Closed form of the parameter tree."""
    plan, D, L, r = plan_reading(config, schema), config.width, config.layers, config.ratio
    dense = plan.events.params + (plan.events.width + plan.candidate.candidate_width + 2) * D
    dense += (2 * L + 1) * 3 * r * D * D + 4 * L * D + 4 * L * D * D + sum(range(2, L + 2)) * D * D
    return Params(dense=dense)


def count_flops(config: STCAConfig, schema: Schema) -> Flops:
    """Closed form of the matrix products."""
    plan, D, L, r = plan_reading(config, schema), config.width, config.layers, config.ratio
    S, reordered = plan.events.length, config.kv == "reordered"
    embed, query = 2 * S * plan.events.width * D, 2 * plan.candidate.candidate_width * D
    user = L * (6 * S * r * D * D + 4 * S * D * D * (not reordered))
    read = 8 * D * D + 4 * config.heads * S * D if reordered else 4 * D * D + 4 * S * D
    return plan.flops(embed, query, user, (L + 1) * 6 * r * D * D + 2 * sum(range(2, L + 2)) * D * D + L * read)


STCA_SPEC = EncoderSpec(
    STCAConfig, builder(STCA), candidate_token, count_params, count_flops, sized_by_width(count_params)
)
