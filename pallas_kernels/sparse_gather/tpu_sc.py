"""`sparse_gather` on a TPU's SparseCores: compiled, not executed, for v5p, v6e and 7x (v5e has none).

Every vector subcore owns a range of reads and serves them R at a time: it fetches their ids and weights, brings the
rows by indirect copies of up to 128 rows of 128 words, two buffers in turn, and sums them in registers as wide as its
lanes. Indirect copies know 32-bit words only: see `tpu_layout` for bfloat16. A row of C tiles is C rows of the copied
table.

The gate is applied afterwards by XLA, on the TensorCore: vector subcores lack tanh, and [N, d] is small beside N*J
rows. Gradients are those of the TensorCore (`tpu`): one pass over g in the stated order, a serial sum per row.

No interpreter runs SparseCore kernels yet. What can be tested apart is: `arranged` (ids and weights as the subcores
read them), `weighted_sum` (the arithmetic of one register) and `joined` (its results as [N, d]).

Letters: N reads, J hits per read (P when padded), M rows, d width, C tiles of 128 words, L lanes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc as plsc

from recscale.pallas_kernels.compat import lowering_for
from recscale.pallas_kernels.dispatch import Refused
from recscale.pallas_kernels.targets import SparseCores, Target

from . import tpu
from .costs import read_cost
from .gates import with_gate
from .tpu import gradients, value_gradient, weight_gradient
from .tpu_copies import weighted
from .tpu_layout import LANES, as_words, split, tiling

__all__ = ["arranged", "gradients", "joined", "obstacle", "read", "value_gradient", "weight_gradient", "weighted_sum"]

Array = jax.Array
Ref = Any

# Rows of one indirect copy: its index vector may hold no more.
_COPY = 128

# Indirect copies of a step at least, so that filling the pipeline is a small part of it.
_COPIES = 4

# Part of a subcore's memory that one step may take.
_SHARE = 0.9


class Shape(NamedTuple):
    """How reads are cut: J padded to P; R reads a step, g reads a copy; `steps` per subcore; `workers` subcores."""

    padded: int
    step: int
    copied: int
    steps: int
    workers: int

    @property
    def copies(self) -> int:
        """Copies of a step, for each tile."""
        return self.step // self.copied


def shape_of(target: Target, reads: int, per_read: int, tiles: int) -> Shape:
    """The cut of `reads` reads on the SparseCores of a target."""
    cores = _sparse_cores(target)
    padded = -(-per_read // cores.lanes) * cores.lanes
    copied = 1
    while 2 * copied * padded <= _COPY:
        copied *= 2
    # 8 reads are a tile of the output.
    step = max(8, copied)
    while step // copied * tiles < _COPIES and step * LANES * 4 * tiles * 4 < cores.vmem_bytes // 4:
        step *= 2
    workers = cores.cores * cores.subcores
    return Shape(padded, step, copied, -(-reads // (workers * step)), workers)


def _sparse_cores(target: Target) -> SparseCores:
    if target.sparse_cores is None:
        raise ValueError(f"{target.name} has no SparseCores")
    return target.sparse_cores


def _step_bytes(shape: Shape, tiles: int, parts: int) -> int:
    """Vector memory of a subcore: ids, weights and results twice, indices of every tile, two buffers of rows."""
    hits = shape.step * shape.padded
    results = parts * tiles * shape.step * LANES
    return 4 * (2 * 2 * hits + tiles * hits + 2 * results + 2 * shape.copied * shape.padded * LANES)


def obstacle(
    target: Target, values_shape: tuple[int, ...], values_dtype: Any, ids_shape: tuple[int, ...], gate_fn: str
) -> str | None:
    """Why the kernel cannot serve a request, or None."""
    if target.sparse_cores is None:
        return f"{target.name} has no SparseCores"
    reason = tpu.obstacle(target, values_shape, values_dtype, ids_shape, gate_fn)
    if reason is not None:
        return reason
    if ids_shape[1] > _COPY:
        return f"{ids_shape[1]} hits per read, more than the {_COPY} rows of an indirect copy"
    tiles, parts = tiling(values_shape[1], values_dtype)
    if values_shape[0] * tiles >= 2**31:
        return f"{values_shape[0]} rows of {tiles} tiles are more than int32 counts"
    size = _step_bytes(shape_of(target, ids_shape[0], ids_shape[1], tiles), tiles, parts)
    if size > _SHARE * target.sparse_cores.vmem_bytes:
        return f"a step takes {size} bytes of a subcore's {target.sparse_cores.vmem_bytes}"
    return None


def arranged(ids: Array, weights: Array, rows: int, shape: Shape) -> tuple[Array, Array]:
    """Clamped ids and float32 weights, flat, as the subcores read them: padded hits and reads have weight 0."""
    weights = jnp.where(ids >= 0, weights.astype(jnp.float32), 0.0)
    ids = jnp.clip(ids, 0, rows - 1).astype(jnp.int32)
    reads, per_read = ids.shape
    pad = ((0, shape.workers * shape.steps * shape.step - reads), (0, shape.padded - per_read))
    return jnp.pad(ids, pad).reshape(-1), jnp.pad(weights, pad).reshape(-1)


def weighted_sum(
    words: Sequence[Array],
    weights: Sequence[Array],
    bitcast: Callable[[Array, Any], Array] = jax.lax.bitcast_convert_type,
) -> tuple[Array, ...]:
    """Float32 parts of sum_j weights[j] * words[j], in increasing j: the arithmetic of one register."""
    total = [weighted(weights[0], part) for part in split(words[0], bitcast)]
    for word, weight in zip(words[1:], weights[1:], strict=True):
        total = [t + weighted(weight, part) for t, part in zip(total, split(word, bitcast), strict=True)]
    return tuple(total)


def joined(sums: Array, reads: int, width: int) -> Array:
    """y float32 [N, d] of the kernel's [T, reads with padding, 128]."""
    return jnp.moveaxis(sums, 0, 1).reshape(sums.shape[1], -1)[:reads, :width]


