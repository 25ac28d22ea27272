"""MSN, memory scaling network (arXiv 2602.07526): RankMixer's blocks with one feature-interaction module per token.

    S = LN(mix(X) + X)          X = LN(module(S) + S)          logits = towers(mean_t X_L)

module, z [T,B,D] its input and y = memory(z) a read of a product-key memory:

    ffn        FFN_t(z)                                    per-token weights
    gated_ffn  FFN_t(z * GateFFN_t(z))                     control: a gate without a memory
    smoe       sum over the K best experts g_e FFN_te(z)   experts of F/K, so that K of them are the dense network
    msn_ffn    FFN_t(z * tanh(y))
    msn_smoe   smoe(z * tanh(y))

`mem_layers` says which layers are gated; the others have the same module without its gate. combine: gate_tanh,
gate_identity, gate_sigmoid: z * f(y); gate_one_plus_tanh: z * (1 + tanh y), the plain module where values are 0;
concat: FFN_t([z; y]); replace: FFN_t(y).

At the start values are small, so tanh(y) is near 0 and the printed form hides z from the network: only the residual
passes. The form is kept, `branch_ratio` (norm of the module's output over that of its input) is reported.

Against collapse, each a switch: norms of queries and keys (query_norm, key_norm), over-parameterised keys (theta,
theta_order, freeze_base_keys; `MSN.fold` makes them constant for serving), and a warm-up, which is the trainer's.
theta_a K as printed (preset `msn_as_printed`, "left_nxn") moves only keys that were read; the default "right_dxd",
K theta_a, moves every key, which is what the text says it does.

Letters: B rows, T tokens, D token width, F hidden width, L layers, H memory heads, k slots per head, n sub-keys per
axis, M = n*n slots, p key width, d value width, E experts, K of them active, f = F/K, G width of the gate network.

Closed forms: RankMixer's with, per layer, those of `options` for a memory and
    ffn        T*(2*D*F + F + D) parameters, 4*T*D*F FLOPs per row;  concat D*F more reads d columns, replace d for D
    gated_ffn  + T*(2*D*G + G + D), 4*T*D*G
    smoe       T*(E*(2*D*f + f) + D + D*E), 2*T*D*E + K*4*T*D*f

Undisclosed -> flag (default): gated layers -> mem_layers (the last memory_count); heads, key width, query depth ->
memory_heads (1), key_width, query ("linear"); temperature -> score_scale (1/sqrt p); values -> value_init_std (0.02);
sharing -> query_per_token (True), keys_per_token and values_per_token (False); gate network -> gate_hidden (None: as
many weights as query and keys); router -> router (softmax over the selected), balance_weight (0); residual and norm
-> block_style ("post", RankMixer's; "pre"; "plain": neither). Sizes are flags; defaults are small.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from recscale.models.architecture import BackboneSpec, token_builder
from recscale.models.counts import Flops, Params
from recscale.models.inputs.history import NO_TOKENS, TokenShape
from recscale.models.inputs.schema import Schema
from recscale.models.inputs.tokenizers import TokenPlan, plan_tokens
from recscale.models.layers.per_token import PerTokenFFN
from recscale.models.layers.per_token_moe import ExpertOptions, TopKMoE, check_top_k
from recscale.models.layers.towers import tower_flops
from recscale.models.mixers.rankmixer import HIDDEN_RATIO, BlockOptions, StackOptions, stack_params
from recscale.models.options import group_of, refuse_unused, require_sizes
from recscale.models.sizing import counted_choices, dense_params, token_shapes

from .options import MemoryOptions, memory_flops, memory_params
from .product_key_memory import ProductKeyMemory
from .stack import MemoryStack, ReadingBlock, Stats

# combine -> the gate of `sparse_gather`.
_GATES = {
    "gate_tanh": "tanh",
    "gate_identity": "identity",
    "gate_sigmoid": "sigmoid",
    "gate_one_plus_tanh": "one_plus_tanh",
}


@dataclasses.dataclass(frozen=True)
class MSNConfig(MemoryOptions, ExpertOptions, StackOptions):
    """mem_layers: gated layers, None for the last `memory_count`; experts E, active_experts K; the rest: see the file
    and the groups."""

    module: Literal["ffn", "gated_ffn", "smoe", "msn_ffn", "msn_smoe"] = "msn_ffn"
    combine: Literal["gate_tanh", "gate_identity", "gate_sigmoid", "gate_one_plus_tanh", "concat", "replace"] = (
        "gate_tanh"
    )
    memory_count: int = 1
    mem_layers: tuple[int, ...] | None = None
    gate_hidden: int | None = None
    experts: int = 4
    active_experts: int = 2
    router: Literal["selected", "all"] = "selected"
    query_per_token: bool = True
    theta: Literal["none", "right_dxd", "left_nxn"] = "right_dxd"
    value_init_std: float | None = 0.02
    block_style: Literal["post", "pre", "plain"] = "post"
    norm: Literal["layer", "rms"] = "layer"

    def __post_init__(self):
        super().__post_init__()
        require_sizes(experts=self.experts, active_experts=self.active_experts, gate_hidden=self.gate_hidden)
        if not 0 <= self.memory_count <= self.layers:
            raise ValueError(f"memory_count is {self.memory_count}, expected 0 to the {self.layers} layers")
        placed = self.mem_layers or ()
        if len(set(placed)) < len(placed) or any(not 0 <= i < self.layers for i in placed):
            raise ValueError(f"mem_layers is {placed}, expected distinct layers from 0 to {self.layers - 1}")
        if self.module not in ("smoe", "msn_smoe"):
            reason = f"module={self.module!r} has no experts; take an smoe"
            refuse_unused(self, reason, balance_weight=self.balance_weight, router=self.router)
            refuse_unused(self, reason, expert_path=self.expert_path, capacity_factor=self.capacity_factor)
        self.check_capacity()
        if self.addressing == "hash":
            raise ValueError("msn's tokens are trained, so a hash of them is no address; take hash_table for a control")
        if self.block_style == "plain":
            reason = "block_style='plain' has no norm; take 'post' or 'pre'"
            refuse_unused(self, reason, norm=self.norm, norm_affine=self.norm_affine, norm_eps=self.norm_eps)
            refuse_unused(self, reason, norm_per_token=self.norm_per_token)
        if self.module in ("msn_ffn", "msn_smoe"):
            self._check_combine()
        if self.module in ("smoe", "msn_smoe"):
            if self.hidden % self.active_experts:
                raise ValueError(f"hidden is {self.hidden}, expected a multiple of the {self.active_experts} experts")
            sizes = (self.experts * self.expert_hidden, self.experts, self.active_experts)
            check_top_k(*sizes, shared=False, gate_norm=self.router)

    def _check_combine(self) -> None:
        """ValueError if what is read does not fit what the module does with it."""
        gate = self.combine in _GATES
        if gate and (self.value_op != "bag" or self.tucker_cores > 1 or self.value_width is not None):
            raise ValueError(
                f"combine={self.combine!r} gates tokens with a bag of their width: it needs value_op='bag', one core "
                f"and value_width=None, found {self.value_op!r}, {self.tucker_cores} and {self.value_width}"
            )
        if self.module == "msn_smoe" and not gate and (self.combine == "concat" or self.value_width is not None):
            raise ValueError(f"combine={self.combine!r} changes the width of tokens, which module='msn_smoe' cannot")

    @property
    def memory_layers(self) -> tuple[int, ...]:
        """Gated layers in order; none for the modules without a gate."""
        if self.module in ("ffn", "smoe"):
            return ()
        if self.mem_layers is not None:
            return tuple(sorted(self.mem_layers))
        return tuple(range(self.layers - self.memory_count, self.layers))

    @property
    def expert_hidden(self) -> int:
        """f."""
        return self.hidden // self.active_experts

    def module_of(self, layer: int) -> str:
        """The module of one layer: the configured one where it is gated, else that without its gate."""
        if layer in self.memory_layers:
            return self.module
        return "smoe" if self.module in ("smoe", "msn_smoe") else "ffn"

    def network_inputs(self, module: str) -> int:
        """Width of what the network of a module reads."""
        if module != "msn_ffn" or self.combine in _GATES:
            return self.width
        return self.out_width(self.width) + (self.width if self.combine == "concat" else 0)


def gate_width(config: MSNConfig, tokens: int) -> int:
    """G: `gate_hidden`, or the width at which the gate network has as many parameters as a memory's query and keys."""
    if config.gate_hidden is not None:
        return config.gate_hidden
    plain = dataclasses.replace(
        group_of(config, MemoryOptions),
        theta="none",
        theta_order="ln_after",
        theta_noise=0.0,
        freeze_base_keys=False,
        query_norm=None,
        key_norm=None,
        score_scale="inv_sqrt",
        addressing="learned",
        value_op="bag",
        prevalue_width=None,
        expert_activation="gelu",
        expansion=4,
        expansion_join="grouped",
    )
    same = memory_params(plain, tokens, config.width, own_values=False).dense
    return max(1, round((same / tokens - config.width) / (2 * config.width + 1)))


