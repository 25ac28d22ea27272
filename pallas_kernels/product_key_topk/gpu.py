"""`product_key_topk` as one kernel on Hopper GPUs (Mosaic GPU): scores, both selections of sub-keys, and of pairs.

    grid (head, tile of 64 reads)      one warpgroup a block, reads on the rows of its tiles

WGMMA leaves the scores of 64 reads and up to 256 sub-keys in registers. A selection is K rounds of {the largest of each
row, the lowest index that has it, put -inf there}. More sub-keys come in chunks: the best K so far stand beside the
next chunk's scores and take part in its rounds. Winners go to shared memory, a row of 64 reads per rank.

The pairs: both lists descend, so the best pair not yet taken with row rank i has the lowest column rank left, j_i. The
kernel holds its score for every i, [64, K], and K rounds take the largest (lowest i first, which is the order of ties)
and move that j_i on. No other pair is ever formed.

Keys stream through shared memory 64 columns at a time; a step's memory is filled again as soon as its product is done,
while the rounds run. float32 inputs (one is enough) are split into three bfloat16 pieces each and the six products that
matter are summed, as a TPU does at its highest precision: TF32 would round them to 10 bits. For them, queries and keys
are copied; otherwise only keys are (a -inf is made finite), with queries whose number is no multiple of 8 or whose
width is none of 64, and results of several heads, or whose reads are no multiple of 64 or whose winners none of 8.

Compiled for H100, not yet run on one.

Letters: N reads, H heads, n sub-keys per axis, p key width per axis, K winners.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from recscale.pallas_kernels import compat
from recscale.pallas_kernels.blocks import block_sizes
from recscale.pallas_kernels.hopper_tiles import SIDE, Ref, Tile, along_rows, pad_axis, round_up, where
from recscale.pallas_kernels.targets import Target

from .reference import comparable, finite_keys

Array = jax.Array
Shape = tuple[int, ...]

# Columns of queries and keys in one step of a product: one row of 128 bytes, the widest swizzle.
_COLUMNS = 64
# Sub-keys whose scores, and winners whose pairs, fit the registers of a warpgroup: fewer sub-keys where the winners of
# the chunks before them stand beside their scores and a product takes many steps. (float32 at n = 1024, p = 128, K = 32
# still spills 32 bytes.)
_MOST_CHUNK, _CROWDED_CHUNK, _MOST_WINNERS = 256, 192, 32
_FEW_STEPS = 2
_GRANULE = 8
# Steps of keys in shared memory.
_STAGES = 2
# Barriers and what the compiler aligns.
_SPARE_BYTES = 1024


def obstacle(target: Target, q_shape: Shape, keys_shape: Shape, k: int, dtypes) -> str | None:
    """Why this kernel cannot serve q [N,H,2,p] and keys [H,2,n,p] of these dtypes on that target, or None."""
    for dtype in dtypes:
        if dtype not in (jnp.float32, jnp.bfloat16):
            return f"an input is {jnp.dtype(dtype).name}, expected float32 or bfloat16"
    if 0 in q_shape:
        return f"q {q_shape} is empty"
    if k > _MOST_WINNERS:
        return f"topk is {k}, at most {_MOST_WINNERS}: the pairs of its ranks stay in registers"
    plan = _plan(q_shape, keys_shape, k, dtypes, target)
    needed = plan.shared_bytes + _SPARE_BYTES
    if needed > target.vmem_bytes:
        return f"key width {q_shape[-1]} takes {needed} bytes of shared memory, more than {target.vmem_bytes}"
    return None


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Sizes of one call: `pieces` bfloat16 arrays stand for queries and keys, each of `slices` times 64 columns."""

    k: int
    sub_keys: int
    chunk: int
    chunks: int
    stages: int
    pieces: int
    slices: int

    @property
    def winners(self) -> int:
        return round_up(self.k, _GRANULE)

    @property
    def all_slices(self) -> int:
        return self.pieces * self.slices

    @property
    def steps(self) -> int:
        """How many tiles of keys a block loads: every slice of every chunk, of both axes."""
        return 2 * self.chunks * self.all_slices

    @property
    def shared_bytes(self) -> int:
        tiles = 2 * _COLUMNS * (self.all_slices * SIDE + self.stages * self.chunk)
        return tiles + 2 * self.winners * SIDE * 8


