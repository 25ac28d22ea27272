"""Which tiles of rows and keys the Hopper attention kernels visit, and how their work is shared out among blocks.

A warpgroup works on 64 rows of a score tile. Keys (or, for dk and dv, query rows) stream through shared memory: one
warpgroup of each block loads, the others compute.

Letters: R requests, N query rows, S keys, H heads, d head width, dv value width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from recscale.pallas_kernels.hopper_tiles import SIDE, Lane, Tile, drain, round_up, stream
from recscale.pallas_kernels.targets import Target

Array = jax.Array

# Products contract over multiples of 16.
WIDTH_GRANULE = 16

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)


def key_ranges(positions: Array, lengths: Array, rows: int, keys: int) -> Array:
    """int32 [R, ceil(N/rows), 4]: the key tiles a tile of query rows visits, and which of them need no mask.

    (begin, clear_begin, clear_end, end): key tiles begin <= j < end hold every visible pair; in tiles
    clear_begin <= j < clear_end each row sees each key. A row tile that sees nothing has begin = end.

    Args:
        positions: int32 [1 or R, N], the first key each row sees.
        lengths: int32 [R].
        rows, keys: tile sizes.
    """
    first, last = _extremes(positions, rows)
    length = lengths[:, None]
    begin = first // keys
    end = jnp.where(first < length, -(-length // keys), begin)
    clear_begin = jnp.minimum(-(-last // keys), end)
    clear_end = jnp.maximum(jnp.minimum(length // keys, end), clear_begin)
    parts = jnp.broadcast_arrays(begin, clear_begin, clear_end, end)
    return jnp.stack(parts, axis=-1).astype(jnp.int32)


def row_ranges(positions: Array, lengths: Array, rows: int, keys: int, total_keys: int) -> Array:
    """int32 [R, ceil(S/keys), 2]: the tiles of query rows a key tile visits, and which of them need no mask.

    (clear, end): row tiles i < end hold every row that sees one of these keys (positions grow along the rows but for
    candidates, whose rows start again); tiles i < clear are whole and each of their rows sees each key.
    """
    first, last = _extremes(positions, rows)
    start = jnp.arange(-(-total_keys // keys), dtype=jnp.int32) * keys
    tile = jnp.arange(1, first.shape[1] + 1, dtype=jnp.int32)[:, None]
    length = lengths[:, None]
    stop = jnp.minimum(start + keys, length)
    end = jnp.max(jnp.where(first[:, :, None] < stop[:, None], tile, 0), axis=1)
    clear = jnp.sum(lax.cummax(last, axis=1)[:, :, None] <= start, axis=1)
    end = jnp.where(start < length, end, 0)
    clear = jnp.where(start + keys <= length, jnp.minimum(clear, positions.shape[1] // rows), 0)
    return jnp.stack([clear, end], axis=-1).astype(jnp.int32)


def visited_tiles(positions: Array, lengths: Array, rows: int, keys: int) -> Array:
    """int32 [R]: how many tiles of rows x keys the forward kernel works on, per request and head."""
    ranges = key_ranges(positions, lengths, rows, keys)
    return jnp.sum(ranges[..., 3] - ranges[..., 0], axis=1)


def _extremes(positions: Array, rows: int) -> tuple[Array, Array]:
    """Smallest and largest position of each tile of rows, int32 [1 or R, tiles]."""
    tiles = -(-positions.shape[1] // rows)
    fill = [(0, 0), (0, tiles * rows - positions.shape[1])]
    tiled = jnp.pad(positions, fill, mode="edge").reshape(-1, tiles, rows)
    return tiled.min(axis=2), tiled.max(axis=2)


def rows_held(n: int, block: int, interpret: bool) -> int:
    """Rows an array needs whose tiles of `block` rows are copied.

    On the chip a copy reads zeros beyond the end and writes nothing there, but rows come in groups of 8 unless all are
    in one. Interpret mode knows no copies across the end.
    """
    return round_up(n, block) if interpret else (n if n <= 8 else round_up(n, 8))


def values_held(n: int, block: int, interpret: bool) -> int:
    """The same for 32-bit values along the last axis: what a copy starts from lies at multiples of 16 bytes."""
    return round_up(n, block if interpret else 4)


def stages_that_fit(memory: int, fixed: int, per_stage: int, most: int) -> int:
    """Depth of a stream: as deep as shared memory allows, at most `most`; 0 if not even two stages fit."""
    # Barriers, and the scratch of reductions across warps.
    stages = min(most, (memory - fixed - 4096) // per_stage)
    return stages if stages >= 2 else 0


def tile_memory(tile: Tile, shape: tuple[int, ...], dtype: Any, rows: int = SIDE) -> Any:
    """Shared memory for tiles [..., n, width] that products read.

    A product contracts over as many rows at a time as the swizzle has columns: `rows` is how many the streamed tiles
    have, for every operand alike, since both of a product share the swizzle.
    """
    columns = next((c for c in (64, 32, 16) if shape[-1] % c == 0 and rows % c == 0), None)
    return tile.memory(shape, dtype, columns)


def clear_beyond(tile: Tile, refs, valid) -> None:
    """Zeros in the rows of key or value tiles that lie beyond a request's length: 0 * NaN would not be 0.

    Args:
        refs: tiles [keys, width]. valid: how many of their rows are of the request.
    """

    @pl.when(valid < refs[0].shape[0])
    def _clear():
        for ref in refs:
            tile.clear_rows(ref, valid)
        plgpu.commit_smem()


@dataclasses.dataclass(frozen=True)
class Items:
    """The work of a kernel: one item for each tile, head and request, `per_block` neighbours to a block.

    A block that has several keeps its stream running from one to the next.
    """

    requests: int
    heads: int
    tiles: int
    per_block: int

    @property
    def total(self) -> int:
        return self.requests * self.heads * self.tiles

    @property
    def blocks(self) -> int:
        return -(-self.total // self.per_block)

    def each(self, one: Callable[[Array, Array, Array, Array], Array]) -> Array:
        """Runs `done = one(request, head, tile, done)` for the items of this block, from done = 0; returns the last."""
        first = lax.axis_index("block") * self.per_block

        def item(n, done):
            tile, rest = lax.rem(n, jnp.int32(self.tiles)), lax.div(n, jnp.int32(self.tiles))
            head, request = lax.rem(rest, jnp.int32(self.heads)), lax.div(rest, jnp.int32(self.heads))
            return one(request, head, tile, done)

        return lax.fori_loop(first, lax.min(first + self.per_block, jnp.int32(self.total)), item, jnp.int32(0))


def items_per_block(items: int, steps: int, target: Target) -> int:
    """How many items a block gets: one, or with short streams of `steps` tiles as many as make 16 steps of them.

    Four blocks for each multiprocessor are left all the same, so that long and short requests even out.
    """
    return max(1, min(16 // steps, items // (4 * target.sms)))


def load_keys(inputs, scratch, items: Items, keys: int, stages: int) -> None:
    """The loading warpgroup: streams the key tiles (with their bias) and value tiles that the items' rows see."""

    def lanes(r, h, begin):
        def load_k(step, slot):
            at, ready = pl.ds((begin + step) * keys, keys), scratch["k_ready"].at[slot]
            plgpu.copy_gmem_to_smem(inputs["k"].at[r, at, h], scratch["k_tile"].at[slot], ready)
            if "bias" in inputs:
                plgpu.copy_gmem_to_smem(inputs["bias"].at[r, h, at], scratch["bias_tile"].at[slot], ready)

        def load_v(step, slot):
            at, ready = pl.ds((begin + step) * keys, keys), scratch["v_ready"].at[slot]
            plgpu.copy_gmem_to_smem(inputs["v"].at[r, at, h], scratch["v_tile"].at[slot], ready)

        both = Lane(scratch["k_free"], load_k), Lane(scratch.get("v_free"), load_v)
        return both if "v" in inputs else both[:1]

    def item(r, h, t, done):
        begin, end = inputs["ranges"][r, t, 0], inputs["ranges"][r, t, 3]
        return stream(lanes(r, h, begin), end - begin, stages, done)

    free = [scratch[name] for name in ("k_free", "v_free") if name in scratch]
    drain(free, items.each(item), stages)
