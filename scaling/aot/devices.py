"""Compile-only devices of a target: what a program is compiled for where the chip is not there."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from typing import Any

from jax.experimental import topologies

from recscale.pallas_kernels.targets import Target

# Topologies of growing size, as libtpu names them. v5e and v6e lie in a plane, v5p and 7x in a block; a 7x chip is two
# devices.
_PLANE = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_BLOCK = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
_GPUS_PER_HOST = 8


# Of `jax.Device`, a class without a description that type checkers could read.
Devices = Sequence[Any]


def topology_name(target: Target, devices: int) -> str:
    """The smallest topology of a TPU with at least so many devices, such as `v5e:16x16`.

    Raises:
        ValueError: there is none so large.
    """
    chip, _, own = (target.topology or "").partition(":")
    sizes = _BLOCK if own.count("x") == 2 else _PLANE
    per_chip = 2 if chip == "tpu7x" else 1
    for chips, shape in sizes.items():
        if chips * per_chip >= devices:
            return f"{chip}:{shape}"
    raise ValueError(f"a mesh of {devices} devices is larger than {target.name} allows ({max(sizes) * per_chip})")


def compile_only_devices(target: Target, devices: int) -> Devices:
    """At least `devices` devices of a target that can be compiled for and nothing else.

    Raises:
        ValueError: no topology is so large.
    """
    if target.platform == "tpu":
        topology: Any = topologies.get_topology_desc(platform="tpu", topology_name=topology_name(target, devices))
    else:
        hosts = -(-devices // _GPUS_PER_HOST)
        topology = topologies.get_topology_desc(
            topology_name=target.name,
            platform="cuda",
            target_config=_description(target),
            topology=f"1x{hosts}x{_GPUS_PER_HOST}",
        )
    return list(topology.devices)


def _description(target: Target) -> str:
    """What XLA knows a GPU by."""
    package = importlib.resources.files("recscale.pallas_kernels.targets")
    return (package / f"{target.name}.txtpb").read_text(encoding="utf-8")
