"""Sparse reads on a TensorCore by copying single rows from HBM, whatever the table's size.

Rows stay in HBM, tiles [C, L] each. A program serves R reads; their ids and weights lie in scalar memory as one row
of R*J numbers (a row of J would be padded to 128). 16 reads are in flight while the 16 before are summed: two buffers
of 16 J rows. Sums are float32 in increasing j.

Letters: N reads, J hits per read, M rows, d width, a row is C tiles of L columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from recscale.pallas_kernels.targets import Target

from .costs import read_cost
from .gates import GATES
from .tpu_layout import LANES, Tiles, as_tiles, tiles_of

Array = jax.Array
Ref = Any

# Reads summed together: the rows of a bfloat16 tile.
GROUP = 16

# Hits of a program at least, so that its fixed costs are shared.
_HITS = 2048

# Copies started, or hits summed, per iteration of a loop.
UNROLL = 8


def buffer_bytes(per_read: int, width: int, dtype: Any) -> int:
    """Vector memory of the two row buffers."""
    # A buffered row takes whole vector registers.
    tiles = -(-tiles_of(width, dtype).stored[0] // 8) * 8
    return 2 * GROUP * per_read * tiles * LANES * jnp.dtype(dtype).itemsize


def reads_per_block(reads: int, per_read: int) -> int:
    """R: a multiple of 16 with R*J a multiple of 128, enough for `_HITS` hits but no more than there are."""
    step = GROUP
    while step * per_read % LANES:
        step *= 2
    return step * max(min(-(-_HITS // (step * per_read)), -(-reads // step)), 1)


def hits_in_blocks(array: Array, block: int) -> Array:
    """[N, J] -> [blocks, 1, R*J], the last one padded with zeros."""
    padded = jnp.pad(array, ((0, -array.shape[0] % block), (0, 0)))
    return padded.reshape(-1, 1, block * array.shape[1])


def double_buffered(
    first: Any,
    last: Any,
    start: Callable[[Any, Any], None],
    wait: Callable[[Any], None],
    work: Callable[[Any, Any], None],
) -> None:
    """work(i, slot) for first <= i < last, while start(i + 1, other slot) is under way."""

    @pl.when(first < last)
    def _():
        start(first, jax.lax.rem(first, 2))

    def step(i, carry):
        slot = jax.lax.rem(i, 2)

        @pl.when(i + 1 < last)
        def _():
            start(i + 1, 1 - slot)

        wait(slot)
        work(i, slot)
        return carry

    jax.lax.fori_loop(first, last, step, 0)


def row_copies(ids: Ref, table: Ref, buffers: Ref, semaphores: Ref, hits: int, tiles: Tiles):
    """(start, wait) of copies of `hits` rows into a buffer: those named at ids[0, 0, group*hits ...]."""

    def start(group, slot):
        def one(h, carry):
            row = table.at[tiles.at(ids[0, 0, group * hits + h])]
            pltpu.make_async_copy(row, buffers.at[slot, h], semaphores.at[slot]).start()
            return carry

        jax.lax.fori_loop(0, hits, one, 0, unroll=min(UNROLL, hits))

    def wait(slot):
        # One wait for the bytes of all copies.
        pltpu.make_async_copy(buffers.at[slot], buffers.at[slot], semaphores.at[slot]).wait()

    return start, wait


def compiler_parameters(
    target: Target, *semantics: Literal["parallel", "arbitrary"], eighths: int = 4
) -> pltpu.CompilerParams:
    """Grid semantics, and so many eighths of the target's vector memory: the compiler's own limit is far lower."""
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=target.vmem_bytes * eighths // 8)


def _hits_spec(size: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, size), lambda b: (b, 0, 0), memory_space=pltpu.SMEM)


def weighted(weight: Array, row: Array) -> Array:
    """weight * row; 0 where the weight is, as that of an absent hit, whatever the row holds."""
    return jnp.where(weight != 0, weight * row, 0.0)


def _columns(c: int, width: int) -> slice:
    """Columns of tile c."""
    return slice(c * LANES, min((c + 1) * LANES, width))


# ---- y[t] = sum_j w[t,j] V[ids[t,j]]


def read(
    values, ids, weights, gate, gate_fn: str, *, target: Target, interpret: Any = False
) -> tuple[Array, Array | None]:
    """(out, y) of clamped ids [N, J] and float32 weights [N, J], 0 where a hit is absent."""
    (reads, per_read), width, dtype = ids.shape, values.shape[1], values.dtype
    tiles = tiles_of(width, dtype)
    block = reads_per_block(reads, per_read)
    hits = block * per_read
    rows = pl.BlockSpec((block, width), lambda b: (b, 0))
    gated = gate is not None
    flops, moved = read_cost(reads, per_read, width, dtype, gated)
    out = jax.ShapeDtypeStruct((reads, width), gate.dtype if gated else dtype)
    found = pl.pallas_call(
        functools.partial(_read_kernel, gate_fn=gate_fn, per_read=per_read, tiles=tiles),
        grid=(-(-reads // block),),
        in_specs=[_hits_spec(hits), _hits_spec(hits), pl.BlockSpec(memory_space=pl.ANY), *([rows] if gated else [])],
        out_specs=[rows] * (1 + gated),
        out_shape=[out] * (1 + gated),
        scratch_shapes=[
            pltpu.VMEM((2, GROUP * per_read, *tiles.stored), dtype),
            pltpu.VMEM((tiles.columns, GROUP, tiles.lanes), jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        compiler_params=compiler_parameters(target, "parallel"),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=gated * reads * width),
        interpret=interpret,
        name="sparse_gather_copies",
    )(hits_in_blocks(ids, block), hits_in_blocks(weights, block), as_tiles(values), *([gate] if gated else []))
    return found[0], found[1] if gated else None


def _read_kernel(ids: Ref, weights: Ref, table: Ref, *refs: Ref, gate_fn: str, per_read: int, tiles: Tiles) -> None:
    *gated, buffers, sums, semaphores = refs
    gate, out, y = (gated[0], gated[1], gated[2]) if len(gated) == 3 else (None, gated[0], None)
    block, width = out.shape

    def one_read(group, slot, r, carry):
        def add(j, total):
            hit = (group * GROUP + r) * per_read + j
            row = tiles.pick(buffers[slot, r * per_read + j], ids[0, 0, hit])
            return total + weighted(weights[0, 0, hit], row)

        zeros = jnp.zeros(tiles.row, jnp.float32)
        total = jax.lax.fori_loop(0, per_read, add, zeros, unroll=min(UNROLL, per_read))
        for c in range(sums.shape[0]):
            sums[c, pl.ds(r, 1), :] = total[c : c + 1]
        return carry

    def work(group, slot):
        jax.lax.fori_loop(0, GROUP, functools.partial(one_read, group, slot), 0)
        at = pl.ds(pl.multiple_of(group * GROUP, GROUP), GROUP)
        for c in range(sums.shape[0]):
            cut = _columns(c, width)
            finish(sums[c][:, : cut.stop - cut.start], (at, cut), gate, gate_fn, out, y)

    start, wait = row_copies(ids, table, buffers, semaphores, GROUP * per_read, tiles)
    double_buffered(0, block // GROUP, start, wait, work)


def finish(total: Array, at: Any, gate: Ref, gate_fn: str, out: Ref, y: Ref) -> None:
    """Writes out[at] = total; with a gate (None: without) gate[at] * f(total), and y[at] for the backward."""
    if gate is None:
        out[at] = total.astype(out.dtype)
        return
    out[at] = (gate[at].astype(jnp.float32) * GATES[gate_fn](total)).astype(out.dtype)
    y[at] = total.astype(y.dtype)


# ---- dw[t,j] = <g[t], V[ids[t,j]]>


def weight_gradient(values, ids, g, *, target: Target, interpret: Any = False) -> Array:
    """float32 [N, J] of clamped ids [N, J] and float32 g [N, d]."""
    (reads, per_read), width, dtype = ids.shape, values.shape[1], values.dtype
    tiles = tiles_of(width, dtype)
    block = reads_per_block(reads, per_read)
    flops, moved = read_cost(reads, per_read, width, dtype, False)
    return pl.pallas_call(
        functools.partial(_weight_kernel, per_read=per_read, tiles=tiles),
        grid=(-(-reads // block),),
        in_specs=[
            _hits_spec(block * per_read),
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec((block, width), lambda b: (b, 0)),
        ],
        out_specs=pl.BlockSpec((block, per_read), lambda b: (b, 0)),
        out_shape=jax.ShapeDtypeStruct((reads, per_read), jnp.float32),
        scratch_shapes=[
            pltpu.VMEM((2, GROUP * per_read, *tiles.stored), dtype),
            pltpu.VMEM((GROUP, *tiles.row), jnp.float32),
            pltpu.VMEM((per_read, GROUP, tiles.lanes), jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        compiler_params=compiler_parameters(target, "parallel"),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0),
        interpret=interpret,
        name="sparse_gather_copies_dw",
    )(hits_in_blocks(ids, block), as_tiles(values), g)


def _weight_kernel(
    ids: Ref,
    table: Ref,
    g: Ref,
    dw: Ref,
    buffers: Ref,
    tall: Ref,
    products: Ref,
    semaphores: Ref,
    *,
    per_read: int,
    tiles: Tiles,
) -> None:
    block, width = g.shape

    def one_read(group, slot, r, carry):
        side = tall[r]

        def one_hit(j, carry):
            row = ids[0, 0, (group * GROUP + r) * per_read + j]
            product = side * tiles.pick(buffers[slot, r * per_read + j], row)
            products[j, pl.ds(r, 1), :] = jnp.sum(product, axis=0, keepdims=True)
            return carry

        return jax.lax.fori_loop(0, per_read, one_hit, carry, unroll=min(UNROLL, per_read))

    def work(group, slot):
        at = pl.ds(pl.multiple_of(group * GROUP, GROUP), GROUP)
        for c in range(tall.shape[1]):
            cut = _columns(c, width)
            if cut.stop - cut.start < tall.shape[2]:
                tall[:, c, :] = jnp.zeros((GROUP, LANES), jnp.float32)
            tall[:, c, : cut.stop - cut.start] = g[at, cut]
        jax.lax.fori_loop(0, GROUP, functools.partial(one_read, group, slot), 0)
        dw[at, :] = sum_lanes(products, per_read)

    start, wait = row_copies(ids, table, buffers, semaphores, GROUP * per_read, tiles)
    double_buffered(0, block // GROUP, start, wait, work)


def sum_lanes(products: Ref, per_read: int) -> Array:
    """[J, 16, lanes] -> [16, J]."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (GROUP, per_read), 1)
    total = jnp.zeros((GROUP, per_read), jnp.float32)
    for j in range(per_read):
        total = jnp.where(lane == j, jnp.sum(products[j], axis=1, keepdims=True), total)
    return total
