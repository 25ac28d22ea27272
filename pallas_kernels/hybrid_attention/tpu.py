"""Attention over a history on the TPU's TensorCore, tiles in VMEM, scores never in memory; see `tpu_layout` for tiles.

Forward, grid (request, head group, row tile, key tile), online softmax over the key tiles of a row tile:

    s = scale * q k^T + bias        m' = max(m, max s)        p = exp(s - m')        c = exp(m - m')
    l' = c l + sum p                acc' = c acc + p v        o = acc / l            lse = m + log l

Backward, with p = exp(s - lse), delta = sum(do * o) - dlse and ds = p * (do v^T - delta), two passes:

    rows, grid as above                                         delta, dq = scale * sum over key tiles of ds k
    keys, grid (request, head group, key tile, row tile)        dk = scale * sum over row tiles of ds^T q, dv of p^T do,
                                                                dkey_bias of the sum of ds over rows

so every sum is made in one program, in the order of the tiles: two runs are bit-equal. Statistics and sums are float32,
operands of products have the input's type (float32 at full precision). What lies beyond a length is read only as part
of a tile that holds valid keys, and selected away: it may be anything, NaN too.

Compiled for v5e, v5p, v6e and 7x; not yet run on any of them.
"""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from recscale.pallas_kernels.targets import Target

from . import tpu_layout as tiles
from .tpu_bodies import GridStep, forward_body, key_body, row_body
from .tpu_layout import Layout

Array = jax.Array

# Shares of VMEM a program may fill and of scalar memory its scalars may: the compiler needs some for itself.
_VMEM_SHARE, _SMEM_SHARE = 0.75, 0.5

# lse of a row that fills a tile up: its weights are exp(s - lse) = 0.
_NO_WEIGHT = 1e30


