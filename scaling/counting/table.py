"""One model counted three ways side by side: closed form, jaxpr, XLA.

    phase        closed form                        jaxpr
    user         forward_flops_user, per request    forward - candidate
    candidate    forward_flops_candidate            F(1, 2) - F(1, 1)
    forward      forward_flops_per_row, C = 1       F(2, 1) - F(1, 1)
    train        train_flops_per_row, C = 1         B(3, 1) - B(2, 1)
    step         forward_flops_step, per batch      F(1, 1) - forward
    train_step   train_flops_step, per batch        B(2, 1) - 2 train

with F(R, C) the count of a whole forward pass of R requests with C candidates each, and B(R, C) that of a forward and
backward pass: what does not grow with the batch (parameters made from parameters) belongs to no row and is the last
two. XLA counts a compiled batch, divided by its rows, element-wise work included. Parameters are compared with the
abstract parameter tree.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from recscale import models
from recscale.models.counts import Count
from recscale.models.inputs import Schema

from .abstract import abstract_model, forward_program, train_program, tree_params
from .jaxpr_flops import count_flops
from .xla_cost import XlaCost, xla_cost

# Rows of the compiled batch: enough that XLA sees matrix products and not vectors.
XLA_ROWS = 64

PHASES = ("user", "candidate", "forward", "train", "step", "train_step")


@dataclasses.dataclass(frozen=True)
class CountTable:
    """The three counts of one model.

    Attributes:
        count: the closed forms.
        tree_params: size of the abstract parameter tree; equals `count.dense_params`.
        closed, jaxpr: phase -> FLOPs (per request for "user", per candidate for "candidate", per batch for "step" and
            "train_step", per row else).
        xla: phase -> XLA's analysis of a batch of `XLA_ROWS` requests at C = 1, for "forward" and "train"; empty if not
            asked for.
    """

    count: Count
    tree_params: int
    closed: dict[str, int]
    jaxpr: dict[str, int]
    xla: dict[str, XlaCost]

    @property
    def agrees(self) -> bool:
        """Whether closed forms equal what was counted, exactly."""
        return self.closed == self.jaxpr and self.count.dense_params == self.tree_params

    def xla_flops_per_row(self, phase: str) -> float | None:
        cost = self.xla.get(phase)
        return None if cost is None or cost.flops is None else cost.flops / XLA_ROWS

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: the closed form's fields, then the other counts beside them."""
        return {
            **self.count.to_dict(),
            "tree_params": self.tree_params,
            "jaxpr_flops": self.jaxpr,
            "xla_flops_per_row": {phase: self.xla_flops_per_row(phase) for phase in self.xla},
            "xla_rows": XLA_ROWS if self.xla else None,
            "xla": {phase: cost.to_dict() for phase, cost in self.xla.items()},
            "agrees": self.agrees,
        }


def count_table(name: str, schema: Schema, config: Any = None, *, xla: bool = False) -> CountTable:
    """Counts `models.build(name, schema, config)` in every way; allocates nothing, compiles only for `xla=True`.

    Raises:
        ValueError: from the registry, for an unknown name or a config it refuses.
    """
    count = models.count(name, schema, config)
    first = _flops(forward_program, name, schema, config, 1, 1)
    forward = _flops(forward_program, name, schema, config, 2, 1) - first
    candidate = _flops(forward_program, name, schema, config, 1, 2) - first
    # Two requests are the fewest that every model can be trained on.
    trained = _flops(train_program, name, schema, config, 2, 1)
    train = _flops(train_program, name, schema, config, 3, 1) - trained
    jaxpr = {"user": forward - candidate, "candidate": candidate, "forward": forward, "train": train}
    jaxpr |= {"step": first - forward, "train_step": trained - 2 * train}
    closed = {
        "user": count.forward_flops_user,
        "candidate": count.forward_flops_candidate,
        "forward": count.forward_flops_per_row,
        "train": count.train_flops_per_row,
        "step": count.forward_flops_step,
        "train_step": count.train_flops_step,
    }
    costs = {}
    if xla:
        for phase, program in (("forward", forward_program), ("train", train_program)):
            fn, args = program(name, schema, config, XLA_ROWS, 1)
            costs[phase] = xla_cost(fn, *args)
    return CountTable(count, tree_params(abstract_model(name, schema, config)), closed, jaxpr, costs)


def _flops(program: Any, name: str, schema: Schema, config: Any, requests: int, candidates: int) -> int:
    fn, args = program(name, schema, config, requests, candidates)
    return count_flops(fn, *args)
