"""One or two layers per token on the TPU's TensorCore; the hidden stays in VMEM.

    grid (token, row block, hidden block)      h = act(x . w1 + b1) in pieces of 512 columns,  sums += h . w2

A token's weights stay in VMEM for all of its rows where they fit (D=768, F=3072 in bfloat16: 9.4 MB), else they stream
in blocks of F, once per row block. In the forms [B, T*D] and [B, T, D] a token's rows are the block of columns t of
[B, T*D], so that nothing is transposed; that needs D and O to be multiples of 128. float32 multiplies at full
precision.

Compiled for v5e, v5p, v6e and 7x; not yet run on any of them.

Letters: T tokens, B rows, D inputs, F hidden width, O outputs.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from recscale.pallas_kernels.blocks import block_sizes
from recscale.pallas_kernels.targets import Target

from .form import Form, Weights, bytes_moved, flops

Array = jax.Array

_LANES = 128
_ROWS, _PIECE = 512, 512
# Share of VMEM that two buffers of a token's weights, and that a whole program, may take.
_WEIGHTS_SHARE, _VMEM_SHARE = 0.5, 0.75


def obstacle(target: Target, form: Form, x: Array, weights: Weights) -> str | None:
    """Why this kernel cannot serve a request on that target, or None; reads only shapes and dtypes."""
    tokens, rows, inputs, hidden, outputs = form.sizes(x.shape, weights)
    if 0 in (tokens, rows, inputs, hidden, outputs):
        return f"there is nothing to compute for x {x.shape}"
    if form.layout != "tbd" and tokens > 1 and (inputs % _LANES or outputs % _LANES):
        return (
            f"a token has {inputs} inputs and {outputs} outputs, expected multiples of {_LANES} where rows hold their "
            "tokens side by side; pad the widths, or pass [T, B, D] with token_first=True"
        )
    blocks = _blocks(target, form, x, weights)
    needed, limit = _vmem_bytes(form, x, weights, blocks), int(_VMEM_SHARE * target.vmem_bytes)
    if needed > limit:
        return f"blocks {blocks} take {needed} bytes of VMEM, more than {limit} on {target.name}"
    return None


def forward(form: Form, x: Array, weights: Weights, *, target: Target, interpret: bool = False) -> Array:
    """y in the layout and dtype of x.

    Args:
        target: chip to compile for; one on which `obstacle` finds nothing.
        interpret: run by interpretation, on any device.
    """
    tokens, rows, _, _, outputs = form.sizes(x.shape, weights)
    shape = x.shape
    if form.layout == "btd":
        x = x.reshape(rows, -1)
    y_shape = (tokens, rows, outputs) if form.layout == "tbd" else (rows, tokens * outputs)
    y = _call(form, x, weights, y_shape, target, interpret)
    return y.reshape(*shape[:2], outputs) if form.layout == "btd" else y


def _call(form: Form, x: Array, weights: Weights, y_shape, target: Target, interpret: bool) -> Array:
    tokens, rows, inputs, hidden, outputs = form.sizes(x.shape, weights)
    blocks = _blocks(target, form, x, weights)
    b, f = blocks["rows"], blocks["hidden"]
    two = weights.w2 is not None
    arrays, specs = _operands(form, x, weights, f)
    # A second layer sums over the hidden blocks; a single layer writes each block of them apart.
    width, block = (outputs, lambda k: 0) if two else (f, lambda k: k)
    names = ("x", *(name for name, w in zip(Weights._fields, weights, strict=True) if w is not None))
    body = functools.partial(_kernel, form=form, names=names, interpret=interpret)
    per_row = tokens * rows * hidden if form.act in ("gelu", "silu") else 0
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(y_shape, x.dtype),
        grid=(tokens, pl.cdiv(rows, b), hidden // f),
        in_specs=[_row_spec(form, b, inputs, lambda k: 0), *specs],
        out_specs=_row_spec(form, b, width, block, blocks_per_token=outputs // width),
        scratch_shapes=[pltpu.VMEM((b, outputs), jnp.float32)] if two else [],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=target.vmem_bytes * 7 // 8,
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops(form, x.shape, weights),
            bytes_accessed=bytes_moved(form, x, _cast(weights, x.dtype)),
            transcendentals=per_row,
        ),
        interpret=interpret,
        name="per_token_ffn" if two else "per_token_matmul",
    )(x, *arrays)


def _row_spec(form: Form, b: int, width: int, block, blocks_per_token: int = 1) -> pl.BlockSpec:
    """Rows of a token, from [T, B, width * blocks] or from the token's columns of [B, T * width * blocks]."""
    if form.layout == "tbd":
        return pl.BlockSpec((None, b, width), lambda t, i, k: (t, i, block(k)))
    return pl.BlockSpec((b, width), lambda t, i, k: (i, t * blocks_per_token + block(k)))


def _cast(weights: Weights, dtype: DTypeLike) -> Weights:
    """Matrices in the operands' dtype; biases as they are."""
    return weights.map(lambda w: w if w.ndim == 2 else w.astype(dtype))


