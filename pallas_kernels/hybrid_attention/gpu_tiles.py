"""What the Hopper attention kernels share: which tiles they visit, and the operations on a tile of one warpgroup.

A warpgroup works on 64 rows of a score tile. Keys (or, for dk and dv, query rows) stream through shared memory: one
warpgroup of each block loads, the others compute, and every buffer of the stream has a barrier "ready" and one "free".

The operations carry layout and memory annotations on the chip and none in interpret mode, which does not know them:
`Tile(interpret=True)` is the switch, the kernels' bodies are the same.

Letters: R requests, N query rows, S keys, H heads, d head width, dv value width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from recscale.pallas_kernels.targets import Target

Array = jax.Array

# Rows of one WGMMA instruction, hence of a warpgroup's tile.
ROWS = 64

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


def round_up(n: int, granule: int) -> int:
    """The smallest multiple of `granule` that is at least n."""
    return -(-n // granule) * granule


def rows_held(n: int, block: int, interpret: bool) -> int:
    """Rows an array needs whose tiles of `block` rows are copied.

    On the chip a copy reads zeros beyond the end and writes nothing there, but rows come in groups of 8 unless all are
    in one. Interpret mode knows no copies across the end.
    """
    return round_up(n, block) if interpret else (n if n <= 8 else round_up(n, 8))


def values_held(n: int, block: int, interpret: bool) -> int:
    """The same for 32-bit values along the last axis: what a copy starts from lies at multiples of 16 bytes."""
    return round_up(n, block if interpret else 4)


def pad_axis(x: Array, axis: int, size: int) -> Array:
    """x with zeros up to `size` along an axis; x itself if it has that size."""
    if x.shape[axis] == size:
        return x
    fill = [(0, 0)] * x.ndim
    fill[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, fill)


def stages_that_fit(memory: int, fixed: int, per_stage: int, most: int) -> int:
    """Depth of a stream: as deep as shared memory allows, at most `most`; 0 if not even two stages fit."""
    # Barriers, and the scratch of reductions across warps.
    stages = min(most, (memory - fixed - 4096) // per_stage)
    return stages if stages >= 2 else 0


@dataclasses.dataclass(frozen=True)
class Tile:
    """Operations on the tiles of a warpgroup, [64, n] in registers and [n, width] in shared memory.

    Attributes:
        interpret: without annotations, and products of loaded values: for interpret mode.
    """

    interpret: bool

    def memory(self, shape: Sequence[int], dtype, rows: int = 64) -> plgpu.SMEM:
        """Shared memory for tiles [..., n, width] that products read: tiled and swizzled as WGMMA wants them.

        A product contracts over as many rows at a time as the swizzle has columns: `rows` is how many the streamed
        tiles have, for every operand alike, since both of a product share the swizzle.
        """
        if self.interpret:
            return plgpu.SMEM(tuple(shape), dtype)
        columns = next(c for c in (64, 32, 16) if shape[-1] % c == 0 and rows % c == 0)
        swizzle = columns * jnp.dtype(dtype).itemsize
        transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle))
        return plgpu.SMEM(tuple(shape), dtype, transforms=transforms)

    def zeros(self, columns: int) -> Array:
        """float32 [64, columns]."""
        return self._as_tile(jnp.zeros((ROWS, columns), jnp.float32))

    def per_row(self, value: float) -> Array:
        """float32 [64], one value for each row."""
        vector = jnp.full((ROWS,), value, jnp.float32)
        return vector if self.interpret else plgpu.layout_cast(vector, plgpu.Layout.WGMMA.reduce(1))

    def load_rows(self, ref) -> Array:
        """[64] from shared memory, one value for each row of a tile."""
        return ref[...] if self.interpret else plgpu.load(ref, (), layout=plgpu.Layout.WGMMA.reduce(1))

    def load_columns(self, ref) -> Array:
        """[n] from shared memory, one value for each column of a tile."""
        return ref[...] if self.interpret else plgpu.load(ref, (), layout=plgpu.Layout.WGMMA.reduce(0))

    def counting(self, columns: int, axis: int) -> Array:
        """int32 [64, columns]: the index along an axis."""
        if self.interpret:
            return lax.broadcasted_iota(jnp.int32, (ROWS, columns), axis)
        return plgpu.broadcasted_iota(jnp.int32, (ROWS, columns), axis, layout=plgpu.Layout.WGMMA)

    def times_transposed(self, a, b) -> Array:
        """float32 a b^T of two refs in shared memory, [64, w] and [n, w]."""
        if self.interpret:
            return lax.dot_general(a[...], b[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

        def product(total):
            plgpu.wgmma(total, a, plgpu.transpose_ref(b, (1, 0)))
            return total[...]

        return pl.run_scoped(product, plgpu.ACC((ROWS, b.shape[0]), jnp.float32))

    def add_product(self, total: Array, a: Array, b) -> Array:
        """total + a b, with a [64, n] in registers and the ref b [n, w]."""
        if self.interpret:
            return total + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
        return pl.run_state(lambda acc: plgpu.wgmma(acc, a, b))(plgpu.ACC.init(total))

    def _as_tile(self, x: Array) -> Array:
        return x if self.interpret else plgpu.layout_cast(x, plgpu.Layout.WGMMA)


def along_rows(vector: Array, columns: int) -> Array:
    """[64] -> [64, columns]: a value for each row."""
    return lax.broadcast_in_dim(vector, (ROWS, columns), (0,))


def along_columns(vector: Array) -> Array:
    """[n] -> [64, n]: a value for each column."""
    return lax.broadcast_in_dim(vector, (ROWS, vector.shape[0]), (1,))


@dataclasses.dataclass(frozen=True)
class Lane:
    """One buffer of a stream: `load(step, slot)` fills a slot and arrives at "ready"; `free` gives it back."""

    free: object
    load: Callable[[Array, Array], None]


def stream(lanes: Sequence[Lane], steps: Array, done: Array, stages: int) -> Array:
    """Loads `steps` tiles of every lane through the slots, after `done` of earlier items; returns their sum."""
    depth = jnp.int32(stages)

    @pl.loop(0, steps)
    def _load(step):
        slot = lax.rem(done + step, depth)
        for lane in lanes:

            @pl.when(done + step >= depth)
            def _wait(lane=lane, slot=slot):
                plgpu.barrier_wait(lane.free.at[slot])

            lane.load(step, slot)

    return done + steps


def drain(free: Sequence[object], done: Array, stages: int) -> None:
    """Waits until the last tiles of a stream are given back: every phase of a barrier is seen."""
    depth = jnp.int32(stages)

    @pl.loop(lax.max(done - depth, jnp.int32(0)), done)
    def _wait(step):
        for barrier in free:
            plgpu.barrier_wait(barrier.at[lax.rem(step, depth)])


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
        return stream(lanes(r, h, begin), end - begin, done, stages)

    free = [scratch[name] for name in ("k_free", "v_free") if name in scratch]
    drain(free, items.each(item), stages)


def where(condition: Array, x: Array, otherwise: float) -> Array:
    """x where the condition holds, else a constant."""
    return lax.select(condition, x, lax.full_like(x, otherwise))
