"""Which code serves an operation: XLA, the plain reference, or a kernel; chosen, fallen back from, and said why.

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

A kernel is a module, or any object, with the functions that the page of its operation (`<operation>/api.py`) lists:

    obstacle(target, *request) -> str | None            why it cannot serve a request, in words
    one function per pass(..., *, target, interpret)    `interpret`: run it in Pallas's interpreter, for tests on a CPU

Another distribution adds one through the entry-point group "recscale.kernels", named after the operation:

    [project.entry-points."recscale.kernels"]
    "hybrid_attention.my_impl" = "my_package.attention:kernel"

and `implementation="my_impl"`, or "hybrid_attention=my_impl" in the environment, then takes it; so does its address,
`implementation="my_package.attention:kernel"`. Its target is what programs are being built for, None if that is a CPU
or in no table. It is never picked without being named.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args

import jax
import numpy as np

from . import names, targets
from .blocks import beats_xla
from .targets import Target

Ours = Literal["xla", "reference", "pallas_tpu", "pallas_tpu_sc", "pallas_gpu"]

# A name of ours, the name of a kernel that another distribution brings, or a kernel's address.
Implementation = Ours | str

IMPLEMENTATIONS: tuple[Ours, ...] = get_args(Ours)

# Operation -> the kernels it has.
KERNELS: dict[str, tuple[Ours, ...]] = {
    "product_key_topk": ("pallas_tpu", "pallas_gpu"),
    "sparse_gather": ("pallas_tpu", "pallas_tpu_sc", "pallas_gpu"),
    "hybrid_attention": ("pallas_tpu", "pallas_gpu"),
    "w8a16_matmul": ("pallas_tpu", "pallas_gpu"),
    "per_token_ffn": ("pallas_tpu", "pallas_gpu"),
    "grouped_matmul": ("pallas_gpu",),
}

# Kernel -> its module in the operation's folder, and the target it is interpreted for where there is none of its kind.
_MODULES = {"pallas_tpu": ("tpu", "tpu-v5e"), "pallas_tpu_sc": ("tpu_sc", "tpu-v6e"), "pallas_gpu": ("gpu", "h100")}

# Platform -> implementations to try, best first.
_PREFERRED = {"tpu": ("pallas_tpu_sc", "pallas_tpu"), "gpu": ("pallas_gpu",)}

_GROUP = "recscale.kernels"
_VARIABLE = "RECSCALE_IMPLEMENTATION"

_log = logging.getLogger(__name__)
_told: set[tuple[str, str]] = set()
_chosen: contextvars.ContextVar[dict[str, dict[str, str]] | None] = contextvars.ContextVar(
    "recscale_implementations_chosen", default=None
)


class Refused(NotImplementedError):
    """The named implementation cannot serve a request; the message says why."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """What serves a request.

    Attributes:
        name: of the implementation.
        kernel: the module or object with its functions; None for "xla" and "reference".
        target: what the kernel is compiled for. interpret: whether it runs in the interpreter.
    """

    name: str
    kernel: Any = None
    target: Target | None = None
    interpret: Any = False

    def function(self, name: str) -> Callable[..., Any] | None:
        """A function of the kernel for its target; None if there is no kernel, or it has no such function."""
        found = getattr(self.kernel, name, None)
        return None if found is None else functools.partial(found, target=self.target, interpret=self.interpret)

    def call(self, name: str, *arguments: Any) -> Any:
        """The result of a function that every kernel of the operation has."""
        return functools.partial(getattr(self.kernel, name), target=self.target, interpret=self.interpret)(*arguments)


def choose(
    operation: str,
    implementation: Implementation | None,
    interpret: Any,
    *request: Any,
    function: str = "",
    measured_only: bool = False,
    obstacle: str | None = None,
    stays_with_xla: str = "",
) -> Backend:
    """What serves a request.

    Args:
        operation: a key of `KERNELS`.
        implementation: as the caller of the operation gave it.
        interpret: whether a kernel is to be interpreted.
        request: what the `obstacle` of the operation's kernels takes behind the target.
        function: name of the function called, where the operation has several.
        measured_only: see `resolve`.
        obstacle: a reason that holds for every kernel of the operation, None if there is none.
        stays_with_xla: why the request is XLA's unless an implementation is named; "" if it is not.

    Raises:
        ValueError: there is no such implementation; interpret=True without a kernel to interpret.
        Refused: the named implementation cannot serve the request; the message says why.
    """
    implementation = asked(operation, implementation)
    function = function or operation
    backends: dict[str, Backend] = {}
    if implementation is None and stays_with_xla:
        name = note(function, "xla", stays_with_xla)
    else:
        obstacles: dict[str, str | None] = {}
        for candidate in _candidates(operation, implementation):
            target, obstacles[candidate] = _target(candidate, interpret)
            kernel = kernel_of(operation, candidate)
            backends[candidate] = Backend(candidate, kernel, target, interpret)
            obstacles[candidate] = obstacle or obstacles[candidate] or kernel.obstacle(target, *request)
        name = resolve(function, implementation, obstacles, measured_only=measured_only)
    if interpret and name not in backends:
        raise ValueError(f"interpret=True needs a Pallas implementation, but {name!r} was chosen; name one")
    return backends.get(name) or Backend(name)


def kernel_of(operation: str, name: str) -> Any:
    """The module or object of a kernel, imported when first asked for.

    Raises:
        ValueError: there is no such kernel.
    """
    if name in _MODULES:
        return importlib.import_module(f".{operation}.{_MODULES[name][0]}", __package__)
    return names.load(_GROUP, name if ":" in name else f"{operation}.{name}", {}, "kernel")


def asked(operation: str, implementation: Implementation | None) -> str | None:
    """The implementation a caller asks for: its own name, else that of RECSCALE_IMPLEMENTATION, else None.

    Args:
        operation: a key of `KERNELS`.

    Raises:
        ValueError: the operation has no such implementation, or the variable names an operation that does not exist.
    """
    text = os.environ.get(_VARIABLE, "").strip()
    if implementation is not None or not text:
        return None if implementation is None else _known(implementation, operation)
    if "=" not in text:
        return _known(text, operation)
    pairs = [[side.strip() for side in part.partition("=")[::2]] for part in text.split(",")]
    for name, _ in pairs:
        if name not in KERNELS:
            raise ValueError(f"{_VARIABLE} names operation {name!r}{names.nearest(name, KERNELS)}")
    return next((_known(wanted, operation) for name, wanted in pairs if name == operation), None)


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
    implementation: Implementation | None,
    obstacles: Mapping[str, str | None],
    *,
    platform: str | None = None,
    measured_only: bool = False,
) -> str:
    """The name of the implementation that serves a request.

    Args:
        operation: name used in messages.
        implementation: None, one of `IMPLEMENTATIONS`, or a key of `obstacles`.
        obstacles: implementation -> None if it can serve this request, else the reason why not. "xla" and "reference"
            always can; an implementation that is missing here does not exist for the operation.
        platform: "cpu", "gpu" or "tpu"; None is the one programs are being built for (`targets.current_platform`).
        measured_only: a kernel must have been measured also in a program for a chip that is not here.

    Raises:
        ValueError: a name that is not an implementation.
        Refused: the named implementation cannot serve this request; the message says why.
    """
    if implementation is not None:
        if implementation not in obstacles:
            _known(implementation, operation)
        reason = _obstacle(implementation, obstacles)
        if reason is not None:
            raise Refused(f"{operation} cannot run as {implementation!r}: {reason}")
        return note(operation, implementation, "asked for")
    unproven = platform is None and (measured_only or not targets.is_scoped())
    reasons = []
    for candidate in _PREFERRED.get(platform or targets.current_platform(), ()):
        reason = _obstacle(candidate, obstacles)
        if reason is None and unproven and not beats_xla(operation, candidate, targets.current()):
            reason = "not measured to be faster on this kind of device (`recscale bench kernels --tune` does that)"
        if reason is None:
            return note(operation, candidate)
        reasons.append(f"{candidate}: {reason}")
    if reasons:
        _tell_once(operation, "; ".join(reasons))
    return note(operation, "xla", "; ".join(reasons))


def replicas_in_turn(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays, None and other values, whose replicas under vmap run one after the other.

    The scalars of a kernel, such as lengths that say which tiles it visits, cannot be batched.
    """

    def call(*arguments: Any) -> Any:
        # Names and numbers are no arrays, which vmap would ask for.
        fixed = {i: a for i, a in enumerate(arguments) if not isinstance(a, jax.Array | np.ndarray)}

        @jax.custom_batching.sequential_vmap
        def one(*arrays: Any) -> Any:
            rest = iter(arrays)
            return function(*(fixed[i] if i in fixed else next(rest) for i in range(len(arguments))))

        return one(*(a for i, a in enumerate(arguments) if i not in fixed))

    return call


