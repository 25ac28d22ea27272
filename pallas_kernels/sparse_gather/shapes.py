"""Named shapes of `sparse_gather`: small ones for tests, and those of published memories for compilation and timing.

    gather-ind   an industrial memory: 32 hits of 65 536 rows, 1024 wide
    gather-pub   the same number of rows at width 128, twice the reads
    gather-lmn   a million rows at width 64, 16 hits

Letters: N reads, J hits per read, M rows, d width. FLOPs and bytes as in `costs`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from recscale.pallas_kernels.cases import Case

from . import reference
from .api import sparse_gather
from .costs import gradients_cost, read_cost

Array = jax.Array

_MIB = 2**20


def _inputs(
    reads: int, per_read: int, width: int, rows: int, dtype: Any, gated: bool, absent: float
) -> Callable[[Array], tuple[Array, ...]]:
    """-> function of a key: values, ids, weights, dout and, if gated, a gate."""

    def make(key: Array) -> tuple[Array, ...]:
        keys = jax.random.split(key, 6)
        ids = jax.random.randint(keys[1], (reads, per_read), 0, rows, jnp.int32)
        ids = jnp.where(jax.random.uniform(keys[2], ids.shape) < absent, -1, ids)
        arrays = (
            jax.random.normal(keys[0], (rows, width), jnp.float32).astype(dtype),
            ids,
            jax.random.normal(keys[3], (reads, per_read), jnp.float32) / per_read**0.5,
            jax.random.normal(keys[4], (reads, width), jnp.float32).astype(dtype),
        )
        return (*arrays, jax.random.normal(keys[5], (reads, width), jnp.float32).astype(dtype)) if gated else arrays

    return make


def _read(gate_fn: str) -> Callable[..., Any]:
    def call(values, ids, weights, gate=None, *, implementation=None, interpret=False):
        return sparse_gather(
            values, ids, weights, gate=gate, gate_fn=gate_fn, implementation=implementation, interpret=interpret
        )

    return call


def _forward(gate_fn: str) -> Callable[..., Any]:
    read = _read(gate_fn)

    def call(values, ids, weights, dout, gate=None, **options):
        del dout
        return read(values, ids, weights, gate, **options)

    return call


def _backward(gate_fn: str) -> Callable[..., Any]:
    """Gradients of values, weights and gate for the given gradient of the output."""
    read = _read(gate_fn)

    def call(values, ids, weights, dout, gate=None, **options):
        trained = (values, weights) if gate is None else (values, weights, gate)
        _, pull = jax.vjp(lambda v, w, *gate: read(v, ids, w, *gate, **options), *trained)
        return pull(dout)

    return call


def _rows(values, ids, weights, dout, *, implementation=None, interpret=False):
    """Gradients of weights and of what was read, for constant values: how memories train."""

    def read(weights, probe):
        return sparse_gather(
            values, ids, weights, probe=probe, value_grad="rows", implementation=implementation, interpret=interpret
        )

    _, pull = jax.vjp(read, weights, jnp.zeros(dout.shape, jnp.float32))
    return pull(dout)


def _gathered_first(values, ids, weights, dout):
    """The rival that holds all gathered rows."""
    del dout
    return reference.read(values, ids, weights).astype(values.dtype)


def _factored(
    name: str,
    group: str,
    reads: int,
    per_read: int,
    width: int,
    rows: int,
    dtype: Any,
    temporaries: dict[str, int] | None = None,
) -> Case:
    """The gradients of a read whose values train by touched rows."""
    flops, moved = read_cost(reads, per_read, width, dtype, False)
    return Case(
        "sparse_gather",
        name,
        group,
        _inputs(reads, per_read, width, rows, dtype, False, 0.0),
        _rows,
        bytes_moved=moved,
        flops=flops,
        temporaries=temporaries or {},
        rtol=1e-5 if dtype == jnp.float32 else 2**-7,
    )


def _pair(
    name: str,
    group: str,
    reads: int,
    per_read: int,
    width: int,
    rows: int,
    dtype: Any,
    *,
    gate_fn: str = "none",
    absent: float = 0.0,
    temporaries: tuple[dict[str, int], dict[str, int]] = ({}, {}),
) -> tuple[Case, Case]:
    """A forward case and its backward; `temporaries` of both."""
    gated = gate_fn != "none"
    inputs = _inputs(reads, per_read, width, rows, dtype, gated, absent)
    flops, moved = read_cost(reads, per_read, width, dtype, gated)
    rtol = 1e-5 if dtype == jnp.float32 else 2**-7
    forward = Case(
        "sparse_gather",
        name,
        group,
        inputs,
        _forward(gate_fn),
        bytes_moved=moved,
        flops=flops,
        temporaries=temporaries[0],
        rivals={"gathered_first": _gathered_first} if group == "bench" else {},
        rtol=rtol,
    )
    flops, moved = gradients_cost(reads, per_read, width, rows, dtype)
    backward = Case(
        "sparse_gather",
        f"{name}-backward",
        group,
        inputs,
        _backward(gate_fn),
        bytes_moved=moved,
        flops=flops,
        temporaries=temporaries[1],
        rtol=rtol,
    )
    return forward, backward


def _bound(tensor_core: int, sparse_core: int | None = None) -> dict[str, int]:
    """Bounds in MiB on temporaries of the TPU programs, the largest of v5e, v6e and 7x; both have one backward.

    v5p keeps within those of reads and row gradients; the dense gradients were not compiled for it.

    They are copies of the table, g and dV in the order kernels read rows in, and [N, J] arrays padded to 128 columns.
    """
    sparse_core = tensor_core if sparse_core is None else sparse_core
    return {"pallas_tpu": tensor_core * _MIB, "pallas_tpu_sc": sparse_core * _MIB}


CASES: tuple[Case, ...] = (
    *_pair("gather-tiny", "tiny", 16, 8, 128, 64, jnp.float32),
    *_pair("gather-tiny-bf16", "tiny", 16, 8, 128, 64, jnp.bfloat16, gate_fn="one_plus_tanh"),
    _factored("gather-tiny-rows", "tiny", 16, 8, 128, 64, jnp.float32),
    *_pair("gather-ragged", "ragged", 33, 5, 72, 91, jnp.float32, gate_fn="tanh", absent=0.2),
    *_pair("gather-ragged-bf16", "ragged", 33, 5, 72, 91, jnp.bfloat16, absent=0.2),
    *_pair("gather-ind", "bench", 32_768, 32, 1024, 65_536, jnp.bfloat16, temporaries=(_bound(40, 272), _bound(560))),
    *_pair("gather-pub", "bench", 65_536, 32, 128, 65_536, jnp.bfloat16, temporaries=(_bound(112, 80), _bound(112))),
    *_pair("gather-lmn", "bench", 204_800, 16, 64, 2**20, jnp.bfloat16, temporaries=(_bound(448, 800), _bound(960))),
    _factored("gather-ind-rows", "bench", 32_768, 32, 1024, 65_536, jnp.bfloat16, _bound(176)),
    _factored("gather-lmn-rows", "bench", 204_800, 16, 64, 2**20, jnp.bfloat16, _bound(528)),
)
