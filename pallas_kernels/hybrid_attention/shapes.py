"""Named shapes of attention over a history, forward and backward: LONGER, target attention, HyFormer, long histories.

Arrays come as projections leave them, heads packed in the last axis: q [R, C*Q, H*d], k [R, S, Hk*d], v [R, S, Hk*dv].
Lengths, FLOPs and bytes are those of `shape`.

Rivals attend over the same pairs: XLA's and cuDNN's `jax.nn.dot_product_attention`, JAX's flash attention and splash
attention for the TPU, each where its mask can say ours.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from recscale.pallas_kernels.cases import Case

from . import rivals
from .api import hybrid_attention
from .shape import Shape

Array = jax.Array


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


def _cases(name: str, group: str, shape: Shape) -> tuple[Case, ...]:
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
            only_on=rivals.ONLY_ON,
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
    ("longer-2k", "bench", Shape(R=64, C=1, Q=512, S=2048, H=4, d=64, mode="causal", lengths="uniform")),
    ("target", "bench", Shape(R=16, C=512, Q=1, S=4096, H=4, d=32, lengths="uniform")),
    ("target-single", "bench", Shape(R=256, C=1, Q=1, S=256, H=4, d=32, lengths="zipf")),
    ("target-reordered", "bench", Shape(R=16, C=64, Q=1, S=4096, H=8, d=256, Hk=1, same=True, lengths="uniform")),
    ("hyformer-decode", "bench", Shape(R=64, C=64, Q=16, S=1024, H=4, d=128, lengths="uniform")),
    ("events-10k", "bench", Shape(R=8, C=1, Q=128, S=10_000, H=4, d=128, lengths="zipf")),
    ("events-16k", "bench", Shape(R=16, C=1, Q=512, S=16_384, H=4, d=128, mode="causal")),
)  # fmt: skip

CASES = tuple(case for entry in _SHAPES for case in _cases(*entry))
