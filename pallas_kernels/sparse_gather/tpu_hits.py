"""Gradients of a sparse read on a TensorCore, by sorted hits: one pass over g for values and weights together.

    dV[m] = sum over hits of row m of w g[t]          dw[hit] = <g[t], V[m]>

Hits are sorted by (row, flat index), stable, and cut into chunks; rows are cut into blocks that lie in vector memory.
A program serves one chunk within one block, so that a chunk on a border is served twice, each time the hits it owns.
The g rows of a chunk are copied from HBM, 128 in flight while the 128 before are added. Additions follow `hits`:
float32, in sorted order, and pieces of 4096 hits of one row added left to right. The sum so far is stored after every
hit (the last store of a row is its sum), so nothing is read back and rows without a hit keep the block's zeros.

Letters: N reads, J hits per read, M rows, d width; a row is C tiles of L columns.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from recscale.pallas_kernels.targets import Target

from .costs import gradients_cost, value_gradient_cost
from .hits import PIECE
from .tpu_copies import compiler_parameters, double_buffered, row_copies
from .tpu_layout import LANES, Tiles, as_tiles, tiles_of

Array = jax.Array
Ref = Any

# Hits of a chunk, and of one buffer of g rows.
CHUNK = 2048
_GROUP = 128

# Bytes of a block of dV rows.
_BLOCK_BYTES = 2 * 2**20

# Unrolled hits of a full group.
_UNROLL = 4


class Items(NamedTuple):
    """Programs, int32 [items] each: block of rows, chunk of hits, and the hits first <= h < last of the chunk."""

    block: Array
    chunk: Array
    first: Array
    last: Array


def item_count(hits: int, rows: int, width: int) -> int:
    """Programs at most: a chunk is shared by two blocks at every border between blocks."""
    return -(-hits // CHUNK) + -(-rows // rows_per_block(rows, width))


def rows_per_block(rows: int, width: int) -> int:
    """Rows of dV that lie in vector memory together: a multiple of 8, or all."""
    tiles = -(-width // LANES)
    return min(max(_BLOCK_BYTES // (tiles * LANES * 4) // 8 * 8, 8), rows)


def sorted_hits(ids: Array, weights: Array, rows: int) -> tuple[Array, ...]:
    """(rows, flat indices, weights) of hits by (row, flat index), whole chunks; row M for absent hits, which come last.

    One sort carries everything: reading scalars by index afterwards is slow on TPUs.
    """
    flat = jnp.where(ids < 0, rows, jnp.minimum(ids, rows - 1)).reshape(-1).astype(jnp.int32)
    position = jnp.arange(flat.size, dtype=jnp.int32)
    found = jax.lax.sort((flat, position, weights.reshape(-1).astype(jnp.float32)), num_keys=2, is_stable=False)
    short = -flat.size % CHUNK
    return tuple(jnp.pad(a, (0, short), constant_values=fill) for a, fill in zip(found, (rows, 0, 0), strict=True))


def items_of(sorted_rows: Array, rows: int, block: int) -> Items:
    """The programs of sorted hits, in order; a block without hits has one (its rows are zeros), the rest do nothing."""
    blocks, chunks = -(-rows // block), sorted_rows.size // CHUNK
    borders = jnp.minimum(jnp.arange(blocks + 1, dtype=jnp.int32) * block, rows)
    edges = jnp.searchsorted(sorted_rows, borders, side="left").astype(jnp.int32)
    starts, ends = edges[:-1], edges[1:]
    first = jnp.minimum(starts // CHUNK, chunks - 1)
    count = jnp.maximum(jnp.maximum(ends - 1, starts) // CHUNK - starts // CHUNK, 0) + 1
    until = jnp.cumsum(count)
    item = jnp.arange(blocks + chunks, dtype=jnp.int32)
    owner = jnp.minimum(jnp.searchsorted(until, item, side="right"), blocks - 1).astype(jnp.int32)
    chunk = jnp.minimum(first[owner] + item - (until - count)[owner], chunks - 1).astype(jnp.int32)
    live = item < until[-1]
    low = jnp.clip(starts[owner] - chunk * CHUNK, 0, CHUNK)
    high = jnp.where(live, jnp.clip(ends[owner] - chunk * CHUNK, 0, CHUNK), 0)
    return Items(owner, chunk, low, high)


def gradients(
    rows: int,
    values: Array | None,
    ids: Array,
    weights: Array,
    g: Array,
    *,
    target: Target,
    interpret: Any = False,
) -> tuple[Array, Array | None]:
    """(dV float32 [M, d], dw float32 [N, J]); without values only the former.

    ids int32 [N, J], -1 = absent; weights [N, J]; g float32 [N, d].
    """
    (reads, per_read), width = ids.shape, g.shape[1]
    block = rows_per_block(rows, width)
    hit_rows, order, hit_weights = sorted_hits(ids, weights, rows)
    if values is None:
        flops, moved = value_gradient_cost(reads, per_read, width, rows)
    else:
        flops, moved = gradients_cost(reads, per_read, width, rows, values.dtype)
    found = _launch(
        items_of(hit_rows, rows, block),
        (hit_rows, order // per_read, hit_weights),
        g.astype(jnp.float32),
        values,
        rows,
        block,
        compiler_params=compiler_parameters(target, "arbitrary"),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0),
        interpret=interpret,
    )
    dvalues = found[0].reshape(rows, -1)[:, :width]
    if values is None:
        return dvalues, None
    _, dw = jax.lax.sort((order[: ids.size], found[1].reshape(-1)[: ids.size]), num_keys=1, is_stable=False)
    return dvalues, jnp.where(ids < 0, 0.0, dw.reshape(ids.shape))


def _launch(
    items: Items, hits: tuple[Array, ...], g: Array, values: Array | None, rows: int, block: int, **options: Any
) -> list[Array]:
    """[dV in tiles, dw of the sorted hits]; without values only the former. Programs run in order: a row's sum is
    carried from one to the next."""
    g_tiles = tiles_of(g.shape[1], jnp.float32)
    in_hits = pl.BlockSpec((1, 1, CHUNK), lambda i, block, chunk, *_: (chunk[i], 0, 0), memory_space=pltpu.SMEM)
    in_specs = [in_hits, in_hits, in_hits, pl.BlockSpec(memory_space=pl.ANY)]
    out_specs, out_shape = [_rows_spec(g_tiles, block)], [jax.ShapeDtypeStruct(g_tiles.block(rows), jnp.float32)]
    scratch = [
        pltpu.VMEM((2, _GROUP, *g_tiles.stored), jnp.float32),
        pltpu.VMEM((2, *g_tiles.row), jnp.float32),
        pltpu.SMEM((2,), jnp.int32),
        pltpu.SemaphoreType.DMA((2,)),
    ]
    tables, tiles = [], None
    if values is not None:
        tables, tiles = [as_tiles(values)], tiles_of(values.shape[1], values.dtype)
        in_specs += [_rows_spec(tiles, block)]
        out_specs += [pl.BlockSpec((CHUNK // LANES, LANES), lambda i, block, chunk, *_: (chunk[i], 0))]
        out_shape += [jax.ShapeDtypeStruct((hits[0].size // LANES, LANES), jnp.float32)]
        scratch += [pltpu.VMEM((_GROUP, g_tiles.lanes), jnp.float32)]
    return pl.pallas_call(
        functools.partial(_kernel, g_tiles=g_tiles, tiles=tiles),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(items),
            grid=(items.block.size,),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        name="sparse_gather_dv" if values is None else "sparse_gather_gradients",
        **options,
    )(*items, *(a.reshape(-1, 1, CHUNK) for a in hits), as_tiles(g), *tables)


def _rows_spec(tiles: Tiles, block: int) -> pl.BlockSpec:
    """A block of table rows of the program's block."""
    shape = tiles.block(block)
    return pl.BlockSpec(shape, lambda i, block, *_: (block[i], *(0,) * (len(shape) - 1)))


