"""Block sizes of kernels: measured ones, kept as data per kind of device, else the kernel's own rule.

    <operation>/tuned/<device kind>.json    {"provenance": {device, date, versions, command},
                                             "blocks": {implementation: {case key: {name: size}}},
                                             "times_xla": {implementation: {case: times faster than XLA}}}

A file is only ever written from a measurement on that device (`recscale bench kernels --tune`); without one every
kernel uses its heuristic. A kernel module may say which sizes are worth trying:

    candidates(key, heuristic, target) -> iterable of {name: size}
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .targets import Target


@dataclasses.dataclass(frozen=True)
class Asked:
    """One request for block sizes: what the kernel would take by its own rule, and for which target."""

    operation: str
    implementation: str
    key: str
    heuristic: dict[str, int]
    target: Target | None


@dataclasses.dataclass
class _Trial:
    sizes: Mapping[str, Mapping[str, int]]
    asked: list[Asked]


_trial: contextvars.ContextVar[_Trial | None] = contextvars.ContextVar("recscale_block_trial", default=None)


@contextlib.contextmanager
def trial(sizes: Mapping[str, Mapping[str, int]] | None = None) -> Iterator[list[Asked]]:
    """Within it `sizes` (case key -> sizes) come before measured ones; yields the list of all requests made.

    Kernels ask while they are traced, so JAX's caches must be empty (`jax.clear_caches`) for a trial to see them.
    """
    own = _Trial(sizes or {}, [])
    token = _trial.set(own)
    try:
        yield own.asked
    finally:
        _trial.reset(token)


def block_sizes(
    operation: str, implementation: str, key: str, heuristic: Mapping[str, int], target: Target | None
) -> dict[str, int]:
    """The measured block sizes of a case on a target, or `heuristic` where there are none.

    Args:
        key: the shape, written by the kernel, such as "n256_K32_p128".
    """
    measured = {} if target is None else _tuned(operation, target.device_kind, "blocks")
    chosen = dict(heuristic) | measured.get(implementation, {}).get(key, {})
    attempt = _trial.get()
    if attempt is None:
        return chosen
    attempt.asked.append(Asked(operation, implementation, key, dict(heuristic), target))
    return chosen | dict(attempt.sizes.get(key, {}))


def beats_xla(operation: str, implementation: str, target: Target | None) -> bool:
    """Whether an implementation, its numbers checked first, was measured on that kind of device and is faster than XLA.

    Faster is the geometric mean over the shapes it was measured at; one where XLA does not run (None) says nothing.
    """
    if target is None:
        return False
    times = _tuned(operation, target.device_kind, "times_xla").get(implementation)
    known = [math.log(time) for time in (times or {}).values() if time is not None]
    return times is not None and sum(known) >= 0


@functools.cache
def _tuned(operation: str, device_kind: str, part: str) -> dict[str, dict[str, Any]]:
    path = tuned_path(operation, device_kind)
    return json.loads(path.read_text(encoding="utf-8"))[part] if path.is_file() else {}


def tuned_path(operation: str, device_kind: str) -> Path:
    """Where the measured block sizes of an operation on a kind of device are kept."""
    return Path(__file__).parent / operation / "tuned" / f"{device_kind.lower().replace(' ', '_')}.json"


def write_tuned(
    operation: str,
    device_kind: str,
    implementation: str,
    sizes: Mapping[str, Mapping[str, int]],
    times_xla: Mapping[str, float | None],
    provenance: Mapping[str, Any],
    folder: Path | None = None,
) -> Path:
    """Lays what was measured of one implementation over what is kept for a device; returns the file.

    Args:
        sizes: case key -> block sizes that beat the kernel's rule. times_xla: case -> how many times faster than XLA.
        folder: where the file is written instead of the package, for `adopt`.
    """
    kept_at = path = tuned_path(operation, device_kind)
    if folder is not None:
        path = folder / operation / path.name
        kept_at = path if path.is_file() else kept_at
    known = json.loads(kept_at.read_text(encoding="utf-8")) if kept_at.is_file() else {}
    content: dict[str, Any] = {"provenance": dict(provenance)}
    for part, new in (("blocks", sizes), ("times_xla", times_xla)):
        kept = known.get(part, {})
        content[part] = kept | {implementation: kept.get(implementation, {}) | dict(new)}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")
    _tuned.cache_clear()
    return path


def adopt(folder: Path) -> list[Path]:
    """Copies the files that `write_tuned` wrote to a folder into the package; returns where they are now."""
    copied = []
    for path in sorted(folder.glob("*/*.json")):
        home = Path(__file__).parent / path.parent.name / "tuned" / path.name
        home.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, home)
        copied.append(home)
    _tuned.cache_clear()
    return copied
