"""Operations on the tiles of a Hopper warpgroup (Mosaic GPU), with a switch for interpret mode.

A warpgroup multiplies tiles of 64 rows: float32 sums in registers, bfloat16 operands in shared memory, or the left one
in registers. Interpret mode knows neither the layouts nor the instruction, so that `Tile(interpret=True)` does the same
with plain arrays; bodies of kernels are the same either way.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Array = jax.Array

# Rows of a warpgroup's tile.
SIDE = 64


@dataclasses.dataclass(frozen=True)
class Tile:
    """Operations on a tile [64, columns] of a warpgroup.

    Attributes:
        interpret: without layouts and WGMMA.
    """

    interpret: bool

    def memory(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Shared memory for tiles, in pieces of 8 rows by 128 bytes, swizzled, as WGMMA and the copy engine want it."""
        if self.interpret:
            return plgpu.SMEM(shape, dtype)
        tiling = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))
        return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(128)))

    def set_registers(self, count: int, action: str) -> None:
        """Changes the registers of this warpgroup's threads; action: "increase" or "decrease"."""
        if not self.interpret:
            plgpu.set_max_registers(count, action=action)

    def zeros(self, columns: int) -> Array:
        """float32 [64, columns]."""
        zeros = jnp.zeros((SIDE, columns), jnp.float32)
        return zeros if self.interpret else plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)

    def row_index(self, columns: int) -> Array:
        """int32 [64, columns]: the index of the row."""
        if self.interpret:
            return lax.broadcasted_iota(jnp.int32, (SIDE, columns), 0)
        return plgpu.broadcasted_iota(jnp.int32, (SIDE, columns), 0, layout=plgpu.Layout.WGMMA)

    def load(self, ref) -> Array:
        """[64, columns] from shared memory."""
        return ref[...] if self.interpret else plgpu.load(ref, (), layout=plgpu.Layout.WGMMA)

    def per_column(self, ref) -> Array:
        """float32 [64, columns] of a [columns] ref in device memory: one value for each column."""
        if self.interpret:
            vector = ref[...]
        else:
            vector = plgpu.load(ref, (), layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
        return lax.broadcast_in_dim(vector.astype(jnp.float32), (SIDE, vector.shape[0]), (1,))

    def product(self, sums: Array, a: Any, b: Any, *, b_transposed: bool = False) -> Array:
        """sums + a b; a: [64, n] in registers or a ref, b: a ref [n, columns], or [columns, n] if transposed."""
        if self.interpret:
            a, b = (operand[...].astype(jnp.float32) for operand in (a, b))
            return sums + a @ (b.T if b_transposed else b)
        b = plgpu.transpose_ref(b, (1, 0)) if b_transposed else b
        return pl.run_state(lambda total: plgpu.wgmma(total, a, b))(plgpu.ACC.init(sums))

    def streamed(
        self, columns: int, start, count, stages: int, ready, free, operands, transposed=(False, False)
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
                a, b = (ref[...].astype(jnp.float32) for ref in operands(step, slot))
                plgpu.barrier_arrive(free.at[slot])
                return sums + (a.T if transposed[0] else a) @ (b.T if transposed[1] else b)

            return lax.fori_loop(0, count, add, self.zeros(columns))

        def scoped(sums):
            @pl.loop(0, count)
            def _(step):
                slot = slot_of(step)
                plgpu.barrier_wait(ready.at[slot])
                refs = operands(step, slot)
                a, b = (
                    plgpu.transpose_ref(ref, (1, 0)) if turned else ref
                    for ref, turned in zip(refs, transposed, strict=True)
                )
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


def stream(steps: Array, stages: int, free, load) -> None:
    """Fills `stages` slots in turn, load(step, slot), each as soon as it is free; the body of the copying warpgroup."""

    @pl.loop(0, steps)
    def _(step):
        slot = lax.rem(step, stages)

        @pl.when(step >= stages)
        def _wait():
            plgpu.barrier_wait(free.at[slot])

        load(step, slot)

    # Every phase of a barrier is seen, the last ones too.
    @pl.loop(lax.max(steps - stages, 0), steps)
    def _drain(step):
        plgpu.barrier_wait(free.at[lax.rem(step, stages)])


def pad(array: Array, units: tuple[int, ...]) -> Array:
    """Zeros up to a multiple of a unit along every axis; the array itself where nothing is missing."""
    missing = [(0, -size % unit) for size, unit in zip(array.shape, units, strict=True)]
    return jnp.pad(array, missing) if any(more for _, more in missing) else array