def _plan(q_shape: Shape, keys_shape: Shape, k: int, dtypes, target: Target | None) -> _Plan:
    sub_keys, low = keys_shape[2], _is_low(dtypes)
    pieces, slices = 1 if low else 3, pl.cdiv(q_shape[-1], _COLUMNS)
    crowded = sub_keys > _MOST_CHUNK and pieces * slices > _FEW_STEPS
    heuristic = {"sub_keys": _CROWDED_CHUNK if crowded else _MOST_CHUNK, "stages": _STAGES}
    key = f"n{sub_keys}_K{k}_p{q_shape[-1]}_{'bfloat16' if low else 'float32'}"
    blocks = block_sizes("product_key_topk", "pallas_gpu", key, heuristic, target)
    chunks = pl.cdiv(sub_keys, blocks["sub_keys"])
    return _Plan(
        k=k,
        sub_keys=sub_keys,
        chunk=round_up(pl.cdiv(sub_keys, chunks), _GRANULE),
        chunks=chunks,
        stages=blocks["stages"],
        pieces=pieces,
        slices=slices,
    )


def topk(
    q: Array, keys: Array, k: int, scale: float, *, target: Target, interpret: bool = False
) -> tuple[Array, Array]:
    """q [N,H,2,p], keys [H,2,n,p] -> scores float32 [N,H,k], ids int32 [N,H,k].

    Args:
        target: chip to compile for; one on which `obstacle` finds nothing.
        interpret: run by interpretation, on any device.
    """
    reads, heads, _, width = q.shape
    dtypes = (q.dtype, keys.dtype)
    plan = _plan(q.shape, keys.shape, k, dtypes, target)
    tile = Tile(interpret)
    cost = pl.CostEstimate(
        flops=4 * reads * heads * plan.sub_keys * width,
        bytes_accessed=q.size * q.dtype.itemsize + keys.size * keys.dtype.itemsize + 8 * reads * heads * k,
        transcendentals=0,
    )
    tiles = pl.cdiv(reads, SIDE)
    q, keys = (pad_axis(x, 3, plan.slices * _COLUMNS) for x in (q, finite_keys(keys)))
    if not _is_low(dtypes):
        q = jnp.concatenate(_pieces(q), axis=-1)
        keys = jnp.concatenate(_pieces(keys)[::-1], axis=-1)
    # The copies move groups of 8 reads; interpretation knows none across the end of an array.
    q = pad_axis(q, 0, tiles * SIDE if interpret else round_up(reads, _GRANULE))
    keys = pad_axis(keys, 2, plan.chunks * plan.chunk)
    scratch = {
        "q_tile": tile.memory((plan.all_slices, SIDE, _COLUMNS), jnp.bfloat16),
        "keys_tile": tile.memory((plan.stages, plan.chunk, _COLUMNS), jnp.bfloat16),
        "best": plgpu.SMEM((2, plan.winners, SIDE), jnp.float32),
        "index": plgpu.SMEM((2, plan.winners, SIDE), jnp.int32),
        "q_ready": plgpu.Barrier(num_arrivals=plan.all_slices),
        "keys_ready": plgpu.Barrier(num_barriers=plan.stages),
    }

    def body(q_ref, keys_ref, scores_ref, ids_ref, **scratch):
        _Block(plan, tile, scale, q_ref, keys_ref, **scratch).run(scores_ref, ids_ref)

    # Head by head: a block writes whole lines of memory, however few winners there are.
    out = [jax.ShapeDtypeStruct((heads, tiles * SIDE, plan.winners), dtype) for dtype in (jnp.float32, jnp.int32)]
    scores, ids = compat.mosaic_gpu_kernel(
        body,
        out_type=out,
        grid={"head": heads, "tile": tiles},
        cost=cost,
        name="product_key_topk",
        interpret=interpret,
        scratch=scratch,
        automatic_barriers=False,
    )(q, keys)
    return scores[:, :reads, :k].swapaxes(0, 1), ids[:, :reads, :k].swapaxes(0, 1)


