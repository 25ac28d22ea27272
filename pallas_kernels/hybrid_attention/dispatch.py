"""Which code serves attention over a history, and the derivative around its kernels.

A kernel module (`tpu.py`, `gpu.py`) has

    obstacle(target, q_shape, k_shape, v_width, dtype) -> str | None
    forward(q, k, v, lengths, positions, key_bias, scale, *, target, interpret) -> (o, lse)
    backward(q, k, v, lengths, positions, key_bias, scale, o, lse, do, dlse, *, target, interpret)
        -> (dq, dk, dv, dkey_bias)

    q, do, o [R, N, H, d or dv]   k [R, S, Hk, d]   v [R, S, Hk, dv]   lengths int32 [R]   positions int32 [1 or R, N]
    key_bias float32 [R, S, H]    lse, dlse float32 [R, N, H]

with the candidates folded into N = C*Q rows (positions then are not monotone), one dtype for q, k, v, o and do, and
gradients in the dtype of what they belong to. v is None for v = k: then dv is None and its part is in dk. No key_bias:
dkey_bias is None. Rows that see no key: o = 0, lse = INVISIBLE, zero gradients, whatever dlse holds for them.
"""

from __future__ import annotations

import functools
import importlib

import jax

from recscale.pallas_kernels.implementation import note, resolve
from recscale.pallas_kernels.targets import Target, current, current_platform, get_target

Array = jax.Array

# Implementation -> its module, and the target it is interpreted for where no target of its kind is given.
_KERNELS = {"pallas_tpu": (".tpu", "tpu-v5e"), "pallas_gpu": (".gpu", "h100")}


def choose(implementation: str | None, interpret: bool, q: Array, k: Array, v: Array | None) -> str:
    """The name of the implementation that serves q [R, N, H, d], k [R, S, Hk, d], v [R, S, Hk, dv] or None.

    Without a name, few keys stay with XLA: where S <= d the scores of a row take no more memory than the row itself,
    so there is no traffic for a kernel to save.

    Raises:
        ValueError: interpret=True without a kernel to interpret.
        NotImplementedError: the named implementation cannot serve the request; the message says why.
    """
    # Only a kernel that may be chosen is imported: another platform's may not even be importable here.
    wanted = [implementation] if implementation else [f"pallas_{current_platform()}"]
    obstacles = {name: _obstacle(name, interpret, q, k, v) for name in wanted if name in _KERNELS}
    if implementation is None and k.shape[1] <= k.shape[3]:
        chosen = note("hybrid_attention", "xla", "few keys")
    else:
        chosen = resolve("hybrid_attention", implementation, obstacles)
    if interpret and chosen not in _KERNELS:
        raise ValueError(f"interpret=True needs a Pallas implementation, but {chosen!r} was chosen; name one")
    return chosen


def run_kernel(name: str, interpret, q, k, v, lengths, positions, key_bias, scale: float) -> tuple[Array, Array]:
    """(o, lse) by the kernel of that name; differentiable in q, k, v and key_bias."""
    return _attend(q, k, v, key_bias, lengths, positions, scale, name, _target(name, interpret), interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def _attend(q, k, v, key_bias, lengths, positions, scale, name, target, interpret):
    return _forward(q, k, v, key_bias, lengths, positions, scale, name, target, interpret)[0]


# vmap (training replicas) goes through the kernel one replica after the other: its scalars cannot be batched.
def _forward(q, k, v, key_bias, lengths, positions, scale, name, target, interpret):
    @jax.custom_batching.sequential_vmap
    def kernel(q, k, v, lengths, positions, key_bias):
        forward = _module(name).forward
        return forward(q, k, v, lengths, positions, key_bias, scale, target=target, interpret=interpret)

    o, lse = kernel(q, k, v, lengths, positions, key_bias)
    return (o, lse), (q, k, v, key_bias, lengths, positions, o, lse)


def _backward(scale, name, target, interpret, saved, cotangents):
    @jax.custom_batching.sequential_vmap
    def kernel(q, k, v, key_bias, lengths, positions, o, lse, do, dlse):
        arguments = (q, k, v, lengths, positions, key_bias, scale, o, lse, do, dlse)
        return _module(name).backward(*arguments, target=target, interpret=interpret)

    dq, dk, dv, dkey_bias = kernel(*saved, *cotangents)
    return dq, dk, dv, dkey_bias, None, None


_attend.defvjp(_forward, _backward)


def _obstacle(name: str, interpret, q: Array, k: Array, v: Array | None) -> str | None:
    types = {str(x.dtype) for x in (q, k, v) if x is not None}
    if len(types) > 1:
        return f"q, k and v are {', '.join(sorted(types))}; it needs one type"
    target = _target(name, interpret)
    if target is None or f"pallas_{target.platform}" != name:
        return f"no {name.removeprefix('pallas_').upper()} to build for here; interpret=True runs it on a CPU"
    return _module(name).obstacle(target, q.shape, k.shape, (k if v is None else v).shape[-1], q.dtype)


def _target(name: str, interpret) -> Target | None:
    here = current()
    if interpret and (here is None or f"pallas_{here.platform}" != name):
        return get_target(_KERNELS[name][1])
    return here


def _module(name: str):
    return importlib.import_module(_KERNELS[name][0], __package__)
