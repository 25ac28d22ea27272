"""How activations lie on several devices: layers name their axes, and whoever splits the program says what that means.

Nothing happens unless a program is traced inside `laying_out`; the numbers are the same in any case.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence

from jax import Array

# (array, logical name of every axis, None for one that stays whole) -> the same array, laid out.
Layout = Callable[[Array, Sequence[str | None]], Array]

_layout: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("recscale_layout", default=None)


@contextlib.contextmanager
def laying_out(layout: Layout | None) -> Iterator[None]:
    """Within it, programs are traced whose arrays `layout` distributes; None leaves that to the compiler."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def laid_out(x: Array, *axes: str | None) -> Array:
    """x with its axes named, as `recscale.models.layers.param` names those of parameters."""
    layout = _layout.get()
    return x if layout is None else layout(x, axes)


def is_laid_out() -> bool:
    """Whether a program is being traced whose arrays are distributed by their axes."""
    return _layout.get() is not None
