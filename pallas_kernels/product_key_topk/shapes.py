"""Named shapes of `product_key_topk`: small ones for tests, and those of published memories for compilation and timing.

    topk-ind   an industrial memory: 65 536 slots, 32 hits, key width 128 per axis
    topk-pub   the same memory at width 64 and twice the reads
    topk-lmn   a million slots (n = 1024), 16 hits

Entries are multiples of 1/4, so that sums are exact in any order and ids can be compared between devices, ties
included. A backward case returns the gradients of q and keys, with the search they need.

Letters: N reads, H heads, n sub-keys per axis, p key width per axis, K winners. At one pass, b bytes per entry:

    forward     bytes  N H (2 p b + 8 K) + 2 H n p b       FLOPs   4 N H n p
    backward    bytes  N H (6 p b + 16 K) + 6 H n p b      FLOPs  12 N H n p
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from recscale.pallas_kernels.cases import Case
from recscale.pallas_kernels.dispatch import KERNELS

from . import reference
from .api import product_key_topk

Array = jax.Array

_MIB = 2**20


def _inputs(key: Array, reads: int, heads: int, sub_keys: int, width: int, topk: int, dtype: Any) -> tuple[Array, ...]:
    q_key, keys_key, ds_key = jax.random.split(key, 3)
    q, keys = (
        (jnp.round(4 * jax.random.normal(key, shape, jnp.float32)) / 4).astype(dtype)
        for key, shape in ((q_key, (reads, heads, 2, width)), (keys_key, (heads, 2, sub_keys, width)))
    )
    return q, keys, jax.random.normal(ds_key, (reads, heads, topk), jnp.float32)


def _forward(q: Array, keys: Array, ds: Array, **options: Any) -> tuple[Array, Array]:
    return product_key_topk(q, keys, ds.shape[-1], **options)


def _backward(q: Array, keys: Array, ds: Array, **options: Any) -> tuple[Array, Array]:
    _, pull = jax.vjp(lambda q, keys: _forward(q, keys, ds, **options)[0], q, keys)
    return pull(ds)


def _unfused(q: Array, keys: Array, ds: Array) -> tuple[Array, Array]:
    """The rival that holds all scores."""
    return reference.topk(q, keys, ds.shape[-1], 1.0, reference.products)


def _pair(
    name: str,
    group: str,
    reads: int,
    sub_keys: int,
    width: int,
    topk: int,
    dtype: Any,
    *,
    heads: int = 1,
    temporaries: tuple[dict[str, int], dict[str, int]] = ({}, {}),
) -> tuple[Case, Case]:
    """A forward case and its backward; `temporaries` of both."""
    size = jnp.dtype(dtype).itemsize
    inputs = functools.partial(
        _inputs, reads=reads, heads=heads, sub_keys=sub_keys, width=width, topk=topk, dtype=dtype
    )
    entries = 2 * heads * width * (reads + sub_keys)  # of q and keys
    results = reads * heads * topk
    forward = Case(
        "product_key_topk",
        name,
        group,
        inputs,
        _forward,
        bytes_moved=entries * size + 8 * results,
        flops=4 * reads * heads * sub_keys * width,
        temporaries=temporaries[0],
        rivals={"scores, then top_k (XLA)": _unfused} if group == "bench" else {},
        rtol=1e-7,
    )
    backward = Case(
        "product_key_topk",
        f"{name}-backward",
        group,
        inputs,
        _backward,
        bytes_moved=3 * entries * size + 16 * results,
        flops=3 * forward.flops,
        temporaries=temporaries[1],
        rtol=1e-5 if dtype == jnp.float32 else 2**-7,
    )
    return forward, backward


# Bounds of XLA's temporaries. A TPU copies keys whose width fills no lanes, and small operands as a whole. A GPU copies
# the keys (float32: and the queries, in three pieces). A backward holds scores of a chunk of reads and its inputs.
_SMALL: dict[str, int] = dict.fromkeys(KERNELS["product_key_topk"], _MIB)
_BACKWARD: dict[str, int] = dict.fromkeys(KERNELS["product_key_topk"], 208 * _MIB)


def _bounds(tpu: int, gpu: int) -> tuple[dict[str, int], dict[str, int]]:
    return {"pallas_tpu": tpu, "pallas_gpu": gpu}, _BACKWARD


CASES: tuple[Case, ...] = (
    *_pair("topk-tiny", "tiny", 16, 16, 16, 4, jnp.float32, temporaries=(_SMALL, _SMALL)),
    *_pair("topk-tiny-bf16", "tiny", 16, 32, 64, 8, jnp.bfloat16, temporaries=(_SMALL, _SMALL)),
    *_pair("topk-odd", "ragged", 33, 45, 5, 7, jnp.float32, temporaries=(_SMALL, _SMALL)),
    *_pair("topk-odd-bf16", "ragged", 33, 45, 72, 7, jnp.bfloat16, heads=2, temporaries=(_SMALL, _SMALL)),
    *_pair("topk-chunks", "ragged", 70, 300, 8, 9, jnp.bfloat16, temporaries=(_SMALL, _SMALL)),
    *_pair("topk-ind", "bench", 32_768, 256, 128, 32, jnp.bfloat16, temporaries=_bounds(0, 2**18)),
    *_pair("topk-pub", "bench", 65_536, 256, 64, 32, jnp.bfloat16, temporaries=_bounds(2**18, 2**18)),
    *_pair("topk-lmn", "bench", 204_800, 1024, 64, 16, jnp.bfloat16, temporaries=_bounds(2**20, 2**19)),
)
