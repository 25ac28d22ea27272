"""Rows to experts and back: gathers in both directions, forward and backward.

Every row of x [T, B, D] selects k of its token's E experts (id E: none). A *place* is a row of an expert's batch; an
`Assignment` says which selection stands in each place and where each selection stands, so that sending rows out and
adding results up are gathers, and so are their gradients (a scatter would add in an order of its own).

    by_capacity  every expert has C places; selections beyond them are dropped and counted
    by_sorting   places are the selections sorted by expert, nothing is dropped; groups for `grouped_matmul`
"""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Assignment(NamedTuple):
    """selections: int32 [N], flat index (t*B + b)*k + j of the selection at each place, T*B*k where a place is empty;
    places: int32 [T, B, k], the place of each selection, N where it has none."""

    selections: Int[Array, " N"]
    places: Int[Array, "T B k"]


def one_hot(ids: Int[Array, "*T k"], experts: int) -> Bool[Array, "*T k E"]:
    """ids [..., k] -> bool [..., k, E]; id E gives no expert."""
    return ids[..., None] == jnp.arange(experts, dtype=ids.dtype).reshape((1,) * ids.ndim + (experts,))


def by_capacity(ids: Int[Array, "T B k"], experts: int, capacity: int) -> tuple[Assignment, Float[Array, ""]]:
    """Places t*E*C + e*C + c for ids [T, B, k]; earlier rows first. Also float32 []: selections without a place."""
    tokens, rows, k = ids.shape
    chosen = one_hot(ids, experts)
    order = jnp.cumsum(chosen.any(axis=2).astype(jnp.int32), axis=1) - 1  # [T, B, E], a row chooses an expert once
    order = jnp.where(chosen, order[:, :, None], 0).sum(axis=-1, dtype=jnp.int32)
    placed = (ids < experts) & (order < capacity)
    total = tokens * experts * capacity
    first = (jnp.arange(tokens, dtype=jnp.int32)[:, None, None] * experts + ids) * capacity
    selections = _inverse(jnp.where(placed, first + order, total).reshape(-1), total)
    dropped = ((ids < experts) & ~placed).sum().astype(jnp.float32)
    # The inverse of the inverse: what stood there already, but as an array of its own. XLA's CPU backend would else
    # compute every index anew for each of the D numbers of a row, wherever rows are gathered.
    return Assignment(selections, _inverse(selections, ids.size).reshape(ids.shape)), dropped


def _inverse(positions: Array, size: int) -> Array:
    """int32 [size]: where in `positions` each of 0 ... size - 1 stands, len(positions) where nowhere."""
    nowhere = jnp.full(size, positions.size, jnp.int32)
    return nowhere.at[positions].set(jnp.arange(positions.size, dtype=jnp.int32), mode="drop")


def by_sorting(ids: Int[Array, "T B k"], experts: int) -> tuple[Assignment, Int[Array, " TE"]]:
    """Places in the order of (token, expert, row) for ids [T, B, k]; also int32 [T*E], rows of every group."""
    tokens = ids.shape[0]
    token = jnp.arange(tokens, dtype=jnp.int32)[:, None, None]
    key = jnp.where(ids < experts, token * experts + ids, tokens * experts).reshape(-1)
    order = jnp.argsort(key, stable=True).astype(jnp.int32)
    position = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32), unique_indices=True)
    open_ = key < tokens * experts
    places = jnp.where(open_, position, key.size).reshape(ids.shape)
    selections = jnp.where(open_[order], order, key.size)
    return Assignment(selections, places), one_hot(ids, experts).sum(axis=(1, 2), dtype=jnp.int32).reshape(-1)


@jax.custom_vjp
def dispatch(x: Float[Array, "T B D"], assignment: Assignment) -> Float[Array, "N D"]:
    """The row of every place: [T, B, D] -> [N, D], zeros in empty places."""
    k = assignment.places.shape[-1]
    return _take(x.reshape(-1, x.shape[-1]), assignment.selections // k)


@jax.custom_vjp
def collect(z: Float[Array, "N D"], assignment: Assignment) -> Float[Array, "T B D"]:
    """The sum of every row's places: [N, D] -> [T, B, D]; a selection without a place adds nothing."""
    tokens, rows, k = assignment.places.shape
    places = assignment.places.reshape(-1, k)
    total = functools.reduce(operator.add, [_take(z, places[:, j]).astype(jnp.float32) for j in range(k)])
    return total.astype(z.dtype).reshape(tokens, rows, -1)


@jax.custom_vjp
def spread(gates: Float[Array, "T B k"], assignment: Assignment) -> Float[Array, " N"]:
    """The gate of every place: [T, B, k] -> [N], 0 in empty places."""
    return _take(gates.reshape(-1), assignment.selections)


def _take(values: Array, indices: Array) -> Array:
    """Rows of `values`; an index beyond the end gives 0."""
    # Unsigned: none counts from the end, and nothing looks for those that do.
    return jnp.take(values, indices.astype(jnp.uint32), axis=0, mode="fill", fill_value=0)


dispatch.defvjp(lambda x, a: (dispatch(x, a), a), lambda a, dz: (collect(dz, a), None))
collect.defvjp(lambda z, a: (collect(z, a), a), lambda a, dy: (dispatch(dy, a), None))
spread.defvjp(lambda gates, a: (spread(gates, a), a), lambda a, dg: (_take(dg, a.places), None))
