"""Rows times the matrix of their group on Hopper (Mosaic GPU), and both gradients.

    multiply   y[r] = x[r] w[g], or x[r] w[g]^T      a block: 128 rows x up to 256 columns
    contract   dw[g] = x_g^T dy_g                    a block: 128 x up to 256 entries of one group

Two warpgroups multiply 64 rows (of y, of dw) each, a third streams tiles into shared memory. A block of `multiply` owns
its rows whatever groups they belong to: it visits every group that has rows in it, multiplies all 128 rows with that
group's matrix, and keeps those of the group, so that rows are stored once and rows of no group are 0. Row tiles start
at multiples of 128, at most ceil(N/128) + G - 1 are multiplied. A block of `contract` sums over its group's rows in
order, 64 at a time, and clears the rows of other groups in the first and last tile; an empty group gives 0. Nothing is
added by two blocks and there are no atomics: reruns are bit-equal.

The copy engine fills tiles that stick out with zeros and clips what it writes, but moves pieces of 8 rows and 64
columns: other sizes are padded, which copies the operands. Compiled for H100 without spilled registers in blocks of 64,
128, 192 and 256 columns, not yet run on it. The tiling follows JAX's ragged_dot examples for Hopper, which store a
shared tile of rows once per group.

Letters: N rows, G groups, D inputs, F outputs.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from recscale.pallas_kernels import compat
from recscale.pallas_kernels.blocks import block_sizes
from recscale.pallas_kernels.hopper_tiles import SIDE, Lane, Tile, drain, pad, stream
from recscale.pallas_kernels.targets import Target

Array = jax.Array

_MULTIPLYING = 2  # warpgroups of a block, beside the one that copies
_ROWS = SIDE * _MULTIPLYING
_DEPTH = 64  # of a product of two tiles
_COLUMNS = (256, 192, 128, 64)
_MOST_STAGES = 4
# Rows, inputs and outputs of arrays whose tiles the copy engine takes.
_UNIT = (8, 64, 64)
# Shared memory that is not tiles: barriers.
_RESERVED = 4096
# Registers of a thread: copying takes few, which leaves more to those that multiply.
_COPY_REGISTERS, _MULTIPLY_REGISTERS = 40, 232


def obstacle(target: Target, x_shape: tuple[int, ...], w_shape: tuple[int, ...], x_dtype: Any) -> str | None:
    """Why these kernels cannot serve a product on that target, or None."""
    if x_dtype != jnp.bfloat16:
        return f"x is {jnp.dtype(x_dtype).name}, expected bfloat16: the matrix unit would round it"
    if 0 in x_shape or 0 in w_shape:
        return f"x {x_shape} and w {w_shape} have an empty axis"
    return None


def multiply(
    x: Array, w: Array, group_sizes: Array, transposed: bool = False, *, target: Target, interpret: bool = False
) -> Array:
    """x [N, D] and w [G, D, F] (or [G, F, D] if `transposed`), both bfloat16 -> [N, F]."""
    (rows, inputs), outputs = x.shape, w.shape[1 if transposed else 2]
    row_tiles, depth = pl.cdiv(rows, _ROWS), pl.cdiv(inputs, _DEPTH)
    columns, stages = _blocks("multiply", target, row_tiles, inputs, outputs, x.dtype.itemsize)
    tile = Tile(interpret)
    unit = (_ROWS, _DEPTH, columns) if interpret else _UNIT
    x = pad(x, unit[:2])
    w = pad(w, (1, unit[2], unit[1]) if transposed else (1, *unit[1:]))

    def body(x, w, groups, starts, ends, first, last, y, *, x_tile, w_tile, y_tile, ready, free):
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("rows")
        first_column, first_row = lax.axis_index("columns") * columns, block * _ROWS
        begin = first[block]
        visits = last[block] - begin

        @pl.when(warpgroup == _MULTIPLYING)
        def _copy():
            tile.set_registers(_COPY_REGISTERS, "decrease")

            def load(step, slot):
                group = groups[begin + lax.div(step, depth)]
                inner, outer = pl.ds(lax.rem(step, depth) * _DEPTH, _DEPTH), pl.ds(first_column, columns)
                plgpu.copy_gmem_to_smem(x.at[pl.ds(first_row, _ROWS), inner], x_tile.at[slot], ready.at[slot])
                part = w.at[group, outer, inner] if transposed else w.at[group, inner, outer]
                plgpu.copy_gmem_to_smem(part, w_tile.at[slot], ready.at[slot])

            drain([free], stream([Lane(free, load)], visits * depth, stages), stages)

        @pl.when(warpgroup < _MULTIPLYING)
        def _compute():
            tile.set_registers(_MULTIPLY_REGISTERS, "increase")
            own, out = pl.ds(warpgroup * SIDE, SIDE), y_tile.at[warpgroup]
            row = tile.counting(columns, 0) + first_row + warpgroup * SIDE
            out[...] = tile.zeros(columns).astype(out.dtype)

            @pl.loop(0, visits)
            def _visit(visit):
                def operands(step, slot):
                    return x_tile.at[slot, own], w_tile.at[slot]

                sums = tile.sum_of_stream(
                    columns, visit * depth, depth, stages, ready, free, operands, (False, transposed)
                )
                inside = (row >= starts[begin + visit]) & (row < ends[begin + visit])
                out[...] = lax.select(inside, sums.astype(out.dtype), tile.load(out))

            plgpu.commit_smem()
            at = pl.ds(first_row + warpgroup * SIDE, SIDE), pl.ds(first_column, columns)
            plgpu.copy_smem_to_gmem(out, y.at[at])
            plgpu.wait_smem_to_gmem(0)

    call = compat.mosaic_gpu_kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((x.shape[0], w.shape[1 if transposed else 2]), x.dtype)],
        grid={"rows": row_tiles, "columns": pl.cdiv(outputs, columns)},
        threads={"warpgroup": _MULTIPLYING + 1},
        scratch={
            "x_tile": tile.memory((stages, _ROWS, _DEPTH), x.dtype),
            "w_tile": tile.memory((stages, columns, _DEPTH) if transposed else (stages, _DEPTH, columns), x.dtype),
            "y_tile": tile.memory((_MULTIPLYING, SIDE, columns), x.dtype),
            "ready": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            "free": plgpu.Barrier(num_arrivals=_MULTIPLYING, num_barriers=stages),
        },
        cost=_cost(rows, inputs, outputs, x.dtype.itemsize * (rows * (inputs + outputs) + w.size)),
        name="grouped_matmul",
        interpret=interpret,
    )
    return call(x, w, *_visits(group_sizes, rows, row_tiles))[0][:rows, :outputs]


def contract(x: Array, dy: Array, group_sizes: Array, *, target: Target, interpret: bool = False) -> Array:
    """x [N, D] and dy [N, F], both bfloat16 -> float32 [G, D, F], the sum over each group's rows of x^T dy."""
    (rows, inputs), outputs, groups = x.shape, dy.shape[1], group_sizes.shape[0]
    blocks = groups * pl.cdiv(inputs, _ROWS)
    columns, stages = _blocks("contract", target, blocks, SIDE, outputs, x.dtype.itemsize)
    tile = Tile(interpret)
    unit = (_DEPTH, _ROWS, columns) if interpret else _UNIT
    x, dy = pad(x, unit[:2]), pad(dy, (unit[0], unit[2]))
    starts, ends = _bounds(group_sizes, rows)

    def body(x, dy, starts, ends, dw, *, x_tile, dy_tile, dw_tile, ready, free, cleared):
        warpgroup, group = lax.axis_index("warpgroup"), lax.axis_index("group")
        first_input, first_column = lax.axis_index("inputs") * _ROWS, lax.axis_index("columns") * columns
        start, end = starts[group], ends[group]
        first = lax.div(start, _DEPTH)
        steps = lax.select(end > start, lax.div(end + (_DEPTH - 1), _DEPTH) - first, 0)

        @pl.when(warpgroup == _MULTIPLYING)
        def _copy():
            tile.set_registers(_COPY_REGISTERS, "decrease")

            def load(step, slot):
                at = pl.ds((first + step) * _DEPTH, _DEPTH)
                plgpu.copy_gmem_to_smem(x.at[at, pl.ds(first_input, _ROWS)], x_tile.at[slot], ready.at[slot])
                plgpu.copy_gmem_to_smem(dy.at[at, pl.ds(first_column, columns)], dy_tile.at[slot], ready.at[slot])

            drain([free], stream([Lane(free, load)], steps, stages), stages)

        @pl.when(warpgroup < _MULTIPLYING)
        def _compute():
            tile.set_registers(_MULTIPLY_REGISTERS, "increase")
            own = pl.ds(warpgroup * SIDE, SIDE)

            def operands(step, slot):
                first_row = (first + step) * _DEPTH

                @pl.when((first_row < start) | (first_row + _DEPTH > end))
                def _clear():
                    row = tile.counting(SIDE, 0) + first_row
                    inside = (row >= start) & (row < end)

                    def clear(part):
                        value = tile.load(part)
                        part[...] = lax.select(inside, value, lax.full_like(value, 0))

                    clear(x_tile.at[slot, :, own])
                    for piece in range(columns // SIDE):

                        @pl.when(warpgroup == piece % _MULTIPLYING)
                        def _(piece=piece):
                            clear(dy_tile.at[slot, :, pl.ds(piece * SIDE, SIDE)])

                    plgpu.commit_smem()
                    # Both warpgroups read all of dy's tile.
                    plgpu.barrier_arrive(cleared)
                    plgpu.barrier_wait(cleared)

                return x_tile.at[slot, :, own], dy_tile.at[slot]

            sums = tile.sum_of_stream(columns, 0, steps, stages, ready, free, operands, (True, False))
            for piece in range(0, columns, SIDE):
                out = dw_tile.at[warpgroup]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out[...] = sums[:, piece : piece + SIDE]
                plgpu.commit_smem()
                at = pl.ds(first_input + warpgroup * SIDE, SIDE), pl.ds(first_column + piece, SIDE)
                plgpu.copy_smem_to_gmem(out, dw.at[(group, *at)])
            plgpu.wait_smem_to_gmem(0)

    moved = x.dtype.itemsize * rows * (inputs + outputs) + 4 * groups * inputs * outputs
    call = compat.mosaic_gpu_kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((groups, x.shape[1], dy.shape[1]), jnp.float32)],
        grid={"group": groups, "inputs": pl.cdiv(inputs, _ROWS), "columns": pl.cdiv(outputs, columns)},
        threads={"warpgroup": _MULTIPLYING + 1},
        scratch={
            "x_tile": tile.memory((stages, _DEPTH, _ROWS), x.dtype),
            "dy_tile": tile.memory((stages, _DEPTH, columns), x.dtype),
            "dw_tile": tile.memory((_MULTIPLYING, SIDE, SIDE), jnp.float32),
            "ready": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            "free": plgpu.Barrier(num_arrivals=_MULTIPLYING, num_barriers=stages),
            "cleared": plgpu.Barrier(num_arrivals=_MULTIPLYING),
        },
        cost=_cost(rows, inputs, outputs, moved),
        name="grouped_matmul_weights",
        interpret=interpret,
    )
    return call(x, dy, starts, ends)[0][:, :inputs, :outputs]


