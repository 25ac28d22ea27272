"""Training on a finite log: shuffled passes with validation after each, until none improves, then a decay to zero.

    1. passes at the full rate, until `training.patience` of them in a row improve validation of no replica
    2. from the best state, `training.decay_fraction` as many passes while the rate falls to zero, validated as well

Every replica keeps the state of its own best pass, so its result does not depend on those it is trained with. The
state after a pass and the best one are a checkpoint: a run killed at any moment goes on from its last.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recscale.scaling.parallel import put_everywhere
from recscale.scaling.processes import agreed

from .loop import Loop
from .schedule import Segment
from .step import TrainState

# Fields of a state that are not per replica: they go on, whichever pass was best.
_SHARED = ("step", "decay_from", "decay_steps")


@dataclasses.dataclass
class Tracker:
    """What validation said of every pass. losses: per pass the validation logloss of each replica, inf if diverged.

    decay: first pass of the decay, None before it.
    """

    patience: int
    most: int
    share: float
    losses: list[list[float]] = dataclasses.field(default_factory=list)
    decay: int | None = None

    @property
    def done(self) -> int:
        return len(self.losses)

    @property
    def best(self) -> np.ndarray:
        """Per replica the number of its best pass, from 0."""
        return np.argmin(np.asarray(self.losses), axis=0)

    @property
    def should_decay(self) -> bool:
        """Whether the passes at the full rate are over."""
        if self.decay is not None or not self.done:
            return False
        return self.done - 1 - int(self.best.max()) >= self.patience or self.done >= self.most

    @property
    def over(self) -> bool:
        return self.decay is not None and self.done >= self.decay + self.decay_length

    @property
    def decay_length(self) -> int:
        """Passes of the decay, fixed when it begins."""
        assert self.decay is not None
        best = np.argmin(np.asarray(self.losses[: self.decay]), axis=0)
        return max(math.ceil(self.share * (int(best.max()) + 1)), 1)


class PassesLoop(Loop):
    """The loop of a group whose `training.passes` is above 0."""

    def run(self) -> None:
        t = self.config.training
        self.tracker = Tracker(t.patience, t.passes, t.decay_fraction)
        self.ledger.begin(self.schedule, self.trainer.mesh)
        position, state, best, interval = self._restore()
        for name, value in position.get("passes", {}).items():
            setattr(self.tracker, name, value)
        whole = self.schedule.segments[0]
        per_pass = self.source.batches_per_pass  # pyright: ignore[reportAttributeAccessIssue]  # finite sources have it
        start, trained = position["step"], self.tracker.done
        with jax.transfer_guard("disallow"):
            while not self.tracker.over:
                if self.tracker.should_decay:
                    assert best is not None
                    self.tracker.decay = self.tracker.done
                    state = dataclasses.replace(jax.tree.map(jnp.copy, best), step=state.step)
                decaying = self.tracker.decay is not None
                first = (self.tracker.decay or 0) * per_pass
                stop = (trained + 1) * per_pass
                part = Segment(start, stop, whole.horizon if decaying else None)
                self.schedule.members[part] = self.schedule.members[whole]
                length = self.tracker.decay_length * per_pass if decaying else 0
                state = self._enter(state, Segment(first, first + length, whole.horizon if decaying else None))
                state, interval = self._segment(0, part, start, state, best, interval), []
                with jax.transfer_guard("allow"):
                    state = self.trainer.settled(state)
                    best = self._validate(state, best)
                start, trained = stop, trained + 1
                self._save(0, stop, state, best, [])
            assert best is not None
            self._finish_passes(whole, state, best, per_pass)
        self.checkpoints.close()

    def _position(self) -> dict[str, Any]:
        return {"passes": {"losses": self.tracker.losses, "decay": self.tracker.decay}}

    def _validate(self, state: TrainState, best: TrainState | None) -> TrainState:
        """Evaluates a pass; returns per replica the best state so far."""
        with self.clock.pause():
            logits = self.trainer.holdout_logits(state)
            losses = [self._loss(logits[replica]) for replica in range(len(self.group.replicas))]
        self.tracker.losses.append(list(agreed(*losses)))
        if best is None:
            return jax.tree.map(jnp.copy, state)
        improved = put_everywhere(self.tracker.best == self.tracker.done - 1, state.alive.sharding)

        def choose(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(improved.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

        # Copies throughout: the next step takes the state's own arrays for its result.
        chosen = {
            field.name: jax.tree.map(jnp.copy, getattr(state, field.name))
            if field.name in _SHARED
            else jax.tree.map(choose, getattr(state, field.name), getattr(best, field.name))
            for field in dataclasses.fields(state)
        }
        return dataclasses.replace(state, **chosen)

    def _loss(self, logits: np.ndarray) -> float:
        if not np.isfinite(logits).all():
            return math.inf
        return float(self.source.evaluate(logits)["valid_logloss"])

    def _finish_passes(self, whole: Segment, state: TrainState, best: TrainState, per_pass: int) -> None:
        rows = self.source.total_rows or 0
        work = []
        for place in self.tracker.best:
            passes = int(place) + 1
            if self.tracker.decay is not None and place >= self.tracker.decay:
                # The decay left from the best pass before it.
                before = np.asarray(self.tracker.losses[: self.tracker.decay])
                passes = int(np.argmin(before, axis=0).max()) + 1 + passes - self.tracker.decay
            work.append(
                {
                    "examples": passes * rows,
                    "steps": passes * per_pass,
                    "epochs": float(passes),
                    "unique_examples": rows,
                    "train_flops": self.schedule.train_flops_per_row * passes * rows,
                    "passes_tried": self.tracker.done,
                    "valid_losses": [row[len(work)] for row in self.tracker.losses],
                }
            )
        self._finish(whole, best, work=work, final=state)
