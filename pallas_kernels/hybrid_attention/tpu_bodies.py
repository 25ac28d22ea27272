"""What the three passes of attention over a history do at one tile; `tpu` has the equations, `tpu_layout` the tiles.

A body takes the blocks and scratch of its pass by name. What depends on nothing but the row tile (the stacked rows,
positions and statistics turned from lanes to sublanes) is made once, at the first key tile.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from .reference import INVISIBLE
from .tpu_layout import Layout

Array = jax.Array
Ref = Any

_ROWS_BY_ROWS = (((1,), (1,)), ((), ()))  # x y^T
_COLUMNS = (((0,), (0,)), ((), ()))  # x^T y


class GridStep:
    """One step of a grid: where it is, what of it is seen, and the arithmetic the three bodies share."""

    def __init__(self, plan: Layout, own: bool, by_keys: bool, scale: float, interpret: bool):
        self.plan, self.own, self.scale, self.interpret = plan, own, scale, interpret
        self.r, self.g = pl.program_id(0), pl.program_id(1)
        self.i, self.j = pl.program_id(3 if by_keys else 2), pl.program_id(2 if by_keys else 3)

    def when_seen(self, scalars, step) -> None:
        """`step(masked)`, if any row of the tile may see any key of it; masked unless all see all."""
        length, lowest, highest = scalars
        start, end = self.j * self.plan.keys, (self.j + 1) * self.plan.keys
        seen = (lowest < end) & (start < length) & (lowest < length)
        whole = (highest <= start) & (end <= length)
        pl.when(seen & whole)(functools.partial(step, masked=False))
        pl.when(seen & jnp.logical_not(whole))(functools.partial(step, masked=True))

    def scalars(self, length, lowest, highest):
        """The request's length, and the smallest and largest position of the row tile."""
        at = self.i + (self.r * self.plan.row_tiles if self.own else 0)
        return length[self.r], lowest[at], highest[at]

    def stack(self, x: Array, shared_lanes: bool) -> Array:
        """[rows, group * width] -> [group * rows, lanes of the keys]."""
        plan = self.plan
        width = x.shape[1] // plan.group
        if plan.group == 1:
            return x
        if shared_lanes:
            return jnp.concatenate([x[:, h * width : (h + 1) * width] for h in range(plan.group)])
        wide = x.astype(jnp.float32)
        own = [jnp.where(_in_part(x.shape, 1, h, width), wide, 0.0) for h in range(plan.group)]
        return jnp.concatenate([part.astype(x.dtype) for part in own])

    def unstack(self, x: Array, write) -> None:
        """`write(lanes, values)` of [rows, group * width] from [group * rows, lanes of the keys]."""
        plan = self.plan
        parts = [x[h * plan.rows : (h + 1) * plan.rows] for h in range(plan.group)]
        if plan.shared:
            width = x.shape[1]
            for h, part in enumerate(parts):
                write(slice(h * width, (h + 1) * width), part)
            return
        width = x.shape[1] // plan.group
        if plan.group > 1:
            parts = [jnp.where(_in_part(part.shape, 1, h, width), part, 0.0) for h, part in enumerate(parts)]
        write(slice(None), sum(parts[1:], parts[0]))

    def dot(self, x: Array, y: Array, dims=(((1,), (0,)), ((), ()))) -> Array:
        if self.interpret:  # CPUs lack bfloat16 products; both are exact
            x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
        return jax.lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)

    def scores(self, q: Array, k: Array, bias) -> Array:
        """[group * rows, keys]."""
        s = self.dot(q, k, _ROWS_BY_ROWS) * self.scale
        if bias is None:
            return s
        rows = self.plan.rows
        parts = [s[h * rows : (h + 1) * rows] + bias[h : h + 1, :] for h in range(self.plan.group)]
        return jnp.concatenate(parts)

    def mask(self, start: Array, length, key_axis: int) -> Array:
        """Whether a row, of position `start` [n, 1] or [1, n], sees a key of the tile."""
        shape = (start.shape[0], self.plan.keys) if key_axis else (self.plan.keys, start.shape[1])
        key = jax.lax.broadcasted_iota(jnp.int32, shape, key_axis) + self.j * self.plan.keys
        return (key >= start) & (key < length)

    def valid_keys(self, x: Array, length) -> Array:
        """Zeros instead of what lies beyond the length: 0 * NaN would not be 0."""
        key = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) + self.j * self.plan.keys
        return jnp.where(key < length, x.astype(jnp.float32), 0.0).astype(x.dtype)


def _column(row: Array) -> Array:
    """float32 [1, n] on the lanes -> [n, 1] on the sublanes, exactly."""
    n = row.shape[1]
    return jnp.sum(jnp.where(_diagonal(n), row, 0.0), axis=1, keepdims=True)


def _row(column: Array) -> Array:
    """float32 [n, 1] -> [1, n], exactly."""
    return jnp.sum(jnp.where(_diagonal(column.shape[0]), column, 0.0), axis=0, keepdims=True)


def _diagonal(n: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, (n, n), 0) == jax.lax.broadcasted_iota(jnp.int32, (n, n), 1)


