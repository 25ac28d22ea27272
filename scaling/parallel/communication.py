"""What a step is predicted to send over a mesh: the formulas beside what is counted in the compiled program.

Operand bytes of a device; a = bytes of a number, P = dense parameters, B = rows of a shard, X = devices of an axis:

data      gradients are summed: all-reduce P a, of the part that the other axes leave on a device
fsdp      gradients are summed, and every device gives its part of the parameters to all: all-gather P a / X; with
          data, the sums of a part once more over its axis: all-reduce P a / X
tensor    a per-token network is cut in its hidden width: all-reduce B T D a forward for what comes out, and as much
          backward for what went in
token     tokens are exchanged before a per-token network, and their gradients behind it: two all-to-all of B T D a / X;
          their mean is a sum: all-reduce B D a; who made them wants the gradient of all: all-gather B T D a / X; and
          gradients of what acts on every token, the gains of norms, are summed over them
expert    every device routes all its rows, and its experts at fixed capacity (E C places a token) give what came out
          forward, and the gradient of what went in, and of its gate, backward: all-gather (2 D + 1) T E C a / X
rows      N rows of a table that a batch touches, split by rows: all-reduce N (width + row state) a. Where the batch is
          split X ways, every device finds them among all I ids of rows that are said to be real, all-gather I a / X and
          a byte a row; and their gradients are summed: all-reduce N width a

Nothing is padded: an axis that does not divide stays whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from .mesh import MESH_AXES
from .rules import BATCH_AXES, batch_ways, spec, table_spec

# Of a per-token network: kernels, two and a gate, and biases. Of a norm: gains. Of experts, and of a tower: kernels.
_KERNEL, _BIASES, _GAIN = ("tokens", "embed", "hidden"), (("tokens", "hidden"), ("tokens", "embed")), ("embed",)
_EXPERTS, _TOWER = ("tokens", "experts", "hidden", "embed"), ("tasks", "embed", "hidden")

# Sets of axes that formulas are known for.
_KNOWN = [{axis} for axis in MESH_AXES] + [{"data", axis} for axis in ("fsdp", "tensor", "token")]


@dataclasses.dataclass(frozen=True)
class Lookup:
    """What a batch reads of a table: its ids, and rows that it touches at most; the table [P, V, width] and the arrays
    [P, V, ...] of its optimiser, or shapes."""

    ids: int
    touched: int
    table: Any
    slots: Sequence[Any] = ()


def predicted_bytes(
    params: Any, mesh: Mesh, rows: int, lookups: Sequence[Lookup] = (), places: int | None = None
) -> dict[str, float] | None:
    """{collective: operand bytes of a device a step}; None where no formula holds.

    Args:
        params: a state of variables that name their axes, each [..., *axes]; arrays or shapes. rows: of a batch.
        lookups: of every table. places: E C of a layer of experts, None where they have no capacity.
    """
    axes = {axis for axis, ways in mesh.shape.items() if ways > 1}
    if axes not in _KNOWN:
        return None
    sent: dict[str, float] = defaultdict(float)
    own, tokens, readers = rows / batch_ways(mesh), {}, 0
    for path, variable in nnx.to_flat_state(params):
        array, names = variable.get_value(), tuple(variable.get_metadata().get("logical_axes") or ())
        split = spec((*(None,) * (array.ndim - len(names)), *names), array.shape, mesh)
        over = jax.tree.leaves(tuple(split))
        ways = math.prod(mesh.shape[axis] for axis in over)
        size = math.prod(array.shape) * array.dtype.itemsize
        readers += names == _TOWER and path[-1] == 0  # a tower's first kernel
        if axes & set(BATCH_AXES):
            sent["all-reduce"] += size / ways * (mesh.shape["fsdp"] if "fsdp" in over else 1)
        if "fsdp" in over:
            sent["all-gather"] += size / ways
            sent["all-reduce"] += size / ways if "data" in axes else 0
        if "token" in axes and names == _GAIN:
            sent["all-reduce"] += size
        if not axes & {"tensor", "token", "expert"} or ways == 1:
            continue
        if names == _EXPERTS and axes == {"expert"} and places is not None:
            if "up" in path:
                gathered = places * size / math.prod(array.shape[-3:]) / ways  # T E C a / X
                sent["all-gather"] += (2 * array.shape[-1] + 1) * gathered
            continue
        if names != _KERNEL and names not in _BIASES or "tensor" in axes and "gate" in path:
            return None
        if names != _KERNEL or "gate" in path:
            continue
        of_tokens = own * size / array.shape[-1]  # B T D a
        if "tensor" in axes:
            sent["all-reduce"] += of_tokens
        else:
            sent["all-to-all"] += of_tokens / ways
            tokens[array.shape[-3:-1]] = of_tokens, ways
    if len(tokens) > 1:
        return None
    for (count, _), (of_tokens, ways) in tokens.items():
        sent["all-reduce"] += readers * of_tokens / count
        sent["all-gather"] += of_tokens / ways
    if lookups and batch_ways(mesh) > 1:
        sent["all-gather"] += own  # whether a row is real
    for lookup in lookups:
        if batch_ways(mesh) > 1:
            sent["all-gather"] += 4 * lookup.ids / batch_ways(mesh)
            sent["all-reduce"] += lookup.touched * _row_bytes(lookup.table)
        for array in (lookup.table, *lookup.slots):
            _, by_row, *by_column = (*table_spec("rows", 1, array, mesh), *(None,) * array.ndim)[: array.ndim]
            if any(by_column):
                return None
            if by_row is not None:
                sent["all-reduce"] += lookup.touched * _row_bytes(array)
    return dict(sent)


def _row_bytes(array: Any) -> float:
    """Of a row of an array [P, V, ...], of all replicas."""
    return math.prod(array.shape) / array.shape[1] * array.dtype.itemsize
