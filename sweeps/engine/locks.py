"""Locks on files: one launcher a folder, one process a job. The kernel drops them when a process dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO


class Busy(RuntimeError):
    """Another launcher works on the same folder."""


@contextlib.contextmanager
def hold(path: Path, wait_s: float = 0.0) -> Iterator[IO[str]]:
    """Holds an exclusive lock on a file while the block runs.

    Raises:
        BlockingIOError: somebody else still holds it after `wait_s` seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as handle:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise BlockingIOError(f"{path} is held by another process") from None
                time.sleep(0.05)
        yield handle


@contextlib.contextmanager
def only_launcher(out: Path) -> Iterator[None]:
    """Makes this process the only launcher of a folder for as long as the block runs.

    Raises:
        Busy: there is one already; the message names its process.
    """
    path = _launch_lock(out)
    with contextlib.ExitStack() as stack:
        try:
            handle = stack.enter_context(hold(path))
        except BlockingIOError:
            owner = path.read_text(encoding="utf-8").strip() or "unknown"
            raise Busy(
                f"another launcher ({owner}) is working on {out}; wait for it, or stop it and launch again"
            ) from None
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        yield


def has_launcher(out: Path) -> bool:
    """Whether a launcher is working on a folder right now."""
    if not _launch_lock(out).exists():
        return False
    try:
        with hold(_launch_lock(out)):
            return False
    except BlockingIOError:
        return True


def _launch_lock(out: Path) -> Path:
    return out / "launch.lock"
