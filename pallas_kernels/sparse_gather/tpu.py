"""`sparse_gather` on a TPU's TensorCore: compiled for v5e, v6e and 7x, not yet run on them.

For v5p too, but for the gradients of a dense table at benchmark sizes.

    read, weight gradient    slab        [M, 128] of the table at a time in vector memory, if that is at most half of it
                             row copies  single rows from HBM, else
    value gradient           by sorted hits, with the weight gradient in one pass over g where both are wanted

Which of the first two serves a shape is a block size, `slab` (1 or 0), so a measured file may say otherwise.
The fused gradients replace two gathers of J rows per read (of V for the weights, of g for the values) by one, of g.
"""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp

from recscale.pallas_kernels.blocks import block_sizes
from recscale.pallas_kernels.targets import Target

from . import tpu_copies, tpu_hits, tpu_slab

Array = jax.Array

# Hits of a read are unrolled where they are summed across reads.
_MOST_HITS = 256


def obstacle(
    target: Target, values_shape: tuple[int, ...], values_dtype: Any, ids_shape: tuple[int, ...], gate_fn: str
) -> str | None:
    """Why the kernels cannot serve a request, or None."""
    (rows, width), (reads, per_read) = values_shape, ids_shape
    if values_dtype not in (jnp.float32, jnp.bfloat16):
        return f"values are {jnp.dtype(values_dtype).name}, the kernels read float32 and bfloat16"
    if min(rows, width, reads, per_read) == 0:
        return f"values {values_shape} and ids {ids_shape} leave nothing to read"
    if per_read > _MOST_HITS:
        return f"{per_read} hits per read, more than the {_MOST_HITS} that are unrolled"
    if reads * per_read >= 2**31:
        return f"{reads * per_read} hits, more than int32 counts"
    buffers = tpu_copies.buffer_bytes(per_read, width, values_dtype)
    if buffers > target.vmem_bytes // 4:
        return f"two buffers of 16 reads take {buffers} bytes, more than a quarter of {target.name}'s vector memory"
    items = tpu_hits.item_count(reads * per_read, rows, width)
    if items * 16 > target.smem_bytes // 2:
        return f"the backward's {items} programs do not fit {target.name}'s scalar memory"
    return None


def read(
    values: Array, ids: Array, weights: Array, gate: Array | None, gate_fn: str, *, target: Target, interpret: Any
) -> tuple[Array, Array | None]:
    """(out, y): out [N, d] is y or gate * f(y); y in the gate's dtype, None without a gate."""
    weights = jnp.where(ids >= 0, weights.astype(jnp.float32), 0.0)
    ids = _clamped(ids, values)
    if _slab(target, values, ids):
        return tpu_slab.read(values, ids, weights, gate, gate_fn, target=target, interpret=interpret)
    return tpu_copies.read(values, ids, weights, gate, gate_fn, target=target, interpret=interpret)


def weight_gradient(values: Array, ids: Array, g: Array, *, target: Target, interpret: Any) -> Array:
    """dw[t,j] = <g[t], values[ids[t,j]]>, 0 for absent hits: float32 [N, J]."""
    kernel = tpu_slab if _slab(target, values, ids) else tpu_copies
    dw = kernel.weight_gradient(values, _clamped(ids, values), g, target=target, interpret=interpret)
    return jnp.where(ids >= 0, dw, 0.0)


def value_gradient(rows: int, ids: Array, weights: Array, g: Array, *, target: Target, interpret: Any) -> Array:
    """dV float32 [M, d], summed in the order `hits` states."""
    return tpu_hits.gradients(rows, None, ids, weights, g, target=target, interpret=interpret)[0]


def gradients(
    values: Array, ids: Array, weights: Array, g: Array, *, target: Target, interpret: Any
) -> tuple[Array, Array]:
    """(dV, dw) in one pass over g."""
    found = tpu_hits.gradients(values.shape[0], values, ids, weights, g, target=target, interpret=interpret)
    return cast(tuple[Array, Array], found)


def _clamped(ids: Array, values: Array) -> Array:
    return jnp.clip(ids, 0, values.shape[0] - 1).astype(jnp.int32)


def _slab(target: Target, values: Array, ids: Array) -> bool:
    """Whether a slab of the table serves: by 32-bit rows of 128, which is what any dtype and width takes at most."""
    rows, width = values.shape
    key = f"M{rows}_d{width}_J{ids.shape[1]}_{jnp.dtype(values.dtype).name}"
    sizes = block_sizes("sparse_gather", "pallas_tpu", key, {"slab": int(tpu_slab.fits(target, rows))}, target)
    return bool(sizes["slab"])
