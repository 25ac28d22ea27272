"""RankMixer carrying product-key memories: `pkm` (arXiv 1907.05242) and `memory_plus` (arXiv 2412.09764).

Blocks are RankMixer's; in `memory_count` of them, centred with stride `memory_stride`, the branch of the feed-forward
sub-layer becomes, z [T,B,D] its input and y = memory(z):

    residual   PFFN(z) + y                     pkm: 4 heads, batch-normed queries, plain bag
    replace    y                               memory_plus: rms-normed queries and keys, swilu, one pool of values

Neither paper is a ranker: where the layer sits in a RankMixer block is this file's choice, and so is what it reads
(every token of every row). Sizes are flags; defaults are small. memory_shared_values: all layers read one pool of
values, keys and queries stay their own (the released code of Memory+).

Letters: B rows, T tokens, D token width, F hidden width, L layers, H memory heads, K slots per head, n sub-keys per
axis, M = n*n slots, p key width, d value width.

Closed forms: RankMixer's, plus those of `options` per memory layer, less the networks a memory replaces.
Undisclosed for ranking -> flag (default): see `MemoryOptions`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from recscale.models.architecture import BackboneSpec
from recscale.models.counts import Flops, Params
from recscale.models.inputs.batch import CandidateInputs, Output, UserInputs
from recscale.models.inputs.history import NO_TOKENS, TokenShape
from recscale.models.inputs.schema import Schema
from recscale.models.inputs.tokenizers import Tokenizer, TokenizerOptions, TokenPlan, UserTokens, plan_tokens
from recscale.models.layers.dropout import dropout
from recscale.models.layers.norms import norm_params
from recscale.models.layers.towers import Towers, mean_tokens, tower_flops, tower_params
from recscale.models.mixers.rankmixer import RankMixerBlock, make_norm, token_choices
from recscale.models.ranker import Backbone
from recscale.models.sizing import LARGE, grains, solve_affine

from .options import MemoryOptions, memory_flops, memory_params
from .product_key_memory import memory_layer, valid_tokens
from .value_table import ValueTable

Array = jax.Array

# F / D the sizing prefers, as RankMixer's.
_HIDDEN_RATIO = 2.8


@dataclasses.dataclass(frozen=True)
class MemoryMixerConfig(MemoryOptions, TokenizerOptions):
    """width D, hidden F, layers L, combine, memory_count Lm, memory_stride, memory_shared_values; blocks: RankMixer."""

    width: int = 128
    hidden: int = 512
    layers: int = 2
    combine: Literal["residual", "replace"] = "residual"
    memory_count: int = 1
    memory_stride: int = 1
    memory_shared_values: bool = False
    activation: str = "gelu"
    norm: Literal["layer", "rms", "none"] | None = "layer"
    norm_place: Literal["post", "pre"] = "post"
    norm_affine: bool = True
    norm_per_token: bool = False
    norm_eps: float = 1e-6
    dropout: float = 0.0
    init: str = "lecun_normal"
    tower: tuple[int, ...] = ()

    def __post_init__(self):
        if self.norm == "none":  # what a sweep writes for None
            object.__setattr__(self, "norm", None)
        for name in ("width", "hidden", "layers", "memory_stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}, expected a share in [0, 1)")
        self.check_memory()
        if self.value_op == "bag" and self.value_width not in (None, self.width):
            raise ValueError(
                f"value_width is {self.value_width}, but combine={self.combine!r} adds the bag to tokens of width "
                f"{self.width}; leave it None or take value_op='swilu'"
            )
        if self.memory_shared_values and self.value_op in ("prevalue", "expert"):
            raise ValueError(f"memory_shared_values: value_op={self.value_op!r} has two tables and takes no pool")
        span = (self.memory_count - 1) * self.memory_stride + 1
        if self.memory_count < 0 or span > self.layers:
            raise ValueError(
                f"{self.memory_count} memories with stride {self.memory_stride} span {span} layers, there are "
                f"{self.layers}"
            )

    @property
    def memory_layers(self) -> tuple[int, ...]:
        """Blocks with a memory: centred, later where the middle falls between two."""
        span = (self.memory_count - 1) * self.memory_stride + 1
        first = (self.layers - span + 1) // 2
        return tuple(first + i * self.memory_stride for i in range(self.memory_count))


@dataclasses.dataclass(frozen=True)
class PKMConfig(MemoryMixerConfig):
    """Defaults of arXiv 1907.05242: 4 heads, batch norm on queries, none on keys."""

    memory_heads: int = 4
    query_norm: Literal["layer", "rms", "batch", "none"] | None = "batch"
    key_norm: Literal["layer", "rms", "none"] | None = None
    score_scale: Literal["inv_sqrt", "none", "learned"] = "none"


@dataclasses.dataclass(frozen=True)
class MemoryPlusConfig(MemoryMixerConfig):
    """Defaults of arXiv 2412.09764: 4 heads, rms norms, swilu, two memories that replace networks and share values."""

    memory_heads: int = 4
    query_norm: Literal["layer", "rms", "batch", "none"] | None = "rms"
    key_norm: Literal["layer", "rms", "none"] | None = "rms"
    value_op: Literal["bag", "swilu", "prevalue", "expert", "expansion"] = "swilu"
    layers: int = 3
    combine: Literal["residual", "replace"] = "replace"
    memory_count: int = 2
    memory_shared_values: bool = True


class MemoryBlock(RankMixerBlock):
    """A RankMixer block whose feed-forward branch reads a memory: x [T, B, D] -> [T, B, D] and the read's stats."""

    def __init__(self, memory: nnx.Module, combine: str, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.memory, self.combine = memory, combine
        if combine == "replace":
            self.ffn = None

    def with_stats(
        self, x: Array, *, key: Array | None = None, valid: Array | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """A key means training. valid: bool [T, B], tokens that are no padding; others read nothing."""
        found: dict[str, Array] = {}

        def branch(z: Array) -> Array:
            read = self.memory(z, train=key is not None, valid=valid)
            found.update(read.stats)
            y = read.y if self.combine == "replace" else self.ffn(z) + read.y
            return dropout(y, self.dropout, key)

        x = self._sublayer(self._mix, self.mixing_norm, x)
        return self._sublayer(branch, self.ffn_norm, x), found


class MemoryMixer(Backbone):
    """Tokenizer, L blocks of which some carry a memory, mean over tokens, towers.

    Args:
        plan: the resolved tokenizer. config: sizes and flags. tasks: Y.
    """

    def __init__(self, plan: TokenPlan, config: MemoryMixerConfig, tasks: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        T, D, kwargs = plan.tokens, config.width, dict(init=config.init, dtype=dtype, rngs=rngs)
        norm = {name: getattr(config, name) for name in ("norm", "norm_affine", "norm_per_token", "norm_eps")}
        flags = dict(activation=config.activation, norm_place=config.norm_place, dropout=config.dropout)
        self.tokenizer = Tokenizer(plan, D, **kwargs)
        pool: ValueTable | None = None
        blocks = []
        for i in range(config.layers):
            if i not in config.memory_layers:
                blocks.append(RankMixerBlock(T, D, config.hidden, **flags, **norm, **kwargs))
                continue
            memory = memory_layer(config, T, D, values=pool, dtype=dtype, rngs=rngs)
            pool = memory.values if config.memory_shared_values else None
            blocks.append(MemoryBlock(memory, config.combine, T, D, config.hidden, **flags, **norm, **kwargs))
        self.blocks = nnx.List(blocks)
        self.final_norm = make_norm(T, D, dtype=dtype, **norm) if config.norm_place == "pre" else None
        self.towers = Towers(D, tasks, tower=config.tower, **kwargs)

    def encode_user(self, user: UserInputs, tokens: Array | None = None) -> UserTokens:
        return self.tokenizer.encode_user(user, tokens)

    def score(
        self, state: UserTokens, candidates: CandidateInputs, tokens: Array | None = None, *, key: Array | None = None
    ) -> Output:
        own = self.tokenizer.candidate_tokens(state, candidates, tokens)
        x, stats = self.tokenizer.join(state, own), {}
        valid = valid_tokens(candidates, x.shape[0])
        for i, block in enumerate(self.blocks):
            own_key = None if key is None else jax.random.fold_in(key, i)
            if isinstance(block, MemoryBlock):
                x, found = block.with_stats(x, key=own_key, valid=valid)
                stats |= {f"memory{i}/{name}": value for name, value in found.items()}
            else:
                x = block(x, key=own_key)
        if self.final_norm is not None:
            x = self.final_norm(x)
        logits = self.towers(mean_tokens(x))
        return Output(logits=logits.reshape(*own.shape[1:3], -1), stats=stats)

    def fold(self) -> None:
        """Folds over-parameterised keys into constants, for serving."""
        for block in self.blocks:
            if isinstance(block, MemoryBlock):
                block.memory.fold()


def build(
    config: MemoryMixerConfig, schema: Schema, tokens: TokenShape = NO_TOKENS, *, rngs: nnx.Rngs, dtype=jnp.float32
) -> MemoryMixer:
    """The model of a config; `tokens` are those of a sequence encoder in front."""
    plan = plan_tokens(schema, config, config.width, tokens)
    return MemoryMixer(plan, config, len(schema.tasks), rngs=rngs, dtype=dtype)


def count_params(config: MemoryMixerConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Params:
    """Closed form of the parameter tree, values of memories included."""
    plan = plan_tokens(schema, config, config.width, tokens)
    T, D, F = plan.tokens, config.width, config.hidden
    gains = T if config.norm_per_token else None
    norms = config.layers * 2 + (config.norm_place == "pre")
    norm = norm_params(D, kind=config.norm, affine=config.norm_affine, tokens=gains)
    networks = config.layers - (config.memory_count if config.combine == "replace" else 0)
    tokenizer, head = plan.params(D), tower_params(D, len(schema.tasks), config.tower)
    total = Params(tokenizer + networks * T * (2 * D * F + F + D) + norms * norm + head, tokenizer, head)
    for i in range(config.memory_count):
        total += memory_params(config, T, D, own_values=i == 0 or not config.memory_shared_values)
    return total


def count_flops(config: MemoryMixerConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Flops:
    """Closed form of the matrix products: user tokens per request, all else per candidate."""
    plan = plan_tokens(schema, config, config.width, tokens)
    T, D, F = plan.tokens, config.width, config.hidden
    networks = config.layers - (config.memory_count if config.combine == "replace" else 0)
    total = plan.flops(D) + Flops(candidate=networks * 4 * T * D * F + tower_flops(D, len(schema.tasks), config.tower))
    for _ in range(config.memory_count):
        total += memory_flops(config, T, D)
    return total


def size_space(
    schema: Schema, config: MemoryMixerConfig, target_dense_params: float, tokens: TokenShape = NO_TOKENS
) -> Iterator[dict[str, Any]]:
    """Overrides (tokens, width, hidden) near the target; the memory's slots, heads and key width stay as configured.

    For each T and D the hidden width that meets the target, values included, is solved for; shapes with F/D near 2.8
    come first.
    """
    found = []
    for T, token_cost in token_choices(schema, config, target_dense_params, tokens):
        step = math.lcm(T or 1, 128 if target_dense_params >= LARGE else 4)
        ideal = math.sqrt(target_dense_params / (2 * _HIDDEN_RATIO * config.layers * (T or 16)))
        for D in range(step, int(3 * ideal) + step + 1, step):
            value_width = None if config.value_op == "bag" else config.value_width
            shape = {"tokens": T, "width": D, "value_width": value_width}

            def dense(F: int, shape: Mapping[str, Any] = shape) -> int:
                return count_params(dataclasses.replace(config, **shape, hidden=F), schema, tokens).dense

            for i, grain in enumerate(grains(target_dense_params)):
                hidden = solve_affine(dense, target_dense_params, grain) if dense(2) > dense(1) else None
                if hidden is not None:
                    ratio_cost = abs(math.log2(hidden / D / _HIDDEN_RATIO))
                    found.append((ratio_cost + token_cost + i / 4, T or 0, D, hidden))
    for _, T, D, hidden in sorted(set(found)):
        yield {"tokens": T or None, "width": D, "hidden": hidden}


PKM = BackboneSpec(PKMConfig, build, count_params, count_flops, size_space)
MEMORY_PLUS = BackboneSpec(MemoryPlusConfig, build, count_params, count_flops, size_space)
