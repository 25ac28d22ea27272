"""Layers per token on Hopper (Mosaic GPU): two narrow ones, whose hidden stays in registers; the others one by one.

    h = act(x . W1 + b1) in pieces of 64 or 128 columns,   sums += h . W2

A block keeps one token's weights in shared memory and goes through row tiles of 128; each of its two warpgroups loads
its own 64 rows, the next ones while it multiplies. A piece of h is rounded to bfloat16 in registers and is at once the
left operand of the second product, so it is neither written nor exchanged.

Weights must fit shared memory, which is the case for which fusing pays on this chip: D=128, F=256 moves a third of the
bytes. Wide layers and single ones are those of `gpu_wide`. In the forms [B, T*D] and [B, T, D] a token's rows are the
block of columns t of [B, T*D], which is free here. Compiled for H100, not yet run on it.

Letters: T tokens, B rows, D inputs, F hidden width, O outputs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from recscale.pallas_kernels import compat
from recscale.pallas_kernels.hopper_tiles import SIDE, Tile, along_columns, pad
from recscale.pallas_kernels.targets import Target

from . import gpu_wide
from .form import Form, Weights, bytes_moved, flops

Array = jax.Array

_MULTIPLYING = 2  # warpgroups of a block
_MOST_WIDTH = 256  # of one copy
# Shared memory that is not tiles: barriers.
_RESERVED = 1024


def obstacle(target: Target, form: Form, x: Array, weights: Weights) -> str | None:
    """Why this kernel cannot serve a request on that target, or None; reads only shapes and dtypes."""
    if x.dtype != jnp.bfloat16:
        return f"x is {x.dtype}, expected bfloat16: the matrix unit would round it"
    tokens, rows, inputs, hidden, outputs = form.sizes(x.shape, weights)
    if 0 in (tokens, rows) or any(size < 1 or size % SIDE for size in (inputs, hidden, outputs)):
        return f"D={inputs}, F={hidden}, O={outputs} and B={rows}: expected rows, and multiples of {SIDE}"
    return None


def forward(form: Form, x: Array, weights: Weights, *, target: Target, interpret: bool = False) -> Array:
    """y in the layout and dtype of x; see `tpu.forward`."""
    function = _fused if _fuses(form, x, weights, target) else _one_by_one
    return function(form, x, weights, target=target, interpret=interpret)


def _fuses(form: Form, x: Array, weights: Weights, target: Target) -> bool:
    """Whether the sums of the second layer fit the registers, and a token's weights with its rows shared memory."""
    _, _, inputs, hidden, outputs = form.sizes(x.shape, weights)
    needed = _memory_bytes(inputs, hidden, outputs, gated=weights.w_gate is not None)
    return weights.w2 is not None and max(inputs, outputs) <= _MOST_WIDTH and needed <= target.vmem_bytes


def _one_by_one(form: Form, x: Array, weights: Weights, *, target: Target, interpret: bool) -> Array:
    """Each layer by itself; the hidden of two is written in the layout of x."""
    shape = x.shape
    _, rows, *_, outputs = form.sizes(x.shape, weights)
    w1, b1, w_gate, w2, b2 = weights.map(lambda w: w if w.ndim == 2 else w.astype(x.dtype))
    layout = "tbd" if form.layout == "tbd" else "flat"
    # As in the fused kernel; the interpreter does not clip.
    unit = gpu_wide.ROWS if interpret else 8
    x = pad(x, (1, unit, 1)) if layout == "tbd" else pad(x.reshape(rows, -1), (unit, 1))
    first = Form(form.act, layout, first_transposed=form.first_transposed)
    y = gpu_wide.layer(first, x, Weights(w1, b1, w_gate), target=target, interpret=interpret)
    if w2 is not None:
        second = Form(None, layout, first_transposed=form.second_transposed)
        y = gpu_wide.layer(second, y, Weights(w2, b2), target=target, interpret=interpret)
    if layout == "tbd":
        return y[:, :rows]
    return y[:rows].reshape(*shape[:2], outputs) if form.layout == "btd" else y[:rows]


