"""Warm-up, stable, decay: one trunk at a constant rate, and from it one decay branch per horizon.

A training *program* is a list of segments over global step counts. K horizons in ratio 2 cost (1-f) + f sum 2^-i of
the longest run instead of sum 2^-i (f = decay fraction), and every branch is a properly decayed run of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

SCHEDULES = ("wsd", "cosine", "constant")
SHAPES = ("linear", "sqrt", "cosine")

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


def decay_start(horizon: int, schedule: str, decay_fraction: float, warmup: int) -> int:
    """First decaying step of a run of `horizon` steps."""
    if schedule == "constant":
        return horizon
    if schedule == "cosine":
        return min(warmup, horizon)
    return max(horizon - max(round(decay_fraction * horizon), 1), 0)


def program(horizons: Sequence[int], schedule: str, decay_fraction: float, warmup: int) -> list[Segment]:
    """Segments to execute, in order: trunk up to the first decay start, its branch, trunk on, and so forth.

    Raises:
        ValueError: unknown schedule, or a horizon below one step.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"training.schedule is {schedule!r}, expected one of {', '.join(SCHEDULES)}")
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


def rate_factor(step: jax.Array, decay_from: jax.Array, decay_steps: jax.Array, warmup: int, shape: str) -> jax.Array:
    """Factor of the peak rate at a step: linear warm-up, then 1, then a decay to 0 from `decay_from` on."""
    if shape not in SHAPES:
        raise ValueError(f"training.decay_shape is {shape!r}, expected one of {', '.join(SHAPES)}")
    warm = jnp.minimum((step + 1) / max(warmup, 1), 1.0)
    done = jnp.clip((step - decay_from + 1) / jnp.maximum(decay_steps + 1, 1), 0.0, 1.0)
    decay = {
        "linear": lambda t: 1 - t,
        "sqrt": lambda t: 1 - jnp.sqrt(t),
        "cosine": lambda t: 0.5 * (1 + jnp.cos(jnp.pi * t)),
    }
    return warm * decay[shape](done)