def forward_body(
    tile: GridStep, *, length, lowest, highest, q, positions, k, o, lse, stack, start, most, total, sums,
    v=None, bias=None, count=None, **_,
) -> None:  # fmt: skip
    plan = tile.plan
    scalars = keys_seen, low, _high = tile.scalars(length, lowest, highest)

    @pl.when(tile.j == 0)
    def _start():
        stack[...] = tile.stack(q[...], plan.shared)
        start[...] = _column(positions[...]).astype(jnp.int32)
        most[...] = jnp.full_like(most, INVISIBLE)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    at = (tile.r * plan.groups + tile.g) * plan.row_tiles + tile.i
    if count is not None:

        @pl.when(tile.j == 0)
        def _reset():
            count[at] = 0

    def step(masked: bool) -> None:
        s = tile.scores(stack[...], k[...], bias)
        values = k[...] if v is None else v[...]
        if masked:
            seen = tile.mask(start[...], keys_seen, 1)
            s = jnp.where(seen, s, INVISIBLE)
            values = tile.valid_keys(values, keys_seen)
        before = most[...]
        now = jnp.maximum(before, jnp.max(s, axis=1, keepdims=True))
        p = jnp.exp(s - now)
        if masked:
            p = jnp.where(seen, p, 0.0)
        shrink = jnp.exp(before - now)
        most[...] = now
        total[...] = shrink * total[...] + jnp.sum(p, axis=1, keepdims=True)
        sums[...] = shrink * sums[...] + tile.dot(p.astype(values.dtype), values)
        if count is not None:
            count[at] += 1

    tile.when_seen(scalars, step)

    @pl.when(tile.j == plan.key_tiles - 1)
    def _finish():
        some = total[...] > 0
        safe = jnp.where(some, total[...], 1.0)

        def write(lanes, values):
            o[:, lanes] = values.astype(o.dtype)

        tile.unstack(sums[...] / safe, write)
        lse[...] = _row(jnp.where(some, most[...] + jnp.log(safe), INVISIBLE))


def row_body(
    tile: GridStep, *, length, lowest, highest, q, do, o, lse, dlse, positions, k, dq, delta, stack, do_stack, start,
    lse_column, delta_column, sums, v=None, bias=None, **_,
) -> None:  # fmt: skip
    plan = tile.plan
    scalars = keys_seen, _low, _high = tile.scalars(length, lowest, highest)

    @pl.when(tile.j == 0)
    def _start():
        stack[...] = tile.stack(q[...], plan.shared)
        do_stack[...] = tile.stack(do[...], plan.shared)
        start[...] = _column(positions[...]).astype(jnp.int32)
        lse_column[...] = _column(lse[...])
        products = do_stack[...].astype(jnp.float32) * tile.stack(o[...], plan.shared).astype(jnp.float32)
        delta_column[...] = jnp.sum(products, axis=1, keepdims=True) - _column(dlse[...])
        delta[...] = _row(delta_column[...])
        sums[...] = jnp.zeros_like(sums)

    def step(masked: bool) -> None:
        keys = k[...]
        s = tile.scores(stack[...], keys, bias)
        dp = tile.dot(do_stack[...], keys if v is None else v[...], _ROWS_BY_ROWS)
        ds = jnp.exp(s - lse_column[...]) * (dp - delta_column[...])
        if masked:
            ds = jnp.where(tile.mask(start[...], keys_seen, 1), ds, 0.0)
            keys = tile.valid_keys(keys, keys_seen)
        sums[...] += tile.dot(ds.astype(keys.dtype), keys)

    tile.when_seen(scalars, step)

    @pl.when(tile.j == plan.key_tiles - 1)
    def _finish():
        def write(lanes, values):
            dq[:, lanes] = values.astype(dq.dtype)

        tile.unstack(sums[...] * tile.scale, write)


def key_body(
    tile: GridStep, *, length, lowest, highest, q, do, lse, delta, positions, k, dk, dk_sum, v=None, dv=None,
    dv_sum: Ref = None, bias=None, dbias=None, dbias_sum: Ref = None, **_,
) -> None:  # fmt: skip
    plan = tile.plan
    scalars = keys_seen, _low, _high = tile.scalars(length, lowest, highest)
    results = [(dk, dk_sum), (dv, dv_sum), (dbias, dbias_sum)]

    @pl.when(tile.i == 0)
    def _start():
        for _, total in results:
            if total is not None:
                total[...] = jnp.zeros_like(total)

    def step(masked: bool) -> None:
        rows, do_rows = tile.stack(q[...], plan.shared), tile.stack(do[...], plan.shared)
        s = tile.dot(k[...], rows, _ROWS_BY_ROWS) * tile.scale  # [keys, group * rows]
        if bias is not None:
            s = s + tile.dot(bias[...], _heads(plan), _COLUMNS)
        p = jnp.exp(s - lse[...])
        dp = tile.dot(k[...] if v is None else v[...], do_rows, _ROWS_BY_ROWS)
        ds = p * (dp - delta[...])
        if masked:
            seen = tile.mask(positions[...].astype(jnp.int32), keys_seen, 0)
            p, ds = jnp.where(seen, p, 0.0), jnp.where(seen, ds, 0.0)
        dk_sum[...] += tile.scale * tile.dot(ds.astype(rows.dtype), rows)
        (dk_sum if v is None else dv_sum)[...] += tile.dot(p.astype(rows.dtype), do_rows)
        if bias is not None:
            dbias_sum[...] += tile.dot(_heads(plan), ds, _ROWS_BY_ROWS)

    tile.when_seen(scalars, step)

    @pl.when(tile.i == plan.row_tiles - 1)
    def _finish():
        for result, total in results:
            if total is not None:
                result[...] = total[...].astype(result.dtype)


def _heads(plan: Layout) -> Array:
    """float32 [group, group * rows]: 1 where a stacked row is of a head."""
    shape = (plan.group, plan.stacked)
    first = jax.lax.broadcasted_iota(jnp.int32, shape, 0) * plan.rows
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return ((row >= first) & (row < first + plan.rows)).astype(jnp.float32)


def _in_part(shape: tuple[int, ...], axis: int, part: int, size: int) -> Array:
    """Whether an index of the axis is in part number `part` of that size."""
    index = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    return (index >= part * size) & (index < (part + 1) * size)
