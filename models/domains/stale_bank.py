"""A bank of vectors made earlier: read in place of encoding again, and written with whatever was encoded just now.

    read      what was written last, its age in steps, and whether anything was; never a gradient, never a change
    write     after the loss, each id once: rows of other ids keep their bits, and so the order of two writes is nothing
    join      fresh vectors replace stale copies of the same ids, exactly
    forecast  what a vector has become since it was written, from its last snapshots (arXiv 2308.13466; the build here
              is a reconstruction, the paper's graphs are not in it):

        none      the last one
        linear    v_1 + (v_1 - v_2) / (s_1 - s_2) * (now - s_1)       v_1 at step s_1 the newest
        lstm      v_1 + W_o h, h from an LSTM over the snapshots, oldest first; W_o = 0 at the start, so it begins as
                  "none". Trained on rows that are encoded anew, forecast before they are written; always detached

The state is training state and no parameter: donated, checkpointed, split like a table. Every function costs as much as
the ids it is given, whatever the number of rows. An id below 0 or beyond the last row is padding: never found, never
written. Evaluation reads alone.

Letters: V rows, W width, K snapshots of a row, N ids. V*W*(K*size of a number) bytes, and 4*V*K of steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from recscale.models.layers import param
from recscale.models.layers.dense import Dense
from recscale.models.options import require_sizes
from recscale.pallas_kernels.checks import if_checked

# What stands in unused places of sorted ids: larger than any id.
NO_ID = np.iinfo(np.int32).max


class BankState(nnx.Variable):
    """What a bank holds."""


class Snapshots(NamedTuple):
    """What a bank knows of N ids, newest first: vectors [..., K, W] in float32 (zeros where there are fewer), steps
    [..., K] at which they were made (-1: never)."""

    vectors: Float[Array, "*ids K W"]
    steps: Int[Array, "*ids K"]

    @property
    def last(self) -> Float[Array, "*ids W"]:
        return self.vectors[..., 0, :]

    @property
    def known(self) -> Bool[Array, "*ids"]:
        """Whether anything was ever written."""
        return self.steps[..., 0] >= 0

    def age(self, now: Int[Array, ""] | int) -> Int[Array, "*ids"]:
        """Steps since the newest was made; 0 where there is none."""
        return jnp.where(self.known, now - self.steps[..., 0], 0)


class StaleBank(nnx.Module):
    """`rows` vectors of `width` numbers, nothing written yet.

    Args:
        rows, width: V, W.
        snapshots: K. snapshot_rows: only rows below it keep more than one (ids in order of popularity); None: all.
        dtype: of what is stored.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        *,
        snapshots: int = 1,
        snapshot_rows: int | None = None,
        dtype: DTypeLike = jnp.bfloat16,
    ):
        require_sizes(rows=rows, width=width, snapshots=snapshots, snapshot_rows=snapshot_rows)
        self.rows, self.width, self.snapshots = rows, width, snapshots
        self.older_rows = min(snapshot_rows or rows, rows)
        # bfloat16 is kept as integers of the same bits: in order to write some rows of a bfloat16 array, XLA's CPU
        # backend widens all of it to float32 and back.
        stored = jnp.uint16 if dtype == jnp.bfloat16 else dtype
        self.dtype, axes = jnp.dtype(dtype), ("rows", "snapshots", "embed")
        self.vectors = BankState(jnp.zeros((rows, width), stored), logical_axes=axes[::2])
        self.steps = BankState(jnp.full(rows, -1, jnp.int32), logical_axes=axes[:1])
        older, several = (self.older_rows, snapshots - 1), snapshots > 1
        self.older = BankState(jnp.zeros((*older, width), stored), logical_axes=axes) if several else None
        self.older_steps = BankState(jnp.full(older, -1, jnp.int32), logical_axes=axes[:2]) if several else None

    def read(self, ids: Int[Array, "*ids"]) -> Snapshots:
        """What is known of each id; no gradient."""
        vectors = _rows(self.vectors[...], ids, 0)[..., None, :]
        steps = _rows(self.steps[...], ids, -1)[..., None]
        if self.older is not None and self.older_steps is not None:
            vectors = jnp.concatenate([vectors, _rows(self.older[...], ids, 0)], axis=-2)
            steps = jnp.concatenate([steps, _rows(self.older_steps[...], ids, -1)], axis=-1)
        if self.dtype == jnp.bfloat16:
            vectors = jax.lax.bitcast_convert_type(vectors, jnp.bfloat16)
        return Snapshots(jax.lax.stop_gradient(vectors.astype(jnp.float32)), steps)

    def write(
        self,
        ids: Int[Array, " N"],
        vectors: Float[Array, "N W"],
        now: Int[Array, ""] | int,
        mask: Bool[Array, " N"] | None = None,
    ) -> None:
        """Stores the vectors of step `now`; where `mask` is False nothing is written.

        Every id that is written must occur once; RECSCALE_CHECK=1 in the environment checks that. For a bank that is
        updated in place, `mask` has to depend on everything that is read from it before: XLA copies it otherwise.
        """
        write = (ids >= 0) & (ids < self.rows)
        write = write if mask is None else write & mask
        if_checked(_refuse_twice, lambda: (ids, write))
        new, older, older_steps = self._bits(jax.lax.stop_gradient(vectors)), self.older, self.older_steps
        if older is not None and older_steps is not None:
            before = self.read(ids)
            # Always true; it makes every write depend on the reads.
            write = write & jnp.isfinite(before.vectors).all(axis=(-2, -1)) & (before.steps >= -1).all(axis=-1)
            keep = jnp.where(write & (ids < self.older_rows), ids, self.older_rows)
            older.set_value(_put(older[...], keep, self._bits(before.vectors[:, :-1])))
            older_steps.set_value(_put(older_steps[...], keep, before.steps[:, :-1]))
        ids = jnp.where(write, ids, self.rows)
        self.vectors.set_value(_put(self.vectors[...], ids, new))
        self.steps.set_value(_put(self.steps[...], ids, jnp.broadcast_to(jnp.asarray(now, jnp.int32), ids.shape)))

    def _bits(self, vectors: Array) -> Array:
        """Vectors as they are stored."""
        vectors = vectors.astype(self.dtype)
        return jax.lax.bitcast_convert_type(vectors, jnp.uint16) if self.dtype == jnp.bfloat16 else vectors


