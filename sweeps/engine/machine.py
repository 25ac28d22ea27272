"""What this machine has: cores, free memory, accelerators, and how fast one core multiplies matrices.

Nothing here imports jax: the launcher must know the machine before any worker starts a backend.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import subprocess
import sys

from recscale.scaling.host_memory import free_bytes as free_memory_bytes
from recscale.scaling.processes import ONE_THREAD, has_tpu
from recscale.scaling.records.provenance import cores

__all__ = ["accelerators", "core_flops", "cores", "free_memory_bytes"]

# Share of the free memory a pool may plan to use: the rest is for the launcher, the page cache and other people.
MEMORY_SHARE = 0.8

_PROBE = """
import time, numpy as np
a, b = np.ones((512, 128), np.float32), np.ones((128, 128), np.float32)
best = 0.0
for _ in range(8):
    start = time.perf_counter()
    for _ in range(20):
        a @ b
    best = max(best, 20 * 2 * 512 * 128 * 128 / (time.perf_counter() - start))
print(best)
"""


def accelerators() -> list[dict[str, str]]:
    """For every worker the accelerators of this machine can take, the environment that gives it its own: one an NVIDIA
    device, one in all for the TPU chips of a host (a process takes them all). Empty if jax is told to use the CPU or
    has no plugin for what is there."""
    if os.environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return []
    if has_tpu():
        return [{}]
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        names = [str(number) for number in range(len(glob.glob("/dev/nvidia[0-9]*")))]
    else:
        names = [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    return [{"CUDA_VISIBLE_DEVICES": name} for name in names]


def core_flops() -> float:
    """Measured FLOP/s of a [512, 128] x [128, 128] float32 product on one thread, best of 8.

    Raises:
        RuntimeError: the probe process failed.
    """
    done = subprocess.run(
        [sys.executable, "-c", _PROBE], env=os.environ | ONE_THREAD, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the speed probe ended with code {done.returncode}: {done.stderr.strip()[-300:]}")
    return float(done.stdout)
