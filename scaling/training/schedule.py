"""Warm-up, stable, decay: one trunk at a constant rate, and from it one decay branch per horizon.

A training *program* is a list of segments over global step counts. K horizons in ratio 2 cost (1-f) + f sum 2^-i of
the longest run instead of sum 2^-i (f = decay fraction), and every branch is a properly decayed run of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from recscale import models
from recscale.models.counts import Count
from recscale.scaling.data.source import ENDLESS_REQUESTS, Source

from .config import default_warmup, require_word
from .group import Group, RunSpec

Schedule = Literal["wsd", "cosine", "constant"]
DecayShape = Literal["linear", "sqrt", "cosine"]

# Largest share of a run that may be spent on warming up: beyond it too little is left at the peak rate that is tuned.
MOST_WARMUP = 0.25

# A decay start no run reaches: the trunk never decays.
NEVER = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Segment:
    """Steps [start, stop) of the trunk (horizon None) or of the branch that ends at step `horizon`."""

    start: int
    stop: int
    horizon: int | None = None

    @property
    def steps(self) -> int:
        return self.stop - self.start


def decay_start(horizon: int, schedule: Schedule, decay_fraction: float, warmup: int) -> int:
    """First decaying step of a run of `horizon` steps."""
    if schedule == "constant":
        return horizon
    if schedule == "cosine":
        return min(warmup, horizon)
    return horizon - max(round(decay_fraction * horizon), 1)


def program(horizons: Sequence[int], schedule: Schedule, decay_fraction: float, warmup: int) -> list[Segment]:
    """Segments to execute, in order: trunk up to the first decay start, its branch, trunk on, and so forth.

    Raises:
        ValueError: unknown schedule, or a horizon below one step.
    """
    require_word("training.schedule", schedule, get_args(Schedule))
    if not 0 <= decay_fraction <= 1:
        raise ValueError(f"training.decay_fraction is {decay_fraction}, expected a share between 0 and 1")
    if min(horizons) < 1:
        raise ValueError(f"training.examples must give at least one step, got horizons of {sorted(horizons)} steps")
    segments, at = [], 0
    for horizon in sorted(set(horizons)):
        start = decay_start(horizon, schedule, decay_fraction, warmup)
        if start > at:
            segments.append(Segment(at, start))
            at = start
        segments.append(Segment(start, horizon, horizon))
    return segments


def run_steps(config: ConfigDict, source: Source) -> int:
    """Steps of a run: enough for its examples, or every batch there is.

    Raises:
        ValueError: an endless log and no number of examples, or so many that the run would reach its evaluation rows.
    """
    examples = config.training.examples
    if source.batches is not None and examples <= 0:
        return source.batches
    if examples <= 0:
        raise ValueError(f"training.examples is {examples}; an endless log needs a positive number of rows")
    steps = math.ceil(examples / (source.requests * source.candidates))
    if source.batches is None and steps * source.requests > ENDLESS_REQUESTS:
        raise ValueError(
            f"training.examples is {examples:,}: {steps * source.requests:,} requests, but those of an endless log are "
            f"evaluated on from number {ENDLESS_REQUESTS:,} on; train on at most "
            f"{ENDLESS_REQUESTS // source.requests * source.requests * source.candidates:,} rows"
        )
    return steps


def run_examples(config: ConfigDict, source: Source, steps: int) -> int:
    """Rows that so many steps train: the last batch of a pass is padded, and rows that are not there do not count."""
    if steps == source.batches and source.total_rows is not None:
        return source.total_rows * max(config.data.passes, config.training.passes)
    return steps * source.requests * source.candidates


def warmup_steps(config: ConfigDict, batch_rows: int, horizons: Sequence[int]) -> int:
    """Steps of warm-up of runs of so many steps.

    Raises:
        ValueError: it is too large a share of the shortest.
    """
    rows = config.training.warmup_examples
    rows = default_warmup(min(horizons) * batch_rows) if rows is None else rows
    warmup, shortest = math.ceil(rows / batch_rows), min(horizons) * batch_rows
    if warmup * batch_rows > max(MOST_WARMUP * shortest, batch_rows):
        raise ValueError(
            f"training.warmup_examples is {rows:,}: more than {MOST_WARMUP:.0%} of a run of {shortest:,} rows, which "
            f"would hardly train at its peak rate; set training.warmup_examples={default_warmup(shortest)} or raise "
            "training.examples"
        )
    return warmup


def train_flops_per_row(counts: Count, source: Source) -> float:
    """Training FLOPs of a row: the user side is computed once per request and shared by its candidates."""
    return counts.train_flops_user / source.candidates + counts.train_flops_candidate


class GroupSchedule:
    """When a group trains what.

    Attributes:
        source: the data. counts: parameters and FLOPs of the model; train_flops_per_row of it.
        batch_rows: rows of a batch. warmup: steps.
        steps: folder of a run -> its steps.
        segments: the program, in order. total_steps: of all of them.
        members: segment -> per replica the runs whose own history includes it: every later horizon for the trunk, one
            horizon for a branch.
        log_every: steps of a logging interval.

    Raises:
        ValueError: a run needs more batches than the data has, or none is asked for of an endless log.
    """

    def __init__(self, group: Group, source: Source):
        training = group.config.training
        self.source = source
        self.batch_rows = source.requests * source.candidates
        self.steps = {run.run_dir: self._horizon(run) for run in group.runs}
        horizons = sorted(set(self.steps.values()))
        self.warmup = warmup_steps(group.config, self.batch_rows, horizons)
        if training.passes:
            self.segments = [Segment(0, horizons[-1], horizons[-1])]
        else:
            self.segments = program(horizons, training.schedule, training.decay_fraction, self.warmup)
        self.total_steps = sum(segment.steps for segment in self.segments)
        self.members = {
            segment: [self._members(group, segment, r) for r in group.replicas] for segment in self.segments
        }
        every = training.log_every_examples / self.batch_rows if training.log_every_examples else horizons[0] / 40
        self.log_every = max(round(every), 1)
        self.counts = models.count(group.config.architecture, source.schema, group.config.model)
        self.train_flops_per_row = train_flops_per_row(self.counts, source)

    def examples(self, run: RunSpec) -> int:
        """Rows a run trains on."""
        return run_examples(run.config, self.source, self.steps[run.run_dir])

    def _horizon(self, run: RunSpec) -> int:
        steps, there = run_steps(run.config, self.source), self.source.batches
        if there is not None and steps > there:
            raise ValueError(
                f"training.examples is {run.config.training.examples:,}: {steps:,} steps, but the data has "
                f"{there:,} batches of {self.batch_rows} rows in {run.config.data.passes} pass(es); lower it, set it "
                "to 0 for everything, or raise data.passes (recorded as epochs)"
            )
        return steps

    def _members(self, group: Group, segment: Segment, replica: tuple[int, float]) -> list[RunSpec]:
        mine = [run for run in group.runs if run.replica == replica]
        if segment.horizon is not None:
            return [run for run in mine if self.steps[run.run_dir] == segment.horizon]
        starts = {branch.horizon: branch.start for branch in self.segments}
        return [run for run in mine if starts[self.steps[run.run_dir]] >= segment.stop]


def rate_factor(
    step: Int[Array, "*_"],
    decay_from: Int[Array, ""],
    decay_steps: Int[Array, ""],
    warmup: int,
    shape: DecayShape,
) -> Float[Array, "*_"]:
    """Factor of the peak rate at a step: linear warm-up, then 1, then a decay to 0 from `decay_from` on."""
    warm = jnp.minimum((step + 1) / max(warmup, 1), 1.0)
    done = jnp.clip((step - decay_from + 1) / (decay_steps + 1), 0.0, 1.0)
    decay = {
        "linear": lambda t: 1 - t,
        "sqrt": lambda t: 1 - jnp.sqrt(t),
        "cosine": lambda t: 0.5 * (1 + jnp.cos(jnp.pi * t)),
    }
    return warm * decay[shape](done)