class Interaction(nnx.Module):
    """One module: z [T, B, D] -> [T, B, D] and named diagnostics.

    Args:
        network: per-token feed-forward network or experts.
        gate: network whose output multiplies z, or None.
        memory: memory to read, or None. combine: what becomes of the read.
    """

    def __init__(
        self,
        network: PerTokenFFN | TopKMoE,
        *,
        gate: PerTokenFFN | None = None,
        memory: ProductKeyMemory | None = None,
        combine: str = "gate_tanh",
    ):
        self.network, self.gate, self.memory, self.combine = network, gate, memory, combine

    def __call__(
        self, z: Float[Array, "T B D"], *, training: bool = False, valid: Bool[Array, "T B"] | None = None
    ) -> tuple[Float[Array, "T B D"], Stats]:
        """valid: tokens that are no padding; others read nothing."""
        x, stats = z, {}
        if self.gate is not None:
            x = z * self.gate(z)
        if self.memory is not None:
            x, found = self._remember(self.memory, z, training, valid)
            stats |= {f"memory/{name}": value for name, value in found.items()}
        if isinstance(self.network, TopKMoE):
            y, routing = self.network(x, training=training, valid=None if valid is None else valid[0])
            stats |= {f"experts/{name}": value for name, value in routing._asdict().items()}
        else:
            y = self.network(x)
        stats["branch_ratio"] = _rms(y, valid) / jnp.maximum(_rms(z, valid), 1e-30)
        return y, stats

    def _remember(self, memory: ProductKeyMemory, z: Array, training: bool, valid: Array | None) -> tuple[Array, Stats]:
        """What the network reads, and the read's diagnostics."""
        if self.combine in _GATES:
            read = memory(z, gate=z, gate_fn=_GATES[self.combine], train=training, valid=valid)
            return read.y, read.stats
        read = memory(z, train=training, valid=valid)
        x = read.y if self.combine == "replace" else jnp.concatenate([z, read.y], axis=-1)
        return x, read.stats


