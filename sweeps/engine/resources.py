"""What a job needs of a machine: the plan's predictions times a margin, rounded so that like jobs ask for the same."""

from __future__ import annotations

import dataclasses
import math

from recscale.scaling.parallel import parse_mesh

from .job import Job

# Predictions are estimates of a machine that is not the one that trains; what is asked for is not charged where it is
# not used, and what was too little ends a job.
TIME_MARGIN, MEMORY_MARGIN = 4.0, 1.5

# Least that is asked for: a queue's own overheads take minutes.
_LEAST_S, _LEAST_BYTES = 600.0, 2 * 2**30


@dataclasses.dataclass(frozen=True)
class Resources:
    """Of one job. seconds: of wall time. memory_bytes: of the host. cores: of the CPU. devices: accelerators, 0 for
    none. nodes: machines they are spread over."""

    seconds: float
    memory_bytes: int
    cores: int = 1
    devices: int = 0
    nodes: int = 1


def resources(job: Job, mesh: str = "", gpus_per_run: int = 0, gpus_per_node: int | None = None) -> Resources:
    """What a job asks for: time and memory in powers of two, so that a plan makes a handful of arrays.

    Args:
        mesh: of the launch, in place of the job's own.
        gpus_per_run: accelerators of a job whose mesh names fewer; 0 trains on CPU cores.
        gpus_per_node: of the cluster's machines; a mesh of more is spread over several.
    """
    mesh = mesh or job.mesh
    ways = math.prod(parse_mesh(mesh).values()) if mesh else 1
    devices = max(gpus_per_run, ways) if gpus_per_run else 0
    nodes = math.ceil(devices / gpus_per_node) if gpus_per_node else 1
    return Resources(
        seconds=_LEAST_S * _next_power(TIME_MARGIN * job.seconds / _LEAST_S),
        memory_bytes=_LEAST_BYTES * _next_power(MEMORY_MARGIN * job.memory_bytes / _LEAST_BYTES),
        cores=devices or ways,
        devices=devices,
        nodes=nodes,
    )


def _next_power(x: float) -> int:
    """The least power of two that is not below x, at least 1."""
    return 2 ** math.ceil(math.log2(max(x, 1.0)))
