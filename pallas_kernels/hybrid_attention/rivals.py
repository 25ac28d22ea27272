"""Other attentions for the same visible pairs, as rivals in benchmarks. None of them returns lse.

    xla     jax.nn.dot_product_attention: lengths of the keys, and the window j >= i for "causal"
    cudnn   the same on cuDNN, bfloat16, every row sees every valid key (it has no window to the right)
    flash   flash attention for the TPU: valid and padded keys as segments, no window either
    splash  splash attention for the TPU: the same segments, j >= i as a local mask; one replica per request by vmap

A row that sees no key averages padding there and gives 0 here; no length of a benchmark is 0. Each is
`rival(q, k, v, lengths, bias)` for arrays as `shapes` makes them, or its gradients by (q, k, v) with do and dlse added.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp

from .shape import Shape

Array = jax.Array

# Those that run on one platform only.
ONLY_ON = {"jax.nn.dot_product_attention cudnn": "gpu", "flash_attention": "tpu", "splash_attention": "tpu"}

_BLOCK = 512  # of rows and of keys; flash and splash need them to divide
_LANES = 128


def of(shape: Shape, backward: bool) -> dict[str, Callable[..., Any]]:
    """Name -> function of the case's arrays, for every rival that can say the case's mask."""
    if shape.mode == "positions" or shape.bias:
        return {}
    found: dict[str, Callable[..., Array]] = {}
    if shape.value_width == shape.d:
        found["jax.nn.dot_product_attention"] = functools.partial(_library, implementation="xla")
        if shape.mode == "full" and shape.dtype == jnp.bfloat16 and shape.d <= _LANES:
            found["jax.nn.dot_product_attention cudnn"] = functools.partial(_library, implementation="cudnn")
    rows = shape.C * shape.Q
    whole = rows % _LANES == 0 and shape.S % _BLOCK == 0 and shape.key_heads == shape.H
    if whole and shape.mode == "full" and shape.value_width == shape.d:
        found["flash_attention"] = _flash
    if whole and shape.d % _LANES == 0 and shape.value_width % _LANES == 0:
        found["splash_attention"] = _splash
    return {name: functools.partial(_gradient if backward else _forward, rival, shape) for name, rival in found.items()}


def _forward(rival, shape: Shape, q, k, v, lengths, bias) -> Array:
    return rival(shape, q, k, v, lengths)


def _gradient(rival, shape: Shape, q, k, v, lengths, bias, do, dlse):
    return jax.vjp(lambda q, k, v: rival(shape, q, k, v, lengths), q, k, v)[1](do)


def _heads(shape: Shape, q, k, v):
    """[R, C*Q, H, d], [R, S, Hk, d], [R, S, Hk, dv]."""
    q, k = q.reshape(shape.R, -1, shape.H, shape.d), k.reshape(shape.R, shape.S, shape.key_heads, shape.d)
    return q, k, k if v is None else v.reshape(shape.R, shape.S, shape.key_heads, shape.value_width)


def _library(shape: Shape, q, k, v, lengths, *, implementation: Literal["xla", "cudnn"]) -> Array:
    window = (0, shape.S) if shape.mode == "causal" else None
    q, k, v = _heads(shape, q, k, v)
    o = jax.nn.dot_product_attention(
        q, k, v, scale=shape.d**-0.5, key_value_seq_lengths=lengths, local_window_size=window,
        implementation=implementation,
    )  # fmt: skip
    return o.reshape(shape.R, shape.C * shape.Q, -1)


def _flash(shape: Shape, q, k, v, lengths) -> Array:
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    q, k, v = (x.swapaxes(1, 2) for x in _heads(shape, q, k, v))
    segments = flash.SegmentIds(*_segments(shape, lengths))
    # The library's own block sizes are 128, which it calls a placeholder.
    rows, keys = min(_BLOCK, q.shape[2]), _BLOCK
    blocks = flash.BlockSizes(
        block_q=rows, block_k_major=keys, block_k=keys, block_b=1, block_q_major_dkv=rows, block_k_major_dkv=keys,
        block_k_dkv=keys, block_q_dkv=rows, block_k_major_dq=keys, block_k_dq=keys, block_q_dq=rows,
    )  # fmt: skip
    o = flash.flash_attention(q, k, v, segment_ids=segments, sm_scale=shape.d**-0.5, block_sizes=blocks)
    return o.swapaxes(1, 2).reshape(shape.R, shape.C * shape.Q, -1)


def _splash(shape: Shape, q, k, v, lengths) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    q, k, v = (x.swapaxes(1, 2) for x in _heads(shape, q * shape.d**-0.5, k, v))
    size = (q.shape[2], shape.S)
    one = masks.LocalMask(size, (0, None), 0) if shape.mode == "causal" else masks.FullMask(size)
    rows, keys = min(_BLOCK, q.shape[2]), _BLOCK
    blocks = splash.BlockSizes(
        block_q=rows, block_kv=keys, block_kv_compute=keys, block_q_dkv=rows, block_kv_dkv=keys,
        block_kv_dkv_compute=keys, block_q_dq=rows, block_kv_dq=keys,
    )  # fmt: skip
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([one] * shape.H), block_sizes=blocks, head_shards=1, q_seq_shards=1
    )
    o = cast(Array, jax.vmap(kernel)(q, k, v, splash.SegmentIds(*_segments(shape, lengths))))
    return o.swapaxes(1, 2).reshape(shape.R, shape.C * shape.Q, -1)


def _segments(shape: Shape, lengths: Array) -> tuple[Array, Array]:
    """int32 [R, C*Q] all 0 and [R, S], 0 for valid keys."""
    keys = jnp.arange(shape.S, dtype=jnp.int32)[None] >= lengths[:, None]
    return jnp.zeros((shape.R, shape.C * shape.Q), jnp.int32), keys.astype(jnp.int32)
