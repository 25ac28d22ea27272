"""MDL (arXiv 2602.07520): RankMixer's blocks, and tokens of scenarios and tasks that read their features.

Feature tokens f0 [T,B,D] come from the tokenizer, scenario tokens s0 [Gl,B,D] and task tokens t0 [Y,B,D] from
`DomainTokens`. One block, in order (PFFN: a network with own weights for every token; attend: below):

    f' = PFFN_f(S) or LN(PFFN_f(S) + S),  S = LN(mix(f) + f)      features read features alone
    sr = attend_s(s, f') + s          s' = PFFN_s(sr) + sr        a scenario reads the new features
    tr = attend_t(t, f') + t          m  = mean of sr over the row's scenarios and the global token
    t' = PFFN_t(tr + m) + tr + m                                  a task reads them too; m stands before PFFN_s
    logit_y = tower_y(t'_y) of the last block                     Y heads, not G*Y

attend, H heads of width d = D / H:  softmax(x_i Q_i (f'_j K_j)^T / sqrt(d)) f'_j V_j,   Q [n,D,D]  K, V [T,D,D]

The last block has no PFFN_s: nothing would read what it makes. Published results rest on private data, so orderings
are to be reproduced, no values.

Letters: B rows, T feature tokens, D width, F hidden width, L layers, H heads, G scenarios, Gl = G + 1 with the global
token, Y tasks, n tokens that read. Activations are token-major. A request is made in one scenario (`domain`, all of it
in the only one where a schema has one); `MDLBlock` takes any mask of scenarios.

Closed forms, besides RankMixer's tokenizer and towers and those of `DomainTokens` (all defaults; per block):
    params = 4*D + T*(2*D*F + F + D) + 4*T*D^2 + (Gl + Y)*D^2 + (Gl + Y)*(2*D*F + F + D)
    flops  = 4*T*D*F + 8*T*D^2 + 2*(Gl + Y)*D^2 + 4*(Gl + Y)*T*D + 4*(Gl + Y)*D*F
K and V are 2/k of the features' networks at F = k*D, so equal size means other T, D or F.

Undisclosed -> flag (default): second residual and norm of the mixing block -> ffn_residual (True; the printed
equation has neither); output projection -> out_proj (False); biases of Q, K, V -> qkv_bias (False); depth of the
initialiser -> init_depth (1); sizes -> width, hidden, layers, heads (None: T), scenario_hidden, task_hidden (None: F).

Ablations and controls: scenario_tokens, task_tokens = "plain" (without their attention) or "none"; global_scenario;
share_kv; reads = "last" (one attention, in the last block) or "none" (t0 + m of s0 goes to the towers, added to the
mean feature token); token_state="split": tokens ask but are never read, what is read is a learned seed plus what they
found. Without task tokens the towers read the mean feature token plus m.

active_only computes the row's own scenario and the global token alone: the same outputs, see `active.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from recscale.models.architecture import BackboneSpec
from recscale.models.counts import Flops, Params
from recscale.models.inputs.batch import CandidateInputs, Output, UserInputs
from recscale.models.inputs.history import NO_TOKENS, RequestTokens, RowTokens, TokenShape
from recscale.models.inputs.schema import Schema
from recscale.models.inputs.tokenizers import TokenPlan, UserTokens, plan_tokens
from recscale.models.layers import param
from recscale.models.layers.attention import attend_tokens
from recscale.models.layers.dropout import dropout
from recscale.models.layers.per_token import PerTokenDense, PerTokenFFN
from recscale.models.layers.residuals import Step, sub_layer
from recscale.models.layers.towers import mean_tokens, tower_flops
from recscale.models.mixers.rankmixer import (
    HIDDEN_RATIO,
    RankMixerBlock,
    StackOptions,
    TokenStack,
    stack_params,
)
from recscale.models.options import refuse_unused, require_sizes
from recscale.models.sizing import affine_widths, shapes_by_width, tokenizer_choices

from .active import Active, find_active, own_tokens, per_row, per_row_network
from .domain_tokens import DomainPlan, DomainState, DomainTokens, feature_schema, plan_domain_tokens

Reads = Literal["attend", "plain", "none"]


@dataclasses.dataclass(frozen=True)
class MDLConfig(StackOptions):
    """All flags; see the file and the groups."""

    heads: int | None = None
    scenario_hidden: int | None = None
    task_hidden: int | None = None
    ffn_residual: bool = True
    out_proj: bool = False
    qkv_bias: bool = False
    share_kv: bool = False
    init_depth: int = 1
    token_state: Literal["coupled", "split"] = "coupled"
    reads: Literal["every", "last", "none"] = "every"
    scenario_tokens: Reads = "attend"
    task_tokens: Reads = "attend"
    global_scenario: bool = True
    active_only: bool = False

    def __post_init__(self):
        super().__post_init__()
        require_sizes(heads=self.heads, scenario_hidden=self.scenario_hidden, task_hidden=self.task_hidden)
        require_sizes(init_depth=self.init_depth)
        kinds = (self.scenario_tokens, self.task_tokens)
        if kinds == ("none", "none"):
            raise ValueError("without scenario and task tokens this is RankMixer: take architecture 'rankmixer'")
        if self.scenario_tokens == "none":
            reason = "there are no scenario tokens; set scenario_tokens"
            refuse_unused(self, reason, scenario_hidden=self.scenario_hidden, global_scenario=self.global_scenario)
            refuse_unused(self, reason, active_only=self.active_only)
        if self.task_tokens == "none":
            refuse_unused(self, "there are no task tokens; set task_tokens", task_hidden=self.task_hidden)
        if self.reads == "none":
            reason = "no block reads; set reads"
            refuse_unused(self, reason, scenario_hidden=self.scenario_hidden, task_hidden=self.task_hidden)
            if "plain" in kinds:
                raise ValueError("with reads='none' no token attends, so scenario_tokens and task_tokens may not be"
                                 " 'plain'")  # fmt: skip
        if not self.attends:
            reason = "no token attends; set reads, scenario_tokens or task_tokens"
            refuse_unused(self, reason, heads=self.heads, out_proj=self.out_proj, qkv_bias=self.qkv_bias)
            refuse_unused(self, reason, share_kv=self.share_kv, token_state=self.token_state)
        if self.share_kv and kinds != ("attend", "attend"):
            refuse_unused(self, "one kind of token attends; let both", share_kv=self.share_kv)
        if self.token_state == "split" and "plain" in kinds:
            raise ValueError("token_state='split' hides tokens that do not attend: 'plain' tokens would do nothing")

    @property
    def attends(self) -> bool:
        """Whether any token attends anywhere."""
        return self.reads != "none" and "attend" in (self.scenario_tokens, self.task_tokens)

    def block_reads(self, layer: int) -> bool:
        """Whether domain tokens take part in a block, counted from 0."""
        return self.reads == "every" or (self.reads == "last" and layer == self.layers - 1)

    def advances(self, layer: int) -> bool:
        """Whether a block has PFFN_s: whether a later one reads what it makes."""
        return self.scenario_tokens != "none" and self.block_reads(layer) and layer < self.layers - 1


class Tokens(NamedTuple):
    """Tokens of one kind, [n, B, D] each: what asks, and what is read and carried on; one array where coupled."""

    query: Array
    state: Array

    def moved(self, state: Array) -> Tokens:
        """With a new state, which asks as well where the two are one."""
        return Tokens(state if self.query is self.state else self.query, state)


class Keys(nnx.Module):
    """Keys and values of feature tokens: [T, B, D] -> two [T, B, H, d]; 2*T*D^2 parameters, 4*T*D^2 FLOPs per row."""

    def __init__(self, tokens: int, width: int, heads: int, options: MDLConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.heads = heads
        self.key = _square(tokens, width, options.qkv_bias, options.init, dtype, rngs)
        self.value = _square(tokens, width, options.qkv_bias, options.init, dtype, rngs)

    def __call__(self, f: Float[Array, "T B D"]) -> tuple[Float[Array, "T B H d"], Float[Array, "T B H d"]]:
        k, v = (layer(f).reshape(*f.shape[:2], self.heads, -1) for layer in (self.key, self.value))
        return k, v


class Reader(nnx.Module):
    """What n tokens of one kind do in a block: read features, then pass their networks.

    Args:
        tokens, width, heads, hidden: n, D, H, hidden width of the networks; None for none.
        attends: whether they read at all.
        options: biases, projection, activation and init.
    """

    def __init__(
        self,
        tokens: int,
        width: int,
        heads: int,
        hidden: int | None,
        attends: bool,
        options: MDLConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        act, init, out = options.activation, options.init, attends and options.out_proj
        self.heads, self.dtype = heads, dtype
        self.query = _square(tokens, width, options.qkv_bias, init, dtype, rngs) if attends else None
        self.out = _square(tokens, width, False, init, dtype, rngs) if out else None
        network = None
        if hidden is not None:
            network = PerTokenFFN(tokens, width, hidden, activation=act, init=init, dtype=dtype, rngs=rngs)
        self.ffn = network

    def read(self, x: Tokens, keys: tuple[Array, Array] | None, only: Active | None = None) -> Float[Array, "n B D"]:
        """The state plus what the queries find; keys and values [T, B, H, d]; only: see `active.py`."""
        if self.query is None:
            return x.state
        assert keys is not None  # made for whatever attends
        q = per_row(self.query, x.query, only)
        q = q.reshape(*q.shape[:2], self.heads, -1)
        found = attend_tokens(q, *keys, q.shape[-1] ** -0.5, self.dtype)
        return x.state + (found if self.out is None else per_row(self.out, found, only))

    def advance(self, x: Float[Array, "n B D"], only: Active | None = None) -> Float[Array, "n B D"]:
        """x plus its networks' output."""
        return x if self.ffn is None else x + per_row_network(self.ffn, x, only)


