"""What `recscale bench device` does, in which order, and about how long it takes; nothing here computes.

Estimates are for an H200 and cold caches; they are guesses until such a device has run them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from recscale.pallas_kernels.dispatch import KERNELS
from recscale.pallas_kernels.names import nearest

# Stage -> seconds of a budget of `_BUDGET_S` it may take. The first has them whatever the budget: wrong numbers make
# the others worthless. The last takes what is left.
STAGES: dict[str, float] = {"check": 90.0, "measure": 150.0, "train": 100.0, "tune": 100.0, "sweep": float("inf")}
_BUDGET_S = 480.0

# Operation -> cases whose times are worth having; retrieval and sparse reads first.
HEADLINES: dict[str, tuple[str, ...]] = {
    "product_key_topk": ("topk-ind",),
    "sparse_gather": ("gather-ind", "gather-ind-backward"),
    "hybrid_attention": ("longer-2k", "longer-2k-backward", "hyformer-decode", "hyformer-decode-backward"),
    "w8a16_matmul": ("w8-16", "w8-64"),
    "per_token_ffn": ("ptffn-1b",),
    "grouped_matmul": ("ragged",),
}

# Model, and implementation of the layers that have kernels; rows of a step that fill a card of 141 GB.
_TRAINED = (("rankmixer_1b", "xla"), ("rankmixer_1b", "pallas_gpu"), ("rankmixer_1b", "torch"),
            ("tokenmixer_large_1b", "xla"), ("tokenmixer_large_1b", "pallas_gpu"))  # fmt: skip
_ROWS = {"rankmixer_1b": 16_384, "tokenmixer_large_1b": 8192}
# Jobs side by side in an estimate.
_CORES = 8
# The same on a CPU, to prove the harness.
_TRAINED_ON_CPU, _ROWS_ON_CPU = (("rankmixer_10k", "xla"), ("rankmixer_10k", "torch")), 64


@dataclasses.dataclass(frozen=True)
class Job:
    """What one process does, in items that are a row each.

    Attributes:
        stage, name: together its id.
        estimate_s: of the whole job. item_s: without a result for so long, the process is ended and the item is a row
            that says so. least_s: with less left the job is not begun.
        together: whether other jobs of the stage may run beside it.
        task: what the process is told.
    """

    stage: str
    name: str
    estimate_s: float
    item_s: float = 60.0
    least_s: float = 5.0
    together: bool = False
    task: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.stage}/{self.name}"


def jobs(*, cpu: bool, operations: Sequence[str] = (), stages: Sequence[str] = ()) -> list[Job]:
    """All jobs in their order.

    Raises:
        ValueError: no such operation or stage.
    """
    for name, known in [*((o, KERNELS) for o in operations), *((s, STAGES) for s in stages)]:
        if name not in known:
            raise ValueError(f"there is no {name!r} to do{nearest(name, known)}")
    chosen = [name for name in KERNELS if not operations or name in operations]
    found = [
        Job("check", name + part, 12.0, together=True, task={"operation": name, "first": bool(part)})
        # With few cores a case of every operation comes before the second of any; else all run side by side.
        for part in ((" first", "") if cpu else ("",))
        for name in chosen
    ]
    found.append(Job("measure", "ceilings", 8.0))
    found += [
        Job("measure", name, 9.0 * len(HEADLINES[name]), task={"operation": name, "cases": HEADLINES[name]})
        for name in chosen
    ]
    for model, implementation in _TRAINED_ON_CPU if cpu else _TRAINED:
        task = {"model": model, "implementation": implementation, "rows": _ROWS_ON_CPU if cpu else _ROWS[model]}
        found.append(Job("train", f"{model}/{implementation}", 18.0, item_s=90.0, least_s=15.0, task=task))
    found += [
        Job("tune", name, 25.0, item_s=90.0, least_s=15.0, task={"operation": name, "cases": HEADLINES[name]})
        for name in chosen
    ]
    sweep = "smoke" if cpu else "device_ladder"
    found.append(Job("sweep", sweep, 60.0 if cpu else 150.0, item_s=3600.0, least_s=40.0, task={"sweep": sweep}))
    return [job for job in found if not stages or job.stage in stages]


def limit_s(stage: str, budget_s: float) -> float:
    """Seconds a stage may take of a budget."""
    scale = budget_s / _BUDGET_S
    return STAGES[stage] * (max(scale, 1.0) if stage == "check" else scale)


def schedule(planned: Sequence[Job], budget_s: float) -> list[str]:
    """The plan for people: a line a job, with when it is expected to begin."""
    lines, begin = [f"{'job':40s} {'begins at':>9s} {'estimate':>9s}"], 0.0
    for stage in STAGES:
        own = [job for job in planned if job.stage == stage]
        taken = 0.0
        for job in own:
            lines.append(f"{job.id:40s} {begin + taken:8.0f} s {job.estimate_s:8.0f} s")
            taken += job.estimate_s / (_CORES if job.together else 1)
        if own:
            limit = min(limit_s(stage, budget_s), max(budget_s - begin, 0.0))
            lines.append(f"{stage:40s} {'':>9s} {min(taken, limit):8.0f} s of at most {limit:.0f} s")
            begin += min(taken, limit)
    return [*lines, f"{begin:.0f} s of a budget of {budget_s:.0f} s; what is left undone is done by the same command"]
