"""How the memories of a trained model are used, over the whole holdout: `UsageAccumulator`'s figures per layer.

Training steps log the same figures per batch (`model_memory<i>/usage` and so on in metrics.jsonl); a batch hits few
slots, so compare them with their nulls. Here every holdout row counts, and slots hit by none of them are unused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Num

from recscale.models.memories.usage import UsageAccumulator

# What `read_stats` names the vectors over slots.
_VECTORS = ("hits", "weight")


def slot_counts(stats: Mapping[str, Num[Array, "*_"]]) -> dict[str, Num[Array, " M"]]:
    """The vectors over slots among a model's stats: "memory1/hits", ..."""
    return {name: value for name, value in stats.items() if jnp.ndim(value) == 1 and name.split("/")[-1] in _VECTORS}


def holdout_usage(
    batches: Iterable[Mapping[str, Num[np.ndarray, "P M"]]],
    *,
    replicas: int,
    batch_rows: int,
    trained_rows: int,
    sub_keys: int | None,
) -> list[dict[str, Any]]:
    """Per replica: figures of every memory layer, and their means over layers as `memory_<figure>`.

    `memory_hits_per_slot` refers to training: hits of `trained_rows` rows over slots. Empty for a model without memory.

    Args:
        batches: of every batch of the holdout, `batch_rows` rows each, the sums that `slot_counts` names.
        replicas: P. sub_keys: n of the memories; None where rows and columns are no axes of their keys.
    """
    totals: dict[str, Any] = {}
    count = 0
    for counts in batches:
        count += 1
        for name, value in counts.items():
            totals[name] = totals.get(name, 0) + np.asarray(value, np.float64)
    layers = sorted({name.rpartition("/")[0] for name in totals})
    if not layers:
        return [{} for _ in range(replicas)]
    return [_figures(totals, layers, p, trained_rows / (count * batch_rows), sub_keys) for p in range(replicas)]


def _figures(
    totals: dict[str, np.ndarray], layers: list[str], replica: int, scale: float, sub_keys: int | None
) -> dict[str, Any]:
    found = {}
    for layer in layers:
        hits = totals[f"{layer}/hits"][replica]
        if not hits.sum():  # a model that is not a number reads nothing
            return {}
        accumulator = UsageAccumulator(hits.size, sub_keys)
        accumulator.add(hits, totals[f"{layer}/weight"][replica])
        found[layer] = accumulator.metrics()
        found[layer]["hits_per_slot"] *= scale
    names = next(iter(found.values()))
    means = {f"memory_{name}": float(np.mean([figures[name] for figures in found.values()])) for name in names}
    return {"memory": found} | means