def _kernel(
    block: Ref,
    chunk: Ref,
    first: Ref,
    last: Ref,
    rows: Ref,
    reads: Ref,
    weights: Ref,
    g: Ref,
    *refs,
    g_tiles: Tiles,
    tiles: Tiles | None,
):
    table: Ref
    dw: Ref
    products: Ref
    if tiles is not None:
        table, dv, dw, buffers, sums, row_and_count, semaphores, products = refs
    else:
        (dv, buffers, sums, row_and_count, semaphores), table, dw, products = refs, None, None, None
    item = pl.program_id(0)
    low, high = first[item], last[item]
    base = block[item] * dv.shape[0]

    @pl.when((item == 0) | (block[item] != block[jnp.maximum(item - 1, 0)]))
    def _():
        dv[...] = jnp.zeros_like(dv)
        sums[...] = jnp.zeros_like(sums)
        row_and_count[0] = -1
        row_and_count[1] = 0

    def one_hit(slot, offset, h, carry):
        """carry: the row being summed, its hits so far, the sum of its finished pieces and of the present piece."""
        row_before, count, done, piece = carry
        hit = offset + h
        row = rows[0, 0, hit] - base
        x = buffers[slot, h]
        same = row == row_before
        count = jnp.where(same, count + 1, 0)
        opens = jax.lax.rem(count, PIECE) == 0
        done = jnp.where(same, jnp.where(opens, done + piece, done), 0.0)
        piece = jnp.where(opens, 0.0, piece) + weights[0, 0, hit] * x
        dv[g_tiles.at(row)] = done + piece
        if tiles is not None:
            products[pl.ds(h, 1), :] = jnp.sum(x * tiles.pick(table[tiles.at(row)], row), axis=0, keepdims=True)
        return row, count, done, piece

    def work(group, slot):
        offset = group * _GROUP
        begin, end = jnp.maximum(low - offset, 0), jnp.minimum(high - offset, _GROUP)
        step = functools.partial(one_hit, slot, offset)

        def run(loop):
            carry = loop((row_and_count[0], row_and_count[1], sums[0], sums[1]))
            row_and_count[0], row_and_count[1], sums[0], sums[1] = carry

        whole = (begin == 0) & (end == _GROUP)
        pl.when(whole)(lambda: run(lambda carry: jax.lax.fori_loop(0, _GROUP, step, carry, unroll=_UNROLL)))
        pl.when(~whole)(lambda: run(lambda carry: jax.lax.fori_loop(begin, end, step, carry)))
        if tiles is not None:
            _store_row(products, dw, group, begin, end)

    start, wait = row_copies(reads, g, buffers, semaphores, _GROUP, g_tiles)
    double_buffered(jax.lax.div(low, _GROUP), jax.lax.div(high + _GROUP - 1, _GROUP), start, wait, work)


def _store_row(products: Ref, dw: Ref, group: Any, begin: Any, end: Any) -> None:
    """dw[group, h] = sum of products[h] for begin <= h < end; [128, 1] becomes [1, 128] by a masked sum."""
    column = jnp.sum(products[...], axis=1, keepdims=True)
    down, across = (jax.lax.broadcasted_iota(jnp.int32, (_GROUP, LANES), axis) for axis in (0, 1))
    flat = jnp.sum(jnp.where(down == across, column, 0.0), axis=0, keepdims=True)
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    at = pl.ds(group, 1)
    dw[at, :] = jnp.where((lane >= begin) & (lane < end), flat, dw[at, :])
