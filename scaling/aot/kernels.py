"""The kernels of `recscale.pallas_kernels` at their named shapes, as programs to compile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from recscale.pallas_kernels import cases
from recscale.pallas_kernels.cases import Case
from recscale.pallas_kernels.names import nearest
from recscale.pallas_kernels.targets import Target

from .devices import Devices
from .program import Program

# Operations whose gradients at benchmark sizes are mostly XLA's: sorts, scatters and products that take the compiler 15
# to 45 seconds each. Their kernels are those of the small shapes, so a quick check leaves the large ones out.
_SLOW_GRADIENTS = ("product_key_topk", "sparse_gather", "per_token_ffn")


def kernel_programs(
    target: Target,
    operations: Sequence[str] = cases.OPERATIONS,
    names: Sequence[str] = (),
    implementations: Sequence[str] = (),
    quick: bool = False,
) -> list[Program]:
    """One program per operation, case and implementation.

    Args:
        names: cases by name; none given is all. implementations: none given is every kernel for the target's platform.
        quick: leave out what takes long to compile and holds no kernel the other cases lack.

    Raises:
        ValueError: no such operation, or no such case in any of them.
    """
    found: list[Program] = []
    known: list[str] = []
    for operation in operations:
        try:
            chosen, own = implementations or cases.kernels(operation, target.platform), cases.cases(operation)
        except ImportError as error:
            found.append(_unreadable(operation, error))
            continue
        for case in own:
            known.append(case.name)
            slow = operation in _SLOW_GRADIENTS and case.group == "bench" and case.name.endswith("-backward")
            if case.name in names or (not names and not (quick and slow)):
                found.extend(_program(case, implementation) for implementation in chosen)
    for name in names:
        if name not in known:
            raise ValueError(f"there is no case {name!r} of {', '.join(operations)}{nearest(name, known)}")
    return found


def _unreadable(operation: str, error: ImportError) -> Program:
    """The row of an operation whose shapes cannot be imported; the others are compiled all the same."""

    def build(devices: Devices) -> tuple[Any, tuple[Any, ...]]:
        raise error

    return Program("kernel", operation, "shapes", "", "", 1, build)


def _program(case: Case, implementation: str) -> Program:
    def build(devices: Devices) -> tuple[Any, tuple[Any, ...]]:
        mesh = jax.sharding.Mesh(devices[:1], ("data",))
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), case.structs())
        return jax.jit(lambda *arrays: case.call(*arrays, implementation=implementation)), args

    return Program(
        kind="kernel",
        name=case.operation,
        case=case.name,
        implementation=implementation,
        mesh="",
        devices=1,
        build=build,
        temporaries_bound=case.temporaries.get(implementation),
        facts={"group": case.group, "case_flops": case.flops, "case_bytes": case.bytes_moved},
    )
