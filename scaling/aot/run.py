"""What `recscale aot` compiles, target by target, and its result."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from recscale.pallas_kernels.cases import OPERATIONS
from recscale.pallas_kernels.targets import Target, get_target
from recscale.scaling.parallel import parse_mesh
from recscale.scaling.records.provenance import environment

from .kernels import kernel_programs
from .program import FAILED, Program, compile_all
from .train_steps import DEFAULT_ROWS, family_programs, train_step_program


@dataclasses.dataclass(frozen=True)
class Request:
    """What to compile for each target.

    Attributes:
        operations, cases, implementations: kernels; empty is all.
        model: one training step instead of kernels, described by `mesh`, `schema`, `assignments`, `rows`, `candidates`.
        steps: without operations and model, also one training step per family. quick: see `kernel_programs`.
    """

    operations: Sequence[str] = ()
    cases: Sequence[str] = ()
    implementations: Sequence[str] = ()
    model: str | None = None
    mesh: str | None = None
    schema: str | None = None
    assignments: Sequence[str] = ()
    rows: int = DEFAULT_ROWS
    candidates: int = 1
    steps: bool = True
    quick: bool = False

    def programs(self, target: Target) -> list[Program]:
        """The programs for one target.

        Raises:
            ValueError: a name, a mesh or sizes that cannot be.
        """
        if self.model:
            return [
                train_step_program(
                    self.model,
                    axes=parse_mesh(self.mesh) if self.mesh else None,
                    schema_name=self.schema,
                    assignments=self.assignments,
                    rows=self.rows,
                    candidates=self.candidates,
                )
            ]
        kernels = kernel_programs(target, self.operations or OPERATIONS, self.cases, self.implementations, self.quick)
        return kernels if self.operations or not self.steps else [*kernels, *family_programs()]


def rows(targets: Sequence[str], request: Request) -> Iterator[dict[str, Any]]:
    """One row per target and program, as soon as it is compiled; see `compile_program`."""
    for name in targets:
        yield from compile_all(request.programs, get_target(name))


def result(found: list[dict[str, Any]]) -> dict[str, Any]:
    """JSON-able: `programs` (the rows), `failed` (how many), `environment`; a single row's own keys beside them."""
    single = found[0] if len(found) == 1 else {}
    return {
        **single,
        "programs": found,
        "failed": sum(row["status"] == FAILED for row in found),
        "environment": environment(),
    }
