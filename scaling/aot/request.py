"""What `recscale aot` is asked to compile, and the programs that makes for a target."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from recscale.pallas_kernels.cases import OPERATIONS
from recscale.pallas_kernels.targets import Target
from recscale.scaling.parallel import parse_mesh

from .kernels import kernel_programs
from .program import Program


@dataclasses.dataclass(frozen=True)
class Request:
    """What to compile for each target.

    Attributes:
        operations, cases, implementations: kernels; empty is all.
        model: one training step instead of kernels, described by `mesh`, `schema`, `assignments`, `rows`, `candidates`.
        steps: without operations and model, also one training step per family. quick: see `kernel_programs`.
        lower_only: stop where the compiler would begin.
    """

    operations: Sequence[str] = ()
    cases: Sequence[str] = ()
    implementations: Sequence[str] = ()
    model: str | None = None
    mesh: str | None = None
    schema: str | None = None
    assignments: Sequence[str] = ()
    rows: int = 8192
    candidates: int = 1
    steps: bool = True
    quick: bool = False
    lower_only: bool = False

    def programs(self, target: Target) -> list[Program]:
        """The programs for one target.

        Raises:
            ValueError: a name, a mesh or sizes that cannot be.
        """
        # The training stack is loaded only for steps: kernels can be lowered where it is not installed.
        if self.model:
            from .train_steps import train_step_program

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
        if self.operations or not self.steps:
            return kernels
        from .train_steps import family_programs

        return [*kernels, *family_programs(self.rows)]
