"""Grouped (ragged) matrix product: y[r] = x[r] w[g] for the rows r of group g, rows sorted by group.

    group g owns the group_sizes[g] rows after those of groups 0 ... g-1; rows beyond sum(group_sizes) give 0
    dx = the same product with w^T          dw[g] = x_g^T dy_g, exactly 0 for an empty group

Operands have the dtype of x, sums are float32; y and dx come back in the dtype of x, dw in that of w.
Two runs on one device are bit-equal. FLOPs 2*N*D*F, whatever the group sizes.

On TPUs XLA's ragged_dot is a grouped kernel already, so there is no other one here.

A kernel (see `recscale.pallas_kernels.dispatch`) has, for x and w of one dtype,

    obstacle(target, x_shape, w_shape, x_dtype) -> str | None
    multiply(x, w, group_sizes, transposed, *, target, interpret) -> y [N, F]; transposed: w is [G, F, D]
    contract(x, dy, group_sizes, *, target, interpret) -> dw float32 [G, D, F]

Letters: N rows, G groups (experts, or tokens times experts), D inputs, F outputs.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recscale.pallas_kernels import targets
from recscale.pallas_kernels.checks import if_checked
from recscale.pallas_kernels.dispatch import Backend, Implementation, choose
from recscale.pallas_kernels.mixed_precision import full_precision

from . import reference

# On CPUs XLA multiplies every row with every group through a copy of the rows per group: rows come in chunks whose
# copies stay below this.
_CHUNK_BYTES = 256 * 2**20

# dw: rows are contracted, group by group.
_CONTRACT_ROWS = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def grouped_matmul(
    x: Array,
    w: Array,
    group_sizes: Array,
    *,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Float[Array, "N F"]:
    """[N, F]: every row times the matrix of its group.

    Args:
        x: float32 or bfloat16 [N, D], rows sorted by group.
        w: [G, D, F], float32 or the dtype of x.
        group_sizes: int32 [G], not negative, sum at most N. With RECSCALE_CHECK=1 in the environment that is checked.
        implementation: see `recscale.pallas_kernels.dispatch`; None takes kernels only where they were measured.
        interpret: run a kernel by interpretation.

    Raises:
        ValueError: shapes or dtypes that do not fit together; bad group sizes where they are checked.
        NotImplementedError: the named implementation cannot serve the request.
    """
    _check(x, w, group_sizes)
    request = x.shape, w.shape, x.dtype
    backend = choose("grouped_matmul", implementation, interpret, *request, measured_only=True)
    if_checked(functools.partial(_refuse_sizes, x.shape[0]), lambda: (group_sizes,))
    if backend.name == "reference":
        return reference.matmul(x, w, group_sizes)
    return _grouped(backend, x, w, group_sizes)


def _multiply(backend: Backend, x: Array, w: Array, group_sizes: Array, transposed: bool) -> Array:
    w = w.astype(x.dtype)
    if backend.kernel is None:
        return _rows_times_groups(x, w.swapaxes(1, 2) if transposed else w, group_sizes)
    return backend.call("multiply", x, w, group_sizes, transposed)


def _contract(backend: Backend, x: Array, dy: Array, group_sizes: Array) -> Array:
    if backend.kernel is None:
        return _contract_rows(x, dy, group_sizes)
    return backend.call("contract", x, dy, group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(backend: Backend, x: Array, w: Array, group_sizes: Array) -> Array:
    return _multiply(backend, x, w, group_sizes, False)


def _forward(backend, x, w, group_sizes):
    return _grouped(backend, x, w, group_sizes), (x, w, group_sizes)


def _backward(backend, saved, dy):
    x, w, group_sizes = saved
    dx = _multiply(backend, dy, w, group_sizes, True)
    return dx, _contract(backend, x, dy, group_sizes).astype(w.dtype), None


_grouped.defvjp(_forward, _backward)


# vmap (training replicas) goes through the products one after the other: JAX batches them only in special cases.
@jax.custom_batching.sequential_vmap
def _product(x: Array, w: Array, group_sizes: Array) -> Array:
    return jax.lax.ragged_dot(x, w, group_sizes, precision=full_precision(x), preferred_element_type=jnp.float32)


@jax.custom_batching.sequential_vmap
def _weight_product(x: Array, dy: Array, group_sizes: Array) -> Array:
    return jax.lax.ragged_dot_general(
        x, dy, group_sizes, _CONTRACT_ROWS, precision=full_precision(x), preferred_element_type=jnp.float32
    )


def _rows_times_groups(x: Array, w: Array, group_sizes: Array) -> Array:
    chunk = _chunk(x.shape[0], *w.shape)
    if chunk >= x.shape[0]:
        return _product(x, w, group_sizes).astype(x.dtype)
    parts = _chunks(chunk, x), _sizes_per_chunk(group_sizes, chunk, x.shape[0])
    y = jax.lax.map(lambda part: _product(part[0], w, part[1]).astype(x.dtype), parts)
    return y.reshape(-1, y.shape[-1])[: x.shape[0]]


def _contract_rows(x: Array, dy: Array, group_sizes: Array) -> Array:
    """float32 [G, D, F]."""
    shape = (group_sizes.shape[0], x.shape[1], dy.shape[1])
    chunk = _chunk(x.shape[0], *shape)
    if chunk >= x.shape[0]:
        return _weight_product(x, dy, group_sizes)
    parts = _chunks(chunk, x), _chunks(chunk, dy), _sizes_per_chunk(group_sizes, chunk, x.shape[0])
    start = jnp.zeros(shape, jnp.float32)
    return jax.lax.scan(lambda total, part: (total + _weight_product(*part), None), start, parts)[0]


def _chunk(rows: int, groups: int, inputs: int, outputs: int) -> int:
    """Rows of one product: all of them, except on CPUs."""
    if targets.current_platform() != "cpu":
        return rows
    return min(rows, max(_CHUNK_BYTES // (4 * groups * max(inputs, outputs)), 1))


def _chunks(chunk: int, x: Array) -> Array:
    """[N, D] -> [ceil(N / chunk), chunk, D], the last one padded with zeros."""
    rows = jnp.pad(x, ((0, -x.shape[0] % chunk), (0, 0)))
    return rows.reshape(-1, chunk, x.shape[1])


def _sizes_per_chunk(group_sizes: Array, chunk: int, rows: int) -> Array:
    """int32 [chunks, G]: how many rows of each group lie in each chunk."""
    ends = jnp.cumsum(group_sizes)
    starts = chunk * jnp.arange(-(-rows // chunk), dtype=group_sizes.dtype)[:, None]

    def inside(positions: Array) -> Array:
        return jnp.clip(positions[None] - starts, 0, chunk)

    return inside(ends) - inside(ends - group_sizes)


def _check(x: Array, w: Array, group_sizes: Array) -> None:
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"x is {x.dtype}, expected float32 or bfloat16")
    if w.dtype not in (jnp.float32, x.dtype):
        raise ValueError(f"w is {w.dtype}, expected float32 or the dtype of x ({x.dtype})")
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1]:
        raise ValueError(f"x {x.shape} and w {w.shape} do not fit, expected [N, D] and [G, D, F]")
    if group_sizes.shape != w.shape[:1] or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"group_sizes is {group_sizes.dtype} {group_sizes.shape}, expected int32 ({w.shape[0]},)")


def _refuse_sizes(rows: int, sizes) -> None:
    if sizes.min() < 0 or sizes.sum() > rows:
        raise ValueError(f"group_sizes {sizes.tolist()} sum to {sizes.sum()}, expected none negative, sum <= {rows}")
