"""Cost of a LONGER training step against the length of the history, at a fixed number of query rows.

    R 8 requests, event width A 32, merge 4, K 64 query rows, 2 layers, float32, forward and backward, no optimiser

Every length is a program of its own; all of them run by turns in one process. Linear cost is an exponent of at most 1
(what a step does for its K rows is the same at every length, so the shortest ones cost more per event).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recscale.models.inputs import Field, Schema
from recscale.models.inputs import Sequence as History
from recscale.scaling.counting.abstract import train_program
from recscale.scaling.counting.jaxpr_flops import count_flops
from recscale.scaling.counting.xla_cost import compiled_cost

from .timing import race, repeated

LENGTHS = (512, 1024, 2048, 4096, 8192)


def measure_history_lengths(
    *, lengths: Sequence[int] = LENGTHS, requests: int = 8, width: int = 32, queries: int = 64, rounds: int = 5
) -> dict[str, Any]:
    """Measures and returns JSON-able figures.

    Args:
        lengths: events S, increasing. requests, width, queries: R, A, K. rounds: timed steps of each length.

    Returns:
        lengths: S -> times, `temporary_bytes` of the compiled step, `flops` counted in its program; exponents of
        `cpu_ms`, `temporary_bytes` and `flops` against S (least squares of logarithms); shape.
    """
    encoder = {"event_width": width, "merge": 4, "queries": queries, "layers": 2}
    config = {"encoder": encoder, "backbone": {"widths": (64,)}}
    steps, found = {}, {}
    for length in lengths:
        function, shapes = train_program("longer", _schema(length), config, requests, 1)
        compiled = jax.jit(function).lower(*shapes).compile()
        found[length] = {
            "temporary_bytes": compiled_cost(compiled).temporary_bytes,
            "flops": count_flops(function, *shapes),
        }
        steps[str(length)] = repeated(functools.partial(compiled, *_filled(shapes, length)))
    for length, times in race(steps, rounds=rounds, per_round=1).items():
        found[int(length)] |= times
    exponents = {
        name: float(np.polyfit(np.log(lengths), np.log([found[length][name] for length in lengths]), 1)[0])
        for name in ("cpu_ms", "temporary_bytes", "flops")
    }
    return {
        "lengths": {str(length): found[length] for length in lengths},
        "exponents": exponents,
        "shape": {"requests": requests, "width": width, "queries": queries},
    }


def _schema(length: int) -> Schema:
    events = History("history", length, (Field("event", "user", 32, vocabulary=1000),), timestamps=True)
    return Schema((Field("user", "user", 32, 1000), Field("item", "candidate", 32, 1000)), (events,))


def _filled(shapes: Any, length: int) -> Any:
    """Random numbers of the program's shapes; every history is full."""
    rng = np.random.default_rng(0)

    def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(0.1 * rng.standard_normal(leaf.shape, np.float32))
        is_length = jax.tree_util.keystr(path).endswith(".length")
        return jnp.full(leaf.shape, length if is_length else 0, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)
