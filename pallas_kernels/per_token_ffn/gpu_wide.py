"""One layer per token on Hopper (Mosaic GPU), of any width that is a multiple of 64; two of them are a wide network.

    y_t = act(x_t W_t + b_t), gated (x_t W_t + b_t) * act(x_t G_t)        a block: 128 rows x up to 256 columns

Two warpgroups multiply 64 rows each, a third streams tiles of x and W into shared memory, 64 of D at a time; with a
gate, x passes a second time beside G. Bias and activation are applied to the float32 sums in registers, so that a layer
writes its rounded result and nothing else.

Where a token's weights do not fit shared memory, the products are bound by the matrix unit and a fused pair would have
to read the weights once for 64 rows (its sums fill the registers), which L2 cannot bring fast enough. So the hidden of
such a network is written and read: at D = 768, F = 3072 an eighth of the time of the products by this chip's figures.

Compiled for H100, not yet run on it. The tiling is that of `grouped_matmul.gpu`.

Letters: T tokens, B rows, D inputs, F outputs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from recscale.pallas_kernels import compat
from recscale.pallas_kernels.blocks import block_sizes
from recscale.pallas_kernels.hopper_tiles import SIDE, Lane, Tile, along_columns, drain, stream
from recscale.pallas_kernels.targets import Target

from .form import Form, Weights, bytes_moved, flops

Array = jax.Array

_MULTIPLYING = 2  # warpgroups of a block, beside the one that copies
ROWS = SIDE * _MULTIPLYING
_DEPTH = 64  # of a product of two tiles
_MOST_STAGES = 4
# A gate's sums lie beside those of the layer.
_COLUMNS, _GATED_COLUMNS = (256, 192, 128, 64), (128, 64)
# Shared memory that is not tiles: barriers.
_RESERVED = 4096
# Registers of a thread: copying takes few, which leaves more to those that multiply.
_COPY_REGISTERS, _MULTIPLY_REGISTERS = 40, 232


def layer(form: Form, x: Array, weights: Weights, *, target: Target, interpret: bool = False) -> Array:
    """y [T, B, F] or [B, T*F], as x is laid out; B is a multiple of 8, interpreted of 128.

    Args:
        form: of a single layer, in layout "tbd" or "flat".
        weights: w1, b1 and w_gate; matrices bfloat16.
    """
    tokens, rows, inputs, outputs, _ = form.sizes(x.shape, weights)
    gated, turned, depth = weights.w_gate is not None, form.first_transposed, inputs // _DEPTH
    columns, stages = _blocks(target, rows, inputs, outputs, gated=gated)
    tile = Tile(interpret)
    names = [name for name, w in zip(Weights._fields, weights, strict=True) if w is not None]

    def of_token(ref, token, rows, column, width, of_all):
        """Rows of a token, and so many of all its columns, in either layout."""
        if form.layout == "tbd":
            return ref.at[token, rows, pl.ds(column, width)]
        return ref.at[rows, pl.ds(token * of_all + column, width)]

    def body(x, *refs, x_tile, w_tile, y_tile, ready, free):
        given, y = dict(zip(names, refs, strict=False)), refs[-1]
        warpgroup, token = lax.axis_index("warpgroup"), lax.axis_index("token")
        first_row, first_column = lax.axis_index("rows") * ROWS, lax.axis_index("columns") * columns

        @pl.when(warpgroup == _MULTIPLYING)
        def _copy():
            tile.set_registers(_COPY_REGISTERS, "decrease")

            def load(step, slot):
                inner, outer = lax.rem(step, depth) * _DEPTH, pl.ds(first_column, columns)
                rows_of_x = of_token(x, token, pl.ds(first_row, ROWS), inner, _DEPTH, inputs)
                plgpu.copy_gmem_to_smem(rows_of_x, x_tile.at[slot], ready.at[slot])

                def load_weights(ref, turned=False):
                    part = (outer, pl.ds(inner, _DEPTH)) if turned else (pl.ds(inner, _DEPTH), outer)
                    plgpu.copy_gmem_to_smem(ref.at[(token, *part)], w_tile.at[slot], ready.at[slot])

                pl.when(step < depth)(lambda: load_weights(given["w1"], turned))
                if gated:
                    pl.when(step >= depth)(lambda: load_weights(given["w_gate"]))

            steps = jnp.int32(depth * (2 if gated else 1))
            drain([free], stream([Lane(free, load)], steps, stages), stages)

        @pl.when(warpgroup < _MULTIPLYING)
        def _compute():
            tile.set_registers(_MULTIPLY_REGISTERS, "increase")
            own, out = pl.ds(warpgroup * SIDE, SIDE), y_tile.at[warpgroup]

            def product(start, turned=False):
                def operands(step, slot):
                    return x_tile.at[slot, own], w_tile.at[slot]

                count = jnp.int32(depth)
                return tile.sum_of_stream(columns, start, count, stages, ready, free, operands, (False, turned))

            sums = product(0, turned)
            if "b1" in given:
                bias = tile.load_columns(given["b1"].at[token, pl.ds(first_column, columns)], device_memory=True)
                sums = sums + along_columns(bias.astype(jnp.float32))
            gate = product(depth) if gated else None
            out[...] = form.activate(sums, gate).astype(out.dtype)
            plgpu.commit_smem()
            rows = pl.ds(first_row + warpgroup * SIDE, SIDE)
            plgpu.copy_smem_to_gmem(out, of_token(y, token, rows, first_column, columns, outputs))
            plgpu.wait_smem_to_gmem(0)

    shape = (tokens, rows, outputs) if form.layout == "tbd" else (rows, tokens * outputs)
    call = compat.mosaic_gpu_kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(shape, x.dtype)],
        grid={"token": tokens, "rows": pl.cdiv(rows, ROWS), "columns": outputs // columns},
        threads={"warpgroup": _MULTIPLYING + 1},
        scratch={
            "x_tile": tile.memory((stages, ROWS, _DEPTH), x.dtype),
            "w_tile": tile.memory((stages, columns, _DEPTH) if turned else (stages, _DEPTH, columns), x.dtype),
            "y_tile": tile.memory((_MULTIPLYING, SIDE, columns), x.dtype),
            "ready": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            "free": plgpu.Barrier(num_arrivals=_MULTIPLYING, num_barriers=stages),
        },
        cost=pl.CostEstimate(
            flops=flops(form, x.shape, weights),
            bytes_accessed=bytes_moved(form, x, weights),
            transcendentals=tokens * rows * outputs if form.act in ("gelu", "silu") else 0,
        ),
        name="per_token_matmul",
        interpret=interpret,
    )
    return call(x, *(w for w in weights if w is not None))[0]


def _blocks(target: Target, rows: int, inputs: int, outputs: int, *, gated: bool) -> tuple[int, int]:
    """Columns of a block, which divide F, and stages of its stream, as many as shared memory holds."""
    offered = _GATED_COLUMNS if gated else _COLUMNS
    heuristic = {"columns": next(c for c in offered if outputs % c == 0), "stages": _MOST_STAGES}
    key = f"wide_B{rows}_D{inputs}_F{outputs}" + ("_gated" if gated else "")
    sizes = block_sizes("per_token_ffn", "pallas_gpu", key, heuristic, target)
    columns = sizes["columns"]
    if columns not in offered or outputs % columns:
        raise ValueError(f"{columns} columns do not divide {outputs} outputs, or are none of {offered}")
    fitting = (target.vmem_bytes - _RESERVED - 2 * ROWS * columns) // (2 * _DEPTH * (ROWS + columns))
    return columns, min(sizes["stages"], fitting)
