"""Sparse reads on a TensorCore from a slab of the table that stays in vector memory: [M, 128], one after the other.

Rows are loaded by dynamic index, which needs 32-bit words: two bfloat16 rows, 2m and 2m + 1, are one row of words as
they lie in memory. 16 reads are loaded into [J, 16, 128] and then summed 16 rows at a time, in float32 and increasing
j.

Letters: N reads, J hits per read, M rows, d width, R reads of a program, W columns of a slab.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from recscale.pallas_kernels.targets import Target

from .costs import read_cost
from .tpu_copies import (
    GROUP,
    UNROLL,
    compiler_parameters,
    finish,
    hits_in_blocks,
    reads_per_block,
    sum_lanes,
    weighted,
)
from .tpu_layout import HIGH, LANES

Array = jax.Array
Ref = Any


def fits(target: Target, rows: int) -> bool:
    """Whether a slab of `rows` 32-bit rows takes at most half of vector memory."""
    return rows * LANES * 4 <= target.vmem_bytes // 2


def _paired(dtype: Any) -> bool:
    return dtype == jnp.bfloat16


def _table(values: Array) -> Array:
    """Values in whole registers where two rows share a word: a smaller one cannot be indexed by row."""
    if not _paired(values.dtype):
        return values
    rows, width = values.shape
    return jnp.pad(values, ((0, -rows % GROUP), (0, max(LANES - width, 0))))


def _lanes(table: Array) -> int:
    """Columns of a slab as loaded; those beyond the width are not used."""
    return min(table.shape[1], LANES)


def _specs(table: Array, width: int, block: int, hits: int):
    """The slabs' width, and block specs of ids, slab and [N, d] arrays on the grid (slabs, blocks of reads)."""
    slab = min(width, LANES)
    return (
        slab,
        pl.BlockSpec((1, 1, hits), lambda s, b: (b, 0, 0), memory_space=pltpu.SMEM),
        pl.BlockSpec((table.shape[0], _lanes(table)), lambda s, b: (0, s), pipeline_mode=pl.Buffered(1)),
        pl.BlockSpec((block, slab), lambda s, b: (b, s)),
    )


def _beside(numbers: Array | None, ids: Array, paired: bool) -> Array:
    """[N, J] numbers, and for paired rows [N, J] of 1 where the row is the upper half of its word."""
    odd = [(ids % 2).astype(jnp.float32)] if paired else []
    return jnp.concatenate([*([] if numbers is None else [numbers]), *odd], axis=1)


def _load(ids: Ref, table: Ref, loaded: Ref, group: Any, per_read: int) -> None:
    """Copies the words of the hits of 16 reads: loaded[j, r] = table[id(r, j)]."""
    paired = table.dtype == jnp.bfloat16
    words = table.bitcast(jnp.uint32) if paired else table

    def one_read(r, carry):
        def one_hit(j, carry):
            row = ids[0, 0, (group * GROUP + r) * per_read + j]
            row = jax.lax.shift_right_logical(row, 1) if paired else row
            loaded[j, pl.ds(r, 1), :] = words[pl.ds(row, 1), :]
            return carry

        return jax.lax.fori_loop(0, per_read, one_hit, carry, unroll=min(UNROLL, per_read))

    jax.lax.fori_loop(0, GROUP, one_read, 0)


def _rows(loaded: Ref, j: int, odd: Array | None, width: int) -> Array:
    """float32 rows [16, W] of hit j; odd [16, 1] tells which half of its word a row is."""
    words = loaded[j][:, :width]
    if odd is None:
        return words
    return jax.lax.bitcast_convert_type(jnp.where(odd > 0.5, words & HIGH, words << 16), jnp.float32)


# ---- y[t] = sum_j w[t,j] V[ids[t,j]]