def _rms(x: Array, valid: Array | None) -> Array:
    where = None if valid is None else valid[..., None]
    return jnp.sqrt(jnp.mean(jnp.square(jax.lax.stop_gradient(x).astype(jnp.float32)), where=where))


def make_module(module: str, config: MSNConfig, tokens: int, *, dtype=jnp.float32, rngs: nnx.Rngs) -> Interaction:
    """The module called `module` with a config's sizes."""
    D, act, init = config.width, config.activation, config.init

    def feed_forward(inputs: int, hidden: int) -> PerTokenFFN:
        return PerTokenFFN(tokens, inputs, hidden, D, activation=act, init=init, dtype=dtype, rngs=rngs)

    if module in ("smoe", "msn_smoe"):
        network = TopKMoE(
            tokens,
            D,
            config.experts * config.expert_hidden,
            experts=config.experts,
            active=config.active_experts,
            shared=False,
            gate_scale=1.0,
            gate_norm=config.router,
            kind="ffn",
            activation=act,
            init=init,
            fans=(D, config.expert_hidden),
            path=config.expert_path,
            capacity_factor=config.capacity_factor,
            dtype=dtype,
            rngs=rngs,
        )
    else:
        network = feed_forward(config.network_inputs(module), config.hidden)
    gate = feed_forward(D, gate_width(config, tokens)) if module == "gated_ffn" else None
    memory = ProductKeyMemory(tokens, D, config, dtype=dtype, rngs=rngs) if module.startswith("msn") else None
    return Interaction(network, gate=gate, memory=memory, combine=config.combine)


