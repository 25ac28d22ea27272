"""Named shapes of an operation: each is a test, a benchmark, and a program to compile for a target.

An operation's `shapes.py` holds `CASES`, one tuple of `Case`: "tiny" and "ragged" ones run in interpret mode on a CPU,
"bench" ones are compiled for every target and timed where there is one.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from .dispatch import KERNELS
from .names import nearest

OPERATIONS = tuple(KERNELS)

GROUPS = ("tiny", "ragged", "bench")


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation at one shape, forward alone or with its backward.

    Attributes:
        operation, name: the name is unique within the operation, such as "topk-ind" or "gather-ind-backward".
        group: one of `GROUPS`.
        inputs: key -> the arrays, made with jax.random only, so that `jax.eval_shape` sees them without memory.
        call: `call(*arrays, implementation=..., interpret=...)` -> a pytree of arrays. A backward case returns the
            gradients (of a fixed random projection of the outputs).
        bytes_moved, flops: closed forms at one pass, of what `call` does.
        int8: whether the products are int8 x int8 at the int8 peak.
        temporaries: implementation -> bound, in bytes, on XLA's temporaries of the compiled program.
        rivals: name -> a function of the same arrays, timed beside ours (XLA's top_k, a library's attention, ...).
        only_on: rival -> the one platform it runs on.
        rtol, atol: of `call` against the reference implementation, on the largest absolute value of each output.
    """

    operation: str
    name: str
    group: str
    inputs: Callable[[jax.Array], tuple[Any, ...]]
    call: Callable[..., Any]
    bytes_moved: int
    flops: int
    int8: bool = False
    temporaries: Mapping[str, int] = dataclasses.field(default_factory=dict)
    rivals: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    only_on: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rtol: float = 1e-5
    atol: float = 0.0

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(f"case {self.name!r}: group is {self.group!r}, expected one of {', '.join(GROUPS)}")

    def structs(self) -> tuple[Any, ...]:
        """Shapes and dtypes of the inputs, without making them."""
        return jax.eval_shape(self.inputs, jax.random.key(0))


def cases(operation: str) -> tuple[Case, ...]:
    """All cases of an operation.

    Raises:
        ValueError: no such operation.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"operation is {operation!r}{nearest(operation, OPERATIONS)}")
    return importlib.import_module(f".{operation}.shapes", __package__).CASES


def kernels(operation: str, platform: str) -> tuple[str, ...]:
    """The Pallas implementations an operation has on a platform."""
    return tuple(name for name in KERNELS[operation] if name.startswith(f"pallas_{platform}"))
