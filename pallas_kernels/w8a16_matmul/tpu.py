"""y = cast(act((x . wq) * scale + bias)) on the TPU's TensorCore: int8 tiles stream to VMEM and are widened there.

    grid (token, row block, output block, input block)      one block of F at a time, all of D up to 4096 in one piece

A weight is read from memory once per row block, as int8; x once per token and row block. int8 is exact in bfloat16, so
the MXU sees exact products and sums them in float32; scale, bias and activation are applied to the finished sum (group
scales: to each group's sum). float32 x multiplies at full precision.

Compiled for v5e, v5p, v6e and 7x; not yet run on any of them.

Letters: T tokens, B rows, D inputs, F outputs, G groups of inputs with a scale of their own.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from recscale.pallas_kernels.activations import ACTIVATIONS
from recscale.pallas_kernels.blocks import block_sizes
from recscale.pallas_kernels.targets import Target

Array = jax.Array

_LANES = 128
_ROWS, _OUTPUTS, _INPUTS = 512, 512, 4096  # block limits
# Share of VMEM a program may fill: the compiler needs some for itself.
_VMEM_SHARE = 0.75


def obstacle(
    target: Target,
    x_shape: tuple[int, ...],
    wq_shape: tuple[int, ...],
    scale_shape: tuple[int, ...],
    x_dtype,
    act: str | None,
) -> str | None:
    """Why this kernel cannot serve these shapes (those of `matmul`) on that target, or None."""
    if x_dtype not in (jnp.float32, jnp.bfloat16):
        return f"x is {jnp.dtype(x_dtype).name}, expected float32 or bfloat16"
    if 0 in x_shape or 0 in wq_shape:
        return f"x {x_shape} and wq {wq_shape} have an empty axis"
    inputs, groups = wq_shape[-2], scale_shape[-2]
    if groups > 1 and inputs // groups % _LANES:
        return f"groups of {inputs // groups} inputs share a scale, expected a multiple of {_LANES}"
    blocks = _blocks(target, x_shape, wq_shape, groups)
    needed, limit = _vmem_bytes(blocks, groups, jnp.dtype(x_dtype).itemsize), _VMEM_SHARE * target.vmem_bytes
    if needed > limit:
        return f"blocks {blocks} take {needed} bytes of VMEM, more than {int(limit)} on {target.name}"
    return None


def matmul(
    x: Array,
    wq: Array,
    scale: Array,
    bias: Array | None,
    act: str | None,
    out_dtype,
    *,
    target: Target,
    interpret: bool = False,
) -> Array:
    """x [B, D] or token-major [T, B, D], wq [D, F] or [T, D, F], scale [.., G, F], bias [.., F] -> [.., B, F].

    Args:
        target: chip to compile for; one on which `obstacle` finds nothing.
        interpret: run by interpretation, on any device.
    """
    per_token = wq.ndim == 3
    if not per_token:
        x, wq, scale, bias = x[None], wq[None], scale[None], None if bias is None else bias[None]
    y = _batched(x, wq, scale, bias, act, jnp.dtype(out_dtype), target, interpret)
    return y if per_token else y[0]


def _batched(x, wq, scale, bias, act, out_dtype, target: Target, interpret: bool) -> Array:
    tokens, rows, inputs = x.shape
    outputs, groups = wq.shape[-1], scale.shape[1]
    blocks = _blocks(target, x.shape, wq.shape, groups)
    b, d, f = blocks["rows"], blocks["inputs"], blocks["outputs"]
    steps = pl.cdiv(inputs, d)
    operands = [x, wq, scale]
    specs = [
        pl.BlockSpec((None, b, d), lambda t, i, j, k: (t, i, k)),
        pl.BlockSpec((None, d, f), lambda t, i, j, k: (t, k, j)),
        pl.BlockSpec((None, groups, f), lambda t, i, j, k: (t, 0, j)),
    ]
    if bias is not None:
        operands.append(bias[:, None, :])
        specs.append(pl.BlockSpec((None, 1, f), lambda t, i, j, k: (t, 0, j)))
    body = functools.partial(
        _kernel, act=act, inputs=inputs, group=inputs // groups, biased=bias is not None, interpret=interpret
    )
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((tokens, rows, outputs), out_dtype),
        grid=(tokens, pl.cdiv(rows, b), pl.cdiv(outputs, f), steps),
        in_specs=specs,
        out_specs=pl.BlockSpec((None, b, f), lambda t, i, j, k: (t, i, j)),
        scratch_shapes=[pltpu.VMEM((b, f), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=target.vmem_bytes * 7 // 8,
        ),
        cost_estimate=_cost(x, wq, scale, bias, act, out_dtype),
        interpret=interpret,
        name="w8a16_matmul",
    )(*operands)


def _kernel(x_ref, wq_ref, scale_ref, *rest, act, inputs: int, group: int, biased: bool, interpret: bool):
    """One block of outputs and one of inputs: sums in float32, finished at the last block of inputs."""
    bias_ref, (out_ref, sums_ref) = (rest[0] if biased else None), rest[-2:]
    step, width = pl.program_id(3), x_ref.shape[1]
    groups = inputs // group

    @pl.when(step == 0)
    def _start():
        sums_ref[...] = jnp.zeros_like(sums_ref)

    x = x_ref[...]
    if inputs % width:  # the last block reaches beyond D, into memory that may hold anything, NaN too
        column = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        x = jnp.where(column < inputs - step * width, x, jnp.zeros_like(x))
    wide = jnp.float32 if interpret else x.dtype  # CPUs lack bfloat16 products; both are exact
    if groups == 1:
        sums_ref[...] += _dot(x.astype(wide), wq_ref[...].astype(wide))
    else:
        for g in range(width // group):
            part = slice(g * group, (g + 1) * group)
            sums = _dot(x[:, part].astype(wide), wq_ref[part, :].astype(wide))
            sums_ref[...] += sums * scale_ref[pl.ds(step * (width // group) + g, 1), :]

    @pl.when(step == pl.num_programs(3) - 1)
    def _finish():
        y = sums_ref[...]
        if groups == 1:
            y = y * scale_ref[...]
        if bias_ref is not None:
            y = y + bias_ref[...].astype(jnp.float32)
        out_ref[...] = ACTIVATIONS[act](y).astype(out_ref.dtype)


def _dot(x: Array, w: Array) -> Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.matmul(x, w, precision=precision, preferred_element_type=jnp.float32)


def _blocks(target: Target, x_shape: tuple[int, ...], wq_shape: tuple[int, ...], groups: int) -> dict[str, int]:
    """Rows, inputs and outputs of a block: measured ones, or the limits above."""
    rows, (inputs, outputs) = x_shape[-2], wq_shape[-2:]
    heuristic = dict(
        rows=min(rows, _ROWS),
        inputs=_input_block(inputs, groups),
        outputs=outputs if outputs <= _OUTPUTS else _OUTPUTS,
    )
    key = f"B{rows}_D{inputs}_F{outputs}_G{groups}"
    return block_sizes("w8a16_matmul", "pallas_tpu", key, heuristic, target)


def _input_block(inputs: int, groups: int) -> int:
    """All inputs up to the limit, else a divisor of them (whole groups), else 2048 with a masked last block."""
    if inputs <= _INPUTS:
        return inputs
    if groups > 1:
        parts = next(n for n in range(1, groups + 1) if groups % n == 0 and (inputs // n <= _INPUTS or n == groups))
        return inputs // parts
    divisors = (n for n in range(_INPUTS, 1024 - 1, -_LANES) if inputs % n == 0)
    return next(divisors, 2048)


def _vmem_bytes(blocks: dict[str, int], groups: int, x_bytes: int) -> int:
    """Two buffers of every block, the widened weights and the sums."""
    b, d, f = (math.ceil(blocks[name] / _LANES) * _LANES for name in ("rows", "inputs", "outputs"))
    b = math.ceil(blocks["rows"] / 32) * 32
    return 2 * (b * d * x_bytes + d * f + 4 * f * (groups + 8) + 4 * b * f) + d * f * (4 + x_bytes) + 8 * b * f


def _cost(x, wq, scale, bias, act, out_dtype) -> pl.CostEstimate:
    tokens, rows, inputs = x.shape
    outputs = wq.shape[-1]
    moved = x.size * x.dtype.itemsize + wq.size + scale.size * 4 + tokens * rows * outputs * out_dtype.itemsize
    return pl.CostEstimate(
        flops=2 * tokens * rows * inputs * outputs,
        bytes_accessed=moved + (0 if bias is None else bias.size * bias.dtype.itemsize),
        transcendentals=tokens * rows * outputs if act in ("gelu", "silu") else 0,
    )
