"""The rule table: logical axis of an array -> the mesh axes it may be split over.

Parallelism is a choice of mesh, not code: parameters and their moments are split by the names of their axes, requests
over `BATCH_AXES`, and XLA inserts the collectives. An axis that a mesh lacks is not used; a mesh axis splits at most
one axis of an array; an axis whose size the split does not divide stays whole, because every device must hold the same
shape. Optimiser state is split like its parameter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from recscale.models.layers.layout import Layout

# Mesh axes that split the requests of a batch.
BATCH_AXES = ("data", "fsdp")

# Logical axis -> mesh axes it is split over together, in this order. An empty tuple keeps it whole.
RULES: dict[str, tuple[str, ...]] = {
    "batch": BATCH_AXES,
    "tokens": ("token",),
    "experts": ("expert",),
    "hidden": ("tensor",),
    "heads": ("tensor",),
    "embed": ("fsdp",),
    "embed_out": ("tensor",),
    "features": ("fsdp",),
    "tokens_in": ("fsdp",),
    "rank": ("tensor",),
    # Tables and memory values: the largest arrays, split as finely as the mesh can without its data axis.
    "rows": ("fsdp", "tensor", "token", "expert"),
    "slots": ("fsdp", "tensor", "token", "expert"),
    # Small ones, read by every device.
    "sub_keys": (),
    "key": (),
    "axes": (),
    "buckets": (),
    "snapshots": (),
    "events": (),
    "tasks": (),
    "domains": (),
    "cores": (),
    "fields": (),
    "routes": (),
}

# Fewest columns of a memory's values on a device, where they are split by columns: a vector register's lanes.
_COLUMNS = 128


def spec(
    logical_axes: Sequence[str | None],
    shape: Sequence[int],
    mesh: Mesh,
    rules: Mapping[str, tuple[str, ...]] = RULES,
) -> PartitionSpec:
    """How an array is split over a mesh.

    Args:
        logical_axes: names of its axes, None for one that stays whole (the replica axis).
        shape: its sizes, as many as names.

    Raises:
        ValueError: a name that no rule knows, or names and sizes differ in number.
    """
    if len(logical_axes) != len(shape):
        raise ValueError(f"array of shape {tuple(shape)} has {len(logical_axes)} axis names: {tuple(logical_axes)}")
    used: set[str] = set()
    parts: list[Any] = []
    for name, size in zip(logical_axes, shape, strict=True):
        if name is not None and name not in rules:
            raise ValueError(f"no rule for logical axis {name!r}; the table knows {', '.join(rules)}")
        split: tuple[str, ...] = ()
        for axis in rules[name] if name is not None else ():
            ways = mesh.shape.get(axis, 1)
            if ways > 1 and axis not in used and size % ways == 0:
                split, size = (*split, axis), size // ways
        used.update(split)
        parts.append(split[0] if len(split) == 1 else split or None)
    while parts and parts[-1] is None:  # an array that stays whole has the empty spec
        parts.pop()
    return PartitionSpec(*parts)


def table_spec(name: str, leading: int, array: Any, mesh: Mesh) -> PartitionSpec:
    """How a table [..., rows, width], or the state of its rows' optimiser [..., rows] or [..., rows, width], is split.

    By rows; memory values by columns where every device keeps at least 128 of them. A device then reads its columns of
    every row hit and sends 1 / ways of the bytes that sums of its own rows would have.

    Args:
        name: logical axis of the rows, "rows" or "slots". leading: axes before them.
    """
    axes = (*(None,) * leading, name, "embed")[: len(array.shape)]
    rules = RULES
    if name == "slots" and len(array.shape) == leading + 2:
        by_columns = RULES | {"slots": (), "embed": RULES["slots"]}
        split = spec(axes, array.shape, mesh, by_columns)
        ways = math.prod(mesh.shape[axis] for axis in jax.tree.leaves(tuple(split)))
        if ways > 1 and array.shape[-1] // ways >= _COLUMNS:
            rules = by_columns
    return spec(axes, array.shape, mesh, rules)


def lay_out(mesh: Mesh | None) -> Layout | None:
    """Splits activations by the names of their axes, an axis without one stays whole; None where XLA does well by
    itself: it follows requests and parameters, and loses its way where devices exchange tokens."""
    if mesh is None or mesh.shape.get("token", 1) == 1:
        return None
    return lambda x, names: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(names, x.shape, mesh)))


def batch_spec(mesh: Mesh) -> PartitionSpec:
    """How the first axis of a batch, its requests, is split."""
    axes = tuple(axis for axis in BATCH_AXES if axis in mesh.shape)
    return PartitionSpec(axes[0] if len(axes) == 1 else axes) if axes else PartitionSpec()


def split_requests(batch: Any, mesh: Mesh | None) -> Any:
    """Inside a program: arrays [requests, ...], split over the mesh."""
    if mesh is None:
        return batch
    return jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, batch_spec(mesh)))


def batch_ways(mesh: Mesh) -> int:
    """Into how many parts the requests of a batch are split."""
    return math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The tree with a sharding in the place of every array: `nnx.Variable`s by their `logical_axes`, all else whole.

    Axes of an array before its named ones (replicas) stay whole.
    """
    return jax.tree.map(lambda leaf: _sharding(leaf, mesh), tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _sharding(leaf: Any, mesh: Mesh) -> Any:
    if not isinstance(leaf, nnx.Variable):
        return replicated(mesh)
    names, array = leaf.get_metadata().get("logical_axes"), leaf.get_value()
    if names is None:
        return jax.tree.map(lambda _: replicated(mesh), leaf)
    names = (*(None,) * (len(array.shape) - len(names)), *names)
    own = NamedSharding(mesh, spec(names, array.shape, mesh))
    return jax.tree.map(lambda _: own, leaf)
