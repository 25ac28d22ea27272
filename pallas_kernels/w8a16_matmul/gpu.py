"""y = cast(act((x . wq) * scale + bias)) on Hopper (Mosaic GPU), as y^T = wq^T x^T.

WGMMA takes only its left operand from registers: an int8 tile of wq comes to registers transposed, is widened to
bfloat16 there (exact) and multiplied with x^T from shared memory. So F fills the sides of 64, and few rows of x cost
few columns: multiples of 8.

    block        128 outputs (two warpgroups of 64) x up to 256 rows; a third warpgroup streams tiles [128, 128] of wq
                 and [rows, 128] of x into shared memory ([64, 128] and [rows, 64] from 136 rows on)
    few rows     B <= 16 leaves SMs idle: D is split over blocks, float32 sums are added in the order of D afterwards

Tiles that stick out of wq, x or y are filled with zeros and clipped by the copy engine, in steps of 64 inputs, 64
outputs and 8 rows: D % 64 or F % 64 costs a padded copy of the weights. No atomics: reruns are bit-equal. Compiled for
H100, not yet run on it.

Letters: T tokens, B rows, D inputs, F outputs.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from recscale.pallas_kernels import compat
from recscale.pallas_kernels.activations import ACTIVATIONS
from recscale.pallas_kernels.blocks import block_sizes
from recscale.pallas_kernels.hopper_tiles import SIDE, Lane, Tile, along_rows, drain, pad, stream
from recscale.pallas_kernels.targets import Target

Array = jax.Array

# Warpgroups that multiply, 64 outputs each, beside the one that copies.
_MULTIPLYING = 2
_OUTPUTS = SIDE * _MULTIPLYING
_MOST_ROWS = 256
# Inputs of a tile, up to so many rows and beyond: many rows leave room for fewer stages.
_FEW_ROWS, _INPUTS, _INPUTS_OF_MANY_ROWS = 128, 128, 64
# Rows, inputs and outputs come in multiples of a swizzled piece of shared memory.
_UNITS = (8, 64, 64)
# Registers per thread of the warpgroups that multiply and of the one that copies, where an even share would spill.
_MULTIPLYING_REGISTERS, _COPYING_REGISTERS = 232, 40
_SPLIT_ROWS = 16  # D is split up to so many rows
_MOST_STAGES = 6
_STORED_ROWS = 64  # results pass through shared memory so many rows at a time
# Shared memory that is not tiles: barriers.
_RESERVED = 4096


def obstacle(
    target: Target,
    x_shape: tuple[int, ...],
    wq_shape: tuple[int, ...],
    scale_shape: tuple[int, ...],
    x_dtype: Any,
    act: str | None,
) -> str | None:
    """Why this kernel cannot serve these shapes (those of `matmul`) on that target, or None."""
    if x_dtype != jnp.bfloat16:
        return f"x is {jnp.dtype(x_dtype).name}, expected bfloat16: the matrix unit would round it"
    if 0 in x_shape or 0 in wq_shape:
        return f"x {x_shape} and wq {wq_shape} have an empty axis"
    if scale_shape[-2] > 1:
        return f"{scale_shape[-2]} groups of inputs have scales of their own, expected one"
    return None


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Tiles of a product: rows, inputs, stages of a block; tiles of each axis; tiles of D in each of `splits` parts."""

    rows: int
    inputs: int
    stages: int
    row_tiles: int
    output_tiles: int
    input_tiles: int
    tiles_each: int
    splits: int


def matmul(
    x: Array,
    wq: Array,
    scale: Array,
    bias: Array | None,
    act: str | None,
    out_dtype: Any,
    *,
    target: Target,
    interpret: bool = False,
) -> Array:
    """x [B, D] or token-major [T, B, D], wq [D, F] or [T, D, F], scale [.., 1, F], bias [.., F] -> [.., B, F].

    Args:
        target: chip to compile for; its number of SMs decides how D is split.
        interpret: run by interpretation, on any device.
    """
    if wq.ndim == 2:
        bias = None if bias is None else bias[None]
        return matmul(x[None], wq[None], scale[None], bias, act, out_dtype, target=target, interpret=interpret)[0]
    factors = [scale[:, 0]] if bias is None else [scale[:, 0], bias.astype(jnp.float32)]
    out_dtype = jnp.dtype(out_dtype)
    tokens, rows, inputs = x.shape
    outputs = wq.shape[-1]
    plan = _plan(target, tokens, rows, inputs, outputs)
    moved = inputs * outputs + 4 * len(factors) * outputs + 2 * rows * inputs + rows * outputs * out_dtype.itemsize
    cost = pl.CostEstimate(flops=2 * tokens * rows * inputs * outputs, bytes_accessed=tokens * moved, transcendentals=0)
    # The interpreter knows no copies that stick out.
    unit = (plan.rows, plan.inputs, _OUTPUTS) if interpret else _UNITS
    x, wq = pad(x, (1, unit[0], unit[1])), pad(wq, (1, unit[1], unit[2]))
    factors = [pad(factor, (1, _OUTPUTS)) for factor in factors]
    split = plan.splits > 1
    dtype = jnp.float32 if split else out_dtype
    y = _products(plan, x, wq, [] if split else factors, act, dtype, cost=cost, interpret=interpret)
    y = y[:, :, :rows, :outputs]
    if not split:
        return y[0]
    total = functools.reduce(jnp.add, list(y))
    return _finish(act, total, *(factor[:, None, :outputs] for factor in factors)).astype(out_dtype)


def _finish(act: str | None, sums: Array, scale: Array, bias: Array | None = None) -> Array:
    y = sums * scale
    return ACTIVATIONS[act](y if bias is None else y + bias)


