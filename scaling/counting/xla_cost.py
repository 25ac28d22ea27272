"""What XLA itself says a compiled function costs: its FLOPs, bytes and memory.

XLA counts element-wise work as well, counts the body of a loop once whatever its length, and counts recomputed work.
So its FLOPs are a second opinion on `jaxpr_flops`, not the figure of record; its memory figures have no rival.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class XlaCost:
    """Cost and memory analysis of one compiled program. None where the backend does not say.

    Attributes:
        flops: of everything, element-wise operations included; loop bodies once.
        transcendentals: exponentials, logarithms, tanh and the like.
        bytes_accessed: summed over operations after fusion: an upper bound of the memory traffic.
        argument_bytes, output_bytes: of the program's inputs and results.
        temporary_bytes: largest scratch memory at any time.
        aliased_bytes: outputs written into donated arguments.
        peak_bytes: arguments + outputs + temporaries - aliased.
    """

    flops: float | None
    transcendentals: float | None
    bytes_accessed: float | None
    argument_bytes: int | None
    output_bytes: int | None
    temporary_bytes: int | None
    aliased_bytes: int | None

    @property
    def peak_bytes(self) -> int | None:
        if self.argument_bytes is None or self.output_bytes is None or self.temporary_bytes is None:
            return None
        return self.argument_bytes + self.output_bytes + self.temporary_bytes - (self.aliased_bytes or 0)

    def to_dict(self) -> dict[str, float | int | None]:
        return {**dataclasses.asdict(self), "peak_bytes": self.peak_bytes}


def xla_cost(fn: Callable, *args: Any, **kwargs: Any) -> XlaCost:
    """Compiles `fn` for the default device and reads XLA's analyses; arguments may be abstract, nothing is allocated.

    Args:
        fn: a function, or what `jax.jit` made of one (which keeps its own options).
    """
    jitted: Any = fn if hasattr(fn, "lower") else jax.jit(fn)
    return compiled_cost(jitted.lower(*args, **kwargs).compile())


def compiled_cost(compiled: jax.stages.Compiled) -> XlaCost:
    """The analyses of a function compiled already."""
    cost, memory = _first(compiled.cost_analysis()), compiled.memory_analysis()
    return XlaCost(
        flops=_known(cost.get("flops")),
        transcendentals=_known(cost.get("transcendentals")),
        bytes_accessed=_known(cost.get("bytes accessed")),
        argument_bytes=getattr(memory, "argument_size_in_bytes", None),
        output_bytes=getattr(memory, "output_size_in_bytes", None),
        temporary_bytes=getattr(memory, "temp_size_in_bytes", None),
        aliased_bytes=getattr(memory, "alias_size_in_bytes", None),
    )


def _known(value: float | None) -> float | None:
    """XLA writes -1 for what it cannot tell."""
    return None if value is None or value < 0 else value


def _first(cost: Mapping[str, float] | Sequence[Mapping[str, float]] | None) -> Mapping[str, float]:
    """One mapping, or a list with one per device program, depending on backend and version."""
    if cost is None:
        return {}
    if isinstance(cost, Mapping):
        return cost
    return cost[0] if cost else {}
