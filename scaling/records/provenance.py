"""Where a number comes from: versions, device, date and command, stored with every run and every measurement."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recscale.scaling import host_memory

_PACKAGES = ("recscale", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "torch")


def environment() -> dict[str, Any]:
    """JSON-able provenance: date (UTC), command, versions, device, cores, and what else changes speed.

    `keeps_freed_memory`, `huge_pages`: see `recscale.scaling.host_memory`.
    """
    return {
        "date": now(),
        "command": command(),
        "versions": versions(),
        "device": device(),
        "cpu": _cpu(),
        "cores": len(cores()),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "keeps_freed_memory": host_memory.keeps_freed_memory(),
        "huge_pages": host_memory.has_huge_pages(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def cores() -> list[int]:
    """Indices of the cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def now() -> str:
    """Date and time to the second, UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@functools.cache
def commit() -> str | None:
    """Commit of the checkout this package runs from, None outside one."""
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def command() -> str:
    """The command line of this process, without the folder of the program."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def device() -> dict[str, Any]:
    """Platform, kind and number of the local devices."""
    import jax

    first = jax.local_devices()[0]
    return {"platform": first.platform, "kind": first.device_kind, "count": jax.local_device_count()}


def versions(packages: Iterable[str] = _PACKAGES) -> dict[str, str]:
    """Versions of Python and of these packages, as far as they are installed: by default all that decide results."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
