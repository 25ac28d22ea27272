"""Attention over histories on Hopper GPUs (Mosaic GPU): the forward kernel; `backward` calls those of `gpu_backward`.

Online softmax. A block owns one request, one head and one or two tiles of 64 query rows; keys and values stream
through shared memory, key tiles that none of its rows sees are never loaded, and the mask is computed only in tiles
that need it. Statistics and sums are float32; the weights are cast to the input type for the second product.

    m' = max(m, max_j s_j)    l' = l exp2(m - m') + sum_j exp2(s_j - m')    acc' = acc exp2(m - m') + exp2(s - m') v
    s = (scale * q.k + bias) log2(e)        o = acc / l        lse = m ln 2 + log l

One key head shared by all query heads: the heads become rows, so each key is read once for all of them (with a
`key_bias`, which differs by head, the keys are repeated instead). Widths are padded to 16 and row and key counts to 8
where they are no multiples; the kernels themselves need no temporaries beyond those copies, positions and statistics.

Compiled for H100, not yet run on one. The tiling follows the attention example that JAX ships for this chip; the
softmax is that of FlashAttention (arXiv 2205.14135).

Rows are flat here: q [R, N, H, d], k [R, S, Hk, d], v [R, S, Hk, dv] or None for v = k (then each tile of keys is
loaded once for both products), positions int32 [1 or R, N], lengths [R], key_bias [R, S, H] or None. Row n of request
r sees key j iff positions[r, n] <= j < lengths[r].
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from recscale.pallas_kernels.blocks import block_sizes
from recscale.pallas_kernels.compat import mosaic_gpu_kernel
from recscale.pallas_kernels.hopper_tiles import (
    SIDE,
    Tile,
    along_columns,
    along_rows,
    pad_axis,
    round_up,
    where,
)
from recscale.pallas_kernels.targets import Target

from . import gpu_backward
from .gpu_tiles import (
    LN2,
    LOG2E,
    WIDTH_GRANULE,
    Items,
    clear_beyond,
    items_per_block,
    key_ranges,
    load_keys,
    rows_held,
    stages_that_fit,
    tile_memory,
    values_held,
)
from .reference import INVISIBLE

Array = jax.Array

_MOST_WIDTH = 256


def obstacle(target: Target, q_shape, k_shape, v_width: int, dtype) -> str | None:
    """Why these kernels cannot serve a request, or None.

    Args:
        q_shape, k_shape: [R, N, H, d] and [R, S, Hk, d]. v_width: dv. dtype: common type of q, k and v.
    """
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        return (
            f"the inputs are {jnp.dtype(dtype).name}; Hopper's matrix unit takes bfloat16 and float16, and its TF32 "
            "would round float32 to 10 bits"
        )
    if max(q_shape[-1], v_width) > _MOST_WIDTH:
        return f"head widths are {q_shape[-1]} and {v_width}, at most {_MOST_WIDTH} fit the registers"
    if 0 in (*q_shape, *k_shape, v_width):
        return f"q is {tuple(q_shape)} and k {tuple(k_shape)}: there is nothing to compute"
    return None


def forward(
    q: Array,
    k: Array,
    v: Array | None,
    lengths: Array,
    positions: Array,
    key_bias: Array | None,
    scale: float,
    *,
    target: Target,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """o [R, N, H, dv] in q's type and lse float32 [R, N, H]; rows that see no key give 0 and -1e30."""
    R, N, H, _ = q.shape
    q, k, v, lengths, positions, fold = _prepared(q, k, v, lengths, positions, key_bias)
    o, lse = _forward(q, k, v, lengths, positions, key_bias, scale, target=target, interpret=interpret)
    if fold > 1:
        return o.reshape(R, N, H, o.shape[-1]), lse.reshape(R, N, H)
    return o, lse.swapaxes(1, 2)