def join(
    ids: Int[Array, "*ids"],
    fresh_ids: Int[Array, " N"],
    fresh: Float[Array, "N W"],
    base: Float[Array, "*ids W"],
    *,
    gradient: bool = False,
) -> Float[Array, "*ids W"]:
    """`base`, with the fresh vector wherever an id is one of the fresh ones.

    Args:
        ids: below 0 on padding, which stays as it is.
        fresh_ids: distinct and ascending, none below 0, `NO_ID` in unused places.
        gradient: whether it flows back into `fresh`.
    """
    place = jnp.minimum(jnp.searchsorted(fresh_ids, ids, method="sort"), fresh_ids.shape[0] - 1)
    found = (jnp.take(fresh_ids, place) == ids) & (ids != NO_ID)
    vectors = jnp.take(fresh, place, axis=0).astype(base.dtype)
    return jnp.where(found[..., None], vectors if gradient else jax.lax.stop_gradient(vectors), base)


def linear_forecast(found: Snapshots, now: Int[Array, ""] | int) -> Float[Array, "*ids W"]:
    """The newest vector plus its last difference per step, times its age; the vector itself with one snapshot."""
    if found.steps.shape[-1] < 2:
        raise ValueError("a linear forecast needs a bank with two snapshots")
    gap = found.steps[..., 0] - found.steps[..., 1]
    slope = (found.vectors[..., 0, :] - found.vectors[..., 1, :]) / jnp.maximum(gap, 1)[..., None]
    known = (found.steps[..., 1] >= 0) & (gap > 0)
    return found.last + jnp.where(known[..., None], slope * found.age(now)[..., None], 0.0)


