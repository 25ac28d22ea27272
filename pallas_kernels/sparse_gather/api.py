"""Sparse reads of a large table: y[t] = sum_j weights[t,j] * values[ids[t,j]], and a gate on top of it.

    out = y                    gate_fn="none"
    out = gate * f(y)          f in tanh, sigmoid, identity, one_plus_tanh (1 + tanh y)

The gradient of `values` is the caller's choice (`value_grad`):

    dense   dV [M, d], float32 sums, rows without a hit exactly 0
    rows    values are constant; a `probe` of zeros added to y returns g = dloss/dy, and (ids, weights, g) is dV in
            factored form: dV[m] = sum over hits of w * g
    none    frozen values

A kernel (see `recscale.pallas_kernels.dispatch`) has

    obstacle(target, values_shape, values_dtype, ids_shape, gate_fn) -> str | None
    read(values, ids, weights, gate, gate_fn, *, target, interpret) -> (out, y or None)

and, where it does better than XLA, any of

    weight_gradient(values, ids, g, *, target, interpret) -> float32 [N, J]
    value_gradient(rows, ids, weights, g, *, target, interpret) -> float32 [M, d]
    gradients(values, ids, weights, g, *, target, interpret) -> (the latter, the former), in one pass

y is what the gate's backward needs, in the gate's dtype; None without a gate. Ids below 0 are absent hits: they add
nothing, whatever the table holds. (Whether 0 * NaN of a present hit with weight 0 shows is left to the kernel.)

Letters: N reads, J hits per read, M rows, d width.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from recscale.pallas_kernels.checks import if_checked
from recscale.pallas_kernels.dispatch import Backend, Implementation, choose

from . import passes, reference, xla
from .gates import GATES, with_gate

VALUE_GRADS = ("dense", "rows", "none")


def sparse_gather(
    values: Array,
    ids: Array,
    weights: Array,
    *,
    gate: Array | None = None,
    gate_fn: str = "none",
    probe: Array | None = None,
    value_grad: str = "dense",
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Float[Array, "N d"]:
    """Weighted sums of rows, optionally gating another vector.

    Sums are float32 in increasing j; a row named twice counts twice; a read without hits gives y = 0. Ids at or beyond
    M are clamped, or a ValueError with RECSCALE_CHECK=1. Ids have no gradient.

    Args:
        values: [M, d], float32 or bfloat16. ids: int32 [N, J], -1 = absent hit. weights: [N, J].
        gate: [N, d], needed unless gate_fn is "none".
        probe: zeros [N, d], whose gradient is that of y; kernels take it at its word and do not add it.
        value_grad: "dense", "rows" or "none", see above.
        implementation: see `recscale.pallas_kernels.dispatch`.
        interpret: run a Pallas kernel in interpret mode (for tests on a CPU).

    Returns:
        [N, d] in the dtype of `gate`, or of `values` without one.

    Raises:
        ValueError: shapes, dtypes or options that do not fit together.
        NotImplementedError: the named implementation cannot serve the request.
    """
    _check(values, ids, weights, gate, gate_fn, probe, value_grad)
    request = values.shape, values.dtype, ids.shape, gate_fn
    backend = choose("sparse_gather", implementation, interpret, *request)
    if_checked(functools.partial(_refuse_ids, values.shape[0]), lambda: (jnp.max(ids, initial=-1),))
    if value_grad != "dense":
        values = jax.lax.stop_gradient(values)
    if backend.name == "reference":
        y = reference.read(values, ids, weights)
        y = y if probe is None else y + probe.astype(jnp.float32)
        return with_gate(y, values.dtype, gate, gate_fn)[0]
    return _gather((backend, gate_fn, value_grad == "dense"), values, ids, weights, gate, probe)


# Static: (backend, gate function, whether values get a gradient).
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(static: tuple[Backend, str, bool], values, ids, weights, gate, probe) -> Array:
    return _forward(static, values, ids, weights, gate, probe)[0]


def _forward(static, values, ids, weights, gate, probe):
    backend, gate_fn, _ = static
    like_probe = None if probe is None else jnp.zeros(0, probe.dtype)
    if probe is not None and backend.name == "xla":
        y = xla.read(values, ids, weights) + probe.astype(jnp.float32)
        out, y = with_gate(y, values.dtype, gate, gate_fn)
    else:
        out, y = passes.read(backend, values, ids, weights, gate, gate_fn)
    # y itself is kept rather than read again: 1 row instead of J.
    return out, (values, ids, weights, gate, y, like_probe)


def _backward(static: tuple[Backend, str, bool], saved: Any, dout: Array):
    values, ids, weights, gate, y, like_probe = saved
    backend, gate_fn, values_trained = static
    g, dgate = dout.astype(jnp.float32), None
    if gate is not None:
        opened, pull = jax.vjp(GATES[gate_fn], y.astype(jnp.float32))
        dgate = (g * opened).astype(gate.dtype)
        (g,) = pull(g * gate.astype(jnp.float32))
    if values_trained:
        dvalues, dw = passes.gradients(backend, values, ids, weights, g)
        dvalues = dvalues.astype(values.dtype)
    else:
        dvalues, dw = None, passes.weight_gradient(backend, values, ids, g)
    dprobe = None if like_probe is None else g.astype(like_probe.dtype)
    return dvalues, None, dw.astype(weights.dtype), dgate, dprobe


_gather.defvjp(_forward, _backward)


def sparse_dot(
    values: Array,
    ids: Array,
    x: Array,
    *,
    value_grad: str = "dense",
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Float32[Array, "N J"]:
    """Products of a vector with a few rows each, s[t,j] = <x[t], values[ids[t,j]]>: the transpose of `sparse_gather`.

    Args:
        values: [M, d]. ids: int32 [N, J], -1 = absent hit, whose product is 0. x: [N, d].
        value_grad: "dense", or "rows" and "none" for constant values: (ids, ds, x) is their gradient in factored form.
        implementation: see `recscale.pallas_kernels.dispatch`.
        interpret: run a Pallas kernel in interpret mode (for tests on a CPU).

    Returns:
        float32 [N, J].

    Raises:
        ValueError: shapes or options that do not fit together.
        NotImplementedError: the named implementation cannot serve the request.
    """
    if values.ndim != 2 or ids.ndim != 2 or x.shape != (ids.shape[0], values.shape[1]):
        raise ValueError(
            f"sparse_dot: values {values.shape}, ids {ids.shape}, x {x.shape}; want [M, d], [N, J], [N, d]"
        )
    if value_grad not in VALUE_GRADS:
        raise ValueError(f"sparse_dot: value_grad is {value_grad!r}, expected one of {', '.join(VALUE_GRADS)}")
    request = values.shape, values.dtype, ids.shape, "none"
    backend = choose("sparse_gather", implementation, interpret, *request, function="sparse_dot")
    if_checked(functools.partial(_refuse_ids, values.shape[0]), lambda: (jnp.max(ids, initial=-1),))
    if value_grad != "dense":
        values = jax.lax.stop_gradient(values)
    if backend.name == "reference":
        return reference.dot(values, ids, x)
    return _dot((backend, value_grad == "dense"), values, ids, x)


# Static: (backend, whether values get a gradient).
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dot(static: tuple[Backend, bool], values: Array, ids: Array, x: Array) -> Array:
    return passes.weight_gradient(static[0], values, ids, x.astype(jnp.float32))


def _dot_forward(static, values, ids, x):
    return _dot(static, values, ids, x), (values, ids, x)


def _dot_backward(static: tuple[Backend, bool], saved: Any, ds: Array):
    (backend, values_trained), (values, ids, x) = static, saved
    dvalues = None
    if values_trained:
        dvalues = passes.value_gradient(backend, values.shape[0], ids, ds, x.astype(jnp.float32)).astype(values.dtype)
    # Without a gate a read comes rounded to the dtype of the values, through an open one in float32.
    opened = None if values.dtype == jnp.float32 else jnp.ones(x.shape, jnp.float32)
    dx, _ = passes.read(backend, values, ids, ds, opened, "none" if opened is None else "identity")
    return dvalues, None, dx.astype(x.dtype)


_dot.defvjp(_dot_forward, _dot_backward)


def _check(values, ids, weights, gate, gate_fn: str, probe, value_grad: str) -> None:
    if values.ndim != 2 or ids.ndim != 2 or weights.shape != ids.shape:
        raise ValueError(
            f"sparse_gather: values {values.shape}, ids {ids.shape}, weights {weights.shape}; expected [M, d], [N, J] "
            "and [N, J]"
        )
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"sparse_gather: ids are {ids.dtype}, expected int32")
    if gate_fn not in GATES:
        raise ValueError(f"sparse_gather: gate_fn is {gate_fn!r}, expected one of {', '.join(GATES)}")
    if (gate is None) != (gate_fn == "none"):
        raise ValueError(f"sparse_gather: gate_fn is {gate_fn!r} and gate is {'absent' if gate is None else 'given'}")
    if value_grad not in VALUE_GRADS:
        raise ValueError(f"sparse_gather: value_grad is {value_grad!r}, expected one of {', '.join(VALUE_GRADS)}")
    if value_grad == "rows" and probe is None:
        raise ValueError("sparse_gather: value_grad='rows' returns the gradient through a probe; give zeros [N, d]")
    shape = (ids.shape[0], values.shape[1])
    for name, array in (("gate", gate), ("probe", probe)):
        if array is not None and array.shape != shape:
            raise ValueError(f"sparse_gather: {name} has shape {array.shape}, expected {shape}")


def _refuse_ids(rows: int, highest) -> None:
    if highest.max() >= rows:
        raise ValueError(f"sparse_gather: id {highest.max()} is outside a table of {rows} rows")