def backward(
    q: Array,
    k: Array,
    v: Array | None,
    lengths: Array,
    positions: Array,
    key_bias: Array | None,
    scale: float,
    o: Array,
    lse: Array,
    do: Array,
    dlse: Array,
    *,
    target: Target,
    interpret: bool = False,
) -> tuple[Array, Array, Array | None, Array | None]:
    """(dq, dk, dv or None, dkey_bias or None) from the cotangents of o and lse, in the types of q, k, v and key_bias.

    With p = exp(scale*q.k + bias - lse), delta = sum(do*o) - dlse:  ds = p*(do.v - delta),  dq = scale*ds k,
    dk = scale*ds^T q,  dv = p^T do,  dbias = sum of ds over rows. Two kernels, one with a block for each tile of rows
    and one with a block for each tile of keys, compute the scores again: no atomics, so reruns are bit-equal. With
    v = None, dv is part of dk.
    """
    given_q, given_k, given_v = q, k, v
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1) - dlse
    delta = jnp.where(lse > INVISIBLE, delta, 0.0)
    q, k, v, lengths, positions, _ = _prepared(q, k, v, lengths, positions, key_bias)
    do = do.astype(q.dtype).reshape(*q.shape[:3], do.shape[-1])
    rows = [x.reshape(q.shape[:3]).swapaxes(1, 2) for x in (lse, delta)]
    dq, dk, dv, dbias = gpu_backward.gradients(
        q, k, v, lengths, positions, key_bias, scale, do, *rows, target=target, interpret=interpret
    )
    dv = None if dv is None or given_v is None else _like(given_v, dv)
    dbias = None if dbias is None or key_bias is None else dbias.astype(key_bias.dtype)
    return _like(given_q, dq), _like(given_k, dk), dv, dbias


def _like(x: Array, gradient: Array) -> Array:
    """The gradient with the heads of x: those that were folded into rows, or repeated, taken back."""
    if gradient.size > x.size:
        gradient = gradient.astype(jnp.float32).sum(axis=2, keepdims=True).astype(x.dtype)
    return gradient.reshape(x.shape)


def _prepared(
    q: Array, k: Array, v: Array | None, lengths: Array, positions: Array, key_bias: Array | None
) -> tuple[Array, Array, Array | None, Array, Array, int]:
    """Inputs with as many key heads as query heads, clamped lengths and positions, and the heads folded into rows."""
    R, N, H, d = q.shape
    S, heads = k.shape[1:3]
    lengths = jnp.clip(lengths, 0, S).astype(jnp.int32)
    positions = jnp.clip(positions, 0, S).astype(jnp.int32)
    if heads == H:
        return q, k, v, lengths, positions, 1
    if key_bias is not None:
        k = jnp.broadcast_to(k, (R, S, H, d))
        v = None if v is None else jnp.broadcast_to(v, (R, S, H, v.shape[-1]))
        return q, k, v, lengths, positions, 1
    return q.reshape(R, N * H, 1, d), k, v, lengths, jnp.repeat(positions, H, axis=1), H


