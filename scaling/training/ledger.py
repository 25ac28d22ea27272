"""The ledger of a group: what its runs leave on disk, records and metrics, and their mirrors.

What earlier processes left is read once; what this one writes it keeps as well, so nothing is read back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from recscale.scaling.parallel import mesh_text
from recscale.scaling.processes import is_first
from recscale.scaling.records import provenance
from recscale.scaling.records.plain import checksum, plain
from recscale.scaling.records.planned import grouped
from recscale.scaling.records.runs import (
    FINISHED,
    METRICS,
    append_metrics,
    check_metrics,
    metrics_mark,
    read_metrics,
    read_record,
    truncate_metrics,
    write_record,
)

from .config import identities, resolved, run_id
from .group import RunSpec
from .identity import differences, refuse_another_run
from .intervals import progressive_metrics
from .schedule import GroupSchedule, Segment
from .wandb_mirror import WandbMirror


class Ledger:
    """Records (`run.json`) and metrics (`metrics.jsonl`) of runs that are trained together.

    A run that is finished stays as it is, also where its group is trained again on the way to another run. Of several
    processes the first alone writes.

    Attributes:
        data: hash of what the source says of its data, from `begin` on.

    Raises:
        ValueError: a folder holds another run, or a record or the metrics of a finished run are damaged.
    """

    def __init__(self, runs: Sequence[RunSpec]):
        self._runs, self._group = tuple(runs), grouped(run.config for run in runs)
        self._writes = is_first()
        self._records: dict[Any, dict[str, Any]] = {}
        for run in runs:
            record = read_record(run.run_dir)
            if record is not None:
                refuse_another_run(run, record, self._group)
                check_metrics(run.run_dir, record)
            self._records[run.run_dir] = record or {}
        self._open = [run for run in runs if self._records[run.run_dir].get("status") not in FINISHED]
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

    def begin(self, schedule: GroupSchedule, mesh: Mesh | None = None) -> None:
        """Writes every unfinished run's record with status "running", and opens its mirror. `mesh`: where it trains.

        Raises:
            ValueError: the run was begun on other data; names what differs.
        """
        self._schedule = schedule
        facts = plain(schedule.source.facts())
        self.data = checksum(facts)
        for run in self._open:
            old, tracking = self._records[run.run_dir], run.config.tracking
            if "data" in old and old["data"] != facts:
                raise ValueError(
                    f"{run.run_dir} was begun on other data: {differences(old['data'], facts)}. Give the data it was "
                    "begun with, or train in a folder of its own"
                )
            kept = {key: old[key] for key in ("started", "restored_from", "discarded") if key in old}
            fresh = {**self._group, "started": provenance.now(), "placement": _placement(mesh)}
            self._write(run, _record(run, schedule, facts) | fresh | kept)
            if not self._writes:
                continue
            self._mirrors[run.run_dir] = WandbMirror(
                tracking.wandb, tracking.project, run_id(run.config), run.run_dir, resolved(run.config)
            )

    def marks(self) -> dict[str, dict[str, Any]]:
        """What the metrics of every unfinished run hold at this moment, for a checkpoint: run id -> lines and hash."""
        if not self._writes:
            return {}
        return {run_id(run.config): metrics_mark(run.run_dir) for run in self._open}

    def unfit(self, position: dict[str, Any]) -> str | None:
        """Why the runs cannot go on from a checkpoint's position, None if they can."""
        done = {segment.horizon for segment in self._schedule.segments[: position["segment"]]}
        for run in self._open:
            name = run_id(run.config)
            if self._schedule.steps[run.run_dir] in done:
                return f"it lies behind the end of run {name}, whose result is missing"
            mark = position["metrics"].get(name)
            if mark is None or metrics_mark(run.run_dir, mark["lines"]) != mark:
                return f"the metrics of run {name} are not those it was saved with: {run.run_dir / METRICS}"
        return None

    def rewind(self, position: dict[str, Any] | None, discarded: Sequence[dict[str, Any]]) -> None:
        """Drops metrics beyond a checkpoint's position (None: the beginning), and notes what was restored and what
        could not be."""
        for run in self._open if self._writes else ():
            lines = 0 if position is None else position["metrics"][run_id(run.config)]["lines"]
            truncate_metrics(run.run_dir, lines)
            self._lines[run.run_dir] = read_metrics(run.run_dir)
            if position is None and not discarded:
                continue
            record = self._records[run.run_dir]
            self._write(
                run,
                record
                | {
                    "restored_from": 0 if position is None else position["step"],
                    "discarded": [*record.get("discarded", []), *discarded],
                },
            )

    def append(self, segment: Segment, row: dict[str, Any], per_replica: dict[str, np.ndarray]) -> None:
        """Appends one interval to the metrics of every run it belongs to; values are [P, ...], P replicas."""
        if not self._writes:
            return
        for replica, runs in enumerate(self._schedule.members[segment]):
            own = row | {name: value[replica].tolist() for name, value in per_replica.items()}
            for run in runs:
                if run in self._open:
                    append_metrics(run.run_dir, own)
                    self._lines[run.run_dir].append(own)
                    self._mirrors[run.run_dir].log(own)

    def finish(
        self,
        run: RunSpec,
        metrics: dict[str, Any] | None,
        cost: dict[str, Any],
        used: dict[str, Any],
        kernels: dict[str, Any],
        failed_at: int,
        work: dict[str, Any] | None = None,
    ) -> None:
        """Writes a run's final record, unless it has one: done with metrics, or diverged with the step that was not
        finite.

        used: see `run_resources`. kernels: operation -> {implementation that served it: reason}. work: what was done,
        where that was not fixed before.
        """
        if run not in self._open or not self._writes:
            return
        progressive = progressive_metrics(self._lines[run.run_dir], self._schedule.steps[run.run_dir])
        record = self._records[run.run_dir] | {
            "finished": provenance.now(),
            "cost": cost,
            "resources": used,
            "kernels": kernels,
        }
        record["work"] = record["work"] | (work or {})
        seen, rows = record["work"]["examples"], self._schedule.batch_rows
        record["work"] |= {"examples_seen": min((failed_at + 1) * rows, seen) if failed_at >= 0 else seen}
        if failed_at >= 0:
            record |= {"status": "diverged", "reasons": [f"loss was not finite at step {failed_at}"]}
            record["metrics"] = {"logloss": None, **progressive}
        else:
            record |= {"status": "done", "reasons": [], "metrics": (metrics or {}) | progressive}
        self._write(run, record | {"metrics_file": metrics_mark(run.run_dir)})
        figures = {name: value for name, value in record["metrics"].items() if isinstance(value, int | float)}
        self._mirrors[run.run_dir].finish(figures)

    def _write(self, run: RunSpec, record: dict[str, Any]) -> None:
        self._records[run.run_dir] = write_record(run.run_dir, record) if self._writes else record


def _placement(mesh: Mesh | None) -> dict[str, Any]:
    """Over how many devices and processes a run is spread, and how."""
    if mesh is None:
        return {"mesh": "", "devices": 1, "processes": 1}
    return {"mesh": mesh_text(mesh.shape), "devices": mesh.size, "processes": jax.process_count()}


def _record(run: RunSpec, schedule: GroupSchedule, facts: dict[str, Any]) -> dict[str, Any]:
    config, source, total = run.config, schedule.source, schedule.source.total_rows
    steps, examples = schedule.steps[run.run_dir], schedule.examples(run)
    return {
        **run.labels.get("notes", {}),
        **identities(config),
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