def _fused(form: Form, x: Array, weights: Weights, *, target: Target, interpret: bool) -> Array:
    shape = x.shape
    tokens, rows, inputs, hidden, outputs = form.sizes(x.shape, weights)
    weights = weights.map(lambda w: w if w.ndim == 2 else w.astype(x.dtype))
    piece = _piece(hidden, outputs)
    pieces, tiles = hidden // piece, pl.cdiv(rows, SIDE * _MULTIPLYING)
    blocks = min(tiles, max(target.sms // tokens, 1))
    # The copy engine clips what sticks out, in pieces of 8 rows; the interpreter does not.
    padded = rows + (-rows % (SIDE * _MULTIPLYING if interpret else 8))
    if form.layout == "tbd":
        x = pad(x, (1, padded, 1))
        y_shape = (tokens, padded, outputs)
    else:
        x = pad(x.reshape(rows, -1), (padded, 1))
        y_shape = (padded, tokens * outputs)
    tile = Tile(interpret)
    names = [name for name, w in zip(Weights._fields, weights, strict=True) if w is not None]

    def of_token(ref, token, row, width):
        if form.layout == "tbd":
            return ref.at[token, pl.ds(row, SIDE)]
        return ref.at[pl.ds(row, SIDE), pl.ds(token * width, width)]

    def per_column(ref):
        return along_columns(tile.load_columns(ref, device_memory=True).astype(jnp.float32))

    def body(x, *refs, x_tile, y_tile, x_ready, weights_ready, **kept):
        given, y = dict(zip(names, refs, strict=False)), refs[-1]
        token, block, warpgroup = lax.axis_index("token"), lax.axis_index("block"), lax.axis_index("warpgroup")
        count = lax.div(tiles - block + (blocks - 1), blocks)

        def row_of(step):
            return ((block + step * blocks) * _MULTIPLYING + warpgroup) * SIDE

        def load(step, slot):
            ready = x_ready.at[warpgroup * 2 + slot]
            plgpu.copy_gmem_to_smem(of_token(x, token, row_of(step), inputs), x_tile.at[warpgroup, slot], ready)

        @pl.when(warpgroup == 0)
        def _load_weights():
            for name, ref in kept.items():
                for c in range(pieces):
                    part = pl.ds(c * piece, piece)
                    by_rows = name == "w2" and not form.second_transposed
                    source = given[name].at[token, part] if by_rows else given[name].at[token, :, part]
                    plgpu.copy_gmem_to_smem(source, ref.at[c], weights_ready)

        load(0, 0)
        plgpu.barrier_wait(weights_ready)

        @pl.loop(0, count)
        def _tile(step):
            slot = lax.rem(step, 2)

            @pl.when(step + 1 < count)
            def _next():
                load(step + 1, 1 - slot)

            plgpu.barrier_wait(x_ready.at[warpgroup * 2 + slot])
            rows_ref = x_tile.at[warpgroup, slot]

            # A loop, not one program after the other: jax 0.11 cannot multiply with tiles named by constants.
            def one_piece(c, total):
                sums = tile.add_product(tile.zeros(piece), rows_ref, kept["w1"].at[c])
                if "b1" in given:
                    sums = sums + per_column(given["b1"].at[token, pl.ds(c * piece, piece)])
                gate = None
                if "w_gate" in given:
                    gate = tile.add_product(tile.zeros(piece), rows_ref, kept["w_gate"].at[c])
                h = form.activate(sums, gate).astype(x.dtype)
                return tile.add_product(total, h, kept["w2"].at[c], b_transposed=form.second_transposed)

            total = lax.fori_loop(0, pieces, one_piece, tile.zeros(outputs))
            if "b2" in given:
                total = total + per_column(given["b2"].at[token])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            y_tile.at[warpgroup][...] = total.astype(x.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(y_tile.at[warpgroup], of_token(y, token, row_of(step), outputs))

        plgpu.wait_smem_to_gmem(0)

    second = (outputs, piece) if form.second_transposed else (piece, outputs)
    matrices = {"w1": (inputs, piece), "w2": second} | ({} if weights.w_gate is None else {"w_gate": (inputs, piece)})
    call = compat.mosaic_gpu_kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(y_shape, x.dtype)],
        grid={"token": tokens, "block": blocks},
        threads={"warpgroup": _MULTIPLYING},
        scratch={
            "x_tile": tile.memory((_MULTIPLYING, 2, SIDE, inputs), x.dtype),
            "y_tile": tile.memory((_MULTIPLYING, SIDE, outputs), x.dtype),
            "x_ready": plgpu.Barrier(num_barriers=2 * _MULTIPLYING),
            "weights_ready": plgpu.Barrier(num_arrivals=pieces * len(matrices)),
            **{name: tile.memory((pieces, *block), x.dtype) for name, block in matrices.items()},
        },
        cost=pl.CostEstimate(
            flops=flops(form, shape, weights),
            bytes_accessed=bytes_moved(form, x, weights),
            transcendentals=tokens * rows * hidden if form.act in ("gelu", "silu") else 0,
        ),
        name="per_token_ffn",
        interpret=interpret,
    )
    y = call(x, *(w for w in weights if w is not None))[0]
    if form.layout == "tbd":
        return y[:, :rows]
    return y[:rows] if form.layout == "flat" else y[:rows].reshape(rows, tokens, outputs)


def _piece(hidden: int, outputs: int) -> int:
    """Hidden columns at a time: what the sums of the second product leave of the registers."""
    return 128 if outputs <= 128 and hidden % 128 == 0 else SIDE


def _memory_bytes(inputs: int, hidden: int, outputs: int, *, gated: bool) -> int:
    """A token's weights, two tiles of x and one of y for each warpgroup."""
    weights = hidden * (inputs * (2 if gated else 1) + outputs)
    return 2 * (weights + _MULTIPLYING * SIDE * (2 * inputs + outputs)) + _RESERVED
