"""Which rows form a request, and in which order requests are read: a keyed permutation that needs no index array."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Int, Int64

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def permute(positions: Int[np.ndarray, "*shape"], size: int, seed: int, epoch: int = 0) -> Int64[np.ndarray, "*shape"]:
    """Image of `positions` under a permutation of 0 ... size-1 keyed by (seed, epoch).

    A Feistel network on the rectangle a x b >= size, a = ceil(sqrt(size)): x = left * b + right, and in turn
    left += hash(right) mod a and right += hash(left) mod b. Images at or beyond `size` walk the cycle until
    they fall inside, which keeps it a permutation; the rectangle exceeds `size` by less than a, so few ever
    walk.
    """
    if size < 1:
        raise ValueError(f"a permutation needs at least one element, found size {size}")
    positions = np.asarray(positions, np.int64)
    if positions.size and (positions.min() < 0 or positions.max() >= size):
        raise ValueError(f"positions must lie in 0 ... {size - 1}, found {positions.min()} ... {positions.max()}")
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    key = mix(mix(np.array([seed], np.int64).astype(np.uint64)) + np.uint64(epoch))
    image = _feistel(positions, rows, columns, key)
    while True:
        outside = image >= size
        if not outside.any():
            return image
        image[outside] = _feistel(image[outside], rows, columns, key)


class Requests:
    """Requests of one split, start ... end - 1: request q holds at most `candidates` neighbouring rows.

    With one candidate every row is a request and nothing is stored. With more, rows of one stored request are one, or
    where none is stored neighbouring rows of one user and one time; longer runs are cut into several.

    Raises:
        ValueError: several candidates are asked of a set without requests and times.
    """

    def __init__(
        self,
        start: int,
        end: int,
        candidates: int,
        users: Int[np.ndarray, " rows"] | None,
        times: Int[np.ndarray, " rows"] | None,
        requests: Int[np.ndarray, " rows"] | None = None,
    ):
        self.start, self.end = start, end
        self._first: np.ndarray | None = None
        if candidates == 1:
            return
        if requests is not None:
            parts = [requests[start:end]]
        elif times is None or users is None:
            raise ValueError(
                f"this log has no request times, so rows cannot form groups of {candidates} candidates; use 1"
            )
        else:
            parts = [users[start:end], times[start:end]]
        differs = np.logical_or.reduce([part[1:] != part[:-1] for part in parts])
        run = np.flatnonzero(np.r_[True, differs][: end - start])
        length = np.diff(np.r_[run, end - start])
        pieces = -(-length // candidates)
        piece = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        self._first = start + np.repeat(run, pieces) + piece * candidates
        self._size = np.minimum(np.repeat(length, pieces) - piece * candidates, candidates)

    def __len__(self) -> int:
        return self.end - self.start if self._first is None else int(self._first.size)

    def rows(
        self, requests: Int[np.ndarray, " R"], candidates: int
    ) -> tuple[Int64[np.ndarray, "R C"], Bool[np.ndarray, "R C"]]:
        """Row numbers of the requests and which of them exist; absent ones repeat the first."""
        if self._first is None:
            return self.start + requests[:, None], np.ones((requests.size, 1), bool)
        slot = np.arange(candidates)[None, :]
        exists = slot < self._size[requests][:, None]
        return self._first[requests][:, None] + np.where(exists, slot, 0), exists


def _feistel(x: np.ndarray, rows: int, columns: int, key: np.ndarray) -> np.ndarray:
    left, right = x // columns, x % columns
    for turn in range(0, _ROUNDS, 2):
        left = (left + _hash(right, key, turn, rows)) % rows
        right = (right + _hash(left, key, turn + 1, columns)) % columns
    return left * columns + right


def _hash(x: np.ndarray, key: np.ndarray, turn: int, size: int) -> np.ndarray:
    return (mix(mix(x.astype(np.uint64) + key) + np.uint64(turn)) % np.uint64(size)).astype(np.int64)


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function: every input bit reaches every output bit. Wraps modulo 2^64 by design."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
