"""How a memory is used: shares of slots, distance to uniform, and what a perfectly uniform router would show.

    c[slot] = hits, z[slot] = summed |weights|              heads together, one vector per layer
    usage = share of slots with c > 0                       usage_null = 1 - (1 - 1/M)^hits under uniform routing
    kl = log M + sum z' log z',  z' = z / sum z             kl_null = (M - 1) / (2 hits), for hits >> M

Usage below 1 with few hits is not collapse, and neither is a KL above 0: compare each with its null, and never KL
across M or data sizes without it. With hits = M the null of usage is 0.632.

`read_stats` is per batch, on the device; `UsageAccumulator` sums c and z over an evaluation, on the host in float64.

Letters: N reads, H heads, K slots per head, J = H*K, M slots.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from recscale.pallas_kernels.sparse_gather import sort_hits

# Tables with more slots than this many times the hits are counted by sorting, so that the cost stays that of the hits.
_DENSE = 4

# Rows whose norms are looked at.
_SAMPLE = 512


def read_stats(
    slots: Int[Array, "N J"], weights: Float[Array, "N H K"], total: int
) -> dict[str, Shaped[Array, "*shape"]]:
    """Diagnostics of one batch of reads: scalars, and the vectors they come from. No gradient.

    Args:
        slots: int32 [N, J], -1 = absent. weights: [N, H, K]. total: M (times T where values are per token).

    Returns:
        usage, usage_null, kl, kl_null, hits_per_slot, top1_weight (mean over heads), effective_slots (exp of the
        weights' entropy): scalars; hits int32 [M], weight float32 [M].
    """
    slots, weights = jax.lax.stop_gradient((slots, weights))
    index = jnp.where(slots >= 0, slots, total).reshape(-1)
    share = jnp.abs(weights).astype(jnp.float32)
    hits = jnp.zeros(total, jnp.int32).at[index].add(1, mode="drop")
    weight = jnp.zeros(total, jnp.float32).at[index].add(share.reshape(-1), mode="drop")
    present = (slots >= 0).any(axis=-1)
    reads = jnp.maximum(jnp.sum(present), 1).astype(jnp.float32)
    count = jnp.sum(slots >= 0).astype(jnp.float32)
    own = share / jnp.maximum(jnp.sum(share, axis=-1, keepdims=True), 1e-30)
    entropy = -jnp.sum(own * jnp.log(jnp.maximum(own, 1e-30)), axis=-1)
    each = jnp.where(present[:, None], 1.0, 0.0) / (reads * share.shape[1])
    # Of a program whose number of reads is a symbol, nobody knows which is cheaper; it serves, and drops all this.
    sparse = isinstance(index.size, int) and total > _DENSE * index.size
    used, spread = _distinct(slots, share, total) if sparse else (jnp.sum(hits > 0), weight)
    spread = spread / jnp.maximum(jnp.sum(spread), 1e-30)
    return {
        "usage": used / total,
        "usage_null": -jnp.expm1(count * np.log1p(-1.0 / total)) if total > 1 else jnp.minimum(count, 1.0),
        "kl": np.log(total) + jnp.sum(spread * jnp.log(jnp.maximum(spread, 1e-30))),
        "kl_null": (total - 1) / (2.0 * jnp.maximum(count, 1.0)),
        "hits_per_slot": count / total,
        "top1_weight": jnp.sum(jnp.max(own, axis=-1) * each),
        "effective_slots": jnp.sum(jnp.exp(entropy) * each),
        "hits": hits,
        "weight": weight,
    }


def row_norm_quantiles(rows: Float[Array, "M d"]) -> dict[str, Float[Array, ""]]:
    """10, 50 and 90 % quantiles of the norms of at most 512 rows, evenly spaced over a table [M, d]."""
    sample = jax.lax.stop_gradient(rows[:: -(-rows.shape[0] // _SAMPLE)]).astype(jnp.float32)
    norms = jnp.sqrt(jnp.sum(jnp.square(sample), axis=-1))
    return {f"row_norm_p{q}": jnp.quantile(norms, q / 100.0) for q in (10, 50, 90)}


def _distinct(slots: Array, share: Array, total: int) -> tuple[Array, Array]:
    """Number of slots that were hit, and their summed weights in arrays of the hits' size, whatever `total` is."""
    hits = sort_hits(slots, total)
    starts = jnp.concatenate([jnp.ones(1, bool), hits.rows[1:] != hits.rows[:-1]])
    place = jnp.cumsum(starts) - 1
    summed = jnp.where(hits.rows < total, jnp.take(share.reshape(-1), hits.order), 0.0)
    spread = jnp.zeros(hits.rows.size, jnp.float32).at[place].add(summed, indices_are_sorted=True)
    return jnp.sum(starts & (hits.rows < total)), spread


class UsageAccumulator:
    """Hits and weights of every slot, summed over batches; one memory layer.

    Args:
        slots: M, times T where values are per token.
        sub_keys: n, for the usage of each axis; None leaves it out (an expansion has no fixed axes).
    """

    def __init__(self, slots: int, sub_keys: int | None = None):
        self.hits = np.zeros(slots, np.int64)
        self.weight = np.zeros(slots, np.float64)
        self._sub_keys = sub_keys

    def add(self, hits: Any, weight: Any) -> None:
        """hits [M] and summed weights [M] of a batch, as `read_stats` gives them."""
        self.hits += np.asarray(hits, np.int64)
        self.weight += np.asarray(weight, np.float64)

    def metrics(self) -> dict[str, float]:
        """usage, its null and their ratio; kl and its null; hits_per_slot; usage of the row and the column axis.

        Raises:
            ValueError: nothing was added, or no read hit anything.
        """
        total, slots = int(self.hits.sum()), self.hits.size
        if not total:
            raise ValueError("no memory read was accumulated, so usage has no value; add batches first")
        usage = float(np.mean(self.hits > 0))
        null = -np.expm1(total * np.log1p(-1.0 / slots)) if slots > 1 else 1.0
        spread = self.weight / self.weight.sum() if self.weight.sum() > 0 else self.hits / total
        used = spread[spread > 0]
        found = {
            "usage": usage,
            "usage_null": float(null),
            "usage_ratio": float(usage / null),
            "kl": float(max(np.log(slots) + np.sum(used * np.log(used)), 0.0)),
            "kl_null": (slots - 1) / (2.0 * total),
            "hits_per_slot": total / slots,
        }
        if self._sub_keys:
            grid = self.hits.reshape(-1, self._sub_keys, self._sub_keys)
            found["row_usage"] = float(np.mean(grid.sum(axis=2) > 0))
            found["column_usage"] = float(np.mean(grid.sum(axis=1) > 0))
        return found
