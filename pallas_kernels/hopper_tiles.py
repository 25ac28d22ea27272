"""Tiles of a Hopper warpgroup (Mosaic GPU) and the streams that bring them, with a switch for interpret mode.

A warpgroup multiplies tiles of 64 rows: float32 sums in registers, 16-bit operands in shared memory, or the left one
in registers. One warpgroup of a block loads, the others compute; every buffer of a stream has a barrier "ready" and one
"free" for each of its slots.

Interpret mode knows neither layouts nor the instruction, so that `Tile(interpret=True)` does the same with plain
arrays; bodies of kernels are the same either way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from .compat import load

Array = jax.Array
Ref = Any  # of memory or barriers, inside a kernel

# Rows of a warpgroup's tile.
SIDE = 64


# Of a warp 8 rows, of a thread 4 neighbouring columns: for tiles whose rows are no multiple of 64.
_EIGHT_ROWS = plgpu.Layout.TILED(
    plgpu.Tiling(((32, 16), (8, 16), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)


@dataclasses.dataclass(frozen=True)
class Tile:
    """Operations on a tile [64, columns] of a warpgroup.

    Attributes:
        interpret: without layouts and WGMMA.
    """

    interpret: Any

    def memory(self, shape: Sequence[int], dtype: DTypeLike, columns: int | None = None) -> Any:
        """Shared memory for tiles, as WGMMA and the copy engine want it: in swizzled pieces of 8 rows by `columns`.

        None: the widest, of 128 bytes. Both operands of a product share the width of their pieces in bytes.
        """
        if self.interpret:
            return plgpu.SMEM(tuple(shape), dtype)
        size = jnp.dtype(dtype).itemsize
        columns = columns or 128 // size
        transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(columns * size))
        return plgpu.SMEM(tuple(shape), dtype, transforms=transforms)

    def set_registers(self, count: int, action: Literal["increase", "decrease"]) -> None:
        """Changes the registers of this warpgroup's threads."""
        if not self.interpret:
            plgpu.set_max_registers(count, action=action)

    def zeros(self, columns: int) -> Array:
        """float32 [64, columns]."""
        zeros = jnp.zeros((SIDE, columns), jnp.float32)
        return zeros if self.interpret else plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)

    def counting(self, columns: int, axis: int) -> Array:
        """int32 [64, columns]: the index along an axis."""
        if self.interpret:
            return lax.broadcasted_iota(jnp.int32, (SIDE, columns), axis)
        return plgpu.broadcasted_iota(jnp.int32, (SIDE, columns), axis, layout=plgpu.Layout.WGMMA)

    def per_row(self, value: float) -> Array:
        """float32 [64], one value for each row."""
        vector = jnp.full((SIDE,), value, jnp.float32)
        return vector if self.interpret else plgpu.layout_cast(vector, plgpu.Layout.WGMMA.reduce(1))

    def load(self, ref: Ref) -> Array:
        """[64, columns] from shared memory."""
        return ref[...] if self.interpret else load(ref, plgpu.Layout.WGMMA)

    def load_transposed(self, ref: Ref, dtype: DTypeLike) -> Array:
        """[64, columns] of the ref [columns, 64], in `dtype`: narrow numbers are widened on the way."""
        if self.interpret:
            return ref[...].T.astype(dtype)
        turned = ref.transpose((1, 0))
        found = load(turned, plgpu.Layout.WGMMA_TRANSPOSED, optimized=False)
        return plgpu.layout_cast(found.astype(dtype), plgpu.Layout.WGMMA)

    def store_transposed(self, ref: Ref, value: Array) -> None:
        """Stores the tile [64, columns] to a ref [columns, 64]."""
        if self.interpret:
            ref[...] = value.T
        else:
            turned = ref.transpose((1, 0))
            turned[...] = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)

    def load_rows(self, ref: Ref, *, device_memory: bool = False) -> Array:
        """[64] from shared memory, or from device memory: one value for each row of a tile."""
        return self._load_vector(ref, 1, device_memory)

    def load_columns(self, ref: Ref, *, device_memory: bool = False) -> Array:
        """[columns] from shared memory, or from device memory: one value for each column of a tile."""
        return self._load_vector(ref, 0, device_memory)

    def _load_vector(self, ref: Ref, reduced: int, device_memory: bool) -> Array:
        if self.interpret:
            return ref[...]
        return load(ref, plgpu.Layout.WGMMA.reduce(reduced), optimized=not device_memory)

    def clear_rows(self, ref: Ref, first) -> None:
        """Puts zeros into the rows of a tile in shared memory from `first` on; to be committed by the caller.

        The tile is [n, width], n a multiple of 32 and width of 16, of 16-bit numbers. Warpgroups that share it may each
        do so: they write the same.
        """
        rows, width = ref.shape
        shape = (32, width)
        for start in range(0, rows, 32):

            @pl.when(first < start + 32)
            def _piece(start=start):
                part = ref.at[pl.ds(start, 32)]
                if self.interpret:
                    value, row = part[...], lax.broadcasted_iota(jnp.int32, shape, 0)
                else:
                    value = load(part, _EIGHT_ROWS, optimized=False)
                    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_EIGHT_ROWS)
                part[...] = lax.select(row < first - start, value, lax.full_like(value, 0))

    def times_transposed(self, a: Ref, b: Ref) -> Array:
        """float32 a b^T of two refs in shared memory, [64, n] and [columns, n]."""
        if self.interpret:
            return _product(a, b, b_transposed=True)

        def product(total):
            plgpu.wgmma(total, a, b.transpose((1, 0)))
            return total[...]

        return pl.run_scoped(product, plgpu.ACC((SIDE, b.shape[0]), jnp.float32))

    def add_product(self, sums: Array, a: Array | Ref, b: Ref, *, b_transposed: bool = False) -> Array:
        """sums + a b; a: [64, n] in registers or a ref, b: a ref [n, columns], or [columns, n] if transposed."""
        if self.interpret:
            return sums + _product(a, b, b_transposed=b_transposed)
        b = b.transpose((1, 0)) if b_transposed else b
        return pl.run_state(lambda total: plgpu.wgmma(total, a, b))(plgpu.ACC.init(sums))  # pyright: ignore[reportReturnType]  # run_state's type is of the ref

    def sum_of_stream(
        self, columns: int, start, count, stages: int, ready: Ref, free: Ref, operands, transposed=(False, False)
    ) -> Array:
        """float32 [64, columns]: the sum of `count` products of a stream's tiles, from its step `start` on.

        A slot is given back when the next product has been issued and its own is done.

        Args:
            ready, free: the stream's barriers, one of each for every one of its `stages` slots.
            operands: operands(step, slot) -> refs [64, n] and [n, columns] in shared memory.
            transposed: whether each of the two is stored the other way round.
        """

        def slot_of(step):
            return lax.rem(start + step, stages)

        if self.interpret:

            def add(step, sums):
                slot = slot_of(step)
                plgpu.barrier_wait(ready.at[slot])
                a, b = operands(step, slot)
                products = _product(a, b, *transposed)
                plgpu.barrier_arrive(free.at[slot])
                return sums + products

            return lax.fori_loop(0, count, add, self.zeros(columns))

        def scoped(sums):
            @pl.loop(0, count)
            def _(step):
                slot = slot_of(step)
                plgpu.barrier_wait(ready.at[slot])
                refs = operands(step, slot)
                a, b = (ref.transpose((1, 0)) if turned else ref for ref, turned in zip(refs, transposed, strict=True))
                plgpu.wgmma(sums, a, b)
                plgpu.wgmma_wait(1)

                @pl.when(step > 0)
                def _free():
                    plgpu.barrier_arrive(free.at[slot_of(step - 1)])

            plgpu.wgmma_wait(0)

            @pl.when(count > 0)
            def _free_last():
                plgpu.barrier_arrive(free.at[slot_of(count - 1)])

            return sums[...]

        return pl.run_scoped(scoped, plgpu.ACC((SIDE, columns), jnp.float32))