def obstacle(target: Target, q_shape: tuple[int, ...], k_shape: tuple[int, ...], v_width: int, dtype) -> str | None:
    """Why this kernel cannot serve q [R, N, H, d] and k [R, S, Hk, d] on that target, or None."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"q is {jnp.dtype(dtype).name}, expected float32 or bfloat16"
    if 0 in q_shape or 0 in k_shape or v_width == 0:
        return f"q {q_shape}, k {k_shape} or v of width {v_width} has an empty axis"
    if k_shape[1] >= 2**24:
        return f"{k_shape[1]} keys, expected fewer than 2^24"
    for backward in (False, True):
        plan = tiles.layout(target, q_shape, k_shape, v_width, dtype, backward)
        words, limit = tiles.scalar_words(q_shape[0], plan), int(_SMEM_SHARE * target.smem_bytes) // 4
        if words > limit:
            return f"the tiles of {q_shape[0]} requests take {words} words of scalar memory, more than {limit}"
        needed, limit = tiles.vmem_bytes(plan, dtype, backward), int(_VMEM_SHARE * target.vmem_bytes)
        if needed > limit:
            return f"tiles of {plan.stacked} rows and {plan.keys} keys take {needed} bytes of VMEM, more than {limit}"
    return None


def forward(
    q: Array, k: Array, v: Array | None, lengths: Array, positions: Array, key_bias: Array | None, scale: float, *,
    target: Target, interpret=False,
) -> tuple[Array, Array]:  # fmt: skip
    """o [R, N, H, dv] in q's type and lse float32 [R, N, H].

    Args:
        q: [R, N, H, d]. k: [R, S, Hk, d]. v: [R, S, Hk, dv], or None for v = k. One type.
        lengths: int32 [R]. positions: int32 [1 or R, N]. key_bias: [R, S, H] or None.
        target: chip to compile for; one on which `obstacle` finds nothing.
        interpret: True, or parameters of interpretation: run on any device.
    """
    return _forward(q, k, v, lengths, positions, key_bias, scale, target, interpret, counting=False)[:2]


def counted_tiles(
    q: Array, k: Array, v: Array | None, lengths: Array, positions: Array, key_bias: Array | None, scale: float, *,
    target: Target, interpret=False,
) -> Array:  # fmt: skip
    """int32 [R, groups, row tiles]: key tiles the forward pass worked on, counted by itself. Arguments as `forward`."""
    found = _forward(q, k, v, lengths, positions, key_bias, scale, target, interpret, counting=True)
    return cast(Array, found[2])


def _forward(q, k, v, lengths, positions, key_bias, scale, target, interpret, counting):
    plan, call = _call(q, k, v, positions, key_bias, scale, target, interpret, backward=False)
    R, value_width = q.shape[0], (k if v is None else v).shape[3]
    specs = tiles.RowSpecs(plan, positions)
    rows, lanes = plan.row_tiles * plan.rows, plan.groups * plan.group * plan.value_width
    o_shape = jax.ShapeDtypeStruct((R, rows, lanes), q.dtype)
    lse_shape = jax.ShapeDtypeStruct((R, plan.groups, plan.row_tiles, 1, plan.stacked), jnp.float32)
    count_shape = jax.ShapeDtypeStruct((R * plan.groups * plan.row_tiles,), jnp.int32)
    inputs = dict(
        q=(tiles.pack_rows(q, plan, plan.width), specs.rows(plan.width)),
        positions=(tiles.stack_positions(positions, plan), specs.positions()),
        **_key_inputs(k, v, key_bias, plan, specs),
    )
    outputs = dict(o=(o_shape, specs.rows(plan.value_width)), lse=(lse_shape, specs.numbers()))
    if counting:
        outputs["count"] = (count_shape, pl.BlockSpec(memory_space=pltpu.SMEM))
    scratch = dict(
        stack=pltpu.VMEM((plan.stacked, plan.key_lanes), q.dtype),
        start=pltpu.VMEM((plan.stacked, 1), jnp.int32),
        most=pltpu.VMEM((plan.stacked, 1), jnp.float32),
        total=pltpu.VMEM((plan.stacked, 1), jnp.float32),
        sums=pltpu.VMEM((plan.stacked, plan.value_lanes), jnp.float32),
    )
    scalars = tiles.tile_scalars(lengths, positions, plan)
    found = call(forward_body, scalars, inputs, outputs, scratch, "hybrid_attention_forward")
    o, lse = tiles.unpack_rows(found["o"], plan, value_width), tiles.unstack_numbers(found["lse"], plan)
    return o, lse, found["count"].reshape(R, plan.groups, plan.row_tiles) if counting else None


def backward(
    q: Array, k: Array, v: Array | None, lengths: Array, positions: Array, key_bias: Array | None, scale: float,
    o: Array, lse: Array, do: Array, dlse: Array, *, target: Target, interpret=False,
) -> tuple[Array, Array, Array | None, Array | None]:  # fmt: skip
    """dq, dk, dv (None for v = k: then dk holds both) and dkey_bias (or None), each in the type of its input.

    Args:
        o, lse: as `forward` returned them. do, dlse: their cotangents. The others as in `forward`.
    """
    plan, call = _call(q, k, v, positions, key_bias, scale, target, interpret, backward=True)
    scalars = tiles.tile_scalars(lengths, positions, plan)
    rows = dict(
        q=tiles.pack_rows(q, plan, plan.width),
        do=tiles.pack_rows(do.astype(q.dtype), plan, plan.value_width),
        o=tiles.pack_rows(o, plan, plan.value_width),
        lse=tiles.stack_numbers(lse, plan, _NO_WEIGHT),
        dlse=tiles.stack_numbers(dlse, plan, 0.0),
        positions=tiles.stack_positions(positions, plan),
    )
    dq, rows["delta"] = _row_pass(call, scalars, rows, (k, v, key_bias), plan, positions)
    keys = _key_pass(call, scalars, rows, (k, v, key_bias), plan, positions)
    dk, dv = tiles.unpack_keys(keys["dk"], plan, k), None if v is None else tiles.unpack_keys(keys["dv"], plan, v)
    dbias = None if key_bias is None else tiles.unpack_bias(keys["dbias"], plan).astype(key_bias.dtype)
    return tiles.unpack_rows(dq, plan, q.shape[3]), dk, dv, dbias


def _row_pass(call, scalars, rows, keys, plan: Layout, positions) -> tuple[Array, Array]:
    """dq, packed, and delta, stacked."""
    specs, dtype = tiles.RowSpecs(plan, positions), rows["q"].dtype
    k, v, key_bias = keys
    inputs = {**_row_inputs(rows, ("o", "dlse"), plan, specs), **_key_inputs(k, v, key_bias, plan, specs)}
    outputs = dict(
        dq=(jax.ShapeDtypeStruct(rows["q"].shape, dtype), specs.rows(plan.width)),
        delta=(jax.ShapeDtypeStruct(rows["lse"].shape, jnp.float32), specs.numbers()),
    )
    column = pltpu.VMEM((plan.stacked, 1), jnp.float32)
    scratch = dict(
        stack=pltpu.VMEM((plan.stacked, plan.key_lanes), dtype),
        do_stack=pltpu.VMEM((plan.stacked, plan.value_lanes), dtype),
        start=pltpu.VMEM((plan.stacked, 1), jnp.int32),
        lse_column=column,
        delta_column=column,
        sums=pltpu.VMEM((plan.stacked, plan.key_lanes), jnp.float32),
    )
    found = call(row_body, scalars, inputs, outputs, scratch, "hybrid_attention_backward_rows")
    return found["dq"], found["delta"]


def _key_pass(call, scalars, rows, keys, plan: Layout, positions) -> dict[str, Array]:
    """dk, and where there are v and key_bias dv and dbias, packed."""
    k, v, key_bias = keys
    specs, R = tiles.KeySpecs(plan, positions), k.shape[0]
    inputs = {**_row_inputs(rows, ("delta",), plan, specs), **_key_inputs(k, v, key_bias, plan, specs)}
    outputs, scratch = {}, {}
    for name, x, lanes in (("dk", k, plan.key_lanes), ("dv", v, plan.value_lanes)):
        if x is not None:
            shape = (R, plan.S, lanes if plan.shared else plan.groups * lanes)
            outputs[name] = (jax.ShapeDtypeStruct(shape, x.dtype), specs.out_keys(lanes))
            scratch[name + "_sum"] = pltpu.VMEM((plan.keys, lanes), jnp.float32)
    if key_bias is not None:
        shape = (R, plan.groups, plan.group, plan.S)
        outputs["dbias"] = (jax.ShapeDtypeStruct(shape, jnp.float32), specs.out_bias())
        scratch["dbias_sum"] = pltpu.VMEM((plan.group, plan.keys), jnp.float32)
    return call(key_body, scalars, inputs, outputs, scratch, "hybrid_attention_backward_keys")


def _row_inputs(rows, own: tuple[str, ...], plan: Layout, specs) -> dict:
    """What both backward passes read of a row tile, and what only one of them does."""
    made = dict(
        q=specs.rows(plan.width),
        do=specs.rows(plan.value_width),
        lse=specs.numbers(),
        positions=specs.positions(),
        **{name: specs.rows(plan.value_width) if name == "o" else specs.numbers() for name in own},
    )
    return {name: (rows[name], spec) for name, spec in made.items()}


def _key_inputs(k, v, key_bias, plan: Layout, specs) -> dict:
    made = dict(k=(tiles.pack_keys(k, plan, plan.width), specs.keys(plan.key_lanes)))
    if v is not None:
        made["v"] = (tiles.pack_keys(v, plan, plan.value_width), specs.keys(plan.value_lanes))
    if key_bias is not None:
        made["bias"] = (tiles.pack_bias(key_bias, plan), specs.bias())
    return made


def _call(q, k, v, positions, key_bias, scale, target, interpret, *, backward: bool):
    """The layout, and the function that runs a body on arrays and scratch by name; results by name."""
    value_width = (k if v is None else v).shape[3]
    plan = tiles.layout(target, q.shape, k.shape, value_width, q.dtype, backward)
    own = positions.shape[0] > 1

    def call(body, scalars, inputs, outputs, scratch, name):
        by_keys = body is key_body
        names = ("length", "source", "last_key", "lowest", "highest", "last_row", *inputs, *outputs, *scratch)

        def kernel(*refs):
            body(GridStep(plan, own, by_keys, scale, bool(interpret)), **dict(zip(names, refs, strict=True)))

        inner = (plan.key_tiles, plan.row_tiles) if by_keys else (plan.row_tiles, plan.key_tiles)
        results = pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=(q.shape[0], plan.groups, *inner),
                in_specs=[spec for _, spec in inputs.values()],
                out_specs=[spec for _, spec in outputs.values()],
                scratch_shapes=list(scratch.values()),
            ),
            out_shape=[shape for shape, _ in outputs.values()],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("arbitrary" if "count" in outputs else "parallel",) * 2 + ("arbitrary",) * 2,
                vmem_limit_bytes=target.vmem_bytes * 7 // 8,
            ),
            cost_estimate=_cost(body, q, k, v, key_bias, value_width),
            interpret=interpret,
            name=name,
        )(*scalars, *(array for array, _ in inputs.values()))
        return dict(zip(outputs, results, strict=True))

    return plan, call


def _cost(body, q, k, v, key_bias, value_width: int) -> pl.CostEstimate:
    """Of one pass, every key counted as seen: 2 N S H (d + dv) useful FLOPs each; recomputed scores are not useful.

    Bytes once, beside keys: forward q, o, lse; backward q, do, o, lse, dlse, delta, dq and then q, do, lse, delta.
    """
    R, N, H, d = q.shape
    pairs, size = R * N * k.shape[1] * H, q.dtype.itemsize
    keys = sum(x.size * x.dtype.itemsize for x in (k, v, key_bias) if x is not None)
    row = {
        forward_body: (d + value_width) * size + 4,
        row_body: 2 * (d + value_width) * size + 12,
        key_body: (d + value_width) * size + 8,
    }[body]
    return pl.CostEstimate(
        flops=2 * pairs * (d + value_width),
        bytes_accessed=keys * (2 if body is key_body else 1) + R * N * H * row,
        transcendentals=pairs,
    )
