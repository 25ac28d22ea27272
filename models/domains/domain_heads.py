"""Heads of several domains and tasks on RankMixer's blocks: shared bottom, private heads, MMoE. What MDL stands beside.

    h = mean_t X_L [B,D]   g the row's domain

    shared    logit_y = tower_y(h)                             RankMixer itself: domains differ by their fields alone
    private   logit_y = tower_gy(h)                            a tower per domain and task
    mmoe      logit_y = tower_y( sum_i p_gyi relu(h A_i + a_i) ),  p_gy = softmax(h G_gy)
                                                               E experts, a gate per domain and task (KDD 2018,
                                                               doi 10.1145/3219819.3220007, has one per task)

Every tower and gate is computed on every row and the domain's is picked, so their products cost G times one domain's.

Letters: B rows, D token width, G domains, Y tasks, E experts, F2 = expert_width.

Closed forms, besides those of RankMixer's tokenizer and blocks:
    shared    Y*(D + 1) parameters, 2*Y*D FLOPs per row           private: G times that
    mmoe      E*(D*F2 + F2) + G*Y*D*E + Y*(F2 + 1),   2*E*D*F2 + 2*G*Y*D*E + 2*Y*E*F2 + 2*Y*F2
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from recscale.models.architecture import BackboneSpec
from recscale.models.counts import Flops, Params
from recscale.models.inputs.batch import CandidateInputs, Output, UserInputs
from recscale.models.inputs.history import NO_TOKENS, RequestTokens, RowTokens, TokenShape
from recscale.models.inputs.schema import Schema
from recscale.models.inputs.tokenizers import TokenPlan, UserTokens, plan_tokens
from recscale.models.layers.dense import Dense
from recscale.models.layers.matmul import contract
from recscale.models.layers.per_token import PerTokenDense
from recscale.models.layers.towers import Towers, mean_tokens, tower_flops, tower_params
from recscale.models.mixers.rankmixer import HIDDEN_RATIO, RankMixerBlock, StackOptions, TokenStack, stack_params
from recscale.models.options import refuse_unused, require_sizes
from recscale.models.sizing import affine_widths, shapes_by_width, tokenizer_choices


@dataclasses.dataclass(frozen=True)
class DomainHeadsConfig(StackOptions):
    """head: see the file; experts E, expert_width F2."""

    head: Literal["shared", "private", "mmoe"] = "mmoe"
    experts: int = 4
    expert_width: int = 64

    def __post_init__(self):
        super().__post_init__()
        require_sizes(experts=self.experts, expert_width=self.expert_width)
        if self.head != "mmoe":
            reason = f"head={self.head!r} has no experts; set head='mmoe'"
            refuse_unused(self, reason, experts=self.experts, expert_width=self.expert_width)

    def towers(self, schema: Schema) -> tuple[int, int]:
        """Width of what the towers read, and their number."""
        tasks = len(schema.tasks)
        if self.head == "mmoe":
            return self.expert_width, tasks
        return self.width, tasks * (schema.domains if self.head == "private" else 1)


class _State(NamedTuple):
    """Per request: tokens, and domain int32 [R] (None: there is one)."""

    features: UserTokens
    domain: Array | None


class DomainHeads(TokenStack):
    """Tokenizer, L blocks, mean over tokens, heads.

    Args:
        plan: the resolved tokenizer. schema: G and Y. options: the rest.
    """

    def __init__(
        self,
        plan: TokenPlan,
        schema: Schema,
        options: DomainHeadsConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        D, E, init, mixing = options.width, options.experts, options.init, options.block()
        self.domains, self.tasks, self.head = schema.domains, len(schema.tasks), options.head

        def blocks() -> Iterator[RankMixerBlock]:
            for _ in range(options.layers):
                yield RankMixerBlock(plan.tokens, D, options.hidden, mixing, dtype=dtype, rngs=rngs)

        width, towers = options.towers(schema)
        super().__init__(plan, D, towers, blocks, mixing, tower=options.tower, dtype=dtype, rngs=rngs)
        experts = gates = None
        if options.head == "mmoe":
            self.towers = Towers(width, towers, tower=options.tower, init=init, dtype=dtype, rngs=rngs)
            experts = PerTokenDense(E, D, width, init=init, dtype=dtype, rngs=rngs)
            axes, out = ("embed", "experts"), self.domains * self.tasks * E
            gates = Dense(D, out, use_bias=False, init=init, axes=axes, dtype=dtype, rngs=rngs)
        self.experts, self.gates = experts, gates

    def encode_user(self, user: UserInputs, tokens: RequestTokens | None = None) -> _State:
        if self.domains > 1 and user.domain is None:
            raise ValueError(f"the schema has {self.domains} domains, and the inputs carry no domain")
        return _State(super().encode_user(user, tokens), user.domain if self.domains > 1 else None)

    def score(
        self, state: _State, candidates: CandidateInputs, tokens: RowTokens | None = None, *, key: Array | None = None
    ) -> Output:
        x, shape = self.join(state.features, candidates, tokens)
        for i, block in enumerate(self.blocks):
            x = block(x, key=None if key is None else jax.random.fold_in(key, i))
        domain = None if state.domain is None else jnp.repeat(state.domain, shape[1])
        return Output(logits=self._heads(mean_tokens(x), domain).reshape(shape))

    def _heads(self, h: Float[Array, "B D"], domain: Int[Array, " B"] | None) -> Float[Array, "B Y"]:
        if self.experts is None or self.gates is None:
            logits = self.towers(h)
            return logits if self.head == "shared" else _of_domain(logits, self.domains, domain)
        gates = _of_domain(self.gates(h), self.domains, domain).astype(jnp.float32)
        gates = jax.nn.softmax(gates.reshape(h.shape[0], self.tasks, -1))
        experts = jax.nn.relu(self.experts(h)).swapaxes(0, 1)
        return self.towers(contract("bye,bef->byf", gates, experts, self.experts.dtype).swapaxes(0, 1))


def _of_domain(x: Float[Array, "B GN"], domains: int, domain: Int[Array, " B"] | None) -> Float[Array, "B N"]:
    """The part of every row that belongs to its domain."""
    if domain is None:
        return x
    parts = x.reshape(x.shape[0], domains, -1)
    return jnp.take_along_axis(parts, domain[:, None, None], axis=1, mode="clip")[:, 0]


def build(
    config: DomainHeadsConfig,
    schema: Schema,
    tokens: TokenShape = NO_TOKENS,
    *,
    rngs: nnx.Rngs,
    dtype: DTypeLike = jnp.float32,
) -> DomainHeads:
    """The model of a config; `tokens` are those of a sequence encoder in front."""
    return DomainHeads(plan_tokens(schema, config, config.width, tokens), schema, config, dtype=dtype, rngs=rngs)


def count_params(config: DomainHeadsConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Params:
    """Closed form of the parameter tree."""
    plan = plan_tokens(schema, config, config.width, tokens)
    T, D, F, L, E = plan.tokens, config.width, config.hidden, config.layers, config.experts
    head = tower_params(*config.towers(schema), config.tower)
    if config.head == "mmoe":
        head += E * (D + 1) * config.expert_width + schema.domains * len(schema.tasks) * D * E
    blocks = L * T * (2 * D * F + F + D)
    return stack_params(config, plan, 0, 2 * L) + Params(dense=blocks + head, head=head)


def count_flops(config: DomainHeadsConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Flops:
    """Closed form of the matrix products: user tokens per request, all else per candidate."""
    plan = plan_tokens(schema, config, config.width, tokens)
    T, D, F, Y = plan.tokens, config.width, config.hidden, len(schema.tasks)
    head = tower_flops(*config.towers(schema), config.tower)
    if config.head == "mmoe":
        head += 2 * config.experts * (D * config.expert_width + schema.domains * Y * D + Y * config.expert_width)
    return plan.flops(D) + Flops(candidate=config.layers * 4 * T * D * F + head)


def size_space(
    schema: Schema, config: DomainHeadsConfig, target_dense_params: float, tokens: TokenShape = NO_TOKENS
) -> Iterator[dict[str, Any]]:
    """Overrides (tokens, width, hidden, and with experts expert_width = the token width) near the target."""
    mmoe = config.head == "mmoe"

    def hiddens(T: int | None, D: int) -> Iterable[tuple[int, int]]:
        def params(hidden: int) -> int:
            widths = dict(width=D, hidden=hidden) | (dict(expert_width=D) if mmoe else {})
            return count_params(dataclasses.replace(config, tokens=T, **widths), schema, tokens).dense

        return enumerate(affine_widths(params, target_dense_params))

    choices = tokenizer_choices(schema, config, target_dense_params, tokens)
    for shape in shapes_by_width(choices, target_dense_params, config.layers, HIDDEN_RATIO, hiddens):
        yield shape | ({"expert_width": shape["width"]} if mmoe else {})


DOMAIN_HEADS = BackboneSpec(DomainHeadsConfig, build, count_params, count_flops, size_space)
