"""`per_token_ffn` in plain JAX, for tests: one token after the other, one plain product after the other."""

from __future__ import annotations

import operator

import jax
import jax.numpy as jnp

from .form import Form, Weights

Array = jax.Array


def forward(form: Form, x: Array, weights: Weights) -> Array:
    """Arguments as for `xla.forward`."""
    tokens, axis = weights.w1.shape[0], 0 if form.layout == "tbd" else 1
    rows = x.reshape(x.shape[0], tokens, -1) if form.layout == "flat" else x
    each = [_token(form, jnp.take(rows, t, axis), weights.map(operator.itemgetter(t))) for t in range(tokens)]
    y = jnp.stack(each, axis)
    return y.reshape(x.shape[0], -1) if form.layout == "flat" else y


def _token(form: Form, x: Array, weights: Weights) -> Array:
    w1, b1, w_gate, w2, b2 = weights
    sums = _product(x, w1.T if form.first_transposed else w1, b1)
    y = form.activate(sums, None if w_gate is None else _product(x, w_gate, None))
    if w2 is not None:
        y = _product(y.astype(x.dtype), w2.T if form.second_transposed else w2, b2)
    return y.astype(x.dtype)


def _product(x: Array, w: Array, bias: Array | None) -> Array:
    wide = x.astype(jnp.float32), w.astype(x.dtype).astype(jnp.float32)
    y = jnp.matmul(*wide, precision=jax.lax.Precision.HIGHEST)
    return y if bias is None else y + bias.astype(jnp.float32)