def _operands(form: Form, x: Array, weights: Weights, f: int) -> tuple[list[Array], list[pl.BlockSpec]]:
    """The parameters that are there, and their blocks of f hidden columns (or rows)."""
    w1, b1, w_gate, w2, b2 = _cast(weights, x.dtype)
    arrays, specs = [], []

    def columns(array: Array) -> None:  # [T, n, F]: all n, f columns
        arrays.append(array)
        specs.append(pl.BlockSpec((None, array.shape[1], f), lambda t, i, k: (t, 0, k)))

    def rows(array: Array) -> None:  # [T, F, n]
        arrays.append(array)
        specs.append(pl.BlockSpec((None, f, array.shape[2]), lambda t, i, k: (t, k, 0)))

    (rows if form.first_transposed else columns)(w1)
    if b1 is not None:
        columns(b1[:, None, :])
    if w_gate is not None:
        columns(w_gate)
    if w2 is not None:
        (columns if form.second_transposed else rows)(w2)
    if b2 is not None:
        arrays.append(b2[:, None, :])
        specs.append(pl.BlockSpec((None, 1, b2.shape[1]), lambda t, i, k: (t, 0, 0)))
    return arrays, specs


def _kernel(*refs, form: Form, names: tuple[str, ...], interpret: bool):
    """A block of rows of one token, and a block of its hidden columns."""
    given = dict(zip(names, refs, strict=False))
    out_ref, scratch = refs[len(names)], refs[len(names) + 1 :]
    step, last = pl.program_id(2), pl.num_programs(2) - 1
    x = given["x"][...]
    wide = jnp.float32 if interpret else x.dtype  # CPUs lack bfloat16 products; both are exact
    f = given["w1"].shape[0 if form.first_transposed else 1]
    if "w2" in given:

        @pl.when(step == 0)
        def _start():
            scratch[0][...] = jnp.zeros_like(scratch[0])

    def first(name: str, part: slice, transposed: bool) -> Array:
        w = given[name][part, :] if transposed else given[name][:, part]
        return _dot(x.astype(wide), w.astype(wide), transposed)

    for start in range(0, f, _PIECE):
        part = slice(start, min(start + _PIECE, f))
        sums = first("w1", part, form.first_transposed)
        if "b1" in given:
            sums = sums + given["b1"][:, part].astype(jnp.float32)
        h = form.activate(sums, first("w_gate", part, False) if "w_gate" in given else None).astype(x.dtype)
        if "w2" not in given:
            out_ref[:, part] = h
            continue
        w2 = given["w2"][:, part] if form.second_transposed else given["w2"][part, :]
        product = _dot(h.astype(wide), w2.astype(wide), form.second_transposed)
        scratch[0][...] += product
    if "w2" in given:

        @pl.when(step == last)
        def _finish():
            y = scratch[0][...]
            if "b2" in given:
                y = y + given["b2"][...].astype(jnp.float32)
            out_ref[...] = y.astype(out_ref.dtype)


def _dot(x: Array, w: Array, transposed: bool) -> Array:
    contract = (((1,), (1 if transposed else 0,)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(x, w, contract, precision=precision, preferred_element_type=jnp.float32)


def _blocks(target: Target, form: Form, x: Array, weights: Weights) -> dict[str, int]:
    """Rows, and hidden columns: all of them, or the largest divisor in whole registers whose weights fit."""
    _, rows, inputs, hidden, outputs = form.sizes(x.shape, weights)
    two, gated = weights.w2 is not None, weights.w_gate is not None
    per_column = (inputs * (2 if gated else 1) + (outputs if two else 0)) * x.dtype.itemsize
    fitting = int(_WEIGHTS_SHARE * target.vmem_bytes) // (2 * per_column)
    if not two:
        fitting = min(fitting, 4 * _PIECE)  # the block of outputs is written as it is
    divisors = (n for n in range(_LANES, hidden, _LANES) if hidden % n == 0 and n <= fitting)
    heuristic = dict(rows=min(rows, _ROWS), hidden=hidden if hidden <= fitting else max(divisors, default=hidden))
    key = f"B{rows}_D{inputs}_F{hidden}" + (f"_O{outputs}" if two else "") + ("_gated" if gated else "")
    return block_sizes("per_token_ffn", "pallas_tpu", key, heuristic, target)


def _vmem_bytes(form: Form, x: Array, weights: Weights, blocks: dict[str, int]) -> int:
    """Two buffers of every block, the sums, and a piece of the hidden with what its activation keeps."""
    _, _, inputs, _, outputs = form.sizes(x.shape, weights)
    b, f, size = blocks["rows"], blocks["hidden"], x.dtype.itemsize
    two, gated = weights.w2 is not None, weights.w_gate is not None
    columns = inputs * (2 if gated else 1) + (outputs if two else 0)
    out = outputs if two else f
    piece = 4 * b * min(f, _PIECE) * (4 if gated else 3)
    return 2 * size * (columns * f + b * (inputs + out)) + (8 * b * outputs if two else 0) + piece