def _candidates(operation: str, implementation: str | None) -> list[str]:
    # Only a kernel that may be chosen is imported: another platform's may not even be importable here.
    if implementation is None:
        return [name for name in _PREFERRED.get(targets.current_platform(), ()) if name in KERNELS[operation]]
    ours = implementation in IMPLEMENTATIONS
    return [implementation] if not ours or implementation in KERNELS[operation] else []


def _target(name: str, interpret: Any) -> tuple[Target | None, str | None]:
    """What a kernel is to be compiled for, or why there is nothing."""
    here = targets.current()
    if name not in _MODULES:
        return here, None
    platform = name.split("_")[1]
    if here is not None and here.platform == platform:
        return here, None
    if interpret:
        return targets.get_target(_MODULES[name][1]), None
    found = targets.current_platform() if here is None else here.name
    needed = "a TPU" if platform == "tpu" else "a Hopper GPU"
    return None, f"it needs {needed} of a known kind, or interpret=True; programs are being built for {found}"


def _known(implementation: str, operation: str) -> str:
    if implementation in IMPLEMENTATIONS or ":" in implementation:
        return implementation
    prefix = f"{operation}."
    theirs = [name.removeprefix(prefix) for name in names.available(_GROUP, {}) if name.startswith(prefix)]
    if implementation not in theirs:
        known = [*IMPLEMENTATIONS, *theirs]
        raise ValueError(f"implementation is {implementation!r}{names.nearest(implementation, known)}")
    return implementation


def _obstacle(implementation: str, obstacles: Mapping[str, str | None]) -> str | None:
    if implementation in ("xla", "reference"):
        return obstacles.get(implementation)
    if targets.partitions() > 1:
        return f"XLA splits this program over {targets.partitions()} devices and cannot split a kernel"
    return obstacles.get(implementation, "there is no such kernel for this operation")


def _tell_once(operation: str, reason: str) -> None:
    if (operation, reason) not in _told:
        _told.add((operation, reason))
        _log.warning("%s runs on XLA (%s)", operation, reason)
