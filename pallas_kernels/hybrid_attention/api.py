"""Attention over histories that are newest first and padded at the old end, with an optional candidate axis.

One rule: query row i of request r sees key j iff  q_pos[r, i] <= j < lengths[r].

    full       q_pos = 0         every valid event
    causal     q_pos = i         event i sees itself and older events (newest first: older is a larger index)
    positions  q_pos as given    rows sampled from a longer index space

    o_i   = sum_j softmax_j(scale * q_i . k_j + bias_j) v_j           over the visible j
    lse_i = log sum_j exp(scale * q_i . k_j + bias_j)

Two disjoint sets of keys are joined by `merge_attention`, so no code in here knows of global tokens or candidates'
own keys: a candidate can enter a history's rows only if the caller puts it there.

A kernel (see `recscale.pallas_kernels.dispatch`) has

    obstacle(target, q_shape, k_shape, v_width, dtype) -> str | None
    forward(q, k, v, lengths, positions, key_bias, scale, *, target, interpret) -> (o, lse)
    backward(q, k, v, lengths, positions, key_bias, scale, o, lse, do, dlse, *, target, interpret)
        -> (dq, dk, dv, dkey_bias)

    q, do, o [R, N, H, d or dv]   k [R, S, Hk, d]   v [R, S, Hk, dv]   lengths int32 [R]   positions int32 [1 or R, N]
    key_bias float32 [R, S, H]    lse, dlse float32 [R, N, H]

with the candidates folded into N = C*Q rows (positions then are not monotone), one dtype for q, k, v, o and do, and
gradients in the dtype of what they belong to. v is None for v = k: then dv is None and its part is in dk. No key_bias:
dkey_bias is None. Rows that see no key: o = 0, lse = INVISIBLE, zero gradients, whatever dlse holds for them.

Letters: R requests, C candidates, Q query rows, S keys, H heads, Hk key heads (1 or H), d head width, dv value width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from recscale.pallas_kernels.checks import if_checked
from recscale.pallas_kernels.dispatch import Backend, Implementation, choose, replicas_in_turn

from . import reference, xla
from .reference import INVISIBLE

MODES = ("full", "causal", "positions")


def hybrid_attention(
    q: Array,
    k: Array,
    v: Array | None,
    lengths: Array,
    *,
    mode: str = "full",
    q_pos: Array | None = None,
    scale: float,
    key_bias: Array | None = None,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "*rows H dv"], Float32[Array, "*rows H"]]:
    """Attention of every query row over its visible keys, and the log of its weights' sum.

    Scores, maxima and sums are float32; the weights are cast to the input type for the second product. A row that sees
    no key gives o = 0 and lse = -1e30, and has zero gradients. Lengths and positions have no gradient. What k, v
    and the bias hold beyond a length reaches nothing, a NaN included.

    Args:
        q: [R, Q, H, d] or [R, C, Q, H, d].
        k: [R, S, Hk, d].
        v: [R, S, Hk, dv], or None for v = k.
        lengths: int32 [R], number of valid keys; 0 is legal.
        mode: "full", "causal" or "positions".
        q_pos: int32 [Q] or [R, Q], non-decreasing; with mode="positions" only.
        scale: factor of the scores, always explicit.
        key_bias: float32 [R, S, H], added to the scaled scores.
        implementation: see `recscale.pallas_kernels.dispatch`; without a name, S <= d keys stay with XLA.
        interpret: run a Pallas kernel in interpret mode (for tests on a CPU).

    Returns:
        o like q with its last axis dv, in q's type; lse float32 [R, (C,) Q, H].

    Raises:
        ValueError: shapes, mode or arguments that do not fit together; with RECSCALE_CHECK=1 also lengths outside
            0 ... S and positions that fall.
        NotImplementedError: the named implementation cannot serve the request.
    """
    _check(q, k, v, lengths, mode, q_pos, key_bias)
    *lead, Q, H, _ = q.shape
    C = lead[1] if len(lead) == 2 else 1
    rows = q.reshape(lead[0], C * Q, H, q.shape[-1])
    backend = _choose(implementation, interpret, rows, k, v)
    own = _positions(mode, q_pos, Q)
    if_checked(functools.partial(_refuse_values, k.shape[1]), lambda: (lengths, own))
    positions = jnp.broadcast_to(own[:, None], (own.shape[0], C, Q)).reshape(own.shape[0], C * Q)
    if backend.kernel is None:
        attend = reference.attention if backend.name == "reference" else xla.attention
        o, lse = attend(rows, k, v, lengths, positions, key_bias, scale)
    else:
        o, lse = _by_kernel(rows, k, v, key_bias, lengths, positions, scale, backend)
    return o.reshape(*lead, Q, H, o.shape[-1]), lse.reshape(*lead, Q, H)


def merge_attention(
    parts: Sequence[tuple[Array, Array]],
) -> tuple[Float[Array, "*rows H dv"], Float32[Array, "*rows H"]]:
    """Exact softmax over the union of disjoint key sets, from the (o, lse) of each.

        lse = log sum_p exp(lse_p)            o = sum_p exp(lse_p - lse) o_p

    Shapes as `hybrid_attention` returns them, equal for all parts. A row that saw nothing in any part gives 0.
    """
    most = jax.lax.stop_gradient(jnp.stack([lse for _, lse in parts]).max(axis=0))
    weighted = [(jnp.exp(lse - most), o) for o, lse in parts]
    total = sum(weight for weight, _ in weighted)
    o = sum((weight / total)[..., None] * part.astype(jnp.float32) for weight, part in weighted)
    return cast(Array, o).astype(parts[0][0].dtype), most + jnp.log(total)


def _choose(implementation: Implementation | None, interpret: Any, q: Array, k: Array, v: Array | None) -> Backend:
    """What serves q [R, N, H, d], k [R, S, Hk, d], v [R, S, Hk, dv] or None.

    Without a name, few keys stay with XLA: where S <= d the scores of a row take no more memory than the row itself,
    so there is no traffic for a kernel to save.
    """
    types = {str(x.dtype) for x in (q, k, v) if x is not None}
    return choose(
        "hybrid_attention",
        implementation,
        interpret,
        *(q.shape, k.shape, (k if v is None else v).shape[-1], q.dtype),
        obstacle=f"q, k and v are {', '.join(sorted(types))}; it needs one type" if len(types) > 1 else None,
        stays_with_xla="few keys" if k.shape[1] <= k.shape[3] else "",
    )


def _attend(q, k, v, key_bias, lengths, positions, scale: float, backend: Backend) -> tuple[Array, Array]:
    """(o, lse) by a kernel; differentiable in q, k, v and key_bias."""
    return _forward(q, k, v, key_bias, lengths, positions, scale, backend)[0]


def _forward(q, k, v, key_bias, lengths, positions, scale, backend):
    kernel = replicas_in_turn(functools.partial(backend.call, "forward"))
    o, lse = kernel(q, k, v, lengths, positions, key_bias, scale)
    return (o, lse), (q, k, v, key_bias, lengths, positions, o, lse)


def _backward(scale, backend, saved, cotangents):
    q, k, v, key_bias, lengths, positions, o, lse = saved
    kernel = replicas_in_turn(functools.partial(backend.call, "backward"))
    dq, dk, dv, dkey_bias = kernel(q, k, v, lengths, positions, key_bias, scale, o, lse, *cotangents)
    return dq, dk, dv, dkey_bias, None, None


_by_kernel = jax.custom_vjp(_attend, nondiff_argnums=(6, 7))
_by_kernel.defvjp(_forward, _backward)


def _positions(mode: str, q_pos: Array | None, queries: int) -> Array:
    """int32 [1 or R, Q]."""
    if q_pos is not None:
        return q_pos.reshape(-1, queries).astype(jnp.int32)
    return jnp.arange(queries, dtype=jnp.int32)[None] * (mode == "causal")


def _refuse_values(keys: int, lengths, positions) -> None:
    if lengths.size and (lengths.min() < 0 or lengths.max() > keys):
        raise ValueError(f"hybrid_attention: lengths {lengths.tolist()}, expected 0 to {keys}")
    if (positions[..., 1:] < positions[..., :-1]).any():
        raise ValueError("hybrid_attention: q_pos falls from one row to the next, expected it non-decreasing")


def _check(q, k, v, lengths, mode, q_pos, key_bias) -> None:
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}")
    if (q_pos is not None) != (mode == "positions"):
        raise ValueError(f"q_pos goes with mode='positions' and only there; mode is {mode!r}")
    if q.ndim not in (4, 5) or k.ndim != 4:
        raise ValueError(f"q is {q.shape} and k {k.shape}, expected [R, (C,) Q, H, d] and [R, S, Hk, d]")
    R, Q, H, d = q.shape[0], *q.shape[-3:]
    S, heads = k.shape[1:3]
    if heads not in (1, H):
        raise ValueError(f"k has {heads} heads and q {H}; k needs 1 or {H}")
    expected = {"k": (k, [(R, S, heads, d)]), "lengths": (lengths, [(R,)])}
    if v is not None:
        expected["v"] = (v, [(R, S, heads, v.shape[-1])])
    if q_pos is not None:
        expected["q_pos"] = (q_pos, [(Q,), (R, Q)])
    if key_bias is not None:
        expected["key_bias"] = (key_bias, [(R, S, H)])
    for name, (array, shapes) in expected.items():
        if array.shape not in shapes:
            raise ValueError(f"{name} has shape {array.shape}, expected {' or '.join(map(str, shapes))}")


__all__ = ["INVISIBLE", "MODES", "hybrid_attention", "merge_attention"]
