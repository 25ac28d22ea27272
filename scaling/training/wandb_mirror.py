"""Mirrors of a run's metrics. The files are the source; a mirror may lag, fail or be absent without consequence."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from .config import require_word

Mode = Literal["off", "offline", "online"]

_log = logging.getLogger(__name__)


def require_login() -> None:
    """Raises ValueError if wandb has no credentials: it would ask for them, and nobody may be there to answer."""
    if not _has_login():
        raise ValueError(
            "tracking.wandb is 'online', but wandb has no login: run `wandb login`, set WANDB_API_KEY, or take "
            "tracking.wandb=offline"
        )


@functools.cache
def _has_login() -> bool:
    try:
        with _nobody_to_ask():
            import wandb

            return wandb.login(verify=False)
    except Exception:  # without a terminal wandb raises what it would else ask
        return False


@contextlib.contextmanager
def _nobody_to_ask() -> Iterator[None]:
    """Standard input is no terminal while the block runs, so that libraries fail where they would wait for a person."""
    terminal = sys.stdin
    with open(os.devnull) as nobody:
        sys.stdin = nobody
        try:
            yield
        finally:
            sys.stdin = terminal


class WandbMirror:
    """Sends metrics lines to a wandb run; does nothing in mode "off" or once wandb has failed. It never asks anybody.

    Offline runs cannot be read back by wandb's API, which is why nothing here ever reads from it.
    """

    def __init__(self, mode: Mode, project: str, run_id: str, folder: Path, config: dict[str, Any]):
        require_word("tracking.wandb", mode, get_args(Mode))
        self._run: Any = None
        if mode == "off":
            return
        if mode == "online" and not _has_login():
            _log.warning("wandb mirror of run %s is off: there is no login; run `wandb login`", run_id)
            return
        try:
            with _nobody_to_ask():
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