class _PrintedBlock(RankMixerBlock):
    """A block whose feed-forward networks have neither residual nor norm, as the equation of MDL prints it."""

    def around(self, branch: Step, x: Float[Array, "T B D"], key: Array | None) -> Float[Array, "T B D"]:
        x = sub_layer(self._mix, self.mixing_norm, x)
        return dropout(branch(x), self.options.dropout, key)


class MDLBlock(nnx.Module):
    """Feature tokens, and where the block reads, scenario and task tokens: see the file for its equations.

    Args:
        tokens, scenarios, tasks: T, number of scenario tokens (the global one included) and Y; 0 for none of a kind.
        options: everything else; layer: number of the block, from 0.
    """

    def __init__(
        self,
        tokens: int,
        scenarios: int,
        tasks: int,
        options: MDLConfig,
        layer: int,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        D, H, F = options.width, options.heads or tokens, options.hidden
        if D % H:
            raise ValueError(f"width {D} does not divide into {H} heads; make it a multiple")
        mixing = options.block()
        if not options.ffn_residual:
            self.features = _PrintedBlock(tokens, D, F, mixing, dtype=dtype, rngs=rngs)
            self.features.ffn_norm = None
        else:
            self.features = RankMixerBlock(tokens, D, F, mixing, dtype=dtype, rngs=rngs)

        def reader(kind: Reads, count: int, hidden: int | None) -> Reader | None:
            if kind == "none" or not options.block_reads(layer):
                return None
            return Reader(count, D, H, hidden, kind == "attend", options, dtype=dtype, rngs=rngs)

        def keys(of: Reader | None) -> Keys | None:
            attends = of is not None and of.query is not None
            return Keys(tokens, D, H, options, dtype=dtype, rngs=rngs) if attends else None

        own = options.scenario_hidden or F if options.advances(layer) else None
        self.scenario = reader(options.scenario_tokens, scenarios, own)
        self.scenario_keys = keys(self.scenario)
        self.task = reader(options.task_tokens, tasks, options.task_hidden or F)
        self.task_keys = None if options.share_kv else keys(self.task)

    def __call__(
        self,
        f: Float[Array, "T B D"],
        scenario: Tokens | None,
        task: Tokens | None,
        mask: Bool[Array, "n B"],
        *,
        only: Active | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "T B D"], Tokens | None, Tokens | None, Float[Array, "B D"] | None]:
        """New features, scenario and task tokens, and m, the mean state of the scenarios that `mask` [Gl, B] names.

        Args:
            scenario, task: the kinds of token there are. mask: rows of scenario tokens that a row belongs to, the
                global one included. only: each row's own scenario and the global one are given alone.
            key: dropout of the features' networks.
        """
        f = self.features(f, key=key)
        m, keys = None, None
        if self.scenario is not None:
            assert scenario is not None
            keys = None if self.scenario_keys is None else self.scenario_keys(f)
            read = self.scenario.read(scenario, keys, only)
            m, scenario = mean_of_active(read, mask), scenario.moved(self.scenario.advance(read, only))
        if self.task is not None:
            assert task is not None
            keys = keys if self.task_keys is None else self.task_keys(f)
            read = self.task.read(task, keys)
            task = task.moved(self.task.advance(read if m is None else read + m[None]))
        return f, scenario, task, m


