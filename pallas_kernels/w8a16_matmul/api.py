"""int8 weights, float activations (W8A16): y = cast(act((x . wq) * scale + bias)).

    scale[f] = max_k |w[k,f]| / 127 (1 if the column is 0)        wq = clip(round_half_even(w / scale), -127, 127)

int8 is exact in bfloat16 and float32, so the products are those of the integers; sums are float32, and the scale is
applied once, after the sum (once per group with group scales). |w - scale * wq| <= scale / 2.

The gain is in weight bytes only: a quarter of float32, half of bfloat16. It vanishes where activations dominate.

A kernel (see `recscale.pallas_kernels.dispatch`) has

    obstacle(target, x_shape, wq_shape, scale_shape, x_dtype, act) -> str | None
    matmul(x, wq, scale, bias, act, out_dtype, *, target, interpret) -> [B, F] or [T, B, F]

for x [B, D] and wq [D, F], or x [T, B, D] and wq [T, D, F]; scale [(T,) G, F], bias [(T,) F] or None.

Letters: B rows, T tokens, D inputs, F outputs.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8

from recscale.pallas_kernels.activations import ACTIVATIONS
from recscale.pallas_kernels.dispatch import Backend, Implementation, choose
from recscale.pallas_kernels.mixed_precision import full_precision

from . import reference

_LARGEST = 127


def quantize_int8(w: Array, *, group: int | None = None) -> tuple[Int8[Array, "*T D F"], Float32[Array, "*scales F"]]:
    """int8 weights and float32 scales of w [..., D, F]: one scale per output column, symmetric.

    Args:
        w: weights, any float dtype, finite.
        group: inputs that share a scale; must divide D. None: all D.

    Returns:
        wq int8 [..., D, F] and scale float32 [..., F], or [..., D/group, F] with a group.

    Raises:
        ValueError: fewer than two axes, or a group that does not divide D.
    """
    if w.ndim < 2:
        raise ValueError(f"weights have shape {w.shape}, expected [..., D, F]")
    *lead, inputs, outputs = w.shape
    size = inputs if group is None else group
    if size < 1 or inputs % size:
        raise ValueError(f"group is {group}, expected a divisor of the {inputs} inputs")
    parts = w.astype(jnp.float32).reshape(*lead, inputs // size, size, outputs)
    largest = jnp.abs(parts).max(axis=-2)
    scale = jnp.where(largest > 0, largest / _LARGEST, 1.0)
    wq = jnp.clip(jnp.round(parts / scale[..., None, :]), -_LARGEST, _LARGEST).astype(jnp.int8).reshape(w.shape)
    return wq, scale[..., 0, :] if group is None else scale


def w8a16_matmul(
    x: Array,
    wq: Array,
    scale: Array,
    bias: Array | None = None,
    *,
    act: str | None = None,
    out_dtype=jnp.bfloat16,
    token_first: bool = False,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Float[Array, "*rows F"]:
    """act((x . wq) * scale + bias) with float32 sums, cast to `out_dtype`. Forward only: differentiating raises.

    Args:
        x: float [..., D]; with one matrix per token [B, T, D], or [T, B, D] with `token_first`.
        wq: int8 [D, F], or [T, D, F] for one matrix per token.
        scale: float32 [F] or [T, F]; with group scales [G, F] or [T, G, F], each for D/G inputs.
        bias: [F] or [T, F].
        act: None, "gelu" (tanh form), "relu" or "silu", applied in float32.
        implementation: see `recscale.pallas_kernels.dispatch`; None takes kernels only where they were measured.
        interpret: run a kernel by interpretation.

    Returns:
        [..., F], in the token order of x.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
        NotImplementedError: the named implementation cannot serve the request, or the result is differentiated.
    """
    _check(x, wq, scale, bias, act, token_first)
    if scale.ndim == wq.ndim - 1:
        scale = scale[..., None, :]
    per_token = wq.ndim == 3
    rows = x if per_token else x.reshape(-1, x.shape[-1])
    if per_token and not token_first:
        rows = rows.swapaxes(0, 1)
    request = rows.shape, wq.shape, scale.shape, rows.dtype, act
    backend = choose("w8a16_matmul", implementation, interpret, *request, measured_only=True)
    y = _forward_only(backend, act, jnp.dtype(out_dtype).name, rows, wq, scale, bias)
    if not per_token:
        return y.reshape(*x.shape[:-1], y.shape[-1])
    return y if token_first else y.swapaxes(0, 1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _forward_only(backend: Backend, act: str | None, out_dtype: str, x, wq, scale, bias) -> Array:
    if backend.kernel is not None:
        return backend.call("matmul", x, wq, scale, bias, act, out_dtype)
    return (_xla if backend.name == "xla" else reference.matmul)(x, wq, scale, bias, act, out_dtype)


@_forward_only.defjvp
def _no_derivative(backend, act, out_dtype, primals, tangents):
    raise NotImplementedError(
        "w8a16_matmul is forward only: int8 weights are for serving. Differentiate the float model instead"
    )


def _xla(x: Array, wq: Array, scale: Array, bias: Array | None, act: str | None, out_dtype: str) -> Array:
    """x @ wq.astype(x.dtype) under the scale; XLA fuses the widening into the product where its backend can."""
    groups, outputs = scale.shape[-2:]
    weights = wq.astype(x.dtype)
    if groups == 1:
        y = jnp.matmul(x, weights, precision=full_precision(x), preferred_element_type=jnp.float32) * scale
    else:
        # The groups become a batch axis: [.., G, B, D/G] x [.., G, D/G, F], each sum under its own scale.
        parts = x.reshape(*x.shape[:-1], groups, -1).swapaxes(-3, -2)
        weights = weights.reshape(*wq.shape[:-2], groups, -1, outputs)
        sums = jnp.matmul(parts, weights, precision=full_precision(x), preferred_element_type=jnp.float32)
        y = (sums * scale[..., None, :]).sum(axis=-3)
    if bias is not None:
        y = y + bias.astype(jnp.float32)[..., None, :]
    return ACTIVATIONS[act](y).astype(out_dtype)


def _check(x: Array, wq: Array, scale: Array, bias: Array | None, act: str | None, token_first: bool) -> None:
    if wq.dtype != jnp.int8 or wq.ndim not in (2, 3):
        raise ValueError(f"wq is {wq.dtype} {wq.shape}, expected int8 [D, F] or [T, D, F]")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype}, expected a float dtype")
    if scale.dtype != jnp.float32:
        raise ValueError(f"scale is {scale.dtype}, expected float32")
    *tokens, inputs, outputs = wq.shape
    if x.ndim < 1 or x.shape[-1] != inputs:
        raise ValueError(f"x has shape {x.shape}, expected {inputs} inputs on its last axis (wq is {wq.shape})")
    if tokens:
        expected = f"[{tokens[0]}, B, {inputs}]" if token_first else f"[B, {tokens[0]}, {inputs}]"
        if x.ndim != 3 or x.shape[0 if token_first else 1] != tokens[0]:
            raise ValueError(f"x has shape {x.shape}, expected {expected} (token_first={token_first})")
    elif token_first:
        raise ValueError(f"token_first needs one matrix per token, but wq has shape {wq.shape}")
    grouped = scale.ndim == wq.ndim
    groups = scale.shape[-2] if grouped else 1
    fits = scale.shape == (*tokens, *((groups,) if grouped else ()), outputs)
    if not fits or groups < 1 or inputs % groups:
        raise ValueError(f"scale has shape {scale.shape}, expected {(*tokens, outputs)}, or G scales with G | {inputs}")
    if bias is not None and bias.shape != (*tokens, outputs):
        raise ValueError(f"bias has shape {bias.shape}, expected {(*tokens, outputs)}")
    if act not in ACTIVATIONS:
        raise ValueError(f"act is {act!r}, expected one of {', '.join(map(repr, ACTIVATIONS))}")
