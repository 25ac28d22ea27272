"""Huge pages for the scratch memory of CPU programs.

XLA takes the temporaries of a program from malloc and gives them back after every call. glibc returns blocks above
32 MiB to the kernel, so each training step of a large batch touches fresh 4 KiB pages: a RankMixer step with 350 MB
of temporaries takes 90,000 page faults, a quarter of its time. Where the kernel offers transparent huge pages on
request, glibc (2.35 and later) asks for them if told so before the process starts; the faults drop to about 500.

PyTorch on CPU has the same cost and gains as well, so a comparison sets this for both.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path

_TUNABLE = "glibc.malloc.hugetlb"
_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_FIRST_GLIBC = (2, 35)


def huge_page_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment variables to start a process with so that malloc asks for huge pages; {} where that is no use.

    It cannot be switched on inside a running process. A setting somebody made already is kept.
    """
    environ = os.environ if environ is None else environ
    tunables = environ.get("GLIBC_TUNABLES", "")
    if _TUNABLE in tunables or not _offered():
        return {}
    return {"GLIBC_TUNABLES": f"{tunables}:{_TUNABLE}=1".lstrip(":")}


def has_huge_pages(environ: Mapping[str, str] | None = None) -> bool:
    """Whether large blocks of this process are on huge pages: asked for, or given to everybody."""
    environ = os.environ if environ is None else environ
    return _kernel_mode() == "always" or (_offered() and f"{_TUNABLE}=1" in environ.get("GLIBC_TUNABLES", ""))


def _offered() -> bool:
    name, version = platform.libc_ver()
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    return name == "glibc" and numbers >= _FIRST_GLIBC and _kernel_mode() == "madvise"


def _kernel_mode() -> str:
    """ "always", "madvise", "never", or "" where the kernel has no such thing."""
    text = _MODE.read_text() if _MODE.is_file() else ""
    return text.partition("[")[2].partition("]")[0]
