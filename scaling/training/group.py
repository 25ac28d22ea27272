"""A group of runs: the replicas (seed x rate) and horizons of one program, and their records."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from recscale import models
from recscale.scaling.data.source import Source
from recscale.scaling.records import provenance
from recscale.scaling.records import runs as records

from .config import config_hash, group_id, resolved, run_id, shape_id, trunk_id
from .intervals import progressive_metrics
from .schedule import Segment, program
from .wandb_mirror import WandbMirror


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """One run to train: its configuration, its folder, and labels copied into the record (sweep, targets, ...)."""

    config: ConfigDict
    run_dir: Path
    labels: dict[str, Any] = dataclasses.field(default_factory=dict)


class Group:
    """Runs that share everything but seed, rate and number of examples.

    Raises:
        ValueError: the runs do not belong together, or two of them are the same run.
    """

    def __init__(self, runs: Sequence[RunSpec]):
        if not runs:
            raise ValueError("a group needs at least one run")
        ids = {group_id(run.config) for run in runs}
        if len(ids) > 1:
            raise ValueError(
                "runs of one group may differ only in seed, training.lr and training.examples; "
                f"these belong to {len(ids)} groups: {', '.join(sorted(ids))}"
            )
        twice = [run_id(run.config) for run in runs]
        twice = sorted({name for name in twice if twice.count(name) > 1})
        if twice:
            raise ValueError(f"a group trains every run once; given twice: {', '.join(twice)}")
        self.id = ids.pop()
        self.runs = tuple(runs)
        self.config = runs[0].config
        self.replicas = sorted({(int(r.config.seed), float(r.config.training.lr)) for r in runs})
        self.mirrors: dict[str, WandbMirror] = {}

    @property
    def signature(self) -> str:
        """Hash of the members: a checkpoint belongs to exactly one set of replicas and horizons."""
        return config_hash({"runs": sorted(run_id(run.config) for run in self.runs)})

    def bind(self, source: Source) -> None:
        """Settles what depends on the data: steps per run and the segments of the program."""
        training = self.config.training
        self.batch_rows = source.requests * source.candidates
        self.source = source
        self.steps = {id(run): self._horizon(run, source) for run in self.runs}
        self.warmup = math.ceil(training.warmup_examples / self.batch_rows)
        horizons = sorted(set(self.steps.values()))
        self.segments = program(horizons, training.schedule, training.decay_fraction, self.warmup)
        self.total_steps = sum(segment.steps for segment in self.segments)
        every = training.log_every_examples / self.batch_rows if training.log_every_examples else horizons[0] / 40
        self.log_every = max(round(every), 1)
        counts = models.count(self.config.architecture, source.schema, self.config.model)
        self.counts = counts
        # The user side is computed once per request, so its cost is shared by the request's candidates.
        self.train_flops_per_row = counts.train_flops_user / source.candidates + counts.train_flops_candidate

    def _horizon(self, run: RunSpec, source: Source) -> int:
        """Steps of a run: enough for its examples, or every batch there is."""
        examples = run.config.training.examples
        if examples <= 0 and source.batches is None:
            raise ValueError(f"training.examples is {examples}; an endless log needs a positive number of rows")
        steps = math.ceil(examples / self.batch_rows) if examples > 0 else source.batches
        if source.batches is not None and steps > source.batches:
            raise ValueError(
                f"training.examples is {examples:,}: {steps:,} steps, but the data has {source.batches:,} batches of "
                f"{self.batch_rows} rows in {run.config.data.passes} pass(es); lower it, set it to 0 for everything, "
                "or raise data.passes (recorded as epochs)"
            )
        return steps

    def members(self, segment: Segment, replica: int) -> list[RunSpec]:
        """Runs whose own history includes a segment: every later horizon for the trunk, one horizon for a branch."""
        mine = [r for r in self.runs if (int(r.config.seed), float(r.config.training.lr)) == self.replicas[replica]]
        if segment.horizon is None:
            return [r for r in mine if self._branch_start(self.steps[id(r)]) >= segment.stop]
        return [r for r in mine if self.steps[id(r)] == segment.horizon]

    def _branch_start(self, horizon: int) -> int:
        return next(s.start for s in self.segments if s.horizon == horizon)

    def finished(self) -> bool:
        return all((records.read_record(r.run_dir) or {}).get("status") in records.FINISHED for r in self.runs)

    def start_records(self) -> None:
        """Writes every unfinished run's record with status "running", and opens its mirror."""
        facts = self.source.facts()
        for run in self.runs:
            old, tracking = records.read_record(run.run_dir) or {}, run.config.tracking
            finished = old.get("status") in records.FINISHED
            if not finished:
                record = self._record(run, facts) | {"started": old.get("started") or provenance.now()}
                records.write_record(run.run_dir, record)
            # The mirror of a finished run is complete, even if the run is trained again on the way to another.
            mode = "off" if finished else tracking.wandb
            self.mirrors[str(run.run_dir)] = WandbMirror(
                mode, tracking.project, run_id(run.config), run.run_dir, resolved(run.config)
            )

    def append(self, segment: Segment, row: dict[str, Any], per_replica: dict[str, np.ndarray]) -> None:
        """Appends one interval to the metrics of every run it belongs to."""
        for replica in range(len(self.replicas)):
            own = row | {name: value[replica].tolist() for name, value in per_replica.items()}
            for run in self.members(segment, replica):
                records.append_metrics(run.run_dir, own)
                self.mirrors[str(run.run_dir)].log(own)

    def truncate(self, position: dict[str, Any]) -> None:
        """Drops metrics beyond a restored position; branches before its segment are finished and keep theirs."""
        index = position["segment"]
        at, done = self.segments[index], {segment.horizon for segment in self.segments[:index]}
        for run in self.runs:
            horizon = self.steps[id(run)]
            if horizon not in done:
                # A later branch has lines of the trunk, which waits where the present branch left it.
                mine = at.horizon in (None, horizon)
                records.truncate_metrics(run.run_dir, position["step"] if mine else at.start)

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
        record = records.read_record(run.run_dir) or self._record(run, self.source.facts())
        lines = records.read_metrics(run.run_dir)
        progressive = progressive_metrics(lines, self.steps[id(run)])
        record |= {"finished": provenance.now(), "cost": cost, "kernels": kernels}
        if failed_at >= 0:
            record |= {"status": "diverged", "reasons": [f"loss was not finite at step {failed_at}"]}
            record["metrics"] = {"logloss": None, **progressive}
        else:
            record |= {"status": "done", "reasons": [], "metrics": (metrics or {}) | progressive}
        records.write_record(run.run_dir, record)
        self.mirrors[str(run.run_dir)].finish(
            {k: v for k, v in record["metrics"].items() if isinstance(v, int | float)}
        )

    def _record(self, run: RunSpec, facts: dict[str, Any]) -> dict[str, Any]:
        config, steps = run.config, self.steps[id(run)]
        total = self.source.total_rows
        # The last batch of a pass is padded; rows that are not there are not examples.
        all_of_it = steps == self.source.batches
        examples = total * config.data.passes if all_of_it else steps * self.batch_rows
        counts = dataclasses.asdict(self.counts)
        return {
            "run_id": run_id(config),
            "group_id": self.id,
            "shape_id": shape_id(config),
            "trunk_id": trunk_id(config),
            "sweep": run.labels.get("sweep"),
            "labels": run.labels,
            "status": "running",
            "reasons": [],
            "config": resolved(config),
            "counts": counts,
            "history_length": max((s.length for s in self.source.schema.sequences), default=None),
            "seeds": {"seed": int(config.seed), "data_seed": config.data.log_seed},
            "versions": provenance.versions(),
            "device": provenance.device(),
            "command": provenance.command(),
            "data": facts,
            "work": {
                "steps": steps,
                "batch_rows": self.batch_rows,
                "examples": examples,
                "unique_examples": examples if total is None else min(examples, total),
                "epochs": 1.0 if total is None else max(examples / total, 1.0),
                "train_flops": self.train_flops_per_row * examples,
                "flops_target": run.labels.get("flops_target"),
                "params_target": run.labels.get("params_target"),
            },
        }
