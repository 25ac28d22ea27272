"""Which code serves an operation: XLA, the plain reference, or a Pallas kernel.

Every operation takes `implementation`: None picks the kernel of the present device and falls back to "xla", saying why
in one log line; a name forces that one and raises where it cannot serve the request. On a device, None only picks a
kernel that was measured on that kind of device (`blocks.is_measured`): one that was merely compiled for it may be slow
or wrong there. Programs built for a chip that is not here (`targets.compiling_for`) have its kernels.

    xla            plain JAX, arranged for speed and memory; correct everywhere
    reference      plain JAX, obviously right; the oracle of the tests
    pallas_tpu     Pallas on the TPU's TensorCore
    pallas_tpu_sc  Pallas on the TPU's SparseCore
    pallas_gpu     Pallas (Mosaic GPU) on Hopper and newer
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping

from .blocks import is_measured
from .targets import current, current_platform, is_scoped, partitions

IMPLEMENTATIONS = ("xla", "reference", "pallas_tpu", "pallas_tpu_sc", "pallas_gpu")

# Platform -> implementations to try, best first.
_PREFERRED = {"tpu": ("pallas_tpu_sc", "pallas_tpu"), "gpu": ("pallas_gpu",), "cuda": ("pallas_gpu",)}

_log = logging.getLogger(__name__)
_told: set[tuple[str, str]] = set()


class Refused(NotImplementedError):
    """The named implementation cannot serve a request; the message says why."""


def resolve(
    operation: str, implementation: str | None, obstacles: Mapping[str, str | None], *, platform: str | None = None
) -> str:
    """The name of the implementation that serves a request.

    Args:
        operation: name used in messages.
        implementation: None, or one of `IMPLEMENTATIONS`.
        obstacles: implementation -> None if it can serve this request, else the reason why not. "xla" and "reference"
            always can; an implementation that is missing here does not exist for the operation.
        platform: "cpu", "gpu" or "tpu"; None is the one programs are being built for (`targets.current_platform`).

    Raises:
        ValueError: a name that is not an implementation.
        Refused: the named implementation cannot serve this request; the message says why.
    """
    if implementation is not None:
        if implementation not in IMPLEMENTATIONS:
            close = difflib.get_close_matches(implementation, IMPLEMENTATIONS, n=1, cutoff=0.0)
            raise ValueError(
                f"implementation is {implementation!r}; did you mean {close[0]!r}? Known: {', '.join(IMPLEMENTATIONS)}"
            )
        reason = _obstacle(implementation, obstacles)
        if reason is not None:
            raise Refused(f"{operation} cannot run as {implementation!r}: {reason}")
        return implementation
    unproven = platform is None and not is_scoped()
    platform = platform or current_platform()
    reasons = []
    for candidate in _PREFERRED.get(platform, ()):
        reason = _obstacle(candidate, obstacles)
        if reason is None and unproven and not is_measured(operation, candidate, current()):
            reason = "never measured on this kind of device; name it, or run `recscale bench kernels --tune` here"
        if reason is None:
            return candidate
        reasons.append(f"{candidate}: {reason}")
    if reasons:
        _tell_once(operation, "; ".join(reasons))
    return "xla"


def _obstacle(implementation: str, obstacles: Mapping[str, str | None]) -> str | None:
    if implementation in ("xla", "reference"):
        return obstacles.get(implementation)
    if partitions() > 1:
        return f"XLA splits this program over {partitions()} devices and cannot split a kernel"
    return obstacles.get(implementation, "there is no such kernel for this operation")


def _tell_once(operation: str, reason: str) -> None:
    if (operation, reason) not in _told:
        _told.add((operation, reason))
        _log.warning("%s runs on XLA (%s)", operation, reason)
