"""Counter-based random words: word (request, stream, n) is a pure function of (seed, request, stream, n).

Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): the same bits whatever
the backend, the batch size or the library's random-number settings. Both output words of a hash are used.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Int64, UInt32

REQUEST, CANDIDATE, HISTORY, NOISE, DRIFT, USER_EVENTS, QUERY, ITEM_CONTENT = range(8)

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


Key = tuple[UInt32[Array, " R"], UInt32[Array, " R"]]  # one per request, or per user


def threefry(
    key: tuple[UInt32[Array, " ..."], UInt32[Array, " ..."]],
    counter: tuple[UInt32[Array, " ..."], UInt32[Array, " ..."]],
) -> tuple[UInt32[Array, "*shape"], UInt32[Array, "*shape"]]:
    """Threefry-2x32-20 of a two-word counter under a two-word key, broadcast.

    A loop of five groups of four rounds: the loop ends every fusion, so that compilers neither unroll the hash into
    each of its readers nor take minutes over it.
    """
    k0, k1 = key
    k2 = k0 ^ k1 ^ np.uint32(_PARITY)
    x, y = counter[0] + k0, counter[1] + k1
    shape = jnp.broadcast_shapes(x.shape, y.shape)
    schedule = tuple(jnp.broadcast_to(k, jnp.broadcast_shapes(k0.shape, k1.shape)) for k in (k1, k2, k0))
    rotations = tuple(jnp.asarray(r, jnp.uint32) for r in _ROTATIONS)
    start = (jnp.broadcast_to(x, shape), jnp.broadcast_to(y, shape), schedule, rotations)
    x, y, _, _ = jax.lax.fori_loop(0, 5, _group, start)
    return x, y


def _group(group: Array, state: Any) -> Any:
    x, y, (ka, kb, kc), (ra, rb) = state
    for i in range(4):
        x = x + y
        y = ((y << ra[i]) | (y >> (np.uint32(32) - ra[i]))) ^ x
    return x + ka, y + kb + (group + 1).astype(jnp.uint32), (kb, kc, ka), (rb, ra)


def stream_key(
    log_seed: Any, stream: int, index: UInt32[Array, " R"]
) -> tuple[UInt32[Array, " R"], UInt32[Array, " R"]]:
    """Key of `index` (request or user, uint32) in a log. log_seed: int or scalar array, reduced to 32 bits."""
    seed = jnp.asarray(log_seed).astype(jnp.uint32)
    return threefry((seed, jnp.uint32(stream)), (index, jnp.zeros_like(index)))


def words(key: Key, stream: int, count: int) -> UInt32[Array, "{count} R"]:
    """`count` (even) words per key."""
    counter = jnp.arange(count // 2, dtype=jnp.uint32)[:, None]
    return jnp.concatenate(threefry(key, (counter, jnp.uint32(stream))))


def candidate_words(key: Key, stream: int, candidates: int, count: int) -> UInt32[Array, "{count} R {candidates}"]:
    """`count` (even) words per (request, candidate); the same however many candidates follow."""
    wide = (key[0][:, None], key[1][:, None])
    first = count // 2 * jnp.arange(candidates, dtype=jnp.uint32)
    counter = jnp.arange(count // 2, dtype=jnp.uint32)[:, None, None] + first
    return jnp.concatenate(threefry(wide, (counter, jnp.uint32(stream))))


def event_words(
    key: Key, stream: int, counter: UInt32[Array, "*lead S"]
) -> tuple[UInt32[Array, "R S"], UInt32[Array, "R S"]]:
    """Both words of counters [S] or [R, S] under keys [R]."""
    wide = (key[0][:, None], key[1][:, None])
    return threefry(wide, (counter, jnp.uint32(stream)))


def uniform(word: UInt32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Numbers in the open interval (0, 1) from the top 23 bits: the midpoints of 2^23 equal cells, all exact."""
    return ((word >> 9).astype(jnp.float32) + 0.5) * jnp.float32(2.0**-23)


def normal(first: UInt32[Array, "*shape"], second: UInt32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Standard normal numbers from two words (Box-Muller); |value| < 5.7."""
    radius = jnp.sqrt(-2.0 * jnp.log(uniform(first)))
    return radius * jnp.cos(jnp.float32(2.0 * np.pi) * uniform(second))


class Draws:
    """Integers that a world is built from, on the host: raw words of NumPy's Philox (stable across versions)."""

    def __init__(self, seed: int, stream: int):
        self._bits = np.random.Philox(key=[seed, stream])

    def words(self, *shape: int) -> UInt32[np.ndarray, " ..."]:
        """Words of the given shape."""
        raw = self._bits.random_raw(int(np.prod(shape, dtype=np.int64)))
        return (np.asarray(raw, np.uint64) >> np.uint64(32)).astype(np.uint32).reshape(shape)

    def below(self, bound: int) -> int:
        """One integer in [0, bound)."""
        return int((int(self.words(1)[0]) * bound) >> 32)

    def below_array(self, bound: int, *shape: int) -> Int64[np.ndarray, " ..."]:
        """Integers in [0, bound) of the given shape."""
        return ((self.words(*shape).astype(np.uint64) * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)

    def permutation(self, n: int) -> Int[np.ndarray, " {n}"]:
        """A permutation of 0 ... n-1: the order of n 64-bit words."""
        return np.argsort(np.asarray(self._bits.random_raw(n), np.uint64), kind="stable")
