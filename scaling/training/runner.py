"""Training of one run or of one group, whichever way its horizon is decided: locks, records, the loop.

A run in a folder of its own, or runs that differ only in seed, rate and number of examples as replicas of one program.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from recscale.scaling.data.sources import pin_log
from recscale.scaling.processes import agreed, ending_together, is_first, several, wait_for_all
from recscale.scaling.records.locks import hold

from .group import Group, RunSpec
from .ledger import Ledger
from .loop import Loop, Progress
from .model_files import FOLDER
from .passes import PassesLoop
from .preflight import check_places, check_settings

# A predecessor killed a moment ago may still be dying; after this long somebody else really trains the run.
_LOCK_WAIT_S = 1.0


def train(
    config: ConfigDict, workdir: Path | str, *, progress: Progress | None = None, assigned: Sequence[str] = ()
) -> dict[str, Any]:
    """Trains (or resumes) one run in `workdir`: run.json, metrics.jsonl, checkpoints/, cache/; returns its record.

    assigned: settings somebody asked for by name; one that this run would ignore is refused.
    """
    workdir = Path(workdir)
    pin_log(config)
    options = {"progress": progress, "cache_dir": workdir / "cache", "assigned": assigned}
    return train_group([RunSpec(config, workdir)], workdir, **options)[0]


def train_group(
    runs: Sequence[RunSpec],
    group_dir: Path | str,
    *,
    progress: Progress | None = None,
    cache_dir: Path | str | None = None,
    assigned: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Trains runs that differ only in seed, rate and number of examples, as replicas and branches of one program.

    Idempotent: finished runs are left alone, a stopped group goes on from its newest checkpoint. A replica whose
    loss stops being finite is recorded as diverged while the others go on. Of several processes all call; they share
    `group_dir` and the folders of the runs.

    Args:
        runs: configurations and folders. group_dir: holds the checkpoints.
        progress: called between logging intervals with step, total_steps, rows_per_s, flops_per_s, eta_s.
        cache_dir: where the data source may keep what depends on its configuration alone.
        assigned: see `train`.

    Returns:
        The runs' records, in the order given.

    Raises:
        ValueError: a folder holds another run, or something there is damaged; the message says what to do.
        Busy: another process trains one of the runs; the message names it.
    """
    group, ledger = Group(runs), Ledger(runs)
    if ledger.finished and not several():
        return ledger.records
    for run in runs:
        check_settings(run.config)
    caches = () if cache_dir is None else (Path(cache_dir),)
    check_places(*(run.run_dir / FOLDER for run in runs), Path(group_dir) / "checkpoints", *caches)
    with contextlib.ExitStack() as stack:
        stack.enter_context(ending_together())
        for folder in sorted({run.run_dir for run in runs}) if is_first() else ():
            stack.enter_context(hold(folder / "lock", wait_s=_LOCK_WAIT_S))
        ledger = Ledger(runs)  # as the last owner of the lock left it
        (finished,) = agreed(ledger.finished)
        if not finished:
            kind = PassesLoop if group.config.training.passes else Loop
            loop = kind(group, ledger, Path(group_dir), progress or (lambda event: None), cache_dir, assigned)
            with loop.meter.running():
                loop.run()
        wait_for_all("records")
    return ledger.records if is_first() else Ledger(runs).records
