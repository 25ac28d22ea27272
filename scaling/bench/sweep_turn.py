"""One turn of `recscale bench sweep`: trains its small sweep in this process and prints where the time went, as JSON.

    python sweep_turn.py ROWS     with the package of the tree that is measured on the path

A script that is run by its path: it measures other trees than its own, so it imports nothing but what every tree has,
and finds the parts by the names of the functions that do them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# The smallest and the largest shape of either architecture of the quickstart, and how many seeds it trains of each.
SHAPES: dict[str, tuple[str, dict[str, Any], int]] = {
    "smallest": ("dlrm_mlp", {"widths": (8,)}, 5),
    "largest": ("rankmixer", {"layers": 1, "tokens": 8, "width": 64, "hidden": 32}, 5),
}

# In words that older trees know as well.
WORLD = {
    "nested": False,
    "alpha": 1.0,
    "quanta": 1024,
    "order_shares": (0.0, 1.0),
    "code_bits": 31,
    "soft_labels": True,
}
BATCH, HOLDOUT = 256, 16_384

# The quickstart's: rows of a run, which decide how often it logs, and programs that one of its two workers trains; they
# share a log that is drawn once.
ROWS, PROGRAMS = 1_250_000, 7

# Part -> (module, class or None, function): those a tree does not have are left out.
_TRAINING, _KNOWN_TRUTH = "recscale.scaling.training", "recscale.scaling.data.known_truth"
FUNCTIONS = {
    "holdout": [
        (f"{_TRAINING}.step", "Trainer", "holdout_logits"),
        (f"{_KNOWN_TRUTH}.source", "KnownTruthSource", "evaluate"),
        (f"{_KNOWN_TRUTH}.source", None, "card"),
    ],
    "bookkeeping": [(f"{_TRAINING}.ledger", "Ledger", name) for name in ("begin", "append", "finish")]
    + [(f"{_TRAINING}.checkpoints", "Checkpoints", "save")],
}


class Stopwatch:
    """CPU seconds by part; a part inside another is not counted twice."""

    def __init__(self):
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._stack, self._since = ["rest"], time.process_time()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the time inside for `name`."""
        self.charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self.charge()
            self._stack.pop()

    def take(self) -> dict[str, float]:
        """The seconds so far; counts from zero again."""
        self.charge()
        found, self.seconds = self.seconds, defaultdict(float)
        return found

    def charge(self) -> None:
        """Counts the time since the last change for the innermost part."""
        now = time.process_time()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now


def watch(stopwatch: Stopwatch) -> None:
    """Replaces the functions of every part by ones that are timed."""
    for part, functions in FUNCTIONS.items():
        for module, owner, name in functions:
            place = importlib.import_module(module)
            place = place if owner is None else getattr(place, owner)
            original = getattr(place, name, None)
            if original is not None:
                setattr(place, name, _timed(original, part, stopwatch))


def _timed(function: Callable[..., Any], part: str, stopwatch: Stopwatch) -> Callable[..., Any]:
    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with stopwatch.part(part):
            return function(*args, **kwargs)

    return timed


def train(shape: str, rows: int, folder: Path, stopwatch: Stopwatch) -> dict[str, float]:
    """Trains one shape; CPU seconds by part.

    Steps are timed from the second progress event to the last; what is left before them is tracing and compiling.
    """
    from recscale.scaling.training import RunSpec, get_config, train_group

    architecture, model, seeds = SHAPES[shape]
    interval = min(ROWS // 40, rows // 4)  # the quickstart's, but several events in a shorter run
    runs = []
    for seed in range(seeds):
        config = get_config(architecture, "known_truth")
        config.data.preset, config.seed, config.data.holdout_rows = "dense", seed, HOLDOUT
        with config.unlocked():
            config.data.overrides.update(WORLD)
        config.model.update(model)
        config.training.update({"requests": BATCH, "examples": rows, "lr": 5e-3, "log_every_examples": interval})
        runs.append(RunSpec(config, folder / f"{shape}{seed}"))
    events: list[tuple[int, float]] = []

    def progress(event: dict[str, Any]) -> None:
        stopwatch.charge()
        events.append((event["step"], stopwatch.seconds["rest"]))

    train_group(runs, folder / shape, progress=progress, cache_dir=folder / "cache")
    parts = stopwatch.take()
    (first, before), (last, after) = events[0], events[-1]
    step = (after - before) / (last - first) * (rows / BATCH)
    rest = parts.pop("rest")
    return {**parts, "step": step, "compile": max(rest - step, 0.0)}


def drawing(rows: int) -> float:
    """CPU seconds that one program spends on drawing so many rows: its share of a log that is drawn once, or, in a tree
    that draws them inside the step, batch by batch."""
    import jax
    import numpy as np

    from recscale.scaling.data import make_source

    data = {"name": "known_truth", "preset": "dense", "overrides": WORLD, "holdout_rows": HOLDOUT}
    source: Any = make_source(data, requests=BATCH)
    if hasattr(source, "record"):
        start = time.process_time()
        source.record(-(-ROWS // BATCH))
        return (time.process_time() - start) * rows / ROWS / PROGRAMS
    make, count = jax.jit(source.batch), 64
    jax.block_until_ready(make(np.int32(0)))
    start = time.process_time()
    for index in range(count):
        jax.block_until_ready(make(np.int32(index)))
    return (time.process_time() - start) / count * (rows / BATCH)


def main(rows: int) -> None:
    from recscale.scaling.data.known_truth.source import KnownTruthSource
    from recscale.scaling.host_memory import keep_freed_memory

    keep_freed_memory()
    drawn = drawing(rows)
    stopwatch = Stopwatch()
    watch(stopwatch)
    with tempfile.TemporaryDirectory() as folder:
        found = {shape: train(shape, rows, Path(folder), stopwatch) for shape in SHAPES}
    for parts in found.values():
        if not hasattr(KnownTruthSource, "record"):
            parts["step"] = max(parts["step"] - drawn, 0.0)  # it is inside
        parts["generation"] = drawn
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
