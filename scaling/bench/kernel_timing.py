"""Errors, reruns and time of one implementation of an operation at one shape.

Time is that of a program that makes `calls` calls, each on inputs of its own, and as many rounds of them as take 2 ms,
divided by their number: a kernel takes microseconds, which is what starting a program from Python takes too, and inputs
that follow each other through more than four times the on-chip memory are read from device memory as in training.
Median of 50 such programs after 10.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from recscale.pallas_kernels.cases import Case
from recscale.pallas_kernels.targets import Target

from .timing import clock, quartiles

# Inputs rotate over so many times the on-chip memory; no program makes more calls than this.
_CACHES, _MOST_CALLS = 4, 32
# On-chip memory of a GPU that all its SMs share; of a TPU it is the vector memory.
_GPU_L2_BYTES = 50 * 2**20
# Share of device memory that inputs and outputs may take.
_MEMORY_SHARE = 0.25

# What a timed program should last, and the most rounds it makes of its calls.
_LEAST_S, _MOST_ROUNDS = 2e-3, 1000

# Ids may differ where two scores are closer than the rounding of their sums.
_ID_MISMATCHES = 1e-3

Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure: programs before the first timed one, timed ones, calls in each (None: see the head)."""

    warmup: int = 10
    runs: int = 50
    calls: int | None = None


def input_sets(case: Case, target: Target | None, effort: Effort) -> list[Any]:
    """Different inputs of a case, as many as a program makes calls."""
    outputs = jax.eval_shape(lambda *a: case.call(*a, implementation="reference"), *case.structs())
    each = max(_size(case.structs()) + _size(outputs), 1)
    calls = effort.calls
    if calls is None:
        on_chip = 0 if target is None else target.vmem_bytes if target.platform == "tpu" else _GPU_L2_BYTES
        room = _MEMORY_SHARE * target.hbm_bytes / each if target is not None else 2
        # What a call reads may be less than its inputs: some are there for a rival.
        read = max(min(each, case.bytes_moved), 1)
        calls = int(max(2, min(-(-_CACHES * on_chip // read), _MOST_CALLS, room)))
    make = jax.jit(case.inputs)
    return [make(jax.random.key(seed)) for seed in range(calls)]


def errors(case: Case, found: Any, expected: Any) -> dict[str, Any]:
    """How far outputs are from the reference's.

    Returns:
        max_error: largest |difference| of an output over its largest |value|; mismatched_ids: share of integers that
        differ, None without any; within_tolerance: by the case's rtol and atol.
    """
    worst, mismatched, good = 0.0, None, True
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(b.dtype, jnp.integer):
            share = float(jnp.mean(a != b))
            mismatched = max(mismatched or 0.0, share)
            good &= share <= _ID_MISMATCHES
        else:
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
            difference, scale = float(jnp.max(jnp.abs(a - b))), float(jnp.max(jnp.abs(b)))
            good &= bool(difference <= case.rtol * scale + case.atol)  # False for NaN
            worst = max(worst, difference / scale if scale else difference)
    return {"max_error": worst, "mismatched_ids": mismatched, "within_tolerance": good}


def bit_equal(a: Any, b: Any) -> bool:
    """Whether two results are the same, bit for bit."""
    return all(
        x.shape == y.shape and jax.device_get(x).tobytes() == jax.device_get(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def time_calls(function: Function, sets: list[Any], effort: Effort) -> dict[str, Any]:
    """Milliseconds of a call: median_ms, lower_quartile_ms, upper_quartile_ms, and runs, calls, rounds."""
    program = jax.jit(_in_rounds(function)).lower(jnp.int32(1), sets).compile()
    once = min(clock(lambda: program(jnp.int32(1), sets), warmup=1, runs=2))
    rounds = jnp.int32(min(math.ceil(_LEAST_S / once), _MOST_ROUNDS))
    seconds = clock(lambda: program(rounds, sets), warmup=effort.warmup, runs=effort.runs)
    return {
        **quartiles([time / (len(sets) * int(rounds)) for time in seconds]),
        "runs": effort.runs,
        "calls": len(sets),
        "rounds": int(rounds),
    }


def _in_rounds(function: Function) -> Function:
    """(rounds, sets) -> results of a call on every set, made anew in every round."""

    def program(rounds: jax.Array, sets: list[Any]) -> Any:
        def one_round(_, before):
            # Behind the barrier the inputs depend on the round before: else XLA would compute the calls once.
            held, _ = jax.lax.optimization_barrier((sets, before))
            return [function(*arrays) for arrays in held]

        shapes = jax.eval_shape(lambda: [function(*arrays) for arrays in sets])
        start = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        return jax.lax.fori_loop(0, rounds, one_round, start)

    return program


def _size(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
