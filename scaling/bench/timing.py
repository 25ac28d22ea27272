"""Timing by turns: rivals run alternately in one process, so that whatever else the machine does hits all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

# `run(n)` does n steps and returns when they are done.
Rival = Callable[[int], object]

# Steps before the first turn: while the process still grows, a step pays for fresh memory.
_SETTLING = 8


class Sample(NamedTuple):
    """One turn, in seconds per step: by the clock, and summed over the threads of this process."""

    wall_s: float
    cpu_s: float


def race(rivals: Mapping[str, Rival], *, rounds: int, per_round: int) -> dict[str, dict[str, Any]]:
    """Times per step of every rival, by name: the `summary` of its turns in `alternate`."""
    samples = alternate(rivals, rounds=rounds, per_round=per_round)
    return {name: summary(turns) for name, turns in samples.items()}


def alternate(rivals: Mapping[str, Rival], *, rounds: int, per_round: int) -> dict[str, list[Sample]]:
    """Time per step of every turn, by name; each round gives every rival a turn of `per_round` steps.

    Not timed are a few steps at the beginning, in which memory settles, and a step before each turn: the thread pool
    that ran before may still be spinning, and caches hold its data. Within a turn steps follow each other as in
    training, so a rival may prepare one while another computes.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in rivals}
    for run in rivals.values():
        run(_SETTLING)
    gc.collect()
    for _ in range(rounds):
        for name, run in rivals.items():
            run(1)
            start, start_cpu = time.perf_counter(), time.process_time()
            run(per_round)
            wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu
            samples[name].append(Sample(wall / per_round, cpu / per_round))
    return samples


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """Median, quartiles and minimum of the clock in milliseconds, the median of the threads' time, number of turns.

    On a machine others use as well, compare `cpu_ms`: it does not count waiting for a core.
    """
    wall = [sample.wall_s for sample in samples]
    return {
        **quartiles(wall),
        "min_ms": 1e3 * min(wall),
        "cpu_ms": 1e3 * statistics.median(sample.cpu_s for sample in samples),
        "turns": len(samples),
    }


def quartiles(seconds: Sequence[float]) -> dict[str, Any]:
    """median_ms, lower_quartile_ms and upper_quartile_ms of times in seconds."""
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [*seconds] * 3
    return {"median_ms": 1e3 * middle, "lower_quartile_ms": 1e3 * low, "upper_quartile_ms": 1e3 * high}


def clock(call: Callable[[], object], *, warmup: int, runs: int) -> list[float]:
    """Seconds of each of `runs` calls after `warmup` others, every one waited for."""
    seconds = []
    for number in range(warmup + runs):
        start = time.perf_counter()
        jax.block_until_ready(call())
        if number >= warmup:
            seconds.append(time.perf_counter() - start)
    return seconds


def repeated(call: Callable[[], object]) -> Rival:
    """A rival whose step is one call, waited for before the next."""

    def run(steps: int) -> None:
        for _ in range(steps):
            jax.block_until_ready(call())

    return run
