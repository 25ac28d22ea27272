"""Two settings of Linux that make training on a CPU faster: memory that is freed stays with the process, and large
blocks lie on huge pages. And how much memory is free.

Kept memory: XLA allocates the temporaries of a step with malloc and frees them after it. glibc returns freed blocks
above 32 MiB to the kernel, so the next step starts on new pages, which the kernel clears and maps one by one: a
RankMixer step with 350 MB of temporaries spends a quarter of its time on 90,000 page faults. If glibc keeps what is
freed, the second step has none, and is a fifth faster. PyTorch on CPU gains as much; a comparison sets this for both.

Huge pages: a table of hundreds of megabytes covers more pages of 4 KiB than a core's address cache (TLB) has entries,
so reading and writing its rows takes several times as long as on pages of 2 MiB. Where the kernel gives those on
request, glibc (2.35 and later) requests them if an environment variable says so before the process starts.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_NEVER_TRIM = 2**31 - 1

_TUNABLE = "glibc.malloc.hugetlb"
_FIRST_GLIBC = (2, 35)
_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")

_kept = False


def keep_freed_memory() -> bool:
    """Makes malloc keep freed blocks for reuse, for the rest of this process; returns whether it could.

    Call it before the first computation: threads that exist keep their own arenas. The process then holds its largest
    footprint until it ends. Only glibc can; elsewhere nothing happens and the result is False.
    """
    global _kept
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # No blocks outside the heap, nothing given back from its end, and one heap for all threads, so that what one
    # frees another can take.
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER_TRIM), (_ARENA_MAX, 1))
    _kept = all([mallopt(name, value) == 1 for name, value in settings])
    return _kept


def keeps_freed_memory() -> bool:
    """Whether `keep_freed_memory` took effect in this process."""
    return _kept


def huge_page_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables to start a process with so that malloc asks for huge pages; {} where that is no use or settled."""
    tunables = (os.environ if environ is None else environ).get("GLIBC_TUNABLES", "")
    if _TUNABLE in tunables or not _offered():
        return {}
    return {"GLIBC_TUNABLES": f"{tunables}:{_TUNABLE}=1".lstrip(":")}


def has_huge_pages(environ: Mapping[str, str] | None = None) -> bool:
    """Whether large blocks of this process are on huge pages: asked for, or given to everybody."""
    environ = os.environ if environ is None else environ
    return _kernel_mode() == "always" or (_offered() and f"{_TUNABLE}=1" in environ.get("GLIBC_TUNABLES", ""))


def restart_with_huge_pages() -> None:
    """Starts the command `recscale` again with huge pages, if they are to be had and it has none; else does nothing.

    A process that only calls this package is never restarted.
    """
    extra = huge_page_environment()
    if extra and Path(sys.argv[0]).name == "recscale":
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | extra)


def _offered() -> bool:
    name, version = platform.libc_ver()
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    return name == "glibc" and numbers >= _FIRST_GLIBC and _kernel_mode() == "madvise"


def _kernel_mode() -> str:
    """ "always", "madvise", "never", or "" where the kernel has no such thing."""
    text = _MODE.read_text() if _MODE.is_file() else ""
    return text.partition("[")[2].partition("]")[0]


def free_bytes() -> int:
    """Memory a new process could get: the smaller of what the kernel calls available and what the cgroup leaves."""
    free = [_available()]
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free.append(int(text) - int(used.read_text()) + _reclaimable())
    return max(min(free), 0)


def _available() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _reclaimable() -> int:
    """File cache the cgroup counts as used but gives back on demand."""
    stat = Path("/sys/fs/cgroup/memory.stat")
    lines = stat.read_text().splitlines() if stat.is_file() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
