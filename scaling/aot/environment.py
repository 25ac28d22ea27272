"""What the compilers of TPU and GPU need in the process environment of a machine that has neither."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection

# libtpu asks the cloud's metadata server unless told not to, wants some host to compile for, and guards the chip with a
# lock that a compiler has no use for.
_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
# Without a driver the plugin refuses to load. ptxas tells registers and spills. Without a device nothing can be tuned,
# and of XLA's own Triton products, untuned, not all compile: cuBLAS takes them.
_GPU = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
_GPU_XLA_FLAGS = ("--xla_gpu_autotune_level=0", "--xla_gpu_enable_triton_gemm=false")

# Platform -> (module whose presence means that its compiler is installed, make target that installs it).
_COMPILERS = {"tpu": ("libtpu", "make aot-tpu"), "gpu": ("jax_plugins.xla_cuda13", "make aot-gpu")}


class CompilerMissing(RuntimeError):
    """The compiler of a platform is not installed; the message names the command that installs it."""


def prepare(platforms: Collection[str], *, compiler: bool = True) -> None:
    """Makes this process ready to compile for "tpu" or "gpu"; to be called before anything computes.

    The process itself computes on the CPU: on a machine with an accelerator that stays untouched.

    Args:
        compiler: whether the compilers are needed; lowering does without.

    Raises:
        CompilerMissing: one of the compilers is not installed.
    """
    for platform in platforms if compiler else ():
        module, command = _COMPILERS[platform]
        if not _installed(module):
            raise CompilerMissing(
                f"the {platform.upper()} compiler ({module}) is not installed in this environment; "
                f'`{command} ARGS="..."` sets up one of its own and runs there'
            )
    if "tpu" in platforms:
        os.environ.update(_TPU)
    if "gpu" in platforms:
        os.environ.update(_GPU)
        flags = os.environ.get("XLA_FLAGS", "").split()
        os.environ["XLA_FLAGS"] = " ".join(flags + [flag for flag in _GPU_XLA_FLAGS if flag not in flags])
    import jax

    jax.config.update("jax_platforms", "cpu")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is not there
        return False
