"""What RECSCALE_CHECK=1 in the environment adds to an operation: wrong values raise instead of giving garbage."""

from __future__ import annotations

import os
from collections.abc import Callable

import jax
import numpy as np
from jax.core import Tracer

Array = jax.Array


def if_checked(refuse: Callable[..., None], facts: Callable[[], tuple[Array, ...]]) -> None:
    """`refuse(*facts())`, which raises, if the environment asks: at once, or when the traced program runs.

    `refuse` gets NumPy arrays.
    """
    if os.environ.get("RECSCALE_CHECK") != "1":
        return
    arrays = facts()

    def on_host(*values) -> None:
        refuse(*map(np.asarray, values))

    if any(isinstance(array, Tracer) for array in arrays):
        jax.debug.callback(on_host, *arrays)
    else:
        on_host(*arrays)