def _product(a: Array | Ref, b: Array | Ref, a_transposed: bool = False, b_transposed: bool = False) -> Array:
    """float32 a b of plain arrays: CPUs lack products of 16-bit numbers, and float32 ones of the same are exact."""
    a, b = (operand[...].astype(jnp.float32) for operand in (a, b))
    return jnp.matmul(a.T if a_transposed else a, b.T if b_transposed else b, precision=lax.Precision.HIGHEST)


def along_rows(vector: Array, columns: int) -> Array:
    """[64] -> [64, columns]: a value for each row."""
    return lax.broadcast_in_dim(vector, (SIDE, columns), (0,))


def along_columns(vector: Array) -> Array:
    """[columns] -> [64, columns]: a value for each column."""
    return lax.broadcast_in_dim(vector, (SIDE, vector.shape[0]), (1,))


def where(condition: Array, x: Array, otherwise: float) -> Array:
    """x where the condition holds, else a constant."""
    return lax.select(condition, x, lax.full_like(x, otherwise))


@dataclasses.dataclass(frozen=True)
class Lane:
    """One buffer of a stream: `load(step, slot)` fills a slot and arrives at "ready"; `free` gives it back."""

    free: Ref
    load: Callable[[Any, Any], None]


def stream(lanes: Sequence[Lane], steps, stages: int, done: Any = 0) -> Any:
    """Loads `steps` tiles of every lane through the slots, after `done` of earlier items; returns their sum.

    The body of the loading warpgroup; `drain` ends it.
    """
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


def drain(free: Sequence[Ref], done, stages: int) -> None:
    """Waits until the last tiles of a stream are given back: every phase of a barrier is seen."""
    depth = jnp.int32(stages)

    @pl.loop(lax.max(done - depth, jnp.int32(0)), done)
    def _wait(step):
        for barrier in free:
            plgpu.barrier_wait(barrier.at[lax.rem(step, depth)])


def round_up(n: int, granule: int) -> int:
    """The smallest multiple of `granule` that is at least n."""
    return -(-n // granule) * granule


def pad(x: Array, units: tuple[int, ...]) -> Array:
    """Zeros up to a multiple of a unit along every axis; x itself where nothing is missing."""
    missing = [(0, -size % unit) for size, unit in zip(x.shape, units, strict=True)]
    return jnp.pad(x, missing) if any(more for _, more in missing) else x


def pad_axis(x: Array, axis: int, size: int) -> Array:
    """x with zeros up to `size` along an axis; x itself if it has that size."""
    if x.shape[axis] == size:
        return x
    fill = [(0, 0)] * x.ndim
    fill[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, fill)
