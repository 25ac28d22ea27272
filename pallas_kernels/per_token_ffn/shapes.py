"""Named shapes of `per_token_ffn` and `per_token_matmul`: bfloat16, GELU, both biases, in the form [B, T*D].

"ptffn-train" and "ptffn-serve" are blocks of a 100M RankMixer, "ptffn-1b" one of rankmixer_1b, "ptffn-narrow" one at
which the hidden is most of the traffic. Rivals are two XLA products on token-major activations, the fastest order of
axes for them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from recscale.pallas_kernels.cases import Case

from .api import per_token_ffn, per_token_matmul

_DTYPE = jnp.bfloat16


def _inputs(key, rows: int, tokens: int, width: int, hidden: int, layout: str, two: bool = True):
    keys = jax.random.split(key, 5)
    shape = {"tbd": (tokens, rows, width), "btd": (rows, tokens, width), "flat": (rows, tokens * width)}[layout]

    def normal(key, *shape, fan=1):
        return (jax.random.normal(key, shape, jnp.float32) * fan**-0.5).astype(_DTYPE)

    first = normal(keys[1], tokens, width, hidden, fan=width), normal(keys[2], tokens, hidden)
    second = normal(keys[3], tokens, hidden, width, fan=hidden), normal(keys[4], tokens, width)
    return normal(keys[0], *shape), *first, *(second if two else ())


def _forward(x, *weights, token_first, act="gelu", implementation, interpret=False):
    layer = per_token_ffn if len(weights) == 4 else per_token_matmul
    options = dict(act=act, token_first=token_first, implementation=implementation, interpret=interpret)
    return layer(x, *weights, **options)


def _backward(*arrays, token_first, implementation, interpret=False):
    def projected(*arrays):
        y = _forward(*arrays, token_first=token_first, implementation=implementation, interpret=interpret)
        return (y.astype(jnp.float32) * jax.random.normal(jax.random.key(1), y.shape)).sum()

    return jax.grad(projected, argnums=tuple(range(len(arrays))))(*arrays)


def _token_major(x, w1, b1, w2, b2):
    x = x if x.ndim == 3 else x.reshape(x.shape[0], w1.shape[0], -1).swapaxes(0, 1)
    h = jax.nn.gelu(jnp.einsum("tbd,tdf->tbf", x, w1) + b1[:, None], approximate=True)
    return jnp.einsum("tbf,tfd->tbd", h, w2) + b2[:, None]


def _temporaries(rows: int, tokens: int, width: int, hidden: int, two: bool, backward: bool) -> dict[str, int]:
    """Of benchmark shapes. On Hopper a wide hidden is written, and rows that are no multiple of 8 are copied. TPU v5p
    and 7x copy biases [T, F] to [T, 1, F], where a row of bfloat16 takes the room of two; below 64 KiB nobody looks."""
    if backward:
        return {"pallas_tpu": 800_000_000, "pallas_gpu": 2**30}
    held = -(-rows // 8) * 8
    written = 2 * held * tokens * (hidden * two + width * (held > rows)) if width > 256 else 0
    biases = 2 * _DTYPE.dtype.itemsize * tokens * (hidden + width * two)
    return {"pallas_tpu": max(biases, 2**16), "pallas_gpu": 2**18 + written}


def _case(name, group, rows, tokens, width, hidden, layout="flat", *, two=True, backward=False):
    product, activations = rows * tokens * width * hidden, rows * tokens * width
    weights = tokens * (width * hidden + hidden)
    outputs = hidden
    if two:
        weights, outputs = tokens * (2 * width * hidden + hidden + width), width
    moved = weights + activations + rows * tokens * outputs
    # Backward: the first layer again, and two products for each layer's two gradients; everything is read, and all
    # but the cotangent written.
    flops = product * (4 if two else 2)
    if backward:
        flops, moved = 10 * product, 2 * weights + 3 * activations
    return Case(
        operation="per_token_ffn",
        name=name,
        group=group,
        inputs=functools.partial(_inputs, rows=rows, tokens=tokens, width=width, hidden=hidden, layout=layout, two=two),
        call=functools.partial(_backward if backward else _forward, token_first=layout == "tbd"),
        bytes_moved=2 * moved,
        flops=flops,
        temporaries=_temporaries(rows, tokens, width, hidden, two, backward) if group == "bench" else {},
        rivals={} if backward or not two else {"two XLA products, token-major": _token_major},
        rtol=2e-2,
    )


CASES = (
    _case("tiny", "tiny", 8, 2, 128, 128),
    _case("tiny-backward", "tiny", 8, 2, 128, 128, backward=True),
    _case("odd", "ragged", 11, 3, 20, 36, "tbd"),
    _case("odd-backward", "ragged", 11, 3, 20, 36, "tbd", backward=True),
    _case("odd-one-layer", "ragged", 11, 3, 20, 36, "tbd", two=False),
    _case("ptffn-train", "bench", 2048, 16, 768, 3072),
    _case("ptffn-train-token-major", "bench", 2048, 16, 768, 3072, "tbd"),
    _case("ptffn-train-backward", "bench", 2048, 16, 768, 3072, backward=True),
    _case("ptffn-1b", "bench", 2048, 32, 1536, 5632),
    _case("ptffn-serve", "bench", 500, 16, 768, 3072),
    _case("ptffn-narrow", "bench", 4096, 16, 128, 256),
    _case("one-layer-train", "bench", 2048, 16, 768, 3072, two=False),
)
