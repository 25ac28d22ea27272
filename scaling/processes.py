"""Several processes that train one run: how they find each other, what they agree on, and what happens when one dies.

Started before anything computes, from what Slurm, Open MPI or a TPU says, or from an address given by hand. All
processes compute the same; the first alone writes records and decides whatever depends on a clock.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np

# Exit code of what ends well when it is started again (EX_TEMPFAIL).
AGAIN = 75

# A process that is silent for so long is lost; the others end.
_HEARTBEAT_S = 30

# What is started first waits so long for the others.
_START_S = 300


# One thread everywhere: XLA, OpenBLAS and OpenMP read these when they start.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NPROC": "1",
}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Processes that are started inside the block compute on one thread each."""
    before = {name: os.environ.pop(name, None) for name in ONE_THREAD}
    os.environ.update(ONE_THREAD)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ |= {} if value is None else {name: value}


def connect(coordinator: str | None = None, processes: int | None = None, process_id: int | None = None) -> None:
    """Joins this process to the others of its run, if there are any; call before jax computes.

    Args:
        coordinator: host:port of process 0. processes: their number. process_id: of this one, from 0. All or none:
            without them Slurm (`srun`), Open MPI (`mpirun`) or the TPU says.

    Raises:
        ValueError: some of the three are missing, or do not fit.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process-id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(f"{', '.join(given)} go together; {', '.join(missing)} missing")
    limits: Any = {"heartbeat_timeout_seconds": _HEARTBEAT_S, "initialization_timeout": _START_S}
    if processes is not None and process_id is not None:
        if not 0 <= process_id < processes:
            raise ValueError(f"--process-id is {process_id}, expected 0 to {processes - 1} of {processes} processes")
        import jax

        # Deactivated: in a Slurm allocation jax would take the numbers of that.
        jax.distributed.initialize(coordinator, processes, process_id, None, "deactivate", **limits)
    elif scheduled() > 1:
        import jax

        jax.distributed.initialize(local_device_ids=_devices_of_a_whole_node(), **limits)
    elif has_tpu():
        import jax

        with contextlib.suppress(ValueError):  # no metadata says that there are others
            jax.distributed.initialize(**limits)


def has_tpu() -> bool:
    """Whether jax can use TPU chips of this machine. Imports nothing."""
    return bool(importlib.util.find_spec("libtpu") and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")))


def scheduled() -> int:
    """How many processes Slurm, Open MPI or a TPU's environment says that it has started together; 1 if none says."""
    environ = os.environ
    slurm = int(environ.get("SLURM_NTASKS", "1")) if "SLURM_STEP_NODELIST" in environ else 1
    mpi = int(environ.get("OMPI_COMM_WORLD_SIZE", "1"))
    return max(slurm, mpi, len(environ.get("TPU_WORKER_HOSTNAMES", "").split(",")))


def is_first() -> bool:
    """Whether this process writes what only one may write."""
    import jax

    return jax.process_index() == 0


def several() -> bool:
    """Whether this run has more than one process."""
    import jax

    return jax.process_count() > 1


def agreed(*values: float) -> tuple[float, ...]:
    """The first process's numbers, bit for bit, on every process; all must call."""
    if not several():
        return values
    import jax
    from jax.experimental import multihost_utils

    raw = np.asarray(values, np.float64).view(np.uint8)
    with jax.transfer_guard("allow"):
        found = np.asarray(multihost_utils.broadcast_one_to_all(raw), np.uint8)
    return tuple(found.view(np.float64).tolist())


def wait_for_all(name: str) -> None:
    """Returns when every process has called it."""
    if not several():
        return
    import jax
    from jax.experimental import multihost_utils

    with jax.transfer_guard("allow"):
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Ends this process at once, with a message and code 75, if an error ends its block while others compute.

    Without this it would wait for them to leave, and they for it. Those that wait for a process that is gone are told
    by their connections, or by heartbeats after half a minute.
    """
    try:
        yield
    except BaseException as error:
        if not several():
            raise
        import jax

        lost = isinstance(error, jax.errors.JaxRuntimeError)
        if not isinstance(error, jax.errors.JaxRuntimeError | ValueError | OSError):
            traceback.print_exc()
        said = str(error).partition("\n")[0] if lost else str(error)
        reason = f"{'another process of this run was lost, or its program failed' if lost else 'it failed'}: {said}"
        print(
            f"process {jax.process_index()} of {jax.process_count()} stops: {reason}. Start all of them again: the run "
            "goes on from its newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        os._exit(AGAIN if lost else 1)


def _devices_of_a_whole_node() -> list[int] | None:
    """All GPUs of a node that has one Slurm task; None leaves it at jax's one device a task."""
    alone = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0] == "1"
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return list(range(len(visible))) if alone and len(visible) > 1 else None