def _forward(q, k, v, lengths, positions, bias, scale, *, target, interpret):
    """o [R, N, H, dv] and lse [R, H, N]; as many key heads as heads."""
    R, N, H, dv = *q.shape[:3], (k if v is None else v).shape[-1]
    S = k.shape[1]
    blocks = _forward_blocks(q, k, v, target)
    groups, keys = blocks["groups"], blocks["keys"]
    block = groups * SIDE
    tiles = -(-N // block)
    all_rows, all_keys = rows_held(N, block, interpret), rows_held(S, keys, interpret)
    all_values = values_held(N, block, interpret)
    width, v_width = round_up(q.shape[-1], WIDTH_GRANULE), round_up(dv, WIDTH_GRANULE)
    q = pad_axis(pad_axis(q, 3, width), 1, all_rows)
    k = pad_axis(pad_axis(k, 3, width), 1, all_keys)
    operands = {
        "q": q,
        "k": k,
        "positions": pad_axis(positions, 1, all_values),
        "lengths": lengths,
        "ranges": key_ranges(positions, lengths, block, keys),
    }
    if v is not None:
        operands["v"] = pad_axis(pad_axis(v, 3, v_width), 1, all_keys)
    if bias is not None:
        operands["bias"] = pad_axis(bias.astype(jnp.float32).swapaxes(1, 2), 2, values_held(S, keys, interpret))
    tile = Tile(interpret)
    items = Items(R, H, tiles, blocks["items"] if not interpret else R * H * tiles)
    out = (
        jax.ShapeDtypeStruct((R, q.shape[1], H, v_width), q.dtype),
        jax.ShapeDtypeStruct((R, H, all_values), jnp.float32),
    )
    o, lse = mosaic_gpu_kernel(
        functools.partial(_forward_body, tile, tuple(operands), blocks, items, scale),
        out_type=out,
        grid={"block": items.blocks},
        cost=_forward_cost(operands, out, S),
        name="hybrid_attention_forward",
        interpret=interpret,
        scratch=_forward_scratch(tile, operands, v_width, blocks),
        threads={"group": groups + 1},
        approximate_math=True,
    )(*operands.values())
    return o[:, :N, :, :dv], lse[:, :, :N]


def _forward_blocks(q, k, v, target) -> dict[str, int]:
    """groups (of 64 rows), keys (of a tile), stages (of the stream) and items (of a block)."""
    widths = [round_up(x.shape[-1], WIDTH_GRANULE) for x in (q, k if v is None else v)]
    # Registers of a thread: dv/2 for the sums, 3/4 of the tile's keys for scores and weights. Wide tiles of q and of o
    # leave no shared memory for two groups.
    crowded = max(widths) > 128 and widths[0] != widths[1]
    heuristic = {
        "groups": 1 if q.shape[1] <= SIDE or crowded else 2,
        "keys": 128 if max(widths) <= 128 else 64,
    }
    key = f"forward_N{q.shape[1]}_S{k.shape[1]}_d{widths[0]}_dv{widths[1]}"
    blocks = block_sizes("hybrid_attention", "pallas_gpu", key, heuristic, target)
    fixed = 2 * blocks["groups"] * SIDE * (widths[0] + (widths[1] if widths[1] != widths[0] else 0) + 8)
    per_stage = 2 * blocks["keys"] * (widths[0] + (0 if v is None else widths[1]) + 2)
    items = q.shape[0] * q.shape[2] * -(-q.shape[1] // (blocks["groups"] * SIDE))
    return {
        "stages": stages_that_fit(target.vmem_bytes, fixed, per_stage, 4),
        "items": items_per_block(items, -(-k.shape[1] // blocks["keys"]), target),
    } | blocks


def _forward_cost(operands, out, S) -> pl.CostEstimate:
    """Every pair of a row and a key, each operand read once: lengths are not known here."""
    R, N, H, v_width = out[0].shape
    pairs = R * N * H * S
    moved = [x.size * x.dtype.itemsize for x in (*operands.values(), *out)]
    flops = 2 * pairs * (operands["q"].shape[-1] + v_width)
    return pl.CostEstimate(flops=flops, transcendentals=pairs, bytes_accessed=sum(moved))


def _forward_scratch(tile, operands, v_width, blocks):
    groups, keys, stages = blocks["groups"], blocks["keys"], blocks["stages"]
    width, dtype = operands["q"].shape[-1], operands["q"].dtype
    scratch = {
        "q_tile": tile_memory(tile, (groups, SIDE, width), dtype),
        "k_tile": tile_memory(tile, (stages, keys, width), dtype),
        "position_tile": plgpu.SMEM((groups, SIDE), jnp.int32),
        "lse_tile": plgpu.SMEM((groups, SIDE), jnp.float32),
        "q_ready": plgpu.Barrier(num_arrivals=2, num_barriers=groups),
        "k_ready": plgpu.Barrier(num_arrivals=1 + ("bias" in operands), num_barriers=stages),
        "k_free": plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
    }
    if "v" in operands:
        scratch["v_tile"] = tile_memory(tile, (stages, keys, v_width), dtype)
        scratch["v_ready"] = plgpu.Barrier(num_barriers=stages)
        scratch["v_free"] = plgpu.Barrier(num_arrivals=groups, num_barriers=stages)
    if width != v_width:
        scratch["o_tile"] = tile_memory(tile, (groups, SIDE, v_width), dtype)
    if "bias" in operands:
        scratch["bias_tile"] = plgpu.SMEM((stages, keys), jnp.float32)
    return scratch


def _forward_body(tile, names, blocks, items, scale, *refs, **scratch):
    """A block: `groups` warpgroups with 64 rows each, and one that loads."""
    inputs = dict(zip(names, refs, strict=False))
    groups, stages = blocks["groups"], blocks["stages"]
    group = lax.axis_index("group")

    @pl.when(group == groups)
    def _load():
        if groups > 1:
            tile.set_registers(40, "decrease")
        load_keys(inputs, scratch, items, blocks["keys"], stages)

    @pl.when(group < groups)
    def _compute():
        if groups > 1:
            tile.set_registers(232, "increase")
        items.each(functools.partial(_forward_item, tile, inputs, scratch, refs[len(names) :], blocks, scale, group))


def _forward_item(tile, inputs, scratch, outputs, blocks, scale, group, r, h, t, done):
    """64 rows of one request and head; returns how many key tiles the stream has brought so far."""
    o_ref, lse_ref = outputs
    groups, keys, stages = blocks["groups"], blocks["keys"], blocks["stages"]
    begin, clear_begin, clear_end, end = (inputs["ranges"][r, t, i] for i in range(4))
    at = pl.ds((t * groups + group) * SIDE, SIDE)
    q_tile, position_tile, ready = (scratch[name].at[group] for name in ("q_tile", "position_tile", "q_ready"))
    request = r if inputs["positions"].shape[0] > 1 else 0
    plgpu.copy_gmem_to_smem(inputs["q"].at[r, at, h], q_tile, ready)
    plgpu.copy_gmem_to_smem(inputs["positions"].at[request, at], position_tile, ready)
    plgpu.barrier_wait(ready)
    first, length = tile.load_rows(position_tile), inputs["lengths"][r]

    def step(i, carry):
        acc, top, total = carry
        slot = lax.rem(done + i, jnp.int32(stages))
        plgpu.barrier_wait(scratch["k_ready"].at[slot])
        s = tile.times_transposed(q_tile, scratch["k_tile"].at[slot]) * (scale * LOG2E)
        if "bias" in inputs:
            s += along_columns(tile.load_columns(scratch["bias_tile"].at[slot]) * LOG2E)
        if "v" in inputs:
            plgpu.barrier_arrive(scratch["k_free"].at[slot])
        j = begin + i

        def masked(s):
            key = tile.counting(keys, 1) + j * keys
            return where((key >= along_rows(first, keys)) & (key < length), s, -jnp.inf)

        s = lax.cond((j >= clear_begin) & (j < clear_end), lambda s: s, masked, s)
        higher = lax.max(top, s.max(axis=1))
        shrink = jnp.exp2(top - higher)
        p = jnp.exp2(s - along_rows(higher, keys))
        total = total * shrink + p.sum(axis=1)
        acc *= along_rows(shrink, acc.shape[1])
        low = p.astype(q_tile.dtype)
        if "v" in inputs:
            plgpu.barrier_wait(scratch["v_ready"].at[slot])
        values = scratch.get("v_tile", scratch["k_tile"]).at[slot]
        clear_beyond(tile, (values,), length - j * keys)
        acc = tile.add_product(acc, low, values)
        plgpu.barrier_arrive(scratch.get("v_free", scratch["k_free"]).at[slot])
        return acc, higher, total

    # A finite start: a row whose keys are all masked keeps it, and exp2(-inf - start) is 0 and never NaN.
    o_tile, lse_tile = scratch.get("o_tile", scratch["q_tile"]).at[group], scratch["lse_tile"].at[group]
    start = tile.zeros(o_tile.shape[-1]), tile.per_row(INVISIBLE), tile.per_row(0.0)
    acc, top, total = lax.fori_loop(0, end - begin, step, start)
    some = total > 0.0
    total = where(some, total, 1.0)
    o_tile[...] = (acc / along_rows(total, acc.shape[1])).astype(o_tile.dtype)
    lse_tile[...] = where(some, top * LN2 + jnp.log(total), INVISIBLE)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(o_tile, o_ref.at[r, at, h])
    plgpu.copy_smem_to_gmem(lse_tile, lse_ref.at[r, h, at])
    plgpu.wait_smem_to_gmem(0)
    return done + end - begin