def mean_of_active(x: Float[Array, "n B D"], mask: Bool[Array, "n B"]) -> Float[Array, "B D"]:
    """The mean over the tokens that `mask` [n, B] names for each row, zeros where it names none."""
    total = jnp.where(mask[..., None], x, 0).sum(axis=0)
    return total / jnp.maximum(mask.sum(axis=0), 1)[:, None].astype(x.dtype)


class MDLState(NamedTuple):
    """Per request: feature tokens, the users' half of the domain tokens, scenario int32 [R] (None: there is one)."""

    features: UserTokens
    domains: DomainState
    scenario: Array | None


class MDL(TokenStack):
    """Tokenizer, initialisers of domain tokens, L blocks, a tower per task.

    Args:
        plan: the resolved tokenizer of the features. domains: the plan of the domain tokens. tasks: Y. options: the
            rest.
    """

    def __init__(
        self,
        plan: TokenPlan,
        domains: DomainPlan,
        tasks: int,
        options: MDLConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        D, L, init = options.width, options.layers, options.init

        def blocks() -> Iterator[MDLBlock]:
            for layer in range(L):
                yield MDLBlock(plan.tokens, domains.scenarios, domains.tasks, options, layer, dtype=dtype, rngs=rngs)

        super().__init__(plan, D, tasks, blocks, options.block(), tower=options.tower, dtype=dtype, rngs=rngs)
        self.initialiser = DomainTokens(domains, D, options.init_depth, init=init, dtype=dtype, rngs=rngs)
        split, shape = options.token_state == "split", (domains.tokens, D)
        self.seeds = param.normal(rngs, shape, ("tokens", "embed"), D**-0.5) if split else None
        self.domains, self.reads = domains, options.reads != "none"
        self.active_only, self.has_global = options.active_only, options.global_scenario

    def encode_user(self, user: UserInputs, tokens: RequestTokens | None = None) -> MDLState:
        several = self.domains.domains > 1
        if several and user.domain is None:
            raise ValueError(f"the schema has {self.domains.domains} domains, and the inputs carry no domain")
        features, own = super().encode_user(user, tokens), self.initialiser.encode_user(user)
        return MDLState(features, own, user.domain if several else None)

    def score(
        self, state: MDLState, candidates: CandidateInputs, tokens: RowTokens | None = None, *, key: Array | None = None
    ) -> Output:
        f, shape = self.join(state.features, candidates, tokens)
        scenario, task = self._first_tokens(self.initialiser.score(state.domains, candidates))
        rows = f.shape[1]
        domain = jnp.zeros(rows, jnp.int32) if state.scenario is None else jnp.repeat(state.scenario, shape[1])
        mask, only = jnp.arange(self.domains.domains)[:, None] == domain[None], None
        if self.active_only and scenario is not None:
            only = find_active(domain, self.domains.domains)
            scenario, mask = Tokens(*(own_tokens(x, only) for x in scenario)), only.known[None]
        if self.has_global:
            mask = jnp.concatenate([mask, jnp.ones((1, rows), bool)])
        m = None if scenario is None else mean_of_active(scenario.state, mask)
        for i, block in enumerate(self.blocks):
            own_key = None if key is None else jax.random.fold_in(key, i)
            f, scenario, task, found = block(f, scenario, task, mask, only=only, key=own_key)
            m = m if found is None else found
        return Output(logits=self.towers(self._read_from(f, task, m)).reshape(shape))

    def _first_tokens(self, made: Float[Array, "n B D"]) -> tuple[Tokens | None, Tokens | None]:
        """Scenario and task tokens before the first block."""
        state = made
        if self.seeds is not None:
            state = jnp.broadcast_to(self.seeds[...].astype(made.dtype)[:, None], made.shape)
        ends = slice(self.domains.scenarios), slice(self.domains.scenarios, None)
        kinds = [Tokens(made[own], state[own]) if made[own].shape[0] else None for own in ends]
        return kinds[0], kinds[1]

    def _read_from(self, f: Array, task: Tokens | None, m: Array | None) -> Array:
        """What the towers read: [Y, B, D], or [B, D] for all of them."""
        if task is not None and self.reads:
            return task.state
        h = mean_tokens(f)
        h = h if m is None else h + m.astype(h.dtype)
        return h if task is None else h[None] + task.state.astype(h.dtype)


def build(
    config: MDLConfig,
    schema: Schema,
    tokens: TokenShape = NO_TOKENS,
    *,
    rngs: nnx.Rngs,
    dtype: DTypeLike = jnp.float32,
) -> MDL:
    """The model of a config; `tokens` are those of a sequence encoder in front."""
    plan, domains = _plans(config, schema, tokens)
    return MDL(plan, domains, len(schema.tasks), config, dtype=dtype, rngs=rngs)


def count_params(config: MDLConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Params:
    """Closed form of the parameter tree."""
    plan, domains = _plans(config, schema, tokens)
    T, D, L, bias = plan.tokens, config.width, config.layers, config.qkv_bias * config.width
    dense = L * T * _ffn_params(D, config.hidden) + domains.params(D, config.init_depth)
    dense += (config.token_state == "split") * domains.tokens * D
    for layer in range(L):
        for each in _readers(config, domains, layer):
            if each.attends:
                dense += each.count * (D * D + bias + config.out_proj * D * D) + each.keys * 2 * T * (D * D + bias)
            dense += each.count * (0 if each.hidden is None else _ffn_params(D, each.hidden))
    return stack_params(config, plan, len(schema.tasks), L * (1 + config.ffn_residual)) + Params(dense=dense)


def count_flops(config: MDLConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Flops:
    """Closed form of the matrix products: tokens of the user per request, all else per candidate."""
    plan, domains = _plans(config, schema, tokens)
    T, D, L = plan.tokens, config.width, config.layers
    rest = L * 4 * T * D * config.hidden + tower_flops(D, len(schema.tasks), config.tower)
    for layer in range(L):
        for each in _readers(config, domains, layer):
            if each.attends:
                rest += each.computed * (2 * D * D * (1 + config.out_proj) + 4 * T * D) + each.keys * 4 * T * D * D
            rest += each.computed * (0 if each.hidden is None else 4 * D * each.hidden)
    return plan.flops(D) + domains.flops(D, config.init_depth) + Flops(candidate=rest)


def size_space(
    schema: Schema, config: MDLConfig, target_dense_params: float, tokens: TokenShape = NO_TOKENS
) -> Iterator[dict[str, Any]]:
    """Overrides (tokens, width, hidden) near the target, as RankMixer's; a given number of heads divides the width."""

    def hiddens(T: int | None, D: int) -> Iterable[tuple[int, int]]:
        if config.heads is not None and D % config.heads:
            return ()

        def params(hidden: int) -> int:
            shape = dataclasses.replace(config, tokens=T, width=D, hidden=hidden)
            return count_params(shape, schema, tokens).dense

        return enumerate(affine_widths(params, target_dense_params))

    choices = tokenizer_choices(feature_schema(schema), config, target_dense_params, tokens)
    yield from shapes_by_width(choices, target_dense_params, config.layers, HIDDEN_RATIO, hiddens)


class _ReaderSize(NamedTuple):
    """One kind of token in one block: how many, how many of them are computed a row, sets of keys made for them, hidden
    width of their networks (None: none)."""

    count: int
    computed: int
    attends: bool
    keys: int
    hidden: int | None


def _readers(config: MDLConfig, domains: DomainPlan, layer: int) -> Iterator[_ReaderSize]:
    """The kinds of token that take part in a block."""
    if not config.block_reads(layer):
        return
    if config.scenario_tokens != "none":
        n, attends = domains.scenarios, config.scenario_tokens == "attend"
        computed = 1 + config.global_scenario if config.active_only else n
        hidden = (config.scenario_hidden or config.hidden) if config.advances(layer) else None
        yield _ReaderSize(n, computed, attends, int(attends), hidden)
    if config.task_tokens != "none":
        n, attends = domains.tasks, config.task_tokens == "attend"
        yield _ReaderSize(n, n, attends, int(attends and not config.share_kv), config.task_hidden or config.hidden)


def _plans(config: MDLConfig, schema: Schema, tokens: TokenShape) -> tuple[TokenPlan, DomainPlan]:
    domains = plan_domain_tokens(
        schema,
        scenarios=config.scenario_tokens != "none",
        has_global=config.global_scenario,
        tasks=config.task_tokens != "none",
    )
    return plan_tokens(feature_schema(schema), config, config.width, tokens), domains


def _ffn_params(width: int, hidden: int) -> int:
    """Parameters of one token's network."""
    return 2 * width * hidden + hidden + width


def _square(tokens: int, width: int, use_bias: bool, init: str, dtype: DTypeLike, rngs: nnx.Rngs) -> PerTokenDense:
    """One D x D map per token."""
    axes = ("embed", "heads")
    return PerTokenDense(tokens, width, width, use_bias=use_bias, init=init, axes=axes, dtype=dtype, rngs=rngs)


MDL_SPEC = BackboneSpec(MDLConfig, build, count_params, count_flops, size_space)
