"""The weights of a layer or two per token, how they and x are laid out, and the work in FLOPs and bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax

from recscale.pallas_kernels.activations import ACTIVATIONS

Array = jax.Array


class Weights(NamedTuple):
    """w1 [T, D, F], b1 [T, F], w_gate [T, D, F]; then, of the second layer if there is one, w2 [T, F, O], b2 [T, O].

    w2 may be stored [T, O, F], and the w1 of a single layer [T, F, D]; b1, b2 and w_gate may be None.
    """

    w1: Array
    b1: Array | None = None
    w_gate: Array | None = None
    w2: Array | None = None
    b2: Array | None = None

    def map(self, function: Callable[[Array], Array]) -> Weights:
        """The weights with `function` of every array that is there."""
        return jax.tree.map(function, self)


@dataclasses.dataclass(frozen=True)
class Form:
    """Static part of a request.

    Attributes:
        act: of the hidden; a key of `ACTIVATIONS`.
        layout: "tbd", "btd", or "flat" for [B, T*D].
        first_transposed, second_transposed: whether w1 is [T, F, D], whether w2 is [T, O, F].
    """

    act: str | None
    layout: str
    first_transposed: bool = False
    second_transposed: bool = False

    def sizes(self, x_shape: tuple[int, ...], weights: Weights) -> tuple[int, int, int, int, int]:
        """T, B, D, F, O; O = F for a single layer. `weights` may hold shapes instead of arrays."""
        tokens, inputs, hidden = _shape(weights.w1)
        if self.first_transposed:
            inputs, hidden = hidden, inputs
        rows = x_shape[1] if self.layout == "tbd" else x_shape[0]
        if weights.w2 is None:
            return tokens, rows, inputs, hidden, hidden
        return tokens, rows, inputs, hidden, _shape(weights.w2)[1 if self.second_transposed else 2]

    def activate(self, sums: Array, gate: Array | None) -> Array:
        """The hidden from the float32 sums of the first layer: act(sums), or sums * act(gate)."""
        act = ACTIVATIONS[self.act]
        return act(sums) if gate is None else sums * act(gate)


def _shape(weights) -> tuple[int, ...]:
    return weights if isinstance(weights, tuple) else weights.shape


def flops(form: Form, x_shape: tuple[int, ...], weights: Weights) -> int:
    """2*B*T*D*F for the first layer, twice that with a gate, and 2*B*T*F*O for the second."""
    tokens, rows, inputs, hidden, outputs = form.sizes(x_shape, weights)
    first = 2 * inputs * hidden * (1 if weights.w_gate is None else 2)
    return tokens * rows * (first + (0 if weights.w2 is None else 2 * hidden * outputs))


def bytes_moved(form: Form, x: Array, weights: Weights) -> int:
    """x, every parameter and y once."""
    tokens, rows, *_, outputs = form.sizes(x.shape, weights)
    parameters = sum(w.size * w.dtype.itemsize for w in weights if w is not None)
    return parameters + (x.size + tokens * rows * outputs) * x.dtype.itemsize
