"""Names of JAX that differ between the versions we run on, or are private in one of them.

Kernel libraries are imported where they are used: nothing here may pull one in on a machine that does not need it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from .targets import Target


def mosaic_gpu_kernel(
    body: Callable[..., None],
    *,
    out_type: Sequence[Any],
    grid: Mapping[str, int],
    cost: Any,
    name: str,
    interpret: bool | Any,
    scratch: Mapping[str, Any] | None = None,
    threads: Mapping[str, int] | None = None,
    automatic_barriers: bool = True,
    approximate_math: bool = False,
) -> Callable[..., Sequence[Any]]:
    """A Mosaic GPU kernel as a function of arrays: `body(*inputs, *outputs, **scratch)` on every block of the grid.

    `plgpu.kernel` takes no cost estimate; `pl.kernel` does, but has no batching rule: replicas (vmap) run in turn.

    Args:
        out_type: ShapeDtypeStructs of the outputs.
        grid: axis name -> number of blocks.
        cost: `pl.CostEstimate` of the whole call.
        interpret: True runs it on the CPU; memory that was never written reads as NaN there. Or the parameters of
            interpretation themselves, see `gpu_interpretation`.
        scratch: name -> shared memory or barriers of a block.
        threads: {axis name: warpgroups per block}; None: one, without a name.
        automatic_barriers: synchronise a warpgroup around its accesses of shared memory. Off where no memory is both
            read and written by a warpgroup.
        approximate_math: exponentials, logarithms and divisions by the chip's fast instructions.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    thread_name, warpgroups = next(iter(threads.items())) if threads else (None, None)
    mesh = plgpu.Mesh(
        grid=tuple(grid.values()), grid_names=tuple(grid), num_threads=warpgroups, thread_name=thread_name
    )

    def scoped(*refs):
        pl.run_scoped(
            lambda **allocated: body(*refs, **allocated), collective_axes=thread_name or (), **(scratch or {})
        )

    kernel = pl.kernel(
        scoped if scratch else body,
        list(out_type),
        mesh=mesh,
        compiler_params=plgpu.CompilerParams(
            approx_math=approximate_math, unsafe_no_auto_barriers=not automatic_barriers
        ),
        cost_estimate=cost,
        interpret=gpu_interpretation() if interpret is True else interpret,
        name=name,
    )
    return jax.custom_batching.sequential_vmap(kernel)


def load(ref: Any, layout: Any, *, optimized: bool = True) -> jax.Array:
    """`plgpu.load` of a whole reference into a layout; it takes an index up to jax 0.11 and none from 0.12 on."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    index = [()] if "idx" in inspect.signature(plgpu.load).parameters else []
    return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def gpu_interpretation(**changed: Any) -> Any:
    """Parameters that run a Mosaic GPU kernel by interpretation (a private module in jax 0.10)."""
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams(**changed)


def tpu_races_found() -> bool:
    """Whether the last kernel run by `pltpu.InterpretParams(detect_races=True)` had a race (private in jax 0.10)."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    if interpret_pallas_call.races is None:
        raise RuntimeError("no TPU kernel was interpreted with detect_races=True")
    return interpret_pallas_call.races.races_found


@contextlib.contextmanager
def lowering_for(target: Target) -> Iterator[None]:
    """Within it, TPU kernels are traced for `target` although no TPU is there.

    Lowering asks the mesh in scope, else the default device, for SparseCores; with a CPU as default device it refuses.
    Where a TPU is the default device this changes nothing.
    """
    if jax.default_backend() == "tpu":
        yield
        return
    # The two cores of a v5p chip are one device.
    device = jax.sharding.AbstractDevice(
        device_kind=target.device_kind, num_cores=2 if target.name == "tpu-v5p" else 1, platform="tpu"
    )
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        yield
