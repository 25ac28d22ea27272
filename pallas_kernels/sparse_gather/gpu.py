"""Sparse reads on Hopper (Mosaic GPU), and their gradients in one pass over the read gradients.

Forward. Each warpgroup owns a run of reads. The rows of `in_flight` hits are loaded straight into registers, then added
in increasing j in float32; the gate is applied and one row is stored. Several warpgroups per SM keep loads in flight.
Rows bypass shared memory on purpose: here a bulk copy costs an arrival of all 128 threads at its barrier, more than the
loads of a short row, and no row is used twice by a block.

    row          d % 128 == 0: spread over the warpgroup             else d % 64 == 0: over a warp, four times alike

Backward. Hits sorted by (row, flat index) are cut into equal runs, one per warpgroup, moved to the next start of a
piece. Walking its run, a warpgroup adds w * g[t] to the piece's sum, stores the sum where the piece ends, and stores
dw = <g[t], V[m]> of every hit: g and V are read once for both gradients. Further pieces of a row with more than
`PIECE` hits go to a small array of their own and are added afterwards, left to right.

No atomics, every id is clamped: reruns are bit-equal, wrong ids read some row of the table. Compiled for H100, not yet
run on it. Letters: N reads, J hits per read, M rows, d width.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from recscale.pallas_kernels import compat
from recscale.pallas_kernels.blocks import block_sizes
from recscale.pallas_kernels.targets import Target

from .costs import gradients_cost, read_cost
from .gates import GATES
from .hits import PIECE, sort_hits

Array = jax.Array

# Threads of a warpgroup, and of a warp: what a row is spread over.
_GROUP, _WARP = 128, 32

# Bytes a thread loads at once.
_VECTOR_BYTES = 16

# Bytes of registers of one thread that rows in flight may take.
_FLIGHT_BYTES = 128

# Warpgroups per SM and the most hits in flight in each: what registers allow (85 and 128 per thread; half as many
# warpgroups where a row takes many). Warpgroups that do not fit would wait for a second round.
_READ, _GRADIENTS = (6, 16), (4, 8)
_MANY_PER_THREAD = 8

# Widths are multiples of one and at most the other: no program beyond was compiled, and the float32 sum of a wider row
# takes registers that may not be there.
_WIDTH_UNIT, _WIDEST = 64, 1024


def obstacle(
    target: Target,
    values_shape: tuple[int, ...],
    values_dtype: Any,
    ids_shape: tuple[int, ...],
    gate_fn: str,
) -> str | None:
    """Why this kernel cannot serve a read on that target, or None."""
    if jnp.dtype(values_dtype) not in (jnp.float32, jnp.bfloat16):
        return f"values are {jnp.dtype(values_dtype).name}, expected float32 or bfloat16"
    if 0 in values_shape or 0 in ids_shape:
        return f"values {values_shape} and ids {ids_shape} have an empty axis"
    rows, width = values_shape
    if width % _WIDTH_UNIT:
        return f"rows are {width} wide, expected a multiple of {_WIDTH_UNIT}: padding would copy the table"
    if width > _WIDEST:
        return f"rows are {width} wide, more than the {_WIDEST} it was compiled for"
    if ids_shape[0] * ids_shape[1] >= 2**31 or rows >= 2**31:
        return f"{ids_shape[0]} x {ids_shape[1]} hits of {rows} rows do not fit 32-bit indices"
    return None


def read(
    values: Array,
    ids: Array,
    weights: Array,
    gate: Array | None,
    gate_fn: str,
    *,
    target: Target,
    interpret: bool = False,
) -> tuple[Array, Array | None]:
    """out [N, d] = y or gate * f(y), and y [N, d] in the gate's dtype (None without a gate).

    Args:
        values: [M, d] float32 or bfloat16. ids: int32 [N, J], below 0 = absent. weights: [N, J]. gate: [N, d] or None.
    """
    reads, per_read = ids.shape
    width = values.shape[1]
    row = _Row(width, values.dtype.itemsize, annotated=not interpret)
    key = f"d{width}_{values.dtype.name}"
    sizes = block_sizes("sparse_gather", "pallas_gpu", key, row.heuristic(_READ, values.dtype.itemsize), target)
    blocks, in_flight = min(target.sms * sizes["per_sm"], reads), min(sizes["in_flight"], per_read)
    like = jax.ShapeDtypeStruct((reads, width), values.dtype if gate is None else gate.dtype)

    def body(values, ids, weights, *rest):
        refs: tuple[Any, ...] = (None, *rest, None) if gate is None else rest
        gate_ref, out, y_ref = refs
        begin, end = _share(reads, blocks, lax.axis_index("blocks"))

        def one_read(t, _):
            opened: Any = None if gate_ref is None else row.load(gate_ref, t)

            def piece(first, count, y):
                loaded = [_hit(values, ids, weights, row, t * per_read + first + i) for i in range(count)]
                for weight, part in loaded:
                    y = y + weight * part
                return y

            y = lax.fori_loop(0, per_read // in_flight, lambda p, y: piece(p * in_flight, in_flight, y), row.zeros())
            rest = per_read % in_flight
            y = piece(per_read - rest, rest, y) if rest else y
            if gate_ref is None:
                out[t] = y.astype(like.dtype)
            else:
                out[t] = (opened * GATES[gate_fn](y)).astype(like.dtype)
                y_ref[t] = y.astype(like.dtype)
            return ()

        lax.fori_loop(begin, end, one_read, ())

    flops, moved = read_cost(reads, per_read, width, values.dtype, gate is not None)
    call = compat.mosaic_gpu_kernel(
        body,
        out_type=[like] if gate is None else [like, like],
        grid={"blocks": blocks},
        cost=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0 if gate is None else reads * width),
        name="sparse_gather_read",
        interpret=interpret,
        automatic_barriers=False,
    )
    flat = (values, ids.reshape(-1), weights.reshape(-1).astype(jnp.float32))
    out = call(*flat) if gate is None else call(*flat, gate)
    return (out[0], None) if gate is None else (out[0], out[1])


def gradients(
    values: Array, ids: Array, weights: Array, g: Array, *, target: Target, interpret: bool = False
) -> tuple[Array, Array]:
    """dV float32 [M, d] in the order `hits` states, rows without a hit exactly 0; dw float32 [N, J], 0 where absent.

    g [N, d] is read once per hit, in the dtype of the values: exact without a gate, where it came in that dtype, and
    rounded like any bfloat16 gradient with one.
    """
    rows, width = values.shape
    reads, per_read = ids.shape
    total = reads * per_read
    g = g.astype(values.dtype)
    row = _Row(width, values.dtype.itemsize, annotated=not interpret)
    key = f"gradients_d{width}_{values.dtype.name}"
    sizes = block_sizes(
        "sparse_gather", "pallas_gpu", key, row.heuristic(_GRADIENTS, 2 * values.dtype.itemsize), target
    )
    blocks, in_flight = min(target.sms * sizes["per_sm"], total), sizes["in_flight"]
    flops, moved = gradients_cost(reads, per_read, width, rows, values.dtype)
    hits = sort_hits(ids, rows)
    sorted_weights = jnp.take(weights.reshape(-1), hits.order, mode="clip").astype(jnp.float32)
    pieces = total // PIECE + 1

    def body(values, g, rows_of, order, weights, bounds, dvalues, further, dw):
        block = lax.axis_index("blocks")
        begin, end = bounds[block], bounds[block + 1]

        def flush(walk):
            @pl.when(walk.open & (walk.further < 0))
            def _():
                dvalues[walk.row] = walk.sum

            @pl.when(walk.open & (walk.further >= 0))
            def _():
                further[jnp.maximum(walk.further, 0)] = walk.sum

        def some_hits(first, count, walk):
            loaded = []
            for i in range(count):
                m, flat = rows_of[first + i], order[first + i]
                v = row.load(values, jnp.clip(m, 0, rows - 1))
                loaded.append((m, flat, weights[first + i], row.load(g, flat // per_read), v))
            for i, (m, flat, weight, g_row, v) in enumerate(loaded):
                starts = (m != walk.row) | (walk.taken == PIECE)
                closed = dataclasses.replace(walk, open=walk.open & starts)
                flush(closed)
                walk = _Walk(
                    row=m,
                    taken=jnp.where(starts, 1, walk.taken + 1),
                    further=jnp.where(starts, jnp.where(m == walk.row, (first + i) // PIECE, -1), walk.further),
                    open=jnp.bool_(True),
                    sum=row.select(starts, row.zeros(), walk.sum) + weight * g_row,
                )
                dw[flat] = jnp.sum(g_row * v)
            return walk

        # A run that starts amid a row starts with a further piece of it.
        before = rows_of[jnp.maximum(begin - 1, 0)]
        walk = _Walk(
            row=jnp.where(begin > 0, before, -1),
            taken=jnp.int32(PIECE),
            further=jnp.int32(-1),
            open=jnp.bool_(False),
            sum=row.zeros(),
        )
        whole = (end - begin) // in_flight
        walk = lax.fori_loop(0, whole, lambda p, w: some_hits(begin + p * in_flight, in_flight, w), walk)
        walk = lax.fori_loop(begin + whole * in_flight, end, lambda h, w: some_hits(h, 1, w), walk)
        flush(walk)

    call = compat.mosaic_gpu_kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((rows, width), jnp.float32),
            jax.ShapeDtypeStruct((pieces, width), jnp.float32),
            jax.ShapeDtypeStruct((total,), jnp.float32),
        ],
        grid={"blocks": blocks},
        cost=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0),
        name="sparse_gather_gradients",
        interpret=interpret,
        automatic_barriers=False,
    )
    dvalues, further, dw = call(values, g, hits.rows, hits.order, sorted_weights, _bounds(hits.rows, rows, blocks))
    dvalues = _add_further(dvalues, further, hits.rows)
    hit = jnp.zeros(rows, bool).at[hits.rows].set(True, mode="drop", indices_are_sorted=True)
    dvalues = jnp.where(hit[:, None], dvalues, 0.0)
    return dvalues, jnp.where(ids >= 0, dw.reshape(ids.shape), 0.0)


def weight_gradient(values: Array, ids: Array, g: Array, *, target: Target, interpret: bool = False) -> Array:
    """dw[t,j] = <g[t], values[ids[t,j]]>, 0 for absent hits: float32 [N, J]; g [N, d], float32 or bfloat16."""
    reads, per_read = ids.shape
    row = _Row(values.shape[1], min(values.dtype.itemsize, g.dtype.itemsize), annotated=not interpret)
    key = f"weight_gradient_d{row.width}_{values.dtype.name}"
    sizes = block_sizes("sparse_gather", "pallas_gpu", key, row.heuristic(_READ, values.dtype.itemsize), target)
    blocks, in_flight = min(target.sms * sizes["per_sm"], reads), min(sizes["in_flight"], per_read)

    def body(values, ids, g, dw):
        begin, end = _share(reads, blocks, lax.axis_index("blocks"))

        def one_read(t, _):
            g_row = row.load(g, t)

            def piece(first, count):
                flat = [t * per_read + first + i for i in range(count)]
                indices = [ids[f] for f in flat]
                loaded = [row.load(values, jnp.clip(index, 0, values.shape[0] - 1)) for index in indices]
                for f, index, part in zip(flat, indices, loaded, strict=True):
                    dw[f] = jnp.where(index >= 0, jnp.sum(g_row * part), 0.0)

            rest = per_read % in_flight
            pl.loop(0, per_read // in_flight)(lambda p: piece(p * in_flight, in_flight))
            piece(per_read - rest, rest)
            return ()

        lax.fori_loop(begin, end, one_read, ())

    flops, moved = read_cost(reads, per_read, row.width, values.dtype, False)
    call = compat.mosaic_gpu_kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((reads * per_read,), jnp.float32)],
        grid={"blocks": blocks},
        cost=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0),
        name="sparse_gather_weight_gradient",
        interpret=interpret,
        automatic_barriers=False,
    )
    return call(values, ids.reshape(-1), g)[0].reshape(ids.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Walk:
    """Where a warpgroup is: the row of its present piece, hits taken of it, its place (-1: the table), its sum."""

    row: Array
    taken: Array
    further: Array
    open: Array
    sum: Array


class _Row:
    """How a warpgroup holds one row of d float32 values; annotated on the chip, plain in interpret mode."""

    def __init__(self, width: int, itemsize: int, *, annotated: bool) -> None:
        self.width, self.annotated = width, annotated
        self.threads = _GROUP if width % _GROUP == 0 else _WARP
        # Neighbouring elements of a thread: one load of the narrowest dtype where the width allows.
        self.vector = math.gcd(_VECTOR_BYTES // itemsize, width // self.threads)

    def heuristic(self, most: tuple[int, int], bytes_per_element: int) -> dict[str, int]:
        """Warpgroups per SM, and hits whose rows are in flight in each."""
        per_sm, in_flight = most
        elements = self.width // self.threads
        return {
            "per_sm": per_sm if elements <= _MANY_PER_THREAD else per_sm // 2,
            "in_flight": max(min(_FLIGHT_BYTES // max(elements * bytes_per_element, 4), in_flight), 1),
        }

    def load(self, ref, index: Array) -> Array:
        """Row `index` of a [.., d] reference in device memory, as float32."""
        if not self.annotated:
            return ref[index].astype(jnp.float32)
        return compat.load(ref.at[index], self._layout(), optimized=False).astype(jnp.float32)

    def zeros(self) -> Array:
        zeros = jnp.zeros(self.width, jnp.float32)
        return plgpu.layout_cast(zeros, self._layout()) if self.annotated else zeros

    def select(self, condition: Array, x: Array, otherwise: Array) -> Array:
        """x or the other row, by one condition for all of it."""
        return lax.select(lax.broadcast_in_dim(condition, (self.width,), ()), x, otherwise)

    def _layout(self):
        if self.threads == _GROUP:
            return plgpu.Layout.WG_STRIDED((self.width,), vec_size=self.vector)
        return plgpu.Layout.TILED(
            plgpu.Tiling(((self.vector * _WARP,), (self.vector,))),
            warp_dims=(plgpu.Replicated(4),),
            lane_dims=(-2,),
            vector_dim=-1,
        )


def _hit(values, ids, weights, row: _Row, flat: Array) -> tuple[Array, Array]:
    """(weight, row) of one hit; of an absent one zeros, whatever the table holds."""
    index = ids[flat]
    found = row.load(values, jnp.clip(index, 0, values.shape[0] - 1))
    return jnp.where(index >= 0, weights[flat], 0.0), row.select(index >= 0, found, row.zeros())


def _share(total: int, parts: int, part: Array) -> tuple[Array, Array]:
    """Begin and end of one of `parts` nearly equal runs of `total` things."""
    each, more = divmod(total, parts)
    begin = part * each + jnp.minimum(part, more)
    return begin, begin + each + (part < more).astype(jnp.int32)


def _bounds(rows_of_hits: Array, rows: int, blocks: int) -> Array:
    """int32 [blocks + 1]: where the runs of sorted hits begin and end; every run starts with a piece."""
    present = jnp.searchsorted(rows_of_hits, rows, method="scan_unrolled").astype(jnp.int32)
    part = jnp.arange(blocks, dtype=jnp.int32)
    each, more = present // blocks, present % blocks
    cut = part * each + jnp.minimum(part, more)
    first, last = _extent(rows_of_hits, cut)
    begin = jnp.minimum(first + pl.cdiv(cut - first, PIECE) * PIECE, last)
    return jnp.append(jnp.minimum(begin, present), present)


def _extent(rows_of_hits: Array, position: Array) -> tuple[Array, Array]:
    """Where the hits of the row at a position begin and end."""
    row = jnp.take(rows_of_hits, position, mode="clip")
    first = jnp.searchsorted(rows_of_hits, row, side="left", method="scan_unrolled")
    last = jnp.searchsorted(rows_of_hits, row, side="right", method="scan_unrolled")
    return first.astype(jnp.int32), last.astype(jnp.int32)


def _add_further(dvalues: Array, further: Array, rows_of_hits: Array) -> Array:
    """Adds the further pieces of rows with more than `PIECE` hits, left to right.

    Starts of further pieces of one row are `PIECE` apart, and two rows that have one are further apart still: the piece
    that starts in positions [e PIECE, (e + 1) PIECE) is kept in place e.
    """
    rows, places = dvalues.shape[0], further.shape[0]
    if places == 1:
        return dvalues
    window = jnp.arange(places, dtype=jnp.int32) * PIECE
    first, last = _extent(rows_of_hits, window)
    rank = pl.cdiv(window - first, PIECE)
    owner = jnp.take(rows_of_hits, window, mode="clip")
    exists = (rank > 0) & (first + rank * PIECE < last) & (owner < rows)
    rank = jnp.where(exists, rank, 0)

    def add(k, dvalues):
        target = jnp.where(rank == k, owner, rows + jnp.arange(places))
        return dvalues.at[target].add(further, mode="drop", unique_indices=True)

    return lax.fori_loop(1, jnp.max(rank) + 1, add, dvalues)
