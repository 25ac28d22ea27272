"""Chips that kernels are written for: their limits, their peaks, and which of them a program is being built for.

A kernel asks `current()` for its target and never the default device, so that a program can be compiled on a machine
without the chip: inside `compiling_for("tpu-v6e")` every operation picks the kernels and block sizes of that chip.

Figures are per JAX device (a 7x chip is two devices). TPU rows are those of JAX's own hardware table, GPU rows the
vendor's. Bandwidth in bytes/s, memory in bytes, peaks in FLOP/s (int8: operations/s).
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

import jax

from recscale.pallas_kernels.names import nearest

_KIB, _MIB = 2**10, 2**20


@dataclasses.dataclass(frozen=True)
class SparseCores:
    """SparseCores of one device: cores x subcores x lanes, each subcore with its own vector memory."""

    cores: int
    subcores: int
    lanes: int
    vmem_bytes: int


@dataclasses.dataclass(frozen=True)
class Target:
    """One kind of device.

    Attributes:
        name: as on the command line. platform: "tpu" or "gpu". device_kind: JAX's name of the device.
        topology: of the compile-only devices, for a TPU. hbm_bytes, hbm_bytes_per_s: device memory.
        bf16_flops, int8_ops: matrix peaks per second; int8_ops is None where the table has none.
        vmem_bytes: vector memory of a TensorCore, or usable shared memory of one SM.
        smem_bytes: scalar memory of a TPU. sms: streaming multiprocessors of a GPU.
        sparse_cores: of a TPU that has them.
    """

    name: str
    platform: str
    device_kind: str
    topology: str | None
    hbm_bytes: int
    hbm_bytes_per_s: float
    bf16_flops: float
    int8_ops: float | None
    vmem_bytes: int
    smem_bytes: int = 0
    sms: int = 0
    sparse_cores: SparseCores | None = None

    def floor_s(self, bytes_moved: float, flops: float, *, int8: bool = False) -> float:
        """The time no program can beat: max(bytes / bandwidth, FLOPs / peak)."""
        peak = self.int8_ops if int8 and self.int8_ops else self.bf16_flops
        return max(bytes_moved / self.hbm_bytes_per_s, flops / peak)


_SC = SparseCores
TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target("tpu-v5e", "tpu", "TPU v5 lite", "v5e:2x2", int(17.2e9), 0.82e12, 197e12, 394e12, 128 * _MIB, _MIB),
        Target(
            "tpu-v5p", "tpu", "TPU v5", "v5p:2x2x1", int(103e9), 2.46e12, 459e12, 918e12, 64 * _MIB, _MIB,
            sparse_cores=_SC(4, 16, 8, 512 * _KIB),
        ),
        Target(
            "tpu-v6e", "tpu", "TPU v6 lite", "v6e:2x2", int(34e9), 1.64e12, 920e12, 1840e12, 128 * _MIB, _MIB,
            sparse_cores=_SC(2, 16, 8, 256 * _KIB),
        ),
        Target(
            "tpu-7x", "tpu", "TPU7x", "tpu7x:2x2x1", int(103e9), 3.7e12, 1155e12, None, 64 * _MIB, _MIB,
            sparse_cores=_SC(2, 16, 16, 512 * _KIB),
        ),
        Target(
            "h100", "gpu", "NVIDIA H100 80GB HBM3", None, int(84.9e9), 3.35e12, 989e12, 1979e12, 227 * _KIB, sms=132,
        ),
        Target("h200", "gpu", "NVIDIA H200", None, int(150e9), 4.8e12, 989e12, 1979e12, 227 * _KIB, sms=132),
    )
}  # fmt: skip

_scoped: contextvars.ContextVar[Target | None] = contextvars.ContextVar("recscale_target", default=None)
_ways: contextvars.ContextVar[int] = contextvars.ContextVar("recscale_partitions", default=1)


def get_target(name: str) -> Target:
    """The target of that name.

    Raises:
        ValueError: no such target; the message names the nearest one.
    """
    if name not in TARGETS:
        raise ValueError(f"target is {name!r}{nearest(name, TARGETS)}")
    return TARGETS[name]


@contextlib.contextmanager
def compiling_for(target: str | Target) -> Iterator[Target]:
    """Within it, operations choose their code for `target` instead of the present device.

    JAX's caches do not know of targets, so they are emptied on the way in and out.
    """
    target = get_target(target) if isinstance(target, str) else target
    jax.clear_caches()
    token = _scoped.set(target)
    try:
        yield target
    finally:
        _scoped.reset(token)
        jax.clear_caches()


def current() -> Target | None:
    """The target of the enclosing `compiling_for`, else that of the present device; None if it is in no table."""
    scoped = _scoped.get()
    if scoped is not None or jax.default_backend() == "cpu":
        return scoped
    kind = jax.devices()[0].device_kind
    return next((t for t in TARGETS.values() if t.device_kind == kind), None)


def is_scoped() -> bool:
    """Whether programs are being built inside `compiling_for`."""
    return _scoped.get() is not None


def current_platform() -> str:
    """The platform programs are being built for: "cpu", "gpu" or "tpu"."""
    scoped = _scoped.get()
    return scoped.platform if scoped is not None else jax.default_backend()


@contextlib.contextmanager
def partitioned(ways: int) -> Iterator[None]:
    """Within it, programs are traced that XLA will split over so many devices.

    XLA cannot split a kernel, so operations serve such a program with XLA. Inside `jax.shard_map`, where every device
    runs a program of its own, say `partitioned(1)` and kernels are back.
    """
    token = _ways.set(ways)
    try:
        yield
    finally:
        _ways.reset(token)


def partitions() -> int:
    """Over how many devices XLA will split the program being traced."""
    return _ways.get()
