"""What more slots cost a memory: a read and a row update at 2^20 slots against 2^14, and the search beside them.

Reads, hits, width and duplicates are the same; two things are told apart:

    large    the same ids as the small table: what the program does must not grow with the slots
    spread   the same ids spread over the whole table: also what the machine's caches and pages add

Several batches take turns, so that the rows of one are not still in the cache when it comes again. An update includes
the moments (`rows_adam`). The search is O(sqrt M) by construction and is timed apart.
"""

from __future__ import annotations

import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recscale.models.memories.value_table import RowGrads
from recscale.pallas_kernels.product_key_topk import product_key_topk
from recscale.pallas_kernels.sparse_gather import sparse_gather
from recscale.scaling.training.rows.memory_rows import ValueOptions, init_slots, update_rows

from .timing import Rival, Sample, alternate, repeated, summary

SMALL_SLOTS, LARGE_SLOTS = 2**14, 2**20

# Batches that take turns.
_BATCHES = 16


def measure_memory(
    *,
    small: int = SMALL_SLOTS,
    large: int = LARGE_SLOTS,
    reads: int = 4096,
    heads: int = 2,
    topk: int = 8,
    width: int = 64,
    key_width: int = 64,
    rounds: int = 8,
    per_round: int = 8,
) -> dict[str, Any]:
    """Times of one read with row update, and of one search, at both sizes.

    Returns:
        ratio (large to small) and spread_ratio of read and update, and search_ratio, medians over the rounds; the five
        times; shape. A table of 2^20 slots of width 64 takes 0.8 GB with its moments, and there are two.
    """
    hits = heads * topk
    steps = {
        name: _read_and_update(slots, small, reads, hits, width, spread)
        for name, slots, spread in (("small", small, 1), ("large", large, 1), ("spread", large, large // small))
    }
    times = alternate(steps, rounds=rounds, per_round=per_round)
    steps.clear()  # the tables
    searches = {
        name: _search(round(slots**0.5), reads, heads, topk, key_width)
        for name, slots in (("small", small), ("large", large))
    }
    found = alternate(searches, rounds=rounds, per_round=per_round)
    return {
        "ratio": _ratio(times, "large"),
        "spread_ratio": _ratio(times, "spread"),
        "search_ratio": _ratio(found, "large"),
        "small_slots": small,
        "large_slots": large,
        "read_and_update": {name: summary(samples) for name, samples in times.items()},
        "search": {name: summary(samples) for name, samples in found.items()},
        "shape": {"reads": reads, "hits_per_read": hits, "width": width, "key_width": key_width, "update": "rows_adam"},
    }


def _ratio(samples: dict[str, list[Sample]], name: str) -> float:
    """Median over the rounds of one to small: both of a round met the same machine."""
    pairs = zip(samples[name], samples["small"], strict=True)
    return statistics.median(one.wall_s / small.wall_s for one, small in pairs)


def _read_and_update(slots: int, drawn_from: int, reads: int, hits: int, width: int, spread: int) -> Rival:
    """A function that does n steps on a table of `slots` rows; ids are drawn from `drawn_from`, `spread` apart."""
    options, rng = ValueOptions(), np.random.default_rng(0)
    ids = rng.integers(0, drawn_from, (_BATCHES, reads, hits))
    ids = jnp.asarray(ids * spread + (ids * 40_503) % spread, jnp.int32)
    weights = jnp.full((reads, hits), 1.0 / hits, jnp.float32)
    owner = jnp.arange(reads * hits, dtype=jnp.int32) // hits

    def step(table, state, ids, k):
        y = sparse_gather(table, ids, weights)
        # The gradient of half the mean square of what was read: every value falls a little.
        factors = RowGrads(ids.reshape(-1), weights.reshape(-1), owner, y / reads)
        return update_rows(options, table, state, factors, jnp.float32(1e-4), k)

    step = jax.jit(step, donate_argnums=(0, 1))
    table = jax.jit(lambda: jax.random.normal(jax.random.key(0), (slots, width)))()
    held: list[Any] = [table, init_slots(options, table), 0]
    batches = [ids[i] for i in range(_BATCHES)]

    def steps(count: int) -> None:
        for _ in range(count):
            k = held[2]
            held[0], held[1] = step(held[0], held[1], batches[k % _BATCHES], jnp.int32(k))
            held[2] = k + 1
        jax.block_until_ready(held[0])

    return steps


def _search(sub_keys: int, reads: int, heads: int, topk: int, key_width: int) -> Rival:
    rng = np.random.default_rng(1)
    q = jnp.asarray(rng.standard_normal((reads, heads, 2, key_width)), jnp.float32)
    keys = jnp.asarray(rng.standard_normal((heads, 2, sub_keys, key_width)), jnp.float32)
    find = jax.jit(lambda q, keys: product_key_topk(q, keys, topk))
    return repeated(lambda: find(q, keys))