class LSTMForecast(nnx.Module):
    """Snapshots -> what the vector is now: the newest plus what an LSTM over all of them, oldest first, adds.

    The LSTM reads a snapshot and log(1 + steps from it to the next, or to now). 4*H*(W + 1 + H) + 4*H + H*W parameters;
    K*8*H*(W + 1 + H) + 2*H*W FLOPs per id.
    """

    def __init__(self, width: int, hidden: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.hidden = hidden
        self.gates = Dense(width + 1 + hidden, 4 * hidden, dtype=dtype, rngs=rngs)
        self.out = param.matrix(jnp.zeros((hidden, width)), ("hidden", "embed"))

    def __call__(self, found: Snapshots, now: Int[Array, ""] | int) -> Float[Array, "*ids W"]:
        lead, snapshots = found.steps.shape[:-1], found.steps.shape[-1]
        h = c = jnp.zeros((*lead, self.hidden))
        for k in reversed(range(snapshots)):
            step, vector = found.steps[..., k], found.vectors[..., k, :]
            later = now if k == 0 else found.steps[..., k - 1]
            gap = jnp.log1p(jnp.maximum(later - step, 0).astype(jnp.float32))[..., None]
            gates = self.gates(jnp.concatenate([vector, gap, h], axis=-1)).astype(jnp.float32)
            i, f, g, o = jnp.split(gates, 4, axis=-1)
            new_c = jax.nn.sigmoid(f + 1.0) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            known = (step >= 0)[..., None]
            h, c = jnp.where(known, jax.nn.sigmoid(o) * jnp.tanh(new_c), h), jnp.where(known, new_c, c)
        return found.last + (h.reshape(-1, self.hidden) @ self.out[...]).reshape(found.last.shape)


def forecast_loss(
    forecast: Float[Array, "N W"], fresh: Float[Array, "N W"], mask: Bool[Array, " N"]
) -> Float[Array, ""]:
    """Mean squared error per number of forecasts made before the rows were written; the vectors get no gradient."""
    error = jnp.square(forecast - jax.lax.stop_gradient(fresh.astype(jnp.float32))).mean(axis=-1)
    return jnp.where(mask, error, 0.0).sum() / jnp.maximum(mask.sum(), 1)


class Probe(NamedTuple):
    """Vectors of a bank held against the same ids encoded now, by bucket: means over the known ids of each [buckets].

    count: ids of the bucket; coverage: share of them that is known; cosine, and error = |bank - fresh| / |fresh|.
    """

    count: Float[Array, " buckets"]
    coverage: Float[Array, " buckets"]
    cosine: Float[Array, " buckets"]
    error: Float[Array, " buckets"]


def probe(
    read: Float[Array, "N W"],
    fresh: Float[Array, "N W"],
    known: Bool[Array, " N"],
    bucket: Int[Array, " N"],
    buckets: int,
) -> Probe:
    """Compares what was read (or forecast) with freshly encoded vectors; nothing is written.

    bucket: 0 ... buckets - 1, of age (`log2_bucket`) or of frequency; ids outside take no part.
    """
    read, fresh = read.astype(jnp.float32), fresh.astype(jnp.float32)
    norms = jnp.linalg.norm(read, axis=-1), jnp.linalg.norm(fresh, axis=-1)
    cosine = (read * fresh).sum(axis=-1) / jnp.maximum(norms[0] * norms[1], 1e-30)
    error = jnp.linalg.norm(read - fresh, axis=-1) / jnp.maximum(norms[1], 1e-30)

    def total(values: Array) -> Array:
        return jnp.zeros(buckets).at[jnp.where(bucket >= 0, bucket, buckets)].add(values, mode="drop")

    count, found = total(jnp.ones(known.shape)), total(known.astype(jnp.float32))
    cosine, error = (total(jnp.where(known, x, 0.0)) / jnp.maximum(found, 1.0) for x in (cosine, error))
    return Probe(count, found / jnp.maximum(count, 1.0), cosine, error)


def log2_bucket(x: Int[Array, "*ids"], buckets: int) -> Int[Array, "*ids"]:
    """floor(log2(1 + x)) of ages or counts, the last bucket taking all that is larger."""
    starts = jnp.asarray([2**k - 1 for k in range(1, buckets)], jnp.int32)
    return jnp.searchsorted(starts, x, side="right", method="scan_unrolled").astype(jnp.int32)


def momentum(old: Any, new: Any, decay: float | Float[Array, ""]) -> Any:
    """decay * old + (1 - decay) * new, array by array: the encoder that the "ema" control writes a bank with."""
    return jax.tree.map(lambda a, b: decay * a + (1 - decay) * jax.lax.stop_gradient(b), old, new)


def _rows(values: Array, ids: Array, missing: float) -> Array:
    """Rows of `values`, `missing` where there is none."""
    ids = jnp.where(ids < 0, values.shape[0], ids)
    return jnp.take(values, ids, axis=0, mode="fill", fill_value=missing)


def _put(values: Array, ids: Array, rows: Array) -> Array:
    return values.at[ids].set(rows.astype(values.dtype), mode="drop")


def _refuse_twice(ids: np.ndarray, write: np.ndarray) -> None:
    written, counts = np.unique(ids[write], return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"a bank is given id {written[counts > 1][0]} twice in one write; write every id once")
