"""One attention over histories as a case of tests and benchmarks: its sizes, and its work in closed form.

Lengths are quantiles, not draws, so that the work of a case is known: "full" S; "uniform" evenly spread over 1 ... S;
"zipf" log-uniform; "edges" 0, 1, S//2 and S in turn. With P visible pairs (row, key) of all requests:

    FLOPs   forward 2 P H (d + dv); the backward adds twice that (recomputed scores are not counted)
    bytes   of visible keys and of all rows, once: forward q, k, v, o, lse
            the backward adds q, k, v, o, do, lse, dlse and, for all keys, dq, dk, dv (dkey_bias)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Shape:
    """One attention: sizes, rule and lengths. dv None is d; with `same`, v is k; Hk None is H."""

    R: int
    C: int
    Q: int
    S: int
    H: int
    d: int
    dv: int | None = None
    Hk: int | None = None
    same: bool = False
    mode: str = "full"
    lengths: str = "full"
    bias: bool = False
    dtype: Any = jnp.bfloat16

    @property
    def value_width(self) -> int:
        return self.dv or self.d

    @property
    def key_heads(self) -> int:
        return self.Hk or self.H

    def valid(self) -> np.ndarray:
        """int32 [R], the lengths; neighbouring requests differ."""
        place = (np.arange(self.R) * 389) % self.R if np.gcd(389, self.R) == 1 else np.arange(self.R)
        part = (place + 0.5) / self.R
        made = {
            "full": np.full(self.R, self.S),
            "uniform": np.ceil(self.S * part),
            "zipf": np.ceil(self.S**part),
            "edges": np.resize([0, 1, self.S // 2, self.S], self.R),
        }
        return made[self.lengths].astype(np.int32)

    def positions(self) -> np.ndarray | None:
        """int32 [Q] of mode "positions": every other event, from the second on."""
        return 1 + 2 * np.arange(self.Q, dtype=np.int32) if self.mode == "positions" else None

    def pairs(self) -> int:
        """Visible (row, key) pairs of all requests and candidates."""
        first = {"full": np.zeros(self.Q), "causal": np.arange(self.Q), "positions": self.positions()}[self.mode]
        return self.C * int(np.maximum(self.valid()[:, None] - first[None], 0).sum())

    def flops(self, backward: bool) -> int:
        return (3 if backward else 1) * 2 * self.pairs() * self.H * (self.d + self.value_width)

    def bytes_moved(self, backward: bool) -> int:
        size = jnp.dtype(self.dtype).itemsize
        rows, value = self.R * self.C * self.Q * self.H, 0 if self.same else self.value_width
        key = self.key_heads * (self.d + value) * size + 4 * self.H * self.bias
        visible, every = key * int(self.valid().sum()), key * self.R * self.S
        forward = visible + rows * ((self.d + self.value_width) * size + 4)
        again = visible + every + rows * ((2 * self.d + 2 * self.value_width) * size + 8)
        return forward + again * backward
