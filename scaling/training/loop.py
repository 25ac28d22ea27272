"""The training loop: every run of a group, from the first batch to its records, resumable at any instant.

Batch k is a pure function of (source, k) and checkpoints are taken only between logging intervals, so a run killed
at any moment and started again ends with the same bytes as one never killed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from recscale.scaling.data import make_source

from .checkpoints import Checkpoints
from .clock import Clock
from .group import Group, RunSpec
from .intervals import summarise
from .ledger import Ledger
from .rows.memory_usage import holdout_usage
from .schedule import NEVER, GroupSchedule, Segment
from .step import TrainState, make_trainer

Progress = Callable[[dict[str, Any]], None]


def train(config: ConfigDict, workdir: Path | str, *, progress: Progress | None = None) -> dict[str, Any]:
    """Trains (or resumes) one run in `workdir`: run.json, metrics.jsonl, checkpoints/; returns its record."""
    workdir = Path(workdir)
    return train_group([RunSpec(config, workdir)], workdir, progress=progress)[0]


def train_group(
    runs: Sequence[RunSpec],
    group_dir: Path | str,
    *,
    progress: Progress | None = None,
    cache_dir: Path | str | None = None,
) -> list[dict[str, Any]]:
    """Trains runs that differ only in seed, rate and number of examples, as replicas and branches of one program.

    Idempotent: finished runs are left alone, a stopped group goes on from its newest checkpoint. A replica whose
    loss stops being finite is recorded as diverged while the others go on.

    Args:
        runs: configurations and folders. group_dir: holds the checkpoints.
        progress: called between logging intervals with step, total_steps, rows_per_s, flops_per_s, eta_s.
        cache_dir: where the data source may keep what depends on its configuration alone.

    Returns:
        The runs' records, in the order given.
    """
    group, ledger = Group(runs), Ledger(runs)
    if not ledger.finished:
        _Loop(group, ledger, Path(group_dir), progress or (lambda event: None), cache_dir).run()
    return ledger.records


class _Loop:
    def __init__(self, group: Group, ledger: Ledger, group_dir: Path, progress: Progress, cache_dir: Path | str | None):
        self.config, t = group.config, group.config.training
        self.source = make_source(
            self.config.data.to_dict(), requests=t.requests, candidates=t.candidates, cache_dir=cache_dir
        )
        self.group, self.ledger, self.progress = group, ledger, progress
        self.schedule = GroupSchedule(group, self.source)
        self.trainer = make_trainer(self.config, self.source, group.replicas, self.schedule.warmup)
        self.checkpoints = Checkpoints(group_dir / "checkpoints")
        rows = self.schedule.batch_rows * len(group.replicas)
        self.clock = Clock(self.schedule.total_steps, rows, self.schedule.train_flops_per_row)
        self.saved = time.monotonic()

    def run(self) -> None:
        segments = self.schedule.segments
        self.ledger.begin(self.schedule)
        position, state, trunk = self._restore()
        with jax.transfer_guard("disallow"):
            for index in range(position["segment"], len(segments)):
                segment = segments[index]
                if segment.horizon is not None and trunk is None and index + 1 < len(segments):
                    trunk = jax.tree.map(jnp.copy, state)
                state = self._enter(state, segment)
                start = position["step"] if index == position["segment"] else segment.start
                state = self._segment(index, segment, start, state, trunk)
                if segment.horizon is None and not jax.device_get(state.alive).any():
                    for branch in segments[index + 1 :]:
                        if branch.horizon is not None:
                            self._finish(branch, state)
                    break
                if segment.horizon is not None:
                    self._finish(segment, state)
                    state, trunk = (trunk if trunk is not None else state), None
                    if index + 1 < len(segments):
                        self._save(index + 1, segments[index + 1].start, state, None)
        self.checkpoints.close()

    def _restore(self) -> tuple[dict[str, Any], TrainState, TrainState | None]:
        state = self.trainer.fresh_state()
        restored = self.checkpoints.restore(state)
        if restored is None:
            position: dict[str, Any] = {"segment": 0, "step": 0}
            trunk = None
        else:
            position, state, trunk = restored
            if position["signature"] != self.group.signature:
                raise ValueError(
                    "the checkpoint belongs to another set of runs (replicas or horizons changed); "
                    "give the new runs a folder of their own"
                )
            self.clock.resume_from(position["wall_s"])
        self.ledger.truncate(position["segment"], position["step"])
        return position, state, trunk

    def _enter(self, state: TrainState, segment: Segment) -> TrainState:
        """Points the state's schedule at a segment."""
        decay = (NEVER, 1) if segment.horizon is None else (segment.start, max(segment.steps, 1))
        start, steps = jax.device_put([np.int32(value) for value in decay], state.step.sharding)
        return dataclasses.replace(state, decay_from=start, decay_steps=steps)

    def _segment(
        self, index: int, segment: Segment, start: int, state: TrainState, trunk: TrainState | None
    ) -> TrainState:
        """Trains to the end of a segment, or through the first logging interval that leaves no replica alive."""
        batches = None if self.source.on_device else self.source.iterate(start)
        interval, waiting = [], None
        for step in range(start, segment.stop):
            state, metrics = self.trainer.step(state, None if batches is None else self.trainer.put(next(batches)))
            interval.append(metrics)
            last = step + 1 == segment.stop
            if (step + 1) % self.schedule.log_every and not last:
                continue
            # Reading the previous interval while this one runs keeps the device busy.
            if waiting is not None and not self._log(segment, *waiting):
                break
            waiting, interval = (step + 1, interval), []
            due = time.monotonic() - self.saved > self.config.training.checkpoint_every_s
            if due or last:
                alive, waiting = self._log(segment, *waiting), None
                if not alive:
                    break
            if due and not last:
                self._save(index, step + 1, state, trunk)
            event = self.clock.tick(self._done(index, step + 1))
            if event is not None:
                self.progress(event)
        return state

    def _log(self, segment: Segment, step: int, interval: list[dict[str, jax.Array]]) -> bool:
        """Appends an interval to the metrics; returns whether any replica is left."""
        examples = step * self.schedule.batch_rows
        row = {"step": step, "examples": examples, "phase": "decay" if segment.horizon else "trunk"}
        self.ledger.append(segment, row, summarise(interval))
        return bool(jax.device_get(interval[-1]["alive"]).any())

    def _save(self, index: int, step: int, state: TrainState, trunk: TrainState | None) -> None:
        position = {
            "segment": index,
            "step": step,
            "has_trunk": trunk is not None,
            "signature": self.group.signature,
            "wall_s": self.clock.wall_s,
        }
        with self.clock.pause():
            self.checkpoints.save(self._done(index, step), position, state, trunk)
        self.saved = time.monotonic()

    def _done(self, index: int, step: int) -> int:
        """Steps of the whole program through when segment `index` stands at `step`."""
        segments = self.schedule.segments
        return sum(segment.steps for segment in segments[:index]) + step - segments[index].start

    def _finish(self, segment: Segment, state: TrainState) -> None:
        """Evaluates every replica at the end of a branch and writes the records of its runs."""
        with self.clock.pause(), jax.transfer_guard("allow"):
            logits = self.trainer.holdout_logits(state)
            usage = holdout_usage(
                self.trainer.holdout_slot_counts(state),
                replicas=len(self.group.replicas),
                batch_rows=self.schedule.batch_rows,
                trained_rows=segment.stop * self.schedule.batch_rows,
                sub_keys=self.trainer.memory_sub_keys,
            )
            failed = jax.device_get(state.failed_at)
        step_s = self.clock.step_s
        cost = {
            "wall_s": self.clock.wall_s,
            "step_ms": None if step_s is None else 1e3 * step_s,
            "rows_per_s": None if step_s is None else self.schedule.batch_rows / step_s,
            "replicas": len(self.group.replicas),
            "mfu": None,  # needs a device whose peak is known
        }
        asked = tuple(self.config.data.get("metrics", ()))
        further = {"metrics": asked} if asked else {}
        for replica, runs in enumerate(self.schedule.members[segment]):
            at = int(failed[replica])
            if at < 0 and not np.isfinite(logits[replica]).all():
                at = segment.stop  # the last update broke it: no batch was left to notice
            with jax.transfer_guard("allow"):  # metrics are computed on the host and compare with host arrays
                metrics = self.source.evaluate(logits[replica], **further) | usage[replica] if at < 0 else None
            for run in runs:
                self.ledger.finish(run, metrics, cost, self.trainer.kernels, at)
