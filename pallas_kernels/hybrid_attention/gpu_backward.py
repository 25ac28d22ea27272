"""Gradient of attention over histories on Hopper GPUs: one kernel for dq, one for dk, dv and dbias.

    p = exp2(s - lse log2(e))   ds = p (do.v - delta)
    dq = scale * ds k           dk = scale * ds^T q           dv = p^T do           dbias = sum of ds over rows

dq: a block owns tiles of 64 query rows and keys stream, as in the forward kernel. dk and dv: a block owns tiles of 64
keys, computes the scores transposed, and query rows stream with their statistics; a key tile beyond the length writes
zeros. Sums over rows stay in float32 registers of one warpgroup, in a fixed order: no atomics. Wider than 128, dk and
dv do not fit a thread's registers together and the second kernel runs once for each. With v = k both belong to the same
array and are one sum from the start, so one run serves every width and no second array of their size is made.

Compiled for H100 without spilled registers, not yet run on one. For that, heads wider than 64 stream 32 query rows and
heads wider than 128 stream 32 keys (64 spill up to 240 and 352 bytes a thread, stores and loads).

Shapes as in `gpu`, with as many key heads as heads; statistics are [R, H, N].
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
    Lane,
    Tile,
    along_columns,
    along_rows,
    drain,
    pad_axis,
    round_up,
    stream,
    where,
)

from .gpu_tiles import (
    LOG2E,
    WIDTH_GRANULE,
    Items,
    clear_beyond,
    items_per_block,
    key_ranges,
    load_keys,
    row_ranges,
    rows_held,
    stages_that_fit,
    tile_memory,
    values_held,
)

Array = jax.Array

# Wider heads leave no room in registers for both sums of the second kernel.
_BOTH_SUMS_WIDTH = 128

# Narrower tiles of keys belong to heads so wide that a mask costs little and a branch without it spills registers.
_MASKED_BY_NEED = 64


def gradients(q, k, v, lengths, positions, bias, scale, do, lse, delta, *, target, interpret):
    """(dq, dk, dv or None, dbias float32 [R, S, H] or None); delta = sum(do*o) - dlse."""
    values = k if v is None else v
    N, S, d, dv_width = q.shape[1], k.shape[1], q.shape[-1], values.shape[-1]
    widths = round_up(d, WIDTH_GRANULE), round_up(dv_width, WIDTH_GRANULE)
    blocks = _blocks(q.shape[0] * q.shape[2], N, S, widths, v is None, target)
    all_rows = rows_held(N, max(blocks["groups"] * SIDE, blocks["rows"]), interpret)
    all_keys = rows_held(S, max(blocks["keys"], blocks["key_groups"] * SIDE), interpret)
    operands = {
        "q": pad_axis(pad_axis(q, 3, widths[0]), 1, all_rows),
        "do": pad_axis(pad_axis(do, 3, widths[1]), 1, all_rows),
        "k": pad_axis(pad_axis(k, 3, widths[0]), 1, all_keys),
        "lengths": lengths,
    }
    if v is not None:
        operands["v"] = pad_axis(pad_axis(v, 3, widths[1]), 1, all_keys)
    if bias is not None:
        operands["bias"] = bias.astype(jnp.float32).swapaxes(1, 2)
    statistics = {"positions": positions, "lse": lse * LOG2E, "delta": delta}
    common = {"blocks": blocks, "scale": scale, "S": S, "tile": Tile(interpret)}
    dq = _row_gradients(operands | statistics, positions, **common)
    if v is None or max(widths) <= _BOTH_SUMS_WIDTH:
        found = _key_gradients(operands | statistics, positions, ("dk", "dv"), **common)
    else:
        found = _key_gradients(operands | statistics, positions, ("dk",), **common)
        found |= _key_gradients(operands | statistics, positions, ("dv",), **common)
    dv = found["dv"][:, :S, :, :dv_width] if "dv" in found else None
    dbias = found["dbias"][:, :, :S].swapaxes(1, 2) if "dbias" in found else None
    return dq[:, :N, :, :d], found["dk"][:, :S, :, :d], dv, dbias


def _blocks(streams, N, S, widths, shared, target) -> dict[str, int]:
    """First kernel: groups (of 64 rows), keys, stages, items. Second: key_groups, rows, row_stages, key_items."""
    widest = max(widths)
    heuristic = {
        "groups": 1 if N <= SIDE or widest > 128 else 2,
        "keys": 128 if widest <= 64 else 64 if widest <= 128 else 32,
        "key_groups": 1 if S <= SIDE or widest > 128 else 2,
        "rows": 64 if widest <= 64 else 32,
    }
    key = f"backward_N{N}_S{S}_d{widths[0]}_dv{widths[1]}"
    blocks = block_sizes("hybrid_attention", "pallas_gpu", key, heuristic, target)
    both, kept = sum(widths), widths[0] if shared else sum(widths)
    fixed, step = 2 * blocks["groups"] * SIDE * (both + 8), 2 * blocks["keys"] * (kept + 2)
    key_fixed, key_step = 2 * blocks["key_groups"] * SIDE * (both + 4), 2 * blocks["rows"] * (both + 6)
    items, key_items = (streams * -(-n // (blocks[g] * SIDE)) for n, g in ((N, "groups"), (S, "key_groups")))
    return {
        "stages": stages_that_fit(target.vmem_bytes, fixed, step, 4),
        "row_stages": stages_that_fit(target.vmem_bytes, key_fixed, key_step, 4),
        "items": items_per_block(items, -(-S // blocks["keys"]), target),
        "key_items": items_per_block(key_items, -(-N // blocks["rows"]), target),
    } | blocks


def _cost(operands, out, products, S) -> pl.CostEstimate:
    """Every pair of a row and a key; `products` are the widths of what is counted: nothing computed a second time."""
    R, N, H, _ = operands["q"].shape
    moved = [x.size * x.dtype.itemsize for x in (*operands.values(), *out)]
    pairs = R * N * H * S
    return pl.CostEstimate(flops=2 * pairs * sum(products), transcendentals=pairs, bytes_accessed=sum(moved))


# dq ------------------------------------------------------------------------------------------------------------------


def _row_gradients(operands, positions, *, blocks, scale, S, tile):
    """dq [R, N', H, d']."""
    groups, keys, stages = blocks["groups"], blocks["keys"], blocks["stages"]
    block = groups * SIDE
    (R, _, H, _), N = operands["q"].shape, positions.shape[1]
    tiles = -(-N // block)
    operands = dict(operands)
    for name in ("positions", "lse", "delta"):
        operands[name] = pad_axis(operands[name], operands[name].ndim - 1, values_held(N, block, tile.interpret))
    if "bias" in operands:
        operands["bias"] = pad_axis(operands["bias"], 2, values_held(S, keys, tile.interpret))
    operands["ranges"] = key_ranges(positions, operands["lengths"], block, keys)
    q, v_width = operands["q"], operands["do"].shape[-1]
    scratch = {
        "q_tile": tile_memory(tile, (groups, SIDE, q.shape[-1]), q.dtype, keys),
        "do_tile": tile_memory(tile, (groups, SIDE, v_width), q.dtype, keys),
        "k_tile": tile_memory(tile, (stages, keys, q.shape[-1]), q.dtype, keys),
        "position_tile": plgpu.SMEM((groups, SIDE), jnp.int32),
        "lse_tile": plgpu.SMEM((groups, SIDE), jnp.float32),
        "delta_tile": plgpu.SMEM((groups, SIDE), jnp.float32),
        "rows_ready": plgpu.Barrier(num_arrivals=5, num_barriers=groups),
        "k_ready": plgpu.Barrier(num_arrivals=1 + ("bias" in operands), num_barriers=stages),
        "k_free": plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
    }
    if "v" in operands:
        scratch["v_tile"] = tile_memory(tile, (stages, keys, v_width), q.dtype, keys)
        scratch["v_ready"] = plgpu.Barrier(num_barriers=stages)
        scratch["v_free"] = plgpu.Barrier(num_arrivals=groups, num_barriers=stages)
    if "bias" in operands:
        scratch["bias_tile"] = plgpu.SMEM((stages, keys), jnp.float32)
    out = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    items = Items(R, H, tiles, R * H * tiles if tile.interpret else blocks["items"])
    (dq,) = mosaic_gpu_kernel(
        functools.partial(_dq_body, tile, tuple(operands), blocks, items, scale),
        out_type=out,
        grid={"block": items.blocks},
        cost=_cost(operands, out, (q.shape[-1], v_width), S),
        name="hybrid_attention_dq",
        interpret=tile.interpret,
        scratch=scratch,
        threads={"group": groups + 1},
        approximate_math=True,
    )(*operands.values())
    return dq


def _dq_body(tile, names, blocks, items, scale, *refs, **scratch):
    """A block: `groups` warpgroups with 64 query rows each, and one that loads keys and values."""
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
        items.each(functools.partial(_dq_item, tile, inputs, scratch, refs[len(names)], blocks, scale, group))


def _dq_item(tile, inputs, scratch, dq_ref, blocks, scale, group, r, h, t, done):
    """64 rows of one request and head; returns how many key tiles the stream has brought so far."""
    groups, keys, stages = blocks["groups"], blocks["keys"], blocks["stages"]
    begin, clear_begin, clear_end, end = (inputs["ranges"][r, t, i] for i in range(4))
    at, ready = pl.ds((t * groups + group) * SIDE, SIDE), scratch["rows_ready"].at[group]
    request = r if inputs["positions"].shape[0] > 1 else 0
    sources = {
        "q_tile": inputs["q"].at[r, at, h],
        "do_tile": inputs["do"].at[r, at, h],
        "position_tile": inputs["positions"].at[request, at],
        "lse_tile": inputs["lse"].at[r, h, at],
        "delta_tile": inputs["delta"].at[r, h, at],
    }
    own = {name: scratch[name].at[group] for name in sources}
    for name, source in sources.items():
        plgpu.copy_gmem_to_smem(source, own[name], ready)
    plgpu.barrier_wait(ready)
    first, lse, delta = (tile.load_rows(own[name]) for name in ("position_tile", "lse_tile", "delta_tile"))
    length = inputs["lengths"][r]

    def step(i, dq):
        slot = lax.rem(done + i, jnp.int32(stages))
        k_tile = scratch["k_tile"].at[slot]
        j = begin + i
        plgpu.barrier_wait(scratch["k_ready"].at[slot])
        clear_beyond(tile, (k_tile,), length - j * keys)
        s = tile.times_transposed(own["q_tile"], k_tile) * (scale * LOG2E)
        if "bias" in inputs:
            s += along_columns(tile.load_columns(scratch["bias_tile"].at[slot]) * LOG2E)
        p = jnp.exp2(s - along_rows(lse, keys))

        def masked(p):
            key = tile.counting(keys, 1) + j * keys
            return where((key >= along_rows(first, keys)) & (key < length), p, 0.0)

        if keys >= _MASKED_BY_NEED:
            p = lax.cond((j >= clear_begin) & (j < clear_end), lambda p: p, masked, p)
        else:
            p = masked(p)
        if "v" in inputs:
            v_tile = scratch["v_tile"].at[slot]
            plgpu.barrier_wait(scratch["v_ready"].at[slot])
            clear_beyond(tile, (v_tile,), length - j * keys)
            dp = tile.times_transposed(own["do_tile"], v_tile)
            plgpu.barrier_arrive(scratch["v_free"].at[slot])
        else:
            dp = tile.times_transposed(own["do_tile"], k_tile)
        ds = p * (dp - along_rows(delta, keys))
        dq = tile.add_product(dq, ds.astype(k_tile.dtype), k_tile)
        plgpu.barrier_arrive(scratch["k_free"].at[slot])
        return dq

    q_tile = own["q_tile"]
    dq = lax.fori_loop(0, end - begin, step, tile.zeros(q_tile.shape[-1]))
    q_tile[...] = (dq * scale).astype(q_tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_tile, dq_ref.at[r, at, h])
    plgpu.wait_smem_to_gmem(0)
    return done + end - begin


# dk, dv and dbias ----------------------------------------------------------------------------------------------------


def _key_gradients(operands, positions, wanted, *, blocks, scale, S, tile) -> dict[str, Array]:
    """dk [R, S', H, d'], dv [R, S', H, dv'], dbias [R, H, S'] by name, those wanted; v = k and both: dv is in dk."""
    groups, rows, stages = blocks["key_groups"], blocks["rows"], blocks["row_stages"]
    block = groups * SIDE
    R, _, H, width = operands["q"].shape
    N, v_width = positions.shape[1], operands["do"].shape[-1]
    tiles = -(-S // block)
    operands = dict(operands)
    for name in ("positions", "lse", "delta"):
        operands[name] = pad_axis(operands[name], operands[name].ndim - 1, values_held(N, rows, tile.interpret))
    if "bias" in operands:
        operands["bias"] = pad_axis(operands["bias"], 2, values_held(S, block, tile.interpret))
    operands["ranges"] = row_ranges(positions, operands["lengths"], rows, block, S)
    k, dtype = operands["k"], operands["k"].dtype
    with_dk = "dk" in wanted
    scratch = {
        "k_tile": tile_memory(tile, (groups, SIDE, width), dtype, rows),
        "q_tile": tile_memory(tile, (stages, rows, width), dtype, rows),
        "do_tile": tile_memory(tile, (stages, rows, v_width), dtype, rows),
        "position_tile": plgpu.SMEM((stages, rows), jnp.int32),
        "lse_tile": plgpu.SMEM((stages, rows), jnp.float32),
        "keys_ready": plgpu.Barrier(
            num_arrivals=1 + ("v" in operands and with_dk) + ("bias" in operands), num_barriers=groups
        ),
        "q_ready": plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        "q_free": plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
        "do_ready": plgpu.Barrier(num_arrivals=1 + with_dk, num_barriers=stages),
        "do_free": plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
    }
    if with_dk:
        scratch["delta_tile"] = plgpu.SMEM((stages, rows), jnp.float32)
    if "v" in operands:
        scratch["v_tile"] = tile_memory(tile, (groups, SIDE, v_width), dtype, rows)
    out = {}
    if with_dk:
        out["dk"] = jax.ShapeDtypeStruct(k.shape, dtype)
    if "dv" in wanted and "v" in operands:
        out["dv"] = jax.ShapeDtypeStruct((*k.shape[:3], v_width), dtype)
    if "bias" in operands:
        scratch["bias_tile"] = plgpu.SMEM((groups, SIDE), jnp.float32)
        if with_dk:
            out["dbias"] = jax.ShapeDtypeStruct((R, H, values_held(S, block, tile.interpret)), jnp.float32)
    items = Items(R, H, tiles, R * H * tiles if tile.interpret else blocks["key_items"])
    products = [width] * with_dk + [v_width] * ("dv" in wanted)
    results = mosaic_gpu_kernel(
        functools.partial(_keys_body, tile, tuple(operands), tuple(out), wanted, blocks, items, N, scale),
        out_type=list(out.values()),
        grid={"block": items.blocks},
        cost=_cost(operands, out.values(), products, S),
        name=f"hybrid_attention_{'_'.join(wanted)}",
        interpret=tile.interpret,
        scratch=scratch,
        threads={"group": groups + 1},
        approximate_math=True,
    )(*operands.values())
    return dict(zip(out, results, strict=True))


def _keys_body(tile, names, outputs, wanted, blocks, items, N, scale, *refs, **scratch):
    """A block: `key_groups` warpgroups with 64 keys each, and one that loads query rows."""
    inputs = dict(zip(names, refs, strict=False))
    out = dict(zip(outputs, refs[len(names) :], strict=True))
    groups = blocks["key_groups"]
    group = lax.axis_index("group")

    @pl.when(group == groups)
    def _load():
        if groups > 1:
            tile.set_registers(40, "decrease")
        _load_rows(inputs, scratch, items, blocks["rows"], blocks["row_stages"])

    @pl.when(group < groups)
    def _compute():
        if groups > 1:
            tile.set_registers(232, "increase")
        items.each(functools.partial(_keys_item, tile, inputs, scratch, out, wanted, blocks, N, scale, group))


def _keys_item(tile, inputs, scratch, out, wanted, blocks, N, scale, group, r, h, t, done):
    """64 keys of one request and head; returns how many row tiles the stream has brought so far."""
    groups, rows, stages = blocks["key_groups"], blocks["rows"], blocks["row_stages"]
    clear, end = inputs["ranges"][r, t, 0], inputs["ranges"][r, t, 1]
    start = (t * groups + group) * SIDE
    at, ready = pl.ds(start, SIDE), scratch["keys_ready"].at[group]
    own = {name: scratch[name].at[group] for name in ("k_tile", "v_tile", "bias_tile") if name in scratch}
    read = [own["k_tile"]]
    plgpu.copy_gmem_to_smem(inputs["k"].at[r, at, h], own["k_tile"], ready)
    if "v" in inputs and "dk" in wanted:
        read.append(own["v_tile"])
        plgpu.copy_gmem_to_smem(inputs["v"].at[r, at, h], own["v_tile"], ready)
    if "bias" in inputs:
        plgpu.copy_gmem_to_smem(inputs["bias"].at[r, h, at], own["bias_tile"], ready)
    plgpu.barrier_wait(ready)
    length = inputs["lengths"][r]
    clear_beyond(tile, read, length - start)
    value_tile = own.get("v_tile", own["k_tile"])
    shared = "v" not in inputs  # then dv is summed into dk, which has to be scaled term by term

    def step(i, sums):
        slot = lax.rem(done + i, jnp.int32(stages))
        q_tile, do_tile = scratch["q_tile"].at[slot], scratch["do_tile"].at[slot]
        plgpu.barrier_wait(scratch["q_ready"].at[slot])
        s = tile.times_transposed(own["k_tile"], q_tile) * (scale * LOG2E)
        if "bias" in inputs:
            s += along_rows(tile.load_rows(own["bias_tile"]) * LOG2E, rows)
        p = jnp.exp2(s - along_columns(tile.load_columns(scratch["lse_tile"].at[slot])))
        first = tile.load_columns(scratch["position_tile"].at[slot])

        def masked(p):
            key, row = tile.counting(rows, 0) + start, tile.counting(rows, 1) + i * rows
            return where((key >= along_columns(first)) & (key < length) & (row < N), p, 0.0)

        p = lax.cond(i < clear, lambda p: p, masked, p)
        sums = dict(sums)
        plgpu.barrier_wait(scratch["do_ready"].at[slot])
        if "dv" in wanted:
            home = "dk" if shared else "dv"
            sums[home] = tile.add_product(sums[home], p.astype(q_tile.dtype), do_tile)
        if "dk" in wanted:
            dp = tile.times_transposed(value_tile, do_tile)
            ds = p * (dp - along_columns(tile.load_columns(scratch["delta_tile"].at[slot])))
            if "dbias" in out:
                sums["dbias"] += ds.sum(axis=1)
            ds = ds * scale if shared else ds
            sums["dk"] = tile.add_product(sums["dk"], ds.astype(q_tile.dtype), q_tile)
        plgpu.barrier_arrive(scratch["do_free"].at[slot])
        plgpu.barrier_arrive(scratch["q_free"].at[slot])
        return sums

    sums = {"dk": tile.zeros(own["k_tile"].shape[-1])} if "dk" in wanted else {}
    if "dv" in wanted and not shared:
        sums["dv"] = tile.zeros(value_tile.shape[-1])
    if "dbias" in out:
        sums["dbias"] = tile.per_row(0.0)
    sums = lax.fori_loop(0, end, step, sums)
    if "dk" in wanted and not shared:
        sums["dk"] *= scale
    homes = {"dk": own["k_tile"], "dv": value_tile, "dbias": own.get("bias_tile")}
    for name in out:
        homes[name][...] = sums[name].astype(homes[name].dtype)
    plgpu.commit_smem()
    for name, ref in out.items():
        plgpu.copy_smem_to_gmem(homes[name], ref.at[(r, h, at) if name == "dbias" else (r, at, h)])
    plgpu.wait_smem_to_gmem(0)
    return done + end


def _load_rows(inputs, scratch, items, rows, stages):
    """The loading warpgroup: streams query rows (with position and lse) and their cotangents (with delta)."""

    def lanes(r, h):
        request = r if inputs["positions"].shape[0] > 1 else 0

        def load_q(step, slot):
            at, ready = pl.ds(step * rows, rows), scratch["q_ready"].at[slot]
            plgpu.copy_gmem_to_smem(inputs["q"].at[r, at, h], scratch["q_tile"].at[slot], ready)
            plgpu.copy_gmem_to_smem(inputs["positions"].at[request, at], scratch["position_tile"].at[slot], ready)
            plgpu.copy_gmem_to_smem(inputs["lse"].at[r, h, at], scratch["lse_tile"].at[slot], ready)

        def load_do(step, slot):
            at, ready = pl.ds(step * rows, rows), scratch["do_ready"].at[slot]
            plgpu.copy_gmem_to_smem(inputs["do"].at[r, at, h], scratch["do_tile"].at[slot], ready)
            if "delta_tile" in scratch:
                plgpu.copy_gmem_to_smem(inputs["delta"].at[r, h, at], scratch["delta_tile"].at[slot], ready)

        return Lane(scratch["q_free"], load_q), Lane(scratch["do_free"], load_do)

    def item(r, h, t, done):
        return stream(lanes(r, h), inputs["ranges"][r, t, 1], stages, done)

    drain([scratch["q_free"], scratch["do_free"]], items.each(item), stages)
