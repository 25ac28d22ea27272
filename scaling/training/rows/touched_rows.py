"""The rows of every table that a batch names, on however many devices."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from recscale.models.inputs import Batch, Schema
from recscale.models.inputs.tables import Touched, find_touched
from recscale.scaling import parallel


def touched_rows(schema: Schema, batch: Batch, mesh: Mesh | None) -> dict[str, Touched]:
    """`find_touched` inside a program whose requests a mesh may split: every device sorts the ids of all requests, and
    keeps the places of its own. Left to itself, XLA splits ids and puts them together again several times."""
    find = functools.partial(find_touched, schema)
    if mesh is None or parallel.batch_ways(mesh) == 1:
        return find(batch)
    split: Any = parallel.batch_spec(mesh)

    def own(batch: Batch) -> dict[str, Touched]:
        requests = batch.valid.shape[0]
        first = requests * jax.lax.axis_index(split[0])
        whole = jax.tree.map(lambda part: jax.lax.all_gather(part, split[0], tiled=True), batch)
        places = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=requests)
        return {
            name: dataclasses.replace(rows, positions=jax.tree.map(places, rows.positions))
            for name, rows in find(whole).items()
        }

    specs = dict.fromkeys(jax.eval_shape(find, batch), Touched(PartitionSpec(), PartitionSpec(), split))
    return jax.shard_map(own, mesh=mesh, in_specs=split, out_specs=specs, check_vma=False)(batch)