def _bounds(group_sizes: Array, rows: int) -> tuple[Array, Array]:
    """int32 [G]: first row of each group and the row after its last, within [0, N] whatever the sizes."""
    sizes = jnp.maximum(group_sizes.astype(jnp.int32), 0)
    ends = jnp.cumsum(sizes)
    return jnp.minimum(ends - sizes, rows), jnp.minimum(ends, rows)


def _visits(group_sizes: Array, rows: int, row_tiles: int) -> tuple[Array, Array, Array, Array, Array]:
    """Which groups each row tile visits: int32 groups, starts, ends [G], first, last [tiles].

    Tile i visits groups[v] for first[i] <= v < last[i], whose rows are starts[v] ... ends[v] - 1. Groups without rows
    come last and are never visited.
    """
    starts, ends = _bounds(group_sizes, rows)
    empty = starts >= ends
    order = jnp.argsort(empty, stable=True).astype(jnp.int32)
    beyond = row_tiles * _ROWS
    starts, ends = (jnp.where(empty, beyond, bound)[order] for bound in (starts, ends))
    begin = jnp.arange(row_tiles, dtype=jnp.int32) * _ROWS
    first = jnp.searchsorted(ends, begin, side="right").astype(jnp.int32)
    last = jnp.searchsorted(starts, begin + _ROWS, side="left").astype(jnp.int32)
    return order, starts, ends, first, jnp.maximum(first, last)


def _blocks(kind: str, target: Target, blocks: int, inputs: int, outputs: int, size: int) -> tuple[int, int]:
    """Columns of a block, and stages of its stream: the columns for which the busiest multiprocessor copies least."""

    def effort(columns: int) -> int:  # a step of a block brings 128 and `columns` columns
        return (_ROWS + columns) * math.ceil(blocks * math.ceil(outputs / columns) / target.sms)

    heuristic = {"columns": min(_COLUMNS, key=effort), "stages": _MOST_STAGES}
    sizes = block_sizes("grouped_matmul", "pallas_gpu", f"{kind}_B{blocks}_D{inputs}_F{outputs}", heuristic, target)
    columns = sizes["columns"]
    out = _ROWS * columns * size if kind == "multiply" else _ROWS * SIDE * 4
    fitting = (target.vmem_bytes - _RESERVED - out) // (size * _DEPTH * (_ROWS + columns))
    return columns, min(sizes["stages"], fitting)


def _cost(rows: int, inputs: int, outputs: int, moved: int) -> pl.CostEstimate:
    return pl.CostEstimate(flops=2 * rows * inputs * outputs, bytes_accessed=moved, transcendentals=0)