def _plan(target: Target, tokens: int, rows: int, inputs: int, outputs: int) -> _Plan:
    each = min(pl.cdiv(rows, _UNITS[0]) * _UNITS[0], _MOST_ROWS)
    tile_inputs = _INPUTS if each <= _FEW_ROWS else _INPUTS_OF_MANY_ROWS
    row_tiles, output_tiles, input_tiles = pl.cdiv(rows, each), pl.cdiv(outputs, _OUTPUTS), pl.cdiv(inputs, tile_inputs)
    blocks = tokens * row_tiles * output_tiles
    splits = max(min(target.sms // blocks, input_tiles), 1) if rows <= _SPLIT_ROWS else 1
    sizes = block_sizes(
        "w8a16_matmul",
        "pallas_gpu",
        f"B{rows}_D{inputs}_F{outputs}",
        {"splits": splits, "stages": _MOST_STAGES},
        target,
    )
    tiles_each = pl.cdiv(input_tiles, sizes["splits"])
    stored = min(each, _STORED_ROWS) * _OUTPUTS * 4
    fit = (target.vmem_bytes - _RESERVED - stored) // (tile_inputs * (_OUTPUTS + 2 * each))
    stages = max(min(fit, sizes["stages"], tiles_each), 1)
    return _Plan(
        each, tile_inputs, stages, row_tiles, output_tiles, input_tiles, tiles_each, pl.cdiv(input_tiles, tiles_each)
    )


def _products(
    plan: _Plan,
    x: Array,
    wq: Array,
    factors: list[Array],
    act: str | None,
    dtype: Any,
    *,
    cost: pl.CostEstimate,
    interpret: bool,
) -> Array:
    """[splits, T, B, F]: finished results of the whole of D, or (without factors) float32 sums of each part of it."""
    tokens, rows, inputs = x.shape
    outputs = wq.shape[-1]
    tile = Tile(interpret)
    many_registers = plan.rows > _FEW_ROWS
    stored = min(plan.rows, _STORED_ROWS)

    def per_output(ref):
        return along_rows(tile.load_rows(ref, device_memory=True), plan.rows)

    def body(x, wq, *rest, x_tile, w_tile, y_tile, ready, free):
        *factors, y = rest
        warpgroup, token = lax.axis_index("warpgroup"), lax.axis_index("token")
        split = lax.axis_index("split")
        first_row = lax.axis_index("rows") * plan.rows
        first_output = lax.axis_index("outputs") * _OUTPUTS
        first_tile = split * plan.tiles_each
        steps = jnp.minimum(plan.input_tiles - first_tile, plan.tiles_each)

        @pl.when(warpgroup == _MULTIPLYING)
        def _copy():
            if many_registers:
                tile.set_registers(_COPYING_REGISTERS, "decrease")

            def load(step, slot):
                at = pl.ds((first_tile + step) * plan.inputs, plan.inputs)
                part = wq.at[token, at, pl.ds(first_output, _OUTPUTS)]
                plgpu.copy_gmem_to_smem(part, w_tile.at[slot], ready.at[slot])
                plgpu.copy_gmem_to_smem(x.at[token, pl.ds(first_row, plan.rows), at], x_tile.at[slot], ready.at[slot])

            drain([free], stream([Lane(free, load)], steps, plan.stages), plan.stages)

        @pl.when(warpgroup < _MULTIPLYING)
        def _multiply():
            if many_registers:
                tile.set_registers(_MULTIPLYING_REGISTERS, "increase")
            own = pl.ds(warpgroup * SIDE, SIDE)

            def step(index, sums):
                slot = lax.rem(index, plan.stages)
                plgpu.barrier_wait(ready.at[slot])
                weights = tile.load_transposed(w_tile.at[slot, :, own], jnp.bfloat16)
                sums = tile.add_product(sums, weights, x_tile.at[slot], b_transposed=True)
                plgpu.barrier_arrive(free.at[slot])
                return sums

            sums = lax.fori_loop(0, steps, step, tile.zeros(plan.rows))
            outputs = pl.ds(first_output + warpgroup * SIDE, SIDE)
            if factors:
                sums = _finish(act, sums, *(per_output(factor.at[token, outputs]) for factor in factors))
            for start in range(0, plan.rows, stored):
                count = min(stored, plan.rows - start)
                piece = y_tile.at[warpgroup, pl.ds(0, count)]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                tile.store_transposed(piece, sums[:, start : start + count].astype(dtype))
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(piece, y.at[split, token, pl.ds(first_row + start, count), outputs])
            plgpu.wait_smem_to_gmem(0)

    call = compat.mosaic_gpu_kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((plan.splits, tokens, rows, outputs), dtype)],
        grid={"split": plan.splits, "token": tokens, "outputs": plan.output_tiles, "rows": plan.row_tiles},
        threads={"warpgroup": _MULTIPLYING + 1},
        scratch={
            "x_tile": tile.memory((plan.stages, plan.rows, plan.inputs), x.dtype, SIDE),
            "w_tile": tile.memory((plan.stages, plan.inputs, _OUTPUTS), wq.dtype, SIDE),
            "y_tile": tile.memory((_MULTIPLYING, stored, SIDE), dtype, 128 // jnp.dtype(dtype).itemsize),
            "ready": plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
            "free": plgpu.Barrier(num_arrivals=_MULTIPLYING, num_barriers=plan.stages),
        },
        cost=cost,
        name="w8a16_matmul",
        interpret=interpret,
    )
    return call(x, wq, *factors)[0]