@dataclasses.dataclass(frozen=True)
class _Block:
    """What one warpgroup does for one head and 64 reads."""

    plan: _Plan
    tile: Tile
    scale: float
    q_ref: Ref
    keys_ref: Ref
    q_tile: Ref
    keys_tile: Ref
    best: Ref
    index: Ref
    q_ready: Ref
    keys_ready: Ref

    def run(self, scores_ref, ids_ref) -> None:
        plan = self.plan
        self._load_queries(0)
        for step in range(min(plan.stages, plan.steps)):
            self._load_keys(step)
        # Ranks behind K, and the best of no chunk yet.
        for axis in (0, 1):
            for rank in range(0 if plan.chunks > 1 else plan.k, plan.winners):
                self.best[axis, rank] = self.tile.per_row(-jnp.inf)
                self.index[axis, rank] = self.tile.per_row(0.0).astype(jnp.int32)
        for axis in (0, 1):
            plgpu.barrier_wait(self.q_ready)
            if plan.chunks == 1:
                self._pick_sub_keys(axis, 0)
            else:
                pl.loop(0, plan.chunks)(lambda c, axis=axis: self._pick_sub_keys(axis, c))
        plgpu.commit_smem()
        scores, ids = self._pick_pairs()
        rows = pl.ds(lax.axis_index("tile") * SIDE, SIDE)
        scores_ref[lax.axis_index("head"), rows] = scores
        ids_ref[lax.axis_index("head"), rows] = ids

    def _load_queries(self, axis: int) -> None:
        rows = pl.ds(lax.axis_index("tile") * SIDE, SIDE)
        source = self.q_ref.at[rows, lax.axis_index("head"), axis]
        for i in range(self.plan.all_slices):
            columns = pl.ds(i * _COLUMNS, _COLUMNS)
            plgpu.copy_gmem_to_smem(source.at[:, columns], self.q_tile.at[i], self.q_ready)

    def _load_keys(self, step) -> None:
        """Starts the copy of a step's keys [chunk, 64]."""
        plan, step = self.plan, jnp.int32(step)
        part, i = lax.div(step, jnp.int32(plan.all_slices)), lax.rem(step, jnp.int32(plan.all_slices))
        axis, chunk = lax.div(part, jnp.int32(plan.chunks)), lax.rem(part, jnp.int32(plan.chunks))
        slot = lax.rem(step, jnp.int32(plan.stages))
        rows, columns = pl.ds(chunk * plan.chunk, plan.chunk), pl.ds(i * _COLUMNS, _COLUMNS)
        source = self.keys_ref.at[lax.axis_index("head"), axis, rows, columns]
        plgpu.copy_gmem_to_smem(source, self.keys_tile.at[slot], self.keys_ready.at[slot])

    def _pick_sub_keys(self, axis: int, chunk) -> None:
        """Makes best[axis] and index[axis] those of all sub-keys up to this chunk."""
        plan, tile = self.plan, self.tile
        scores = comparable(self._products(axis, chunk) * self.scale)
        first = chunk * plan.chunk
        column = tile.counting(plan.chunk, 1)
        if plan.chunks * plan.chunk > plan.sub_keys:
            scores = where(column < plan.sub_keys - first, scores, -jnp.inf)
        found = (self._list(self.best, axis), self._list(self.index, axis)) if plan.chunks > 1 else None
        plgpu.commit_smem()  # they are read before the rounds overwrite them

        def one(rank, carry):
            scores, before = carry
            best = scores.max(axis=1)
            if found is not None:
                best = lax.max(best, before.max(axis=1))
            index = where(scores == along_rows(best, plan.chunk), column, plan.sub_keys).min(axis=1) + first
            if found is not None:
                same = where(before == along_rows(best, plan.winners), found[1], plan.sub_keys).min(axis=1)
                index = lax.min(index, same)
                before = where(found[1] != along_rows(index, plan.winners), before, -jnp.inf)
            self.best[axis, rank] = best
            self.index[axis, rank] = index
            scores = where(column != along_rows(index - first, plan.chunk), scores, -jnp.inf)
            return scores, before

        lax.fori_loop(0, plan.k, one, (scores, None if found is None else found[0]))
        plgpu.commit_smem()

    def _products(self, axis: int, chunk) -> Array:
        """float32 [64, chunk]: queries times keys; copies of keys that may start are started."""
        plan, tile = self.plan, self.tile
        begin = (axis * plan.chunks + chunk) * plan.all_slices

        def accumulate(multiply, total):
            # Keys lie (low, middle, high), queries (high, middle, low): a piece of keys meets the largest of queries,
            # so many as matter, and the smallest products come first. Single pieces meet each other.
            for met in range(1, plan.pieces + 1):

                def one(i, total, met=met):
                    step = jnp.int32(begin + (met - 1) * plan.slices + i)
                    slot = lax.rem(step, jnp.int32(plan.stages))
                    plgpu.barrier_wait(self.keys_ready.at[slot])
                    for piece in reversed(range(met)):
                        total = multiply(total, self.q_tile.at[piece * plan.slices + i], self.keys_tile.at[slot])
                    if not tile.interpret:
                        plgpu.wgmma_wait(0)
                    plgpu.commit_smem()  # all four warps are done with the slot

                    @pl.when(step + plan.stages < plan.steps)
                    def _refill():
                        self._load_keys(step + plan.stages)

                    return total

                total = lax.fori_loop(0, plan.slices, one, total)
            return total

        if tile.interpret:
            products = accumulate(
                lambda total, q, keys: tile.add_product(total, q, keys, b_transposed=True), tile.zeros(plan.chunk)
            )
        else:

            def on_chip(acc):
                accumulate(lambda _, q, keys: plgpu.wgmma(acc, q, keys.transpose((1, 0))), None)
                return acc[...]

            products = pl.run_scoped(on_chip, plgpu.ACC((SIDE, plan.chunk), jnp.float32))
        if axis == 0:
            pl.when(chunk == plan.chunks - 1)(lambda: self._load_queries(1))
        return products

    def _list(self, lists, axis: int) -> Array:
        """[64, winners] of a list that lies rank by rank in shared memory."""
        return self.tile.load_transposed(lists.at[axis], lists.dtype)

    def _pick_pairs(self) -> tuple[Array, Array]:
        """Scores and slots [64, winners] of the best K pairs."""
        plan, size = self.plan, self.plan.winners
        row, column = (self._list(self.best, axis) for axis in (0, 1))
        row_index, column_index = (self._list(self.index, axis) for axis in (0, 1))
        rank = self.tile.counting(size, 1)
        # For each row rank: the score of its best pair left, and the column rank of that pair.
        pair = row + along_rows(self.tile.load_rows(self.best.at[1, 0]), size)
        left = rank * 0

        def one(place, carry):
            pair, left, scores, ids = carry
            best = pair.max(axis=1)
            i = where(pair == along_rows(best, size), rank, size).min(axis=1)
            here = rank == along_rows(i, size)
            j = where(here, left, -1).max(axis=1)
            slot = where(here, row_index, 0).max(axis=1) * plan.sub_keys
            slot += where(rank == along_rows(j, size), column_index, 0).max(axis=1)
            following = where(rank == along_rows(j + 1, size), column, -jnp.inf).max(axis=1)
            pair = lax.select(here, row + along_rows(following, size), pair)
            left = lax.select(here, left + 1, left)
            scores = lax.select(rank == place, along_rows(best, size), scores)
            ids = lax.select(rank == place, along_rows(slot, size), ids)
            return pair, left, scores, ids

        return lax.fori_loop(0, plan.k, one, (pair, left, row, left))[2:]


def _is_low(dtypes) -> bool:
    return all(dtype == jnp.bfloat16 for dtype in dtypes)


def _pieces(x: Array) -> list[Array]:
    """Three bfloat16 arrays whose sum is x to float32 precision, largest first."""
    pieces, rest = [], x.astype(jnp.float32)
    for _ in range(3):
        # Not `astype` there and back: XLA may drop such a pair.
        rounded = lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        pieces.append(rounded.astype(jnp.bfloat16))
        rest = rest - rounded
    return pieces
