"""The training loop: every run of a group, from the first batch to its records, resumable at any instant.

Batch k is a pure function of (source, k) and checkpoints are taken only between logging intervals, so a run killed
at any moment and started again ends with the same bytes as one never killed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from recscale.models.inputs import Batch
from recscale.scaling import parallel
from recscale.scaling.data import Recordable, Verifiable, make_source
from recscale.scaling.processes import agreed, is_first
from recscale.scaling.resources import value_of

from .checkpoints import Checkpoints
from .clock import Clock
from .config import data_section
from .group import Group
from .intervals import Piece, fetch, stack, summarise, unstack
from .ledger import Ledger
from .model_files import save_model
from .preflight import (
    batch_bytes,
    check_holdout,
    check_room,
    check_shape,
    refuse_without_effect,
    state_bytes,
    without_effect,
)
from .rows.memory_usage import holdout_usage
from .run_resources import meter, run_resources, stated_figures
from .schedule import NEVER, GroupSchedule, Segment
from .step import TrainState, make_trainer

Progress = Callable[[dict[str, Any]], None]

# Steps between two looks at the clock before the time of a step is known.
_UNTIMED_STEPS = 32


class Loop:
    """The loop of a group with fixed horizons."""

    def __init__(
        self,
        group: Group,
        ledger: Ledger,
        group_dir: Path,
        progress: Progress,
        cache_dir: Path | str | None,
        assigned: Sequence[str],
    ):
        self.config, t = group.config, group.config.training
        mesh = parallel.run_mesh(t.get("mesh", ""), t.requests)
        host, hosts = parallel.own_share(mesh, t.requests)
        sizes = {"requests": t.requests, "candidates": t.candidates, "host": host, "hosts": hosts}
        self.source = make_source(data_section(self.config), cache_dir=cache_dir, **sizes)
        self.group, self.ledger, self.progress = group, ledger, progress
        self.schedule = GroupSchedule(group, self.source)
        refuse_without_effect(without_effect(self.config, self.source, self.schedule.counts, assigned))
        check_holdout(self.config, self.source)
        if isinstance(self.source, Verifiable):
            self.source.verify()
        check_shape(self.config, self.source)
        self.trainer = make_trainer(self.config, self.source, group.replicas, self.schedule.warmup, mesh)
        # While a branch decays, the trunk waits in memory and in the checkpoint.
        copies = 2 if len(set(self.schedule.steps.values())) > 1 else 1
        needed = copies * state_bytes(self.trainer.state_shapes(), mesh)
        check_room(needed, group_dir, batch_bytes(self.source) // hosts)
        source, steps = self.source, max(self.schedule.steps.values())
        self.record = source.record(steps) if mesh is None and isinstance(source, Recordable) else None
        self.checkpoints = Checkpoints(group_dir / "checkpoints")
        rows = self.schedule.batch_rows * len(group.replicas)
        self.clock = Clock(self.schedule.total_steps, rows, self.schedule.train_flops_per_row)
        self.saved, self.meter = time.monotonic(), meter()

    def run(self) -> None:
        segments = self.schedule.segments
        self.ledger.begin(self.schedule, self.trainer.mesh)
        position, state, trunk, interval = self._restore()
        with jax.transfer_guard("disallow"):
            for index in range(position["segment"], len(segments)):
                segment = segments[index]
                if segment.horizon is not None and trunk is None and index + 1 < len(segments):
                    trunk = jax.tree.map(jnp.copy, state)
                state = self._enter(state, segment)
                start = position["step"] if index == position["segment"] else segment.start
                state = self._segment(index, segment, start, state, trunk, interval)
                interval = []
                if segment.horizon is None and not jax.device_get(state.alive).any():
                    for branch in segments[index + 1 :]:
                        if branch.horizon is not None:
                            self._finish(branch, state)
                    break
                if segment.horizon is not None:
                    self._finish(segment, state)
                    state, trunk = (trunk if trunk is not None else state), None
                    if index + 1 < len(segments):
                        self._save(index + 1, segments[index + 1].start, state, None, [])
        self.checkpoints.close()

    def _restore(self) -> tuple[dict[str, Any], TrainState, TrainState | None, list[Piece]]:
        """Position, state, waiting trunk and the metrics of a logging interval begun: from the newest checkpoint that
        is whole and fits the metrics on disk, else the beginning."""
        fresh = self.trainer.fresh_state()
        restored = self.checkpoints.restore(fresh, self._unfit)
        position = None if restored is None else restored.position
        self.ledger.rewind(position, self.checkpoints.discarded)
        self.checkpoints.drop_discarded()
        if restored is None:
            return {"segment": 0, "step": 0}, fresh, None, []
        self.clock.resume_from(restored.position["wall_s"])
        self.meter.resume_from(restored.position.get("energy_kwh"))
        return restored.position, restored.state, restored.trunk, unstack(restored.position["interval"])

    def _unfit(self, position: dict[str, Any]) -> str | None:
        if position["signature"] != self.group.signature:
            raise ValueError(
                f"the checkpoints below {self.checkpoints.folder} belong to another set of runs (replicas or horizons "
                "changed); give the new runs a folder of their own"
            )
        if position["data"] != self.ledger.data:
            raise ValueError(
                f"the checkpoints below {self.checkpoints.folder} were made on other data. Give the data the runs were "
                "begun with, or train in a folder of its own"
            )
        return self.ledger.unfit(position)

    def _enter(self, state: TrainState, segment: Segment) -> TrainState:
        """Points the state's schedule at a segment."""
        decay = (NEVER, 1) if segment.horizon is None else (segment.start, max(segment.steps, 1))
        start, steps = (parallel.put_everywhere(np.int32(value), state.step.sharding) for value in decay)
        return dataclasses.replace(state, decay_from=start, decay_steps=steps)

    def _segment(
        self,
        index: int,
        segment: Segment,
        start: int,
        state: TrainState,
        trunk: TrainState | None,
        interval: list[Piece],
    ) -> TrainState:
        """Trains to the end of a segment, or through the first logging interval that leaves no replica alive."""
        batches = None if self.source.on_device else self.source.iterate(start)
        every, step, waiting = self.schedule.log_every, start, None
        while step < segment.stop:
            (until_due,) = agreed(self._steps_until_due())
            count = min(every - step % every, segment.stop - step, int(until_due))
            state, piece = self._steps(state, count, batches)
            step, interval = step + count, [*interval, piece]
            last, ends = step == segment.stop, step % every == 0
            if not (ends or last):
                jax.block_until_ready(state.step)
            # Reading the previous interval while this one runs keeps the device busy.
            if waiting is not None and not self._log(segment, *waiting):
                break
            waiting = None
            if ends or last:
                waiting, interval = (step, interval), []
            (due,) = agreed(time.monotonic() - self.saved > self.config.training.checkpoint_every_s)
            if waiting is not None and (due or last):
                if not self._log(segment, *waiting):
                    break
                waiting = None
            if due and not last:
                self._save(index, step, state, trunk, interval)
            event = self.clock.tick(self._done(index, step)) if ends or last else None
            if event is not None:
                self.progress(event)
        return state

    def _steps_until_due(self) -> int:
        """Steps until the next checkpoint; where none is taken inside a logging interval, no limit."""
        every_s, step_s = self.config.training.checkpoint_every_s, self.clock.step_s
        if every_s == 0:
            return NEVER
        if not step_s:
            return _UNTIMED_STEPS
        return max(int((every_s - (time.monotonic() - self.saved)) / step_s), 1)

    def _steps(self, state: TrainState, count: int, batches: Iterator[Batch] | None) -> tuple[TrainState, Piece]:
        """So many steps: in one program where the device makes the batches."""
        if batches is None:
            state, metrics = self.trainer.steps(state, count, self.schedule.log_every, self.record)
            return state, Piece(metrics, count)
        found = []
        for _ in range(count):
            start = time.monotonic()
            batch = next(batches)
            if cast(Any, state.step).is_ready():  # otherwise the device was busy all the while
                self.clock.waited(time.monotonic() - start)
            state, metrics = self.trainer.step(state, self.trainer.put(batch))
            found.append(metrics)
        return state, Piece(found, count)

    def _log(self, segment: Segment, step: int, interval: list[Piece]) -> bool:
        """Appends an interval to the metrics; returns whether any replica is left."""
        examples = step * self.schedule.batch_rows
        row = {"step": step, "examples": examples, "phase": "decay" if segment.horizon else "trunk"}
        metrics = fetch(interval)
        self.ledger.append(segment, row, summarise(metrics))
        return bool(metrics["alive"][-1].any())

    def _save(self, index: int, step: int, state: TrainState, trunk: TrainState | None, interval: list[Piece]) -> None:
        position = {
            "segment": index,
            "step": step,
            "signature": self.group.signature,
            "data": self.ledger.data,
            "metrics": self.ledger.marks(),
            "wall_s": self.clock.wall_s,
            "energy_kwh": self.meter.kwh,
            "interval": stack(interval),
            **self._position(),
        }
        with self.clock.pause(), jax.transfer_guard("allow"):
            self.checkpoints.save(self._done(index, step), position, state, trunk)
        self.saved = time.monotonic()

    def _position(self) -> dict[str, Any]:
        """What else a checkpoint has to hold, as plain JSON."""
        return {}

    def _done(self, index: int, step: int) -> int:
        """Steps of the whole program through when segment `index` stands at `step`."""
        segments = self.schedule.segments
        return sum(segment.steps for segment in segments[:index]) + step - segments[index].start

    def _finish(
        self,
        segment: Segment,
        state: TrainState,
        work: Sequence[dict[str, Any]] | None = None,
        final: TrainState | None = None,
    ) -> None:
        """Evaluates every replica at the end of a branch and writes the models and records of its runs.

        work: per replica what was really done, where that was not fixed before. final: the last state, where `state` is
        the best one.
        """
        with self.clock.pause(evaluation=True), jax.transfer_guard("allow"):
            state = self.trainer.settled(state)
            logits = self.trainer.holdout_logits(state)
            usage = holdout_usage(
                self.trainer.holdout_slot_counts(state),
                replicas=len(self.group.replicas),
                batch_rows=self.schedule.batch_rows,
                trained_rows=segment.stop * self.schedule.batch_rows,
                sub_keys=self.trainer.memory_sub_keys,
            )
            failed = jax.device_get(state.failed_at)
        used = run_resources(
            self.trainer,
            state,
            self.schedule.counts,
            self.source,
            self.clock,
            steps=segment.stop,
            stated=stated_figures(self.config.tracking),
            energy_kwh=self.meter.kwh,
        )
        step_s = self.clock.step_s
        cost = {
            "wall_s": self.clock.wall_s,
            "step_ms": None if step_s is None else 1e3 * step_s,
            "rows_per_s": None if step_s is None else self.schedule.batch_rows / step_s,
            "replicas": len(self.group.replicas),
            "mfu": value_of(used, "mfu"),
            "input_wait_share": self.clock.input_wait_share if not self.source.on_device else None,
        }
        asked = tuple(self.config.data.get("metrics", ()))
        further = {"metrics": asked} if asked else {}
        for replica, runs in enumerate(self.schedule.members[segment]):
            at = int(failed[replica])
            if at < 0 and not np.isfinite(logits[replica]).all():
                at = segment.stop  # the last update broke it: no batch was left to notice
            with jax.transfer_guard("allow"):  # metrics are computed on the host and compare with host arrays
                evaluated = at < 0 and is_first()
                metrics = self.source.evaluate(logits[replica], **further) | usage[replica] if evaluated else None
            for run in runs:
                if at < 0 and self.config.training.keep_model:
                    with jax.transfer_guard("allow"):
                        save_model(run, "final", final or state, replica)
                        if final is not None:
                            save_model(run, "best", state, replica)
                self.ledger.finish(
                    run, metrics, cost, used, self.trainer.kernels, at, None if work is None else work[replica]
                )
