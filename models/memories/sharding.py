"""Reads of values that are spread over the P devices of a mesh axis, by rows (slots) or by columns (embed).

Reads are spread over the same axis: every device holds N/P of them, and gets their results.

    rows      all-gather ids and weights; each device sums the rows it owns for all reads; reduce-scatter of [N, d]
    columns   all-gather ids and weights; each device reads its d/P columns for all reads; all-to-all

Bytes out per device are (P-1)/P N d b by rows and P times less by columns, which therefore serve wide values (d/P at
least 128); rows serve narrow ones and very large M. `dedupe=U` (by rows) exchanges the U distinct rows a device's reads
name instead of partial sums: less where hits repeat.

Both equal the read of the whole table and its gradients. The gradient of values comes out sharded like the values, and
so may their moments be. Keys and queries are replicated and no concern of this file.

Letters: N reads, J hits per read, M slots, d width, P devices.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Array, Float, Int

from recscale.pallas_kernels.sparse_gather import sparse_gather

SHARDINGS = ("rows", "columns")


def sharded_read(
    values: Float[Array, "M d"],
    ids: Int[Array, "N J"],
    weights: Float[Array, "N J"],
    mesh: Mesh,
    axis: str,
    *,
    by: str = "rows",
    dedupe: int | None = None,
) -> Float[Array, "N d"]:
    """y[t] = sum_j weights[t,j] values[ids[t,j]], float32 [N, d], sharded over reads.

    Args:
        values: [M, d]; M, or d by columns, is padded to a multiple of P where it is not one.
        ids: int32 [N, J], -1 = absent. weights: [N, J]. N must be a multiple of P.
        mesh, axis: devices and the name of the axis to spread over, of type Auto like all meshes of this project.
        by: "rows" or "columns".
        dedupe: most distinct rows one device's reads name; further ones would be lost, so choose N/P * J if unsure.

    Raises:
        ValueError: N that does not divide, an axis of another type, or options that do not exist or fit together.
    """
    devices, types = mesh.shape[axis], dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if types[axis] != AxisType.Auto:
        raise ValueError(
            f"sharded_read: axis {axis!r} of the mesh is {types[axis].name}, expected Auto; make the mesh with "
            "axis_types=(jax.sharding.AxisType.Auto,)"
        )
    if by not in SHARDINGS:
        raise ValueError(f"sharded_read: by is {by!r}, expected one of {', '.join(SHARDINGS)}")
    if ids.shape[0] % devices:
        raise ValueError(f"sharded_read: {ids.shape[0]} reads do not divide over {devices} devices; pad the batch")
    if dedupe is not None and by != "rows":
        raise ValueError("sharded_read: dedupe exchanges rows, so it needs by='rows'")
    width = values.shape[1]
    missing = -values.shape[SHARDINGS.index(by)] % devices
    padding = ((0, missing), (0, 0)) if by == "rows" else ((0, 0), (0, missing))
    if dedupe is not None:
        local = functools.partial(_by_distinct_rows, axis=axis, most=dedupe)
    else:
        local = functools.partial(_by_rows if by == "rows" else _by_columns, axis=axis)
    read = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(Spec(axis) if by == "rows" else Spec(None, axis), Spec(axis), Spec(axis)),
        out_specs=Spec(axis),
        check_vma=False,  # the loops inside start from constants
    )
    return read(jnp.pad(values, padding), ids, weights)[:, :width]


def _by_rows(values: Array, ids: Array, weights: Array, *, axis: str) -> Array:
    every_id, every_weight = (jax.lax.all_gather(a, axis, tiled=True) for a in (ids, weights))
    partial = sparse_gather(values, _owned(every_id, values.shape[0], axis), every_weight)
    return jax.lax.psum_scatter(partial.astype(jnp.float32), axis, tiled=True)


def _by_columns(values: Array, ids: Array, weights: Array, *, axis: str) -> Array:
    every_id, every_weight = (jax.lax.all_gather(a, axis, tiled=True) for a in (ids, weights))
    own = sparse_gather(values, every_id, every_weight).astype(jnp.float32)
    return jax.lax.all_to_all(own, axis, split_axis=0, concat_axis=1, tiled=True)


def _by_distinct_rows(values: Array, ids: Array, weights: Array, *, axis: str, most: int) -> Array:
    distinct, place = jnp.unique(ids, return_inverse=True, size=most, fill_value=-1)
    wanted = jax.lax.all_gather(distinct, axis, tiled=True)[:, None]  # [P*U, 1]
    rows = sparse_gather(values, _owned(wanted, values.shape[0], axis), jnp.ones(wanted.shape, jnp.float32))
    rows = jax.lax.psum_scatter(rows.astype(jnp.float32), axis, tiled=True)
    return sparse_gather(rows, jnp.where(ids >= 0, place.reshape(ids.shape), -1), weights)


def _owned(ids: Array, rows: int, axis: str) -> Array:
    """Ids within this device's rows, absent where another device owns them."""
    own = ids - jax.lax.axis_index(axis) * rows
    return jnp.where((ids >= 0) & (own >= 0) & (own < rows), own, -1)
