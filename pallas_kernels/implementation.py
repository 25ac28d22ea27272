"""Which code serves an operation: XLA, the plain reference, or a Pallas kernel.

Every operation takes `implementation`: None picks the kernel of the present device and falls back to "xla", saying why
in one log line; a name forces that one and raises where it cannot serve the request. On a device, None only picks a
kernel that was right and faster than XLA when it was measured on that kind of device (`blocks.beats_xla`): one that was
merely compiled for it may be slow or wrong there. Programs built for a chip that is not here (`targets.compiling_for`)
have its kernels; operations whose XLA path wastes nothing (`measured_only`) keep to XLA there too.

RECSCALE_IMPLEMENTATION in the environment names what None stands for, wherever a model calls an operation: "xla", or
"hybrid_attention=pallas_gpu,sparse_gather=xla". It is read when a program is traced.

    xla            plain JAX, arranged for speed and memory; correct everywhere
    reference      plain JAX, obviously right; the oracle of the tests
    pallas_tpu     Pallas on the TPU's TensorCore
    pallas_tpu_sc  Pallas on the TPU's SparseCore
    pallas_gpu     Pallas (Mosaic GPU) on Hopper and newer
"""

from __future__ import annotations

import contextlib
import contextvars
import difflib
import logging
import os
from collections.abc import Iterator, Mapping

from .blocks import beats_xla
from .cases import OPERATIONS
from .targets import current, current_platform, is_scoped, partitions

IMPLEMENTATIONS = ("xla", "reference", "pallas_tpu", "pallas_tpu_sc", "pallas_gpu")

# Platform -> implementations to try, best first.
_PREFERRED = {"tpu": ("pallas_tpu_sc", "pallas_tpu"), "gpu": ("pallas_gpu",), "cuda": ("pallas_gpu",)}

_VARIABLE = "RECSCALE_IMPLEMENTATION"

_log = logging.getLogger(__name__)
_told: set[tuple[str, str]] = set()
_chosen: contextvars.ContextVar[dict[str, dict[str, str]] | None] = contextvars.ContextVar(
    "recscale_implementations_chosen", default=None
)


class Refused(NotImplementedError):
    """The named implementation cannot serve a request; the message says why."""


def asked(operation: str, implementation: str | None) -> str | None:
    """The implementation a caller asks for: its own name, else that of RECSCALE_IMPLEMENTATION, else None.

    Args:
        operation: one of `cases.OPERATIONS`.

    Raises:
        ValueError: the variable names an operation or an implementation that does not exist.
    """
    text = os.environ.get(_VARIABLE, "").strip()
    if implementation is not None or not text:
        return implementation
    if "=" not in text:
        return _known(text)
    pairs = [[side.strip() for side in part.partition("=")[::2]] for part in text.split(",")]
    for name, _ in pairs:
        if name not in OPERATIONS:
            close = difflib.get_close_matches(name, OPERATIONS, n=1, cutoff=0.0)[0]
            raise ValueError(f"{_VARIABLE} names operation {name!r}; did you mean {close!r}? {', '.join(OPERATIONS)}")
    return next((_known(wanted) for name, wanted in pairs if name == operation), None)


@contextlib.contextmanager
def recording(into: dict[str, dict[str, str]]) -> Iterator[None]:
    """Adds operation -> {implementation: why it and no other} of what is traced within."""
    token = _chosen.set(into)
    try:
        yield
    finally:
        _chosen.reset(token)


def note(operation: str, implementation: str, reason: str = "") -> str:
    """Records a choice made elsewhere than in `resolve`; returns the implementation."""
    found = _chosen.get()
    if found is not None:
        found.setdefault(operation, {})[implementation] = reason
    return implementation


def resolve(
    operation: str,
    implementation: str | None,
    obstacles: Mapping[str, str | None],
    *,
    platform: str | None = None,
    measured_only: bool = False,
) -> str:
    """The name of the implementation that serves a request.

    Args:
        operation: name used in messages.
        implementation: None, or one of `IMPLEMENTATIONS`.
        obstacles: implementation -> None if it can serve this request, else the reason why not. "xla" and "reference"
            always can; an implementation that is missing here does not exist for the operation.
        platform: "cpu", "gpu" or "tpu"; None is the one programs are being built for (`targets.current_platform`).
        measured_only: a kernel must have been measured also in a program for a chip that is not here.

    Raises:
        ValueError: a name that is not an implementation.
        Refused: the named implementation cannot serve this request; the message says why.
    """
    if implementation is not None:
        reason = _obstacle(_known(implementation), obstacles)
        if reason is not None:
            raise Refused(f"{operation} cannot run as {implementation!r}: {reason}")
        return note(operation, implementation, "asked for")
    unproven = platform is None and (measured_only or not is_scoped())
    platform = platform or current_platform()
    reasons = []
    for candidate in _PREFERRED.get(platform, ()):
        reason = _obstacle(candidate, obstacles)
        if reason is None and unproven and not beats_xla(operation, candidate, current()):
            reason = "not measured to be faster on this kind of device (`recscale bench kernels --tune` does that)"
        if reason is None:
            return note(operation, candidate)
        reasons.append(f"{candidate}: {reason}")
    if reasons:
        _tell_once(operation, "; ".join(reasons))
    return note(operation, "xla", "; ".join(reasons))


def _known(implementation: str) -> str:
    if implementation not in IMPLEMENTATIONS:
        close = difflib.get_close_matches(implementation, IMPLEMENTATIONS, n=1, cutoff=0.0)
        raise ValueError(
            f"implementation is {implementation!r}; did you mean {close[0]!r}? Known: {', '.join(IMPLEMENTATIONS)}"
        )
    return implementation


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
