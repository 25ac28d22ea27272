"""A sparse read and its gradients by whatever was chosen to serve it: XLA, or a kernel for what it has.

Arguments as in the list of a kernel's functions in `api`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from recscale.pallas_kernels.dispatch import Backend, replicas_in_turn

from . import xla
from .gates import with_gate

Array = jax.Array


def read(backend: Backend, values: Array, ids: Array, weights: Array, gate: Array | None, gate_fn: str):
    """(out, y): out = y or gate * f(y); y in the gate's dtype, None without a gate."""
    if backend.kernel is not None:
        return replicas_in_turn(functools.partial(backend.call, "read"))(values, ids, weights, gate, gate_fn)
    return with_gate(xla.read(values, ids, weights), values.dtype, gate, gate_fn)


def weight_gradient(backend: Backend, values: Array, ids: Array, g: Array) -> Array:
    """dw[t,j] = <g[t], values[ids[t,j]]>: float32 [N, J]."""
    kernel = _of_kernel(backend, "weight_gradient") or xla.weight_gradient
    return kernel(values, ids, g)


def value_gradient(backend: Backend, rows: int, ids: Array, weights: Array, g: Array) -> Array:
    """dV float32 [M, d] in the order `hits` states."""
    kernel = _of_kernel(backend, "value_gradient") or xla.value_gradient
    return kernel(rows, ids, weights, g)


def gradients(backend: Backend, values: Array, ids: Array, weights: Array, g: Array) -> tuple[Array, Array]:
    """(dV, dw), in one pass where the kernel has one."""
    kernel = _of_kernel(backend, "gradients")
    if kernel is not None:
        return kernel(values, ids, weights, g)
    dw = weight_gradient(backend, values, ids, g)
    return value_gradient(backend, values.shape[0], ids, weights, g), dw


def _of_kernel(backend: Backend, function: str) -> Callable[..., Any] | None:
    """A function of the kernel, or None where it has none."""
    found = backend.function(function)
    return None if found is None else replicas_in_turn(found)
