"""What hashes and manifests add to a run that saves checkpoints: one run, whose saves take turns with and without them.

A save without them writes the arrays alone. Both follow the same steps of the same program, so that whatever else the
machine does hits both. What a restart checks, every file of the newest checkpoint, is timed at the end.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import jax

from recscale.scaling.training import RunSpec, get_config
from recscale.scaling.training.checkpoints import Checkpoints
from recscale.scaling.training.group import Group
from recscale.scaling.training.ledger import Ledger
from recscale.scaling.training.loop import Loop

_SEEDS = 3
_INTERVALS = 24  # logging intervals, each of which ends with a save


def measure_checkpoint_cost(*, rows: int = 1_000_000) -> dict[str, Any]:
    """Share of a run's wall time that manifests, hashes and their checks take.

    A RankMixer of 1.2e5 dense parameters, three seeds, on the log of the quickstart.

    Args:
        rows: of the run.

    Returns:
        with_ms, without_ms: medians of a save. added_ms: their difference. verify_ms: checking a checkpoint.
        interval_s: median of the steps between two saves. saves: how many were timed. checkpoint_bytes: of one.
        share: what all saves and one check add to the run without them, at one save an interval.
        share_at_default: the same with one save in as many seconds as `training.checkpoint_every_s` is by default.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = [RunSpec(_config(rows, seed), folder / str(seed)) for seed in range(_SEEDS)]
        group = Group(runs)
        loop = _Alternating(group, Ledger(runs), folder, lambda event: None, folder / "cache", ())
        loop.run()
        own, bare = (loop.saves[turn][1:] for turn in (True, False))  # the first of each warms up
        verify_s, size = _verified(folder / "checkpoints")
    default_s = get_config().training.checkpoint_every_s
    added_s, interval_s = median(own) - median(bare), median(loop.intervals[2:])
    return {
        "with_ms": 1e3 * median(own),
        "without_ms": 1e3 * median(bare),
        "added_ms": 1e3 * added_s,
        "verify_ms": 1e3 * verify_s,
        "interval_s": interval_s,
        "saves": len(own) + len(bare),
        "checkpoint_bytes": size,
        "share": (added_s + verify_s / _INTERVALS) / (interval_s + median(bare)),
        "share_at_default": (added_s + verify_s / _INTERVALS) / default_s,
    }


def _config(rows: int, seed: int) -> Any:
    config = get_config("rankmixer", "known_truth")
    config.data.preset, config.seed = "dense", seed
    config.model.update({"layers": 1, "tokens": 8, "width": 104, "hidden": 52})
    config.training.update({"requests": 256, "examples": rows, "checkpoint_every_s": 0.0})
    config.training.log_every_examples = rows // _INTERVALS
    return config


class _Alternating(Loop):
    """The loop, of whose saves every second one writes arrays alone. saves: seconds, with and without the rest."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.saves: dict[bool, list[float]] = {True: [], False: []}
        self.intervals: list[float] = []
        self._ended = time.perf_counter()

    def _save(self, *args: Any) -> None:
        start = time.perf_counter()
        self.intervals.append(start - self._ended)
        own = len(self.intervals) % 2 == 0
        if own:
            super()._save(*args)
        else:
            _, step, state, trunk, _ = args
            with jax.transfer_guard("allow"):
                self.checkpoints.save_arrays(step, state, trunk)
            self.checkpoints.drop_old()
            self.saved = time.monotonic()
        self._ended = time.perf_counter()
        self.saves[own].append(self._ended - start)


def _verified(folder: Path) -> tuple[float, int]:
    """Seconds it takes to check the newest whole checkpoint below a folder, and its bytes."""
    checkpoints = Checkpoints(folder)
    for tick in checkpoints.ticks():
        start = time.perf_counter()
        manifest, _ = checkpoints.verified(tick)
        seconds = time.perf_counter() - start
        if manifest is not None:
            return seconds, sum(path.stat().st_size for path in (folder / str(tick)).rglob("*") if path.is_file())
    raise RuntimeError(f"{folder} holds no whole checkpoint")
