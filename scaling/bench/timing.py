"""Timing by turns: rivals run alternately in one process, so that whatever else the machine does hits all of them."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

from .. import host_memory

# Steps of a turn that are not timed: the thread pool that ran before may still be spinning, caches hold its data.
_UNTIMED = 1


class Sample(NamedTuple):
    """One timed call, in seconds: by the clock, and summed over the threads of this process."""

    wall_s: float
    cpu_s: float


def alternate(steps: Mapping[str, Callable[[], object]], *, rounds: int, per_round: int) -> dict[str, list[Sample]]:
    """Every timed call, by name; each round gives every step a turn of `per_round` timed calls.

    A step must return only when its work is done.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in steps}
    gc.collect()
    for _ in range(rounds):
        for name, step in steps.items():
            for i in range(_UNTIMED + per_round):
                start, start_cpu = time.perf_counter(), time.process_time()
                step()
                if i >= _UNTIMED:
                    samples[name].append(Sample(time.perf_counter() - start, time.process_time() - start_cpu))
    return samples


def summary(samples: list[Sample]) -> dict[str, float]:
    """Median, quartiles and minimum of the clock in milliseconds, the median of the threads' time, and how many.

    On a machine others use as well, compare `cpu_ms`: it does not count waiting for a core.
    """
    wall = [sample.wall_s for sample in samples]
    low, middle, high = statistics.quantiles(wall, n=4) if len(wall) > 1 else wall * 3
    return {
        "median_ms": 1e3 * middle,
        "lower_quartile_ms": 1e3 * low,
        "upper_quartile_ms": 1e3 * high,
        "min_ms": 1e3 * min(wall),
        "cpu_ms": 1e3 * statistics.median(sample.cpu_s for sample in samples),
        "samples": len(samples),
    }


def in_fresh_process(function: Callable[..., Any], *args: Any, huge_pages: bool = True, **kwargs: Any) -> Any:
    """Runs an importable function in a new process, whose malloc uses huge pages where the kernel offers them.

    Arguments and result are pickled. Errors of the function are raised here.
    """
    extra = host_memory.huge_page_environment() if huge_pages else {}
    before = {name: os.environ.get(name) for name in extra}
    os.environ.update(extra)  # a spawned process starts from this environment
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *args, **kwargs).result()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
