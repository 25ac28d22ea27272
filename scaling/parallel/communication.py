"""What a step is predicted to send over a mesh: the formulas beside what is counted in the compiled program.

Operand bytes of a device; a = bytes of a number, P = dense parameters, B = rows of a shard, X = devices of an axis:

data      gradients are summed: all-reduce P a, of the part that the other axes leave on a device
fsdp      gradients are summed, and every device gives its part of the parameters to all: all-gather P a / X
tensor    a per-token network is cut in its hidden width: all-reduce B T D a forward for what comes out, and as much
          backward for what went in

Rows of tables come on top. Nothing is padded: an axis that does not divide stays whole. No formula is given for `token`
and `expert`: how XLA partitions the exchange of tokens is its own choice, and sends more than the exchange itself.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from .rules import batch_ways, spec

# Parameters of a per-token network that `tensor` cuts: kernels and the bias of its hidden layer.
_KERNEL, _BIAS = ("tokens", "embed", "hidden"), ("tokens", "hidden")


def predicted_bytes(params: Any, mesh: Mesh, rows: int) -> dict[str, float] | None:
    """{collective: operand bytes of a device a step} for dense parameters and activations; None where no formula holds.

    Args:
        params: a state of variables that name their axes, each [..., *axes]; arrays or shapes. rows: of a batch.
    """
    axes = {axis for axis, ways in mesh.shape.items() if ways > 1}
    if not axes or axes not in ({"data"}, {"fsdp"}, {"tensor"}, {"data", "tensor"}):
        return None
    sent = {"all-reduce": 0.0}
    for path, variable in nnx.to_flat_state(params):
        array, names = variable.get_value(), tuple(variable.get_metadata().get("logical_axes") or ())
        split = spec((*(None,) * (array.ndim - len(names)), *names), array.shape, mesh)
        ways = math.prod(mesh.shape[axis] for axis in jax.tree.leaves(tuple(split)))
        size = math.prod(array.shape) * array.dtype.itemsize
        if "data" in axes:
            sent["all-reduce"] += size / ways
        elif "fsdp" in axes:
            sent["all-reduce"] += size
            if ways > 1:
                sent["all-gather"] = sent.get("all-gather", 0.0) + size / ways
        if "tensor" in axes and ways > 1:
            if names not in (_KERNEL, _BIAS) or "gate" in path:
                return None
            if names == _KERNEL:
                sent["all-reduce"] += rows / batch_ways(mesh) * size / array.shape[-1]
    return sent
