"""Which rows of a batch a process reads, and how they come to lie on a mesh."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from .mesh import make_mesh, mesh_text, parse_mesh
from .rules import BATCH_AXES, batch_spec


def run_mesh(text: str, requests: int) -> Mesh | None:
    """The mesh of a run whose setting says `text`, over the devices of all its processes.

    None where one device computes. Several processes that name no mesh split the requests over all their devices.

    Raises:
        ValueError: there are fewer devices than the mesh needs, a process would have none of them, or requests do not
            divide over the mesh.
    """
    devices = jax.devices()
    if not text and jax.process_count() == 1:
        return None
    axes = parse_mesh(text) if text else {"data": len(devices)}
    mesh = make_mesh(axes, devices)
    if jax.process_count() > 1 and mesh.size != len(devices):
        raise ValueError(
            f"mesh {mesh_text(axes)} has {mesh.size} devices, the {jax.process_count()} processes {len(devices)}: "
            "a run of several processes uses all of them"
        )
    check_requests(axes, requests)
    return mesh


def check_requests(axes: Mapping[str, int], requests: int) -> None:
    """Raises ValueError if the requests of a batch do not divide over a mesh."""
    ways = math.prod(axes.get(axis, 1) for axis in BATCH_AXES)
    if requests % ways:
        raise ValueError(
            f"training.requests is {requests}, which does not divide over the {ways} devices of the axes "
            f"{' and '.join(axis for axis in BATCH_AXES if axis in axes)} of mesh {mesh_text(axes)}"
        )


def own_share(mesh: Mesh | None, requests: int) -> tuple[int, int]:
    """(i, n): the devices of this process need the i-th of n equal parts of a batch's requests.

    Processes that split something else than requests read the same part.
    """
    if mesh is None or jax.process_count() == 1:
        return 0, 1
    start, stop = _own_rows(NamedSharding(mesh, batch_spec(mesh)), requests)
    count = requests // (stop - start)
    fits = requests % (stop - start) == 0 and start % (stop - start) == 0
    return (start // (stop - start), count) if fits else (0, 1)


def place_batch(batch: Any, mesh: Mesh, requests: int) -> Any:
    """A host batch on a mesh, its requests split: whole on every process, or of this process's `own_share`."""
    sharding = NamedSharding(mesh, batch_spec(mesh))
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    host, hosts = own_share(mesh, requests)

    def placed(array: Any) -> jax.Array:
        array = np.asarray(array)
        first = 0 if len(array) == requests else host * (requests // hosts)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            rows = index[0] if index else slice(None)
            return array[(rows.start or 0) - first : (requests if rows.stop is None else rows.stop) - first]

        return jax.make_array_from_callback((requests, *array.shape[1:]), sharding, part)

    with jax.transfer_guard("allow"):
        return jax.tree.map(placed, batch)


def put_everywhere(value: Any, sharding: NamedSharding | Any) -> jax.Array:
    """A small host value, the same on every process, with a sharding that does not split it."""
    value = np.asarray(value)
    with jax.transfer_guard("allow"):
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _own_rows(sharding: NamedSharding, requests: int) -> tuple[int, int]:
    """First row and the one after the last that devices of this process hold."""
    indices = sharding.addressable_devices_indices_map((requests,)).values()
    parts = [index[0] for index in indices if index is not None]
    return (
        min(part.start or 0 for part in parts),
        max(requests if part.stop is None else part.stop for part in parts),
    )
