"""Mirrors of a run's metrics. The files are the source; a mirror may lag, fail or be absent without consequence."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from .config import require_word

Mode = Literal["off", "offline", "online"]

_log = logging.getLogger(__name__)


class WandbMirror:
    """Sends metrics lines to a wandb run; does nothing in mode "off" or once wandb has failed.

    Offline runs cannot be read back by wandb's API, which is why nothing here ever reads from it.
    """

    def __init__(self, mode: Mode, project: str, run_id: str, folder: Path, config: dict[str, Any]):
        require_word("tracking.wandb", mode, get_args(Mode))
        self._run: Any = None
        if mode == "off":
            return
        try:
            import wandb

            self._run = wandb.init(
                project=project,
                id=run_id,
                resume="allow",
                dir=str(folder),
                mode=mode,
                config=config,
                reinit="create_new",
                # Not a word on the terminal, and nothing of what the run prints is taken along.
                settings=wandb.Settings(silent=True, console="off"),
            )
        except Exception as error:  # wandb is a convenience: no failure of it may touch a run
            _log.warning("wandb mirror of run %s is off: %s", run_id, error)

    def log(self, row: dict[str, Any]) -> None:
        self._guard(lambda run: run.log(row, step=row["step"]))

    def finish(self, metrics: dict[str, Any]) -> None:
        def close(run: Any) -> None:
            run.summary.update(metrics)
            run.finish()

        self._guard(close)
        self._run = None

    def _guard(self, action: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:
            _log.warning("wandb mirror stops: %s", error)
            self._run = None
