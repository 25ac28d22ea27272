"""The ledger of a group: what its runs leave on disk, records and metrics, and their mirrors.

What earlier processes left is read once; what this one writes it keeps as well, so nothing is read back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from recscale.scaling.records import provenance
from recscale.scaling.records.runs import (
    FINISHED,
    append_metrics,
    read_metrics,
    read_record,
    truncate_metrics,
    write_record,
)

from .config import group_id, resolved, run_id, shape_id, trunk_id
from .group import RunSpec
from .intervals import progressive_metrics
from .schedule import GroupSchedule, Segment
from .wandb_mirror import WandbMirror


class Ledger:
    """Records (`run.json`) and metrics (`metrics.jsonl`) of runs that are trained together."""

    def __init__(self, runs: Sequence[RunSpec]):
        self._runs = tuple(runs)
        self._records = {run.run_dir: read_record(run.run_dir) or {} for run in runs}
        self._lines: dict[Any, list[dict[str, Any]]] = {run.run_dir: [] for run in runs}
        self._mirrors: dict[Any, WandbMirror] = {}

    @property
    def records(self) -> list[dict[str, Any]]:
        """Every run's record as it stands, in the order of the runs; empty for one that has none yet."""
        return [self._records[run.run_dir] for run in self._runs]

    @property
    def finished(self) -> bool:
        """Whether every run is done or has diverged."""
        return all(record.get("status") in FINISHED for record in self.records)

    def begin(self, schedule: GroupSchedule) -> None:
        """Writes every unfinished run's record with status "running", and opens its mirror."""
        self._schedule = schedule
        facts = schedule.source.facts()
        for run in self._runs:
            old, tracking = self._records[run.run_dir], run.config.tracking
            finished = old.get("status") in FINISHED
            if not finished:
                self._write(run, _record(run, schedule, facts) | {"started": old.get("started") or provenance.now()})
            # The mirror of a finished run is complete, even if the run is trained again on the way to another.
            mode = "off" if finished else tracking.wandb
            self._mirrors[run.run_dir] = WandbMirror(
                mode, tracking.project, run_id(run.config), run.run_dir, resolved(run.config)
            )

    def truncate(self, segment: int, step: int) -> None:
        """Drops metrics beyond a restored position; branches before its segment are finished and keep theirs."""
        at, done = self._schedule.segments[segment], {s.horizon for s in self._schedule.segments[:segment]}
        for run in self._runs:
            horizon = self._schedule.steps[run.run_dir]
            if horizon not in done:
                # A later branch has lines of the trunk, which waits where the present branch left it.
                mine = at.horizon in (None, horizon)
                truncate_metrics(run.run_dir, step if mine else at.start)
                self._lines[run.run_dir] = read_metrics(run.run_dir)

    def append(self, segment: Segment, row: dict[str, Any], per_replica: dict[str, np.ndarray]) -> None:
        """Appends one interval to the metrics of every run it belongs to; values are [P, ...], P replicas."""
        for replica, runs in enumerate(self._schedule.members[segment]):
            own = row | {name: value[replica].tolist() for name, value in per_replica.items()}
            for run in runs:
                append_metrics(run.run_dir, own)
                self._lines[run.run_dir].append(own)
                self._mirrors[run.run_dir].log(own)

    def finish(
        self,
        run: RunSpec,
        metrics: dict[str, Any] | None,
        cost: dict[str, Any],
        kernels: dict[str, Any],
        failed_at: int,
    ) -> None:
        """Writes a run's final record: done with metrics, or diverged with the step that was not finite.

        kernels: operation -> {implementation that served it: reason}.
        """
        progressive = progressive_metrics(self._lines[run.run_dir], self._schedule.steps[run.run_dir])
        record = self._records[run.run_dir] | {"finished": provenance.now(), "cost": cost, "kernels": kernels}
        if failed_at >= 0:
            record |= {"status": "diverged", "reasons": [f"loss was not finite at step {failed_at}"]}
            record["metrics"] = {"logloss": None, **progressive}
        else:
            record |= {"status": "done", "reasons": [], "metrics": (metrics or {}) | progressive}
        self._write(run, record)
        figures = {name: value for name, value in record["metrics"].items() if isinstance(value, int | float)}
        self._mirrors[run.run_dir].finish(figures)

    def _write(self, run: RunSpec, record: dict[str, Any]) -> None:
        self._records[run.run_dir] = write_record(run.run_dir, record)


def _record(run: RunSpec, schedule: GroupSchedule, facts: dict[str, Any]) -> dict[str, Any]:
    config, source, total = run.config, schedule.source, schedule.source.total_rows
    steps, examples = schedule.steps[run.run_dir], schedule.examples(run)
    return {
        "run_id": run_id(config),
        "group_id": group_id(config),
        "shape_id": shape_id(config),
        "trunk_id": trunk_id(config),
        "sweep": run.labels.get("sweep"),
        "labels": run.labels,
        "status": "running",
        "reasons": [],
        "config": resolved(config),
        "counts": dataclasses.asdict(schedule.counts),
        "history_length": max((s.length for s in source.schema.sequences), default=None),
        "seeds": {"seed": int(config.seed), "data_seed": config.data.log_seed},
        "versions": provenance.versions(),
        "device": provenance.device(),
        "command": provenance.command(),
        "data": facts,
        "work": {
            "steps": steps,
            "batch_rows": schedule.batch_rows,
            "examples": examples,
            "unique_examples": examples if total is None else min(examples, total),
            "epochs": 1.0 if total is None else max(examples / total, 1.0),
            "train_flops": schedule.train_flops_per_row * examples,
            "flops_target": run.labels.get("flops_target"),
            "params_target": run.labels.get("params_target"),
        },
    }
