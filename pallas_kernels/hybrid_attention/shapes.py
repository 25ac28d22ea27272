"""Named shapes of attention over a history, forward and backward: LONGER, target attention, HyFormer, long histories.

Arrays come as projections leave them, heads packed in the last axis: q [R, C*Q, H*d], k [R, S, Hk*d], v [R, S, Hk*dv].
Lengths are quantiles, not draws, so that the work of a case is known: "full" S; "uniform" evenly spread over 1 ... S;
"zipf" log-uniform; "edges" 0, 1, S//2 and S in turn. With P visible pairs (row, key) of all requests:

    FLOPs   forward 2 P H (d + dv); the backward adds twice that (recomputed scores are not counted)
    bytes   of visible keys and of all rows, once: forward q, k, v, o, lse
            the backward adds q, k, v, o, do, lse, dlse and, for all keys, dq, dk, dv (dkey_bias)

Rivals attend over the same pairs: XLA's and cuDNN's `jax.nn.dot_product_attention`, JAX's flash attention and splash
attention for the TPU, each where its mask can say ours.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recscale.pallas_kernels.cases import Case

from . import rivals
from .api import hybrid_attention

Array = jax.Array


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


def _inputs(key: Array, shape: Shape, backward: bool) -> tuple[Any, ...]:
    """q, k, v or None, lengths, key_bias or None, and of a backward case do and dlse."""
    keys = jax.random.split(key, 6)
    R, S, rows = shape.R, shape.S, shape.C * shape.Q

    def normal(i: int, *size: int, dtype=shape.dtype) -> Array:
        return jax.random.normal(keys[i], size, jnp.float32).astype(dtype)

    q, k = normal(0, R, rows, shape.H * shape.d), normal(1, R, S, shape.key_heads * shape.d)
    v = None if shape.same else normal(2, R, S, shape.key_heads * shape.value_width)
    bias = normal(3, R, S, shape.H, dtype=jnp.float32) if shape.bias else None
    lengths = jnp.asarray(shape.valid())
    if not backward:
        return q, k, v, lengths, bias
    do = normal(4, R, rows, shape.H * shape.value_width)
    return q, k, v, lengths, bias, do, normal(5, R, rows, shape.H, dtype=jnp.float32)


def _attend(q, k, v, lengths, bias, *, shape: Shape, implementation, interpret):
    q = q.reshape(shape.R, shape.C, shape.Q, shape.H, shape.d)
    k = k.reshape(shape.R, shape.S, shape.key_heads, shape.d)
    v = None if v is None else v.reshape(shape.R, shape.S, shape.key_heads, shape.value_width)
    positions = shape.positions()
    o, lse = hybrid_attention(
        q, k, v, lengths, mode=shape.mode, q_pos=None if positions is None else jnp.asarray(positions),
        scale=shape.d**-0.5, key_bias=bias, implementation=implementation, interpret=interpret,
    )  # fmt: skip
    # A row that sees nothing has lse = -1e30, which would drown every other in a comparison.
    lse = jnp.where(lse > -1e29, lse, 0.0).reshape(shape.R, -1, shape.H)
    return o.reshape(shape.R, shape.C * shape.Q, -1), lse


def _forward(*arrays, shape: Shape, implementation=None, interpret=False):
    return _attend(*arrays, shape=shape, implementation=implementation, interpret=interpret)


def _backward(q, k, v, lengths, bias, do, dlse, *, shape: Shape, implementation=None, interpret=False):
    def outputs(q, k, v, bias):
        return _attend(q, k, v, lengths, bias, shape=shape, implementation=implementation, interpret=interpret)

    return jax.vjp(outputs, q, k, v, bias)[1]((do, dlse))


def _cases(name: str, group: str, shape: Shape) -> tuple[Case, Case]:
    exact = shape.dtype == jnp.float32
    return tuple(
        Case(
            operation="hybrid_attention",
            name=name + "-backward" * backward,
            group=group,
            inputs=functools.partial(_inputs, shape=shape, backward=backward),
            call=functools.partial(_backward if backward else _forward, shape=shape),
            bytes_moved=shape.bytes_moved(backward),
            flops=shape.flops(backward),
            temporaries=_temporaries(shape, backward) if group == "bench" else {},
            rivals=rivals.of(shape, backward) if group == "bench" else {},
            rtol=(1e-4 if backward else 1e-5) if exact else 2e-2,
        )
        for backward in (False, True)
    )


def _temporaries(shape: Shape, backward: bool) -> dict[str, int]:
    """Numbers per row, on a TPU also copies of the rows; never scores, keys or values.

    TPU: lse, its cotangent and delta, in the backward o as well, and the rows that are filled up to whole tiles.
    GPU: lse, in the backward also delta, each at most twice (a row of each head beside its neighbours, or beside the
    other heads); rows of these shapes are whole as they come. Tile ranges and positions are in the constant.
    """
    rows, size = shape.R * shape.C * shape.Q * shape.H, jnp.dtype(shape.dtype).itemsize
    width = (shape.d + shape.value_width) * size
    filled = shape.R * (-(-shape.C * shape.Q // 16) * 16) * shape.H
    copies = (2 if backward else 1) * filled * width if filled > rows else 0
    return {
        "pallas_tpu": 2**19 + copies + filled * (shape.value_width * size + 16 if backward else 8),
        "pallas_gpu": 2**17 + rows * (16 if backward else 8),
    }


_SHAPES = (
    ("tiny", "tiny", Shape(R=4, C=1, Q=5, S=13, H=2, d=8, mode="causal", lengths="edges", dtype=jnp.float32)),
    ("tiny-candidates", "tiny", Shape(R=4, C=3, Q=2, S=9, H=2, d=8, lengths="edges")),
    ("odd", "ragged", Shape(R=4, C=1, Q=37, S=300, H=3, d=24, dv=40, mode="positions", lengths="edges", bias=True,
                            dtype=jnp.float32)),
    ("odd-shared", "ragged", Shape(R=3, C=5, Q=3, S=141, H=3, d=40, Hk=1, same=True, lengths="edges",
                                   dtype=jnp.float32)),
    ("longer-cross", "bench", Shape(R=64, C=1, Q=512, S=1024, H=4, d=32, mode="causal", lengths="uniform")),
    ("longer-self", "bench", Shape(R=64, C=1, Q=1024, S=1024, H=8, d=64, mode="causal", lengths="uniform")),
    ("target", "bench", Shape(R=16, C=512, Q=1, S=4096, H=4, d=32, lengths="uniform")),
    ("target-single", "bench", Shape(R=256, C=1, Q=1, S=256, H=4, d=32, lengths="zipf")),
    ("target-reordered", "bench", Shape(R=16, C=64, Q=1, S=4096, H=8, d=256, Hk=1, same=True, lengths="uniform")),
    ("hyformer-decode", "bench", Shape(R=64, C=64, Q=16, S=1024, H=4, d=128, lengths="uniform")),
    ("events-10k", "bench", Shape(R=8, C=1, Q=128, S=10_000, H=4, d=128, lengths="zipf")),
    ("events-16k", "bench", Shape(R=16, C=1, Q=512, S=16_384, H=4, d=128, mode="causal")),
)  # fmt: skip

CASES = tuple(case for entry in _SHAPES for case in _cases(*entry))
