"""Meshes by their text: `data=16,tensor=16`, or `16x16` for data x tensor.

data     requests are split, parameters copied        fsdp     requests and parameters are split
tensor   hidden widths and heads                      token    the per-token weights, by token
expert   the experts
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from recscale.pallas_kernels.names import nearest

MESH_AXES = ("data", "fsdp", "tensor", "token", "expert")

# What `16x16` stands for.
_SHORTHAND = ("data", "tensor")


def parse_mesh(text: str) -> dict[str, int]:
    """Axis name -> size, in the order of the text.

    Raises:
        ValueError: an unknown or repeated axis, a size that is no positive integer, or more than two sizes without
            names.
    """
    if "=" not in text:
        sizes = text.lower().split("x")
        if len(sizes) > len(_SHORTHAND):
            raise ValueError(
                f"mesh {text!r} has {len(sizes)} sizes; without names it is {' x '.join(_SHORTHAND)}, such as 16x16. "
                "Name the axes otherwise, such as data=4,fsdp=4,tensor=2"
            )
        pairs = list(zip(_SHORTHAND, sizes, strict=False))
    else:
        pairs = [(name.strip(), size) for name, _, size in (part.partition("=") for part in text.split(","))]
    axes: dict[str, int] = {}
    for name, size in pairs:
        if name not in MESH_AXES:
            raise ValueError(f"mesh {text!r}: there is no axis {name!r}{nearest(name, MESH_AXES)}")
        if name in axes:
            raise ValueError(f"mesh {text!r} names axis {name!r} twice")
        if not size.strip().isdigit() or int(size) < 1:
            raise ValueError(f"mesh {text!r}: the size of axis {name!r} is {size!r}, expected a positive integer")
        axes[name] = int(size)
    return axes


def mesh_text(axes: Mapping[str, int]) -> str:
    """`data=16,tensor=16`."""
    return ",".join(f"{name}={size}" for name, size in axes.items())


def default_axes(dense_params: int) -> dict[str, int]:
    """The mesh of a training step that names none: one device, from a billion parameters on 256 that share the state.

    `fsdp` splits parameters and moments as well as requests; `data` would copy them, 16 times on `16x16`.
    """
    return {"fsdp": 16, "tensor": 16} if dense_params >= 1e9 else {"data": 1}


def make_mesh(axes: Mapping[str, int], devices: Sequence[Any]) -> jax.sharding.Mesh:
    """A mesh of the first devices; the last axis changes fastest, so its neighbours lie closest.

    Raises:
        ValueError: there are fewer devices than the mesh needs.
    """
    needed = math.prod(axes.values())
    if needed > len(devices):
        raise ValueError(f"mesh {mesh_text(axes)} needs {needed} devices, there are {len(devices)}")
    return jax.sharding.Mesh(np.array(devices[:needed]).reshape(tuple(axes.values())), tuple(axes))