def read(
    values: Array, ids: Array, weights: Array, gate: Array | None, gate_fn: str, *, target: Target, interpret: Any
) -> tuple[Array, Array | None]:
    """(out, y): out [N, d] is y or gate * f(y); y in the gate's dtype, None without a gate.

    Raises:
        NotImplementedError: interpretation was asked for; there is no interpreter for SparseCores.
    """
    if interpret:
        raise Refused("SparseCore kernels cannot be interpreted; use 'pallas_tpu'")
    (reads, per_read), (rows, width) = ids.shape, values.shape
    cores, (tiles, parts) = _sparse_cores(target), tiling(width, values.dtype)
    shape = shape_of(target, reads, per_read, tiles)
    flat_ids, flat_weights = arranged(ids, weights, rows, shape)
    table = as_words(values).reshape(rows * tiles, LANES)
    flops, moved = read_cost(reads, per_read, width, values.dtype, False)
    hits, block = shape.step * shape.padded, (tiles * parts, shape.step, LANES)
    with lowering_for(target):
        kernel = pl.kernel(
            functools.partial(_kernel, shape=shape, tiles=tiles, lanes=cores.lanes),
            jax.ShapeDtypeStruct((tiles * parts, shape.workers * shape.steps * shape.step, LANES), jnp.float32),
            mesh=plsc.VectorSubcoreMesh(
                core_axis_name="core",
                subcore_axis_name="subcore",
                num_cores=cores.cores,
                num_subcores=cores.subcores,
            ),
            scratch_types=[
                pltpu.VMEM((2 * hits,), jnp.int32),
                pltpu.VMEM((2 * hits,), jnp.float32),
                pltpu.VMEM((tiles * hits,), jnp.int32),
                pltpu.VMEM((2, shape.copied * shape.padded, LANES), table.dtype),
                pltpu.VMEM((2, *block), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
            # The passes that lay registers out know no bitcast.
            compiler_params=pltpu.CompilerParams(needs_layout_passes=False),
            cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0),
            name="sparse_gather_sc",
        )
        sums = cast(Callable[..., Array], kernel)(flat_ids, flat_weights, table)
    return with_gate(joined(sums, reads, width), values.dtype, gate, gate_fn)


def _kernel(
    ids, weights, table, out, ids_v, weights_v, index, buffers, sums, fetched, copied, written, *, shape, tiles, lanes
):
    worker = jax.lax.axis_index("core") * jax.lax.axis_size("subcore") + jax.lax.axis_index("subcore")
    hits = shape.step * shape.padded
    first = worker * shape.steps

    def fetch(step, slot) -> list[Any]:
        """Copies of the ids and weights of a step."""
        source, place = pl.ds((first + step) * hits, hits), pl.ds(slot * hits, hits)
        return [
            pltpu.make_async_copy(a.at[source], b.at[place], fetched.at[slot])
            for a, b in ((ids, ids_v), (weights, weights_v))
        ]

    def write(step, slot):
        reads = pl.ds((first + step) * shape.step, shape.step)
        return pltpu.make_async_copy(sums.at[slot], out.at[:, reads], written.at[slot])

    def one_step(step, carry):
        slot = jax.lax.rem(step, 2)
        for copy in fetch(step, slot):
            copy.wait()

        @pl.when(step + 1 < shape.steps)
        def _():
            for copy in fetch(step + 1, 1 - slot):
                copy.start()

        _spread(ids_v, index, slot * hits, hits, tiles, lanes)

        @pl.when(step >= 2)
        def _():
            write(step - 2, slot).wait()

        _sum_step(table, index, weights_v, buffers, sums.at[slot], copied, slot * hits, shape, tiles, lanes)
        write(step, slot).start()
        return carry

    for copy in fetch(0, 0):
        copy.start()
    jax.lax.fori_loop(0, shape.steps, one_step, 0)
    for step in range(max(shape.steps - 2, 0), shape.steps):
        write(step, step % 2).wait()


def _spread(ids_v: Ref, index: Ref, offset: Any, hits: int, tiles: int, lanes: int) -> None:
    """index[c * hits + h] = ids[h] * tiles + c: where tile c of a row lies."""

    def some(q, carry):
        row = ids_v[pl.ds(offset + q * lanes, lanes)] * tiles
        for c in range(tiles):
            index[pl.ds(c * hits + q * lanes, lanes)] = row + c
        return carry

    jax.lax.fori_loop(0, hits // lanes, some, 0)


def _sum_step(table, index, weights_v, buffers, sums, copied, offset, shape: Shape, tiles: int, lanes: int) -> None:
    """sums[p*C + c, r] of a step: copy n brings tile n // copies of the reads of copy n % copies."""
    rows, hits = shape.copied * shape.padded, shape.step * shape.padded

    def copy(n, slot):
        tile, part = jax.lax.div(n, shape.copies), jax.lax.rem(n, shape.copies)
        where = index.at[pl.ds(tile * hits + part * rows, rows)]
        return pltpu.make_async_copy(table.at[where], buffers.at[slot], copied.at[slot])

    def one_copy(n, carry):
        slot = jax.lax.rem(n, 2)

        @pl.when(n + 1 < tiles * shape.copies)
        def _():
            copy(n + 1, 1 - slot).start()

        copy(n, slot).wait()
        tile, part = jax.lax.div(n, shape.copies), jax.lax.rem(n, shape.copies)

        def one_read(r, carry):
            at = part * shape.copied + r
            known = _scalars(weights_v, offset + at * shape.padded, shape.padded, lanes)

            def one_register(q, carry):
                columns = pl.ds(q * lanes, lanes)
                words = [buffers[slot, r * shape.padded + j, columns] for j in range(shape.padded)]
                for p, total in enumerate(weighted_sum(words, known, plsc.bitcast)):
                    sums[p * tiles + tile, at, columns] = total
                return carry

            return jax.lax.fori_loop(0, LANES // lanes, one_register, carry)

        return jax.lax.fori_loop(0, shape.copied, one_read, carry)

    copy(0, 0).start()
    jax.lax.fori_loop(0, tiles * shape.copies, one_copy, 0)


def _scalars(numbers: Ref, offset: Any, count: int, lanes: int) -> list[Array]:
    """`count` numbers from an offset, each a scalar."""
    vectors = [numbers[pl.ds(offset + i, lanes)] for i in range(0, count, lanes)]
    return [vectors[i // lanes][i % lanes] for i in range(count)]
