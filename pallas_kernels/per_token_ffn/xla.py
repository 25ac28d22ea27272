"""`per_token_ffn` on XLA: products batched over tokens, and the gradients of every implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from recscale.pallas_kernels.mixed_precision import einsum_float32

from .form import Form, Weights

Array = jax.Array


def forward(form: Form, x: Array, weights: Weights) -> Array:
    """y in the layout and dtype of x; `weights` in any float dtype."""
    shape = x.shape
    x = _split(form, x, weights)
    w1, b1, w_gate, w2, b2 = weights
    y = form.activate(_product(form, x, w1, b1, form.first_transposed), _gate(form, x, w_gate))
    if w2 is not None:
        y = _product(form, y.astype(x.dtype), w2, b2, form.second_transposed)
    y = y.astype(x.dtype)
    return y.reshape(shape[0], -1) if form.layout == "flat" else y


def gradients(form: Form, x: Array, weights: Weights, dy: Array) -> tuple[Array, Weights]:
    """dx, and the gradient of every parameter in its dtype, with the hidden computed again from x.

    Products are those of operands in the dtype of x with float32 sums; the activation's derivative is float32.
    """
    shape = x.shape
    x = _split(form, x, weights)
    dy = dy.reshape(*x.shape[:2], -1)
    w1, b1, w_gate, w2, b2 = weights
    sums = _product(form, x, w1, b1, form.first_transposed)
    hidden, pull = jax.vjp(form.activate, sums, _gate(form, x, w_gate))
    dw2 = db2 = None
    if w2 is None:
        dhidden = dy.astype(jnp.float32)
    else:
        dw2 = _weight_gradient(form, hidden.astype(x.dtype), dy, w2, form.second_transposed)
        db2 = _bias_gradient(form, dy, b2)
        dhidden = _product(form, dy, w2, None, not form.second_transposed)
    dsums, dgate = pull(dhidden)
    db1 = _bias_gradient(form, dsums, b1)
    dsums = dsums.astype(x.dtype)
    dw1 = _weight_gradient(form, x, dsums, w1, form.first_transposed)
    dx = _product(form, dsums, w1, None, not form.first_transposed)
    dw_gate = None
    if w_gate is not None:
        dgate = dgate.astype(x.dtype)
        dw_gate = _weight_gradient(form, x, dgate, w_gate, False)
        dx = dx + _product(form, dgate, w_gate, None, True)
    return dx.astype(x.dtype).reshape(shape), Weights(dw1, db1, dw_gate, dw2, db2)


def _split(form: Form, x: Array, weights: Weights) -> Array:
    return x.reshape(x.shape[0], weights.w1.shape[0], -1) if form.layout == "flat" else x


def _letters(form: Form) -> str:
    return "tb" if form.layout == "tbd" else "bt"


def _gate(form: Form, x: Array, w_gate: Array | None) -> Array | None:
    return None if w_gate is None else _product(form, x, w_gate, None, False)


def _product(form: Form, x: Array, w: Array, bias: Array | None, transposed: bool) -> Array:
    """float32 x_t w_t + bias_t."""
    rows, stored = _letters(form), "tfd" if transposed else "tdf"
    y = einsum_float32(f"{rows}d,{stored}->{rows}f", x, w.astype(x.dtype))
    if bias is None:
        return y
    return y + bias.astype(jnp.float32)[(slice(None), None) if form.layout == "tbd" else (None,)]


def _weight_gradient(form: Form, x: Array, dy: Array, w: Array, transposed: bool) -> Array:
    rows, stored = _letters(form), "tfd" if transposed else "tdf"
    return einsum_float32(f"{rows}d,{rows}f->{stored}", x, dy).astype(w.dtype)


def _bias_gradient(form: Form, dy: Array, bias: Array | None) -> Array | None:
    if bias is None:
        return None
    return dy.astype(jnp.float32).sum(axis=1 if form.layout == "tbd" else 0).astype(bias.dtype)
