"""Which code serves a sparse read and its gradients, and how it is called.

A kernel module has

    obstacle(target, values_shape, values_dtype, ids_shape, gate_fn) -> str | None
    read(values, ids, weights, gate, gate_fn, *, target, interpret) -> (out, y or None)

and, where it does better than XLA, any of

    weight_gradient(values, ids, g, *, target, interpret) -> float32 [N, J]
    value_gradient(rows, ids, weights, g, *, target, interpret) -> float32 [M, d]
    gradients(values, ids, weights, g, *, target, interpret) -> (the latter, the former), in one pass

y is what the gate's backward needs, in the gate's dtype; None without a gate. Ids below 0 are absent hits.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from recscale.pallas_kernels.implementation import resolve
from recscale.pallas_kernels.targets import Target, current, current_platform, get_target

from . import xla
from .gates import GATES

Array = jax.Array

_MODULES = {"pallas_tpu": "tpu", "pallas_tpu_sc": "tpu_sc", "pallas_gpu": "gpu"}

# Kernels are interpreted as if for these, where no target is given.
_INTERPRETED_AS = {"pallas_tpu": "tpu-v5e", "pallas_tpu_sc": "tpu-v6e", "pallas_gpu": "h100"}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Who serves a request: an implementation's name, and for a kernel its target and whether it is interpreted."""

    name: str
    target: Target | None = None
    interpret: bool = False


def plan_for(
    operation: str,
    implementation: str | None,
    interpret: bool,
    values: Array,
    ids_shape: tuple[int, ...],
    gate_fn: str = "none",
) -> Plan:
    """The plan of a request.

    Raises:
        ValueError: interpret=True without a kernel to interpret.
        NotImplementedError: the named implementation cannot serve the request; the message says why.
    """
    # Only kernels that may be chosen are imported: another platform's may not even be importable here.
    prefix = f"pallas_{current_platform()}"
    wanted = [n for n in _MODULES if n == implementation or (implementation is None and n.startswith(prefix))]
    obstacles, targets = {}, {}
    for name in wanted:
        targets[name], obstacles[name] = _target(name, interpret)
        if obstacles[name] is None:
            obstacles[name] = kernel_module(name).obstacle(
                targets[name], values.shape, values.dtype, ids_shape, gate_fn
            )
    chosen = resolve(operation, implementation, obstacles)
    if interpret and chosen not in _MODULES:
        raise ValueError(f"interpret=True needs a Pallas implementation, but {chosen!r} was chosen; name one")
    return Plan(chosen, targets.get(chosen), interpret)


def kernel_module(name: str) -> ModuleType:
    """The module of a kernel, imported when first asked for."""
    return importlib.import_module(f".{_MODULES[name]}", __package__)


def _target(name: str, interpret: bool) -> tuple[Target | None, str | None]:
    """The target of a kernel, or why there is none."""
    platform = name.split("_")[1]
    target = current()
    if target is not None and target.platform == platform:
        return target, None
    if interpret:
        return get_target(_INTERPRETED_AS[name]), None
    found = "unknown" if target is None else target.name
    return None, f"programs are being built for {current_platform()} (target {found}), it needs a {platform} target"


def read(plan: Plan, values: Array, ids: Array, weights: Array, gate: Array | None, gate_fn: str):
    """(out, y): out = y or gate * f(y); y in the gate's dtype, None without a gate."""
    if plan.name in _MODULES:
        return _of_kernel(plan, "read")(values, ids, weights, gate, gate_fn)
    return with_gate(xla.read(values, ids, weights), values.dtype, gate, gate_fn)


def with_gate(y: Array, dtype: Any, gate: Array | None, gate_fn: str) -> tuple[Array, Array | None]:
    """(out, saved y) of float32 y: y in `dtype` without a gate, else gate * f(y) and y in the gate's dtype."""
    if gate is None:
        return y.astype(dtype), None
    return (gate.astype(jnp.float32) * GATES[gate_fn](y)).astype(gate.dtype), y.astype(gate.dtype)


def weight_gradient(plan: Plan, values: Array, ids: Array, g: Array) -> Array:
    """dw[t,j] = <g[t], values[ids[t,j]]>: float32 [N, J]."""
    kernel = _of_kernel(plan, "weight_gradient")
    return xla.weight_gradient(values, ids, g) if kernel is None else kernel(values, ids, g)


def value_gradient(plan: Plan, rows: int, ids: Array, weights: Array, g: Array) -> Array:
    """dV float32 [M, d] in the order `hits` states."""
    kernel = _of_kernel(plan, "value_gradient", rows)
    return xla.value_gradient(rows, ids, weights, g) if kernel is None else kernel(ids, weights, g)


def gradients(plan: Plan, values: Array, ids: Array, weights: Array, g: Array) -> tuple[Array, Array]:
    """(dV, dw), in one pass where the kernel has one."""
    kernel = _of_kernel(plan, "gradients")
    if kernel is not None:
        return kernel(values, ids, weights, g)
    dw = weight_gradient(plan, values, ids, g)
    return value_gradient(plan, values.shape[0], ids, weights, g), dw


def _of_kernel(plan: Plan, function: str, *leading: Any):
    """A kernel's function with its target, or None where it has none; replicas (vmap) run one after the other."""
    found = getattr(kernel_module(plan.name), function, None) if plan.name in _MODULES else None
    if found is None:
        return None
    bound = functools.partial(found, *leading, target=plan.target, interpret=plan.interpret)

    def call(*arguments: Any):
        # A gate function's name and an absent gate are no arrays, which vmap would ask for.
        fixed = {i: a for i, a in enumerate(arguments) if a is None or isinstance(a, str)}

        @jax.custom_batching.sequential_vmap
        def one(*arrays: Array):
            rest = iter(arrays)
            return bound(*(fixed[i] if i in fixed else next(rest) for i in range(len(arguments))))

        return one(*(a for i, a in enumerate(arguments) if i not in fixed))

    return call
