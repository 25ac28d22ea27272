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
import functools
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from recscale.models.architecture import BackboneSpec, token_builder
from recscale.models.counts import Flops, Params
from recscale.models.inputs.history import NO_TOKENS, TokenShape
from recscale.models.inputs.schema import Schema
from recscale.models.inputs.tokenizers import TokenPlan, plan_tokens
from recscale.models.layers.towers import tower_flops
from recscale.models.mixers.rankmixer import (
    HIDDEN_RATIO,
    BlockOptions,
    NormPlace,
    RankMixerBlock,
    StackOptions,
    stack_params,
)
from recscale.models.options import refuse_unused, require_sizes
from recscale.models.sizing import grains, shapes_by_width, solve_affine, tokenizer_choices

from .options import MemoryOptions, memory_flops, memory_params
from .product_key_memory import ProductKeyMemory
from .stack import MemoryStack, ReadingBlock, Stats
from .value_table import ValueTable


@dataclasses.dataclass(frozen=True)
class MemoryMixerConfig(MemoryOptions, StackOptions):
    """combine, memory_count Lm, memory_stride, memory_shared_values: which blocks read, and what becomes of it."""

    combine: Literal["residual", "replace"] = "residual"
    memory_count: int = 1
    memory_stride: int = 1
    memory_shared_values: bool = False
    norm_place: NormPlace = "post"

    def __post_init__(self):
        super().__post_init__()
        if self.norm == "none":  # what a sweep writes for None
            object.__setattr__(self, "norm", None)
        require_sizes(memory_stride=self.memory_stride)
        if self.memory_count < 2:
            reason = f"memory_count is {self.memory_count}; take two memories or more"
            refuse_unused(self, reason, memory_stride=self.memory_stride)
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


class MemoryBlock(ReadingBlock):
    """A RankMixer block whose feed-forward branch reads a memory: combine "residual" adds what is read to the network's
    output, "replace" leaves the network out. Other arguments: see `RankMixerBlock`."""

    def __init__(
        self,
        memory: ProductKeyMemory,
        combine: str,
        tokens: int,
        width: int,
        hidden: int,
        options: BlockOptions = BlockOptions(),  # noqa: B008
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(tokens, width, hidden, options, dtype=dtype, rngs=rngs)
        self.memory, self.combine = memory, combine
        if combine == "replace":
            self.ffn = None

    def branch(self, z: Array, *, training: bool, valid: Array | None) -> tuple[Array, Stats]:
        read = self.memory(z, train=training, valid=valid)
        return read.y if self.combine == "replace" else self.ffn(z) + read.y, read.stats


class MemoryMixer(MemoryStack):
    """Tokenizer, L blocks of which some carry a memory, mean over tokens, towers. Arguments: see `RankMixer`."""

    def __init__(
        self, plan: TokenPlan, tasks: int, options: MemoryMixerConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        T, D, F, mixing = plan.tokens, options.width, options.hidden, options.block(options.norm_place)

        def blocks() -> Iterator[RankMixerBlock]:
            pool: ValueTable | None = None
            for i in range(options.layers):
                if i not in options.memory_layers:
                    yield RankMixerBlock(T, D, F, mixing, dtype=dtype, rngs=rngs)
                    continue
                memory = ProductKeyMemory(T, D, options, values=pool, dtype=dtype, rngs=rngs)
                pool = memory.values if options.memory_shared_values else None
                yield MemoryBlock(memory, options.combine, T, D, F, mixing, dtype=dtype, rngs=rngs)

        super().__init__(plan, D, tasks, blocks, mixing, tower=options.tower, dtype=dtype, rngs=rngs)


def count_params(config: MemoryMixerConfig, schema: Schema, tokens: TokenShape = NO_TOKENS) -> Params:
    """Closed form of the parameter tree, values of memories included."""
    plan = plan_tokens(schema, config, config.width, tokens)
    T, D, F = plan.tokens, config.width, config.hidden
    norms = config.layers * 2 + (config.norm_place == "pre")
    networks = config.layers - (config.memory_count if config.combine == "replace" else 0)
    total = stack_params(config, plan, len(schema.tasks), norms)
    total += Params(dense=networks * T * (2 * D * F + F + D))
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
    target, free = target_dense_params, config.value_width if config.value_op != "bag" else None

    def hiddens(T: int | None, D: int) -> Iterable[tuple[int, int]]:
        @functools.cache
        def dense(F: int) -> int:
            shape = dataclasses.replace(config, tokens=T, width=D, value_width=free, hidden=F)
            return count_params(shape, schema, tokens).dense

        if dense(2) > dense(1):
            for rank, grain in enumerate(grains(target)):
                hidden = solve_affine(dense, target, grain)
                if hidden is not None:
                    yield rank, hidden

    choices = tokenizer_choices(schema, config, target, tokens)
    yield from shapes_by_width(choices, target, config.layers, HIDDEN_RATIO, hiddens)


build = token_builder(MemoryMixer)
PKM = BackboneSpec(PKMConfig, build, count_params, count_flops, size_space)
MEMORY_PLUS = BackboneSpec(MemoryPlusConfig, build, count_params, count_flops, size_space)