def read(
    values, ids, weights, gate, gate_fn: str, *, target: Target, interpret: Any = False
) -> tuple[Array, Array | None]:
    """(out, y) of clamped ids [N, J] and float32 weights [N, J], 0 where a hit is absent."""
    (reads, per_read), width, dtype = ids.shape, values.shape[1], values.dtype
    table = _table(values)
    beside = _beside(weights, ids, _paired(dtype))
    block = reads_per_block(reads, per_read)
    slab, hits, slabs, rows = _specs(table, width, block, block * per_read)
    gated = gate is not None
    flops, moved = read_cost(reads, per_read, width, dtype, gated)
    out = jax.ShapeDtypeStruct((reads, width), gate.dtype if gated else dtype)
    found = pl.pallas_call(
        functools.partial(_read_kernel, gate_fn=gate_fn, per_read=per_read),
        grid=(-(-width // slab), -(-reads // block)),
        in_specs=[
            hits,
            pl.BlockSpec((block, beside.shape[1]), lambda s, b: (b, 0)),
            slabs,
            *([rows] if gated else []),
        ],
        out_specs=[rows] * (1 + gated),
        out_shape=[out] * (1 + gated),
        scratch_shapes=[pltpu.VMEM((per_read, GROUP, _lanes(table)), jnp.uint32 if _paired(dtype) else jnp.float32)],
        compiler_params=compiler_parameters(target, "arbitrary", "arbitrary", eighths=7),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=gated * reads * width),
        interpret=interpret,
        name="sparse_gather_slab",
    )(hits_in_blocks(ids, block), beside, table, *([gate] if gated else []))
    return found[0], found[1] if gated else None


def _read_kernel(ids: Ref, beside: Ref, table: Ref, *refs: Ref, gate_fn: str, per_read: int) -> None:
    *gated, loaded = refs
    gate, out, y = (gated[0], gated[1], gated[2]) if len(gated) == 3 else (None, gated[0], None)

    def work(group, carry):
        _load(ids, table, loaded, group, per_read)
        at = pl.ds(pl.multiple_of(group * GROUP, GROUP), GROUP)
        known = beside[at, :]
        total = jnp.zeros((GROUP, out.shape[1]), jnp.float32)
        for j in range(per_read):
            odd = known[:, per_read + j : per_read + j + 1] if known.shape[1] > per_read else None
            total = total + weighted(known[:, j : j + 1], _rows(loaded, j, odd, out.shape[1]))
        finish(total, (at, slice(None)), gate, gate_fn, out, y)
        return carry

    jax.lax.fori_loop(0, out.shape[0] // GROUP, work, 0)


# ---- dw[t,j] = <g[t], V[ids[t,j]]>


def weight_gradient(values, ids, g, *, target: Target, interpret: Any = False) -> Array:
    """float32 [N, J] of clamped ids [N, J] and float32 g [N, d]; slabs are added from left to right."""
    (reads, per_read), width, dtype = ids.shape, values.shape[1], values.dtype
    table, paired = _table(values), _paired(dtype)
    block = reads_per_block(reads, per_read)
    slab, hits, slabs, rows = _specs(table, width, block, block * per_read)
    known = pl.BlockSpec((block, per_read), lambda s, b: (b, 0))
    count = -(-width // slab)
    flops, moved = read_cost(reads, per_read, width, dtype, False)
    parts = pl.pallas_call(
        functools.partial(_weight_kernel, per_read=per_read, width=width),
        grid=(count, -(-reads // block)),
        in_specs=[hits, *([known] if paired else []), slabs, rows],
        out_specs=pl.BlockSpec((None, block, per_read), lambda s, b: (s, b, 0)),
        out_shape=jax.ShapeDtypeStruct((count, reads, per_read), jnp.float32),
        scratch_shapes=[
            pltpu.VMEM((per_read, GROUP, _lanes(table)), jnp.uint32 if paired else jnp.float32),
            pltpu.VMEM((per_read, GROUP, slab), jnp.float32),
        ],
        compiler_params=compiler_parameters(target, "arbitrary", "arbitrary", eighths=7),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0),
        interpret=interpret,
        name="sparse_gather_slab_dw",
    )(hits_in_blocks(ids, block), *([_beside(None, ids, True)] if paired else []), table, g)
    return functools.reduce(jnp.add, [parts[s] for s in range(count)])


def _weight_kernel(ids: Ref, *refs: Ref, per_read: int, width: int) -> None:
    *odds, table, g, dw, loaded, products = refs
    slab = g.shape[1]
    # Lanes beyond the table hold anything.
    lane = jax.lax.broadcasted_iota(jnp.int32, (GROUP, slab), 1)
    inside = lane < width - pl.program_id(0) * slab

    def work(group, carry):
        _load(ids, table, loaded, group, per_read)
        at = pl.ds(pl.multiple_of(group * GROUP, GROUP), GROUP)
        odd = odds[0][at, :] if odds else None
        side = g[at, :]
        for j in range(per_read):
            product = side * _rows(loaded, j, None if odd is None else odd[:, j : j + 1], slab)
            products[j] = product if width % slab == 0 else jnp.where(inside, product, 0.0)
        dw[at, :] = sum_lanes(products, per_read)
        return carry

    jax.lax.fori_loop(0, g.shape[0] // GROUP, work, 0)
