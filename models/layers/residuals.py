"""Shortcuts: around a sub-layer with its norm before or after, and around several blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxtyping import Array, Float

from .norms import Norm

Step = Callable[[Array], Array]


def sub_layer(
    branch: Step, norm: Norm | Step | None, x: Float[Array, "*rows"], *, place: str = "post", residual: bool = True
) -> Float[Array, "*rows"]:
    """place "post": norm(branch(x) + x);  "pre": branch(norm(x)) + x;  without a residual + x falls away."""

    def normed(y: Array) -> Array:
        return y if norm is None else norm(y)

    y = branch(normed(x) if place == "pre" else x)
    y = y + x if residual else y
    return normed(y) if place == "post" else y


def inter_residual(
    x: Float[Array, "T B D"], stream: Sequence[Float[Array, "T B D"]], *, every: int, layers: int
) -> Float[Array, "T B D"]:
    """x after block len(stream) of `layers`, plus what stood `every` blocks before it.

    Only blocks whose number (from 1) `every` divides have this shortcut, the last one never; 0 switches it off.
    stream: what entered the first block, then what every finished block gave, shortcuts included.
    """
    block = len(stream)
    return x + stream[block - every] if every and block % every == 0 and block < layers else x
