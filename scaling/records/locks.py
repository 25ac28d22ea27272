"""Leases: one process works on a folder at a time, on any disk that machines share; `flock` is not needed.

A lease is a file made by its owner alone, who renews its time every few seconds. A process of this machine that has
died loses it at once; one of another machine when it has not renewed it for a minute.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from .files import write_atomically

# Seconds between two renewals, and after the last one until others may take the lease.
BEAT_S, EXPIRES_S = 5.0, 60.0

# A lease is made a moment before its owner is written into it.
_NAMED_WITHIN_S = 2.0

# Exit code of a process that was taken for dead and another took its place: started again, it waits its turn.
_REPLACED = 75


class Busy(BlockingIOError):
    """A lease another process holds; `owner` names the process and its host."""

    def __init__(self, message: str, owner: str):
        super().__init__(message)
        self.owner = owner


@dataclasses.dataclass(frozen=True)
class _Owner:
    """Who holds a lease. machine: a host, as processes see it that see each other. started: of the process."""

    host: str
    pid: int
    machine: str
    started: str
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def dead(self) -> bool:
        """Whether it ran on this machine and is gone."""
        return self.machine == _machine() and _started(self.pid) != self.started


@contextlib.contextmanager
def hold(path: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Holds a lease while the block runs; the file says who holds it, and is gone afterwards.

    A process that was suspended for so long that another took its lease ends at once, with code 75.

    Raises:
        Busy: somebody else still holds it after `wait_s` seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = _Owner(socket.gethostname(), os.getpid(), _machine(), _started(os.getpid()), secrets.token_hex(8))
    deadline = time.monotonic() + wait_s
    while not _take(path, mine):
        if time.monotonic() >= deadline:
            owner = str(_owner(path) or "unknown")
            message = f"{path} is held by another process ({owner})"
            raise Busy(f"{message}; wait for it, or stop it and run the command again", owner)
        time.sleep(0.05)
    _start_beating(os.getpid())
    _held[path] = mine
    try:
        yield
    finally:
        del _held[path]
        if _owner(path) == mine:
            path.unlink(missing_ok=True)


def is_held(path: Path) -> bool:
    """Whether some process holds a lease right now."""
    return path.exists() and not _is_stale(path, _owner(path), time.time())


def launch_lock(out: Path | str) -> Path:
    """The file whose lease the launcher of a sweep's folder holds."""
    return Path(out) / "launch.lock"


def _take(path: Path, mine: _Owner) -> bool:
    try:
        made = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return _take_over(path, mine)
    with os.fdopen(made, "w", encoding="utf-8") as handle:
        handle.write(json.dumps(dataclasses.asdict(mine)))
    return True


def _take_over(path: Path, mine: _Owner) -> bool:
    """Takes a lease whose owner is gone: of all who try, the one who makes the claim on that very lease."""
    owner = _owner(path)
    if not _is_stale(path, owner, _disk_time(path.parent)):
        return False
    claim = path.with_name(f"{path.name}.{owner.token if owner else 'unknown'}")
    try:
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):
            if _disk_time(path.parent) - claim.stat().st_mtime > EXPIRES_S:  # who made it died over it
                claim.unlink()
        return False
    try:
        if _owner(path) != owner:  # somebody else has been through with it
            return False
        write_atomically(path, json.dumps(dataclasses.asdict(mine)))
        return True
    finally:
        claim.unlink(missing_ok=True)


# The leases of this process. One thread renews them, so that those of a process that dies expire together.
_held: dict[Path, _Owner] = {}


@functools.cache
def _start_beating(pid: int) -> None:
    threading.Thread(target=_beat, daemon=True).start()


def _beat() -> None:
    while True:
        time.sleep(BEAT_S)
        for path, mine in list(_held.items()):
            owner = _owner(path)
            if owner is not None and owner != mine and path in _held:
                print(f"{path} was taken over by {owner}: this process had stood still; it ends", file=sys.stderr)
                os._exit(_REPLACED)
            with contextlib.suppress(OSError):
                os.utime(path)


def _owner(path: Path) -> _Owner | None:
    """Who holds a lease; None where nobody does, or it is not said (yet)."""
    try:
        return _Owner(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _is_stale(path: Path, owner: _Owner | None, now: float) -> bool:
    if owner is not None and owner.dead:
        return True
    try:
        age = now - path.stat().st_mtime
    except FileNotFoundError:
        return False  # it was given back a moment ago
    return age > (_NAMED_WITHIN_S if owner is None else EXPIRES_S)


def _disk_time(folder: Path) -> float:
    """What time it is where the folder is: another machine's clock may differ."""
    probe = folder / f".{secrets.token_hex(8)}.time"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


@functools.cache
def _machine() -> str:
    """This host as far as its processes see each other: containers of one host do not."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _started(pid: int) -> str:
    """When a process of this machine started, in the kernel's count; "" if there is none. A number is used again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    except OSError:
        pass
    if Path("/proc/self").exists():
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "running"
