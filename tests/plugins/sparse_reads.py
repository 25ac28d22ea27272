"""Sparse reads for tests: a table with ids and weights, and what is right about them in float64."""

import jax.numpy as jnp
import numpy as np


def case(reads=11, per_read=4, rows=7, width=5, dtype=jnp.float32, seed=0, absent=0.2):
    """values [M, d], ids [N, J] with absent hits, weights [N, J]."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, rows, (reads, per_read))
    ids = np.where(rng.random(ids.shape) < absent, -1, ids)
    if reads > 2:
        ids[1], ids[2] = -1, ids[2, 0]  # an empty bag; one row named J times
    values = jnp.asarray(rng.standard_normal((rows, width)), jnp.float32).astype(dtype)
    weights = rng.standard_normal((reads, per_read)).astype(np.float32)
    return values, jnp.asarray(ids, jnp.int32), jnp.asarray(weights)


def read64(values, ids, weights):
    values, ids, weights = (np.asarray(a, t) for a, t in ((values, np.float64), (ids, int), (weights, np.float64)))
    return np.einsum("nj,njd->nd", np.where(ids >= 0, weights, 0.0), values[np.maximum(ids, 0)])


def products64(values, ids, g):
    values, ids, g = np.asarray(values, np.float64), np.asarray(ids), np.asarray(g, np.float64)
    return np.where(ids >= 0, np.einsum("nd,njd->nj", g, values[np.maximum(ids, 0)]), 0.0)


def dense64(ids, weights, g, rows):
    ids, weights, g = np.asarray(ids), np.asarray(weights, np.float64), np.asarray(g, np.float64)
    total = np.zeros((rows, g.shape[1]))
    for t, j in zip(*np.nonzero(ids >= 0), strict=True):
        total[ids[t, j]] += weights[t, j] * g[t]
    return total
