"""A group of runs: the replicas (seed x rate) and horizons that one program trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from .config import config_hash, group_id, run_id


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """One run to train: its configuration, its folder, and labels copied into the record (sweep, targets, ...)."""

    config: ConfigDict
    run_dir: Path
    labels: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def replica(self) -> tuple[int, float]:
        """Seed and rate: runs that share them share a trunk."""
        return int(self.config.seed), float(self.config.training.lr)


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
        names = [run_id(run.config) for run in runs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"a group trains every run once; given twice: {', '.join(twice)}")
        self.id = ids.pop()
        self.runs = tuple(runs)
        self.config = runs[0].config
        self.replicas = sorted({run.replica for run in runs})
        # A checkpoint belongs to exactly one set of replicas and horizons.
        self.signature = config_hash({"runs": sorted(names)})
