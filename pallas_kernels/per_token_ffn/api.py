"""Feed-forward layers whose tokens have weights of their own.

    per_token_matmul   y_t = act(x_t W_t + b_t)
    per_token_ffn      y_t = h_t W2_t + b2_t,   h_t = act(x_t W1_t + b1_t),  gated (x_t W1_t + b1_t) * act(x_t Wg_t)

Operands have the dtype of x, sums, biases and activations are float32, h is rounded to the dtype of x; y and dx come
back in the dtype of x, parameter gradients in that of the parameter. A kernel writes no hidden: the backward computes
it again from x. The backward is made of XLA products whatever the implementation. Two runs are bit-equal.

x comes in one of three forms, and y in the same one:

    [T, B, D]    with token_first=True, as models hold it
    [B, T*D]     a token is a block of D columns; token mixing reshapes it for free
    [B, T, D]    on a TPU another layout than [B, T*D], so that kernels read a copy

FLOPs: 2*B*T*D*F for one layer, 4*B*T*D*F for a network (O = D), 6*B*T*D*F for a gated one.

A kernel (see `recscale.pallas_kernels.dispatch`, and `form` for what it is given) has

    obstacle(target, form, x, weights) -> str | None        reads only shapes and dtypes
    forward(form, x, weights, *, target, interpret) -> y, in the layout and dtype of x

Letters: B rows, T tokens, D inputs, F hidden width (of one layer: its outputs), O outputs of the second layer.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recscale.pallas_kernels import targets
from recscale.pallas_kernels.activations import ACTIVATIONS
from recscale.pallas_kernels.blocks import beats_xla
from recscale.pallas_kernels.dispatch import Backend, Implementation, asked, choose

from . import reference, xla
from .form import Form, Weights


def per_token_matmul(
    x: Array,
    w: Array,
    bias: Array | None = None,
    *,
    act: str | None = None,
    transposed: bool = False,
    token_first: bool = False,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Float[Array, "*rows F"]:
    """act(x_t w_t + bias_t) for every token t, in the form of x with F instead of D.

    Args:
        x: float32 or bfloat16, in one of the forms above.
        w: [T, D, F], or [T, F, D] if `transposed`; float32 or the dtype of x.
        bias: [T, F].
        act: None, "gelu" (tanh form), "relu" or "silu".
        implementation: see `recscale.pallas_kernels.dispatch`; None takes kernels only where they were measured.
        interpret: run a kernel by interpretation.

    Raises:
        ValueError: shapes, dtypes or names that do not fit.
        NotImplementedError: the named implementation cannot serve the request.
    """
    form = Form(act, _layout(x, token_first), first_transposed=transposed)
    return _checked("per_token_matmul", form, x, Weights(w, bias), implementation, interpret)


def per_token_ffn(
    x: Array,
    w1: Array,
    b1: Array | None,
    w2: Array,
    b2: Array | None,
    *,
    w_gate: Array | None = None,
    act: str | None = "gelu",
    transposed: bool = False,
    token_first: bool = False,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Float[Array, "*rows O"]:
    """Two layers per token, in the form of x with O instead of D.

    Args:
        x: float32 or bfloat16, in one of the forms above.
        w1: [T, D, F]. w2: [T, F, O], or [T, O, F] if `transposed`. w_gate: [T, D, F]; with act="silu" that is SwiGLU.
            All float32 or of the dtype of x.
        b1: [T, F] or None. b2: [T, O] or None.
        act, implementation, interpret: see `per_token_matmul`.

    Raises:
        ValueError: shapes, dtypes or names that do not fit.
        NotImplementedError: the named implementation cannot serve the request.
    """
    form = Form(act, _layout(x, token_first), second_transposed=transposed)
    return _checked("per_token_ffn", form, x, Weights(w1, b1, w_gate, w2, b2), implementation, interpret)


def fuses(act: str) -> bool:
    """Whether a layer that names no implementation should call `per_token_ffn` rather than make two products: a kernel
    is asked for by the environment, or was measured here to be faster, and the operation knows the activation.
    """
    if act not in ACTIVATIONS:
        return False
    kernel = f"pallas_{targets.current_platform()}"
    measured = targets.partitions() == 1 and beats_xla("per_token_ffn", kernel, targets.current())
    return measured or asked("per_token_ffn", None) is not None


def _checked(
    function: str, form: Form, x: Array, weights: Weights, implementation: Implementation | None, interpret: bool
) -> Array:
    _check(form, x, weights)
    options: dict[str, Any] = dict(function=function, measured_only=True)
    backend = choose("per_token_ffn", implementation, interpret, form, x, weights, **options)
    if backend.name == "reference":
        return reference.forward(form, x, weights)
    return _run(backend, form, x, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(backend: Backend, form: Form, x: Array, weights: Weights) -> Array:
    if backend.kernel is None:
        return xla.forward(form, x, weights)
    return backend.call("forward", form, x, weights)


def _forward(backend, form, x, weights):
    return _run(backend, form, x, weights), (x, weights)


def _backward(backend, form, saved, dy):
    x, weights = saved
    return xla.gradients(form, x, weights, dy)


_run.defvjp(_forward, _backward)


def _layout(x: Array, token_first: bool) -> str:
    if x.ndim == 2 and not token_first:
        return "flat"
    if x.ndim == 3:
        return "tbd" if token_first else "btd"
    expected = "[T, B, D]" if token_first else "[B, T, D] or [B, T*D]"
    raise ValueError(f"x has shape {x.shape}, expected {expected} (token_first={token_first})")


def _check(form: Form, x: Array, weights: Weights) -> None:
    if form.act not in ACTIVATIONS:
        raise ValueError(f"act is {form.act!r}, expected one of {', '.join(map(repr, ACTIVATIONS))}")
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"x is {x.dtype}, expected float32 or bfloat16")
    if weights.w1.ndim != 3 or (weights.w2 is not None and weights.w2.ndim != 3):
        raise ValueError(
            f"weights have shapes {[w.shape for w in weights if w is not None]}, expected one matrix per T"
        )
    tokens, rows, inputs, hidden, outputs = form.sizes(x.shape, weights)
    given = {"tbd": (tokens, rows, inputs), "btd": (rows, tokens, inputs), "flat": (rows, tokens * inputs)}[form.layout]
    if x.shape != given:
        raise ValueError(f"x has shape {x.shape}, expected {given} for weights of {tokens} tokens and {inputs} inputs")
    second = (tokens, outputs, hidden) if form.second_transposed else (tokens, hidden, outputs)
    expected = (weights.w1.shape, (tokens, hidden), (tokens, inputs, hidden), second, (tokens, outputs))
    for name, array, shape in zip(Weights._fields, weights, expected, strict=True):
        if array is None:
            continue
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
        if array.dtype not in (jnp.float32, x.dtype):
            raise ValueError(f"{name} is {array.dtype}, expected float32 or the dtype of x ({x.dtype})")
