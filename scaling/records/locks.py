"""Locks on files: one process works on a folder at a time. The kernel drops them when a process dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

# A lock is taken a moment before its owner's name is written.
_NAMED_WITHIN_S = 1.0


class Busy(BlockingIOError):
    """A lock another process holds; `owner` names the process and its host."""

    def __init__(self, message: str, owner: str):
        super().__init__(message)
        self.owner = owner


@contextlib.contextmanager
def hold(path: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Holds an exclusive lock on a file while the block runs; the file says who holds it.

    Raises:
        Busy: somebody else still holds it after `wait_s` seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as handle:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                owner = path.read_text(encoding="utf-8", errors="replace").strip()
                if time.monotonic() >= deadline + (0.0 if owner else _NAMED_WITHIN_S):
                    message = f"{path} is held by another process ({owner or 'unknown'})"
                    raise Busy(f"{message}; wait for it, or stop it and run the command again", owner) from None
                time.sleep(0.05)
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        try:
            yield
        finally:
            handle.truncate(0)


def is_held(path: Path) -> bool:
    """Whether some process holds a lock right now."""
    if not path.exists():
        return False
    with open(path, "a", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def launch_lock(out: Path | str) -> Path:
    """The file whose lock the launcher of a sweep's folder holds."""
    return Path(out) / "launch.lock"