class MSNBlock(ReadingBlock):
    """A RankMixer block around an interaction module: x [T, B, D] -> [T, B, D] and the module's diagnostics.

    Arguments: see `RankMixerBlock`.
    """

    def __init__(
        self,
        module: Interaction,
        tokens: int,
        width: int,
        options: BlockOptions = BlockOptions(),  # noqa: B008
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(tokens, width, 1, options, dtype=dtype, rngs=rngs)
        self.ffn = module

    def branch(self, z: Array, *, training: bool, valid: Array | None) -> tuple[Array, Stats]:
        return self.ffn(z, training=training, valid=valid)


class MSN(MemoryStack):
    """Tokenizer, L blocks, mean over tokens, towers. Arguments: see `RankMixer`."""

    stats_name = "layer"

    def __init__(
        self, plan: TokenPlan, tasks: int, options: MSNConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        T, D, mixing = plan.tokens, options.width, options.block("pre" if options.block_style == "pre" else "post")
        if options.block_style == "plain":
            mixing = BlockOptions(norm=None, dropout=options.dropout, init=options.init, residual=False)

        def blocks() -> Iterator[MSNBlock]:
            for layer in range(options.layers):
                module = make_module(options.module_of(layer), options, T, dtype=dtype, rngs=rngs)
                yield MSNBlock(module, T, D, mixing, dtype=dtype, rngs=rngs)

        super().__init__(plan, D, tasks, blocks, mixing, tower=options.tower, dtype=dtype, rngs=rngs)
        self.balance_weight = options.balance_weight


def count_params(config: MSNConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Params:
    """Closed form of the parameter tree, values of memories included."""
    plan = plan_tokens(schema, config, config.width, tokens)
    norms = {"post": 2 * config.layers, "pre": 2 * config.layers + 1, "plain": 0}[config.block_style]
    total = stack_params(config, plan, len(schema.tasks), norms)
    for i in range(config.layers):
        total += _module_params(config.module_of(i), config, plan.tokens)
    return total


def _module_params(module: str, config: MSNConfig, T: int) -> Params:
    D, F, f = config.width, config.hidden, config.expert_hidden
    if module in ("smoe", "msn_smoe"):
        expert = T * (2 * D * f + f)
        idle = (config.experts - config.active_experts) * expert
        total = Params(config.experts * expert + T * (D + D * config.experts), inactive=idle)
    else:
        total = Params(T * (config.network_inputs(module) * F + F + F * D + D))
    if module == "gated_ffn":
        G = gate_width(config, T)
        total += Params(T * (2 * D * G + G + D))
    return total + memory_params(config, T, D) if module.startswith("msn") else total


def count_flops(config: MSNConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Flops:
    """Closed form of the matrix products: user tokens per request, all else per candidate.

    Experts count as the K active ones, unless expert_path is "masked".
    """
    plan = plan_tokens(schema, config, config.width, tokens)
    total = plan.flops(config.width) + Flops(candidate=tower_flops(config.width, len(schema.tasks), config.tower))
    for i in range(config.layers):
        total += _module_flops(config.module_of(i), config, plan.tokens)
    return total


def _module_flops(module: str, config: MSNConfig, T: int) -> Flops:
    D, F = config.width, config.hidden
    if module in ("smoe", "msn_smoe"):
        computed = config.experts if config.expert_path == "masked" else config.active_experts
        products = 2 * T * D * config.experts + computed * 4 * T * D * config.expert_hidden
    else:
        products = 2 * T * F * (config.network_inputs(module) + D)
    if module == "gated_ffn":
        products += 4 * T * D * gate_width(config, T)
    total = Flops(candidate=products)
    return total + memory_flops(config, T, D) if module.startswith("msn") else total


def size_space(
    schema: Schema, config: MSNConfig, target_dense_params: float, tokens: TokenShape = NO_TOKENS
) -> Iterator[dict[str, Any]]:
    """Overrides (tokens, width, hidden) near the target, values included; the memory stays as configured.

    For each T and D the hidden width that meets the target is solved for; shapes with F/D near 2.8 come first.
    """
    unit = config.active_experts if config.module in ("smoe", "msn_smoe") else 1
    choices = counted_choices(schema, config, target_dense_params, tokens)
    params = dense_params(count_params, config, schema, tokens)
    yield from token_shapes(params, choices, target_dense_params, HIDDEN_RATIO, unit)


def active_hidden(
    schema: Schema, config: MSNConfig, target_active_params: float, tokens: TokenShape = NO_TOKENS
) -> int:
    """The hidden width at which `active_params` is nearest to the target, for comparisons at equal active parameters.

    Raises:
        ValueError: the rest of the model alone has more.
    """
    unit = config.active_experts if config.module in ("smoe", "msn_smoe") else 1

    def active(steps: int) -> int:
        params = count_params(dataclasses.replace(config, hidden=unit * steps), schema, tokens)
        return params.dense - params.inactive

    one, two = active(1), active(2)
    steps = 1 + round((target_active_params - one) / (two - one))
    if steps < 1:
        raise ValueError(
            f"{config.module} with {config.memory_layers or 'no'} gated layers has {one} active parameters at the "
            f"smallest hidden width, the target is {math.floor(target_active_params)}; raise it or narrow the memory"
        )
    return unit * steps


MSN_SPEC = BackboneSpec(MSNConfig, token_builder(MSN), count_params, count_flops, size_space)
