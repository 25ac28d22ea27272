"""Named shapes of `grouped_matmul`: bfloat16, uneven groups; a case is two layers, y = (x w1[g]) w2[g].

"ragged" is a layer of 8 experts. Its bytes include the hidden, written and read; one pass over x, y and the weights
alone is 4*G*D*F + 4*N*D. The rival is XLA's ragged_dot as XLA chooses to run it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from recscale.pallas_kernels.cases import Case

from .api import grouped_matmul


def _inputs(key, sizes: tuple[int, ...], spare: int, inputs: int, outputs: int):
    keys = jax.random.split(key, 3)

    def normal(key, *shape, fan=1):
        return (jax.random.normal(key, shape, jnp.float32) * fan**-0.5).astype(jnp.bfloat16)

    x = normal(keys[0], sum(sizes) + spare, inputs)
    w1 = normal(keys[1], len(sizes), inputs, outputs, fan=inputs)
    return x, w1, normal(keys[2], len(sizes), outputs, inputs, fan=outputs), jnp.asarray(sizes, jnp.int32)


def _forward(x, w1, w2, sizes, *, implementation, interpret=False):
    options: dict[str, Any] = dict(implementation=implementation, interpret=interpret)
    return grouped_matmul(grouped_matmul(x, w1, sizes, **options), w2, sizes, **options)


def _backward(x, w1, w2, sizes, *, implementation, interpret=False):
    def projected(x, w1, w2):
        y = _forward(x, w1, w2, sizes, implementation=implementation, interpret=interpret)
        return (y.astype(jnp.float32) * jax.random.normal(jax.random.key(1), y.shape)).sum()

    return jax.grad(projected, argnums=(0, 1, 2))(x, w1, w2)


def _ragged_dot(x, w1, w2, sizes):
    return jax.lax.ragged_dot(jax.lax.ragged_dot(x, w1, sizes), w2, sizes)


def _case(name, group, sizes, inputs, outputs, *, spare=0, backward=False, temporaries=None) -> Case:
    rows, groups = sum(sizes) + spare, len(sizes)
    # Products of the two layers: 2 forward; backward the first one again and two gradients of each.
    products = 5 if backward else 2
    return Case(
        operation="grouped_matmul",
        name=name,
        group=group,
        inputs=functools.partial(_inputs, sizes=tuple(sizes), spare=spare, inputs=inputs, outputs=outputs),
        call=_backward if backward else _forward,
        bytes_moved=products * 2 * (rows * (inputs + outputs) + groups * inputs * outputs),
        flops=products * 2 * rows * inputs * outputs,
        temporaries={} if temporaries is None else {"pallas_gpu": temporaries},
        rivals={} if backward else {"ragged_dot (XLA)": _ragged_dot},
        rtol=2e-2,
    )


# 65 536 rows on 8 experts, none a multiple of a tile.
_EIGHT = (4001, 13007, 9999, 1, 20011, 7003, 0, 11514)
# The hidden, and what XLA keeps of the tile lists.
_HIDDEN = 2 * 65536 * 768 + 2**20

CASES = (
    _case("tiny", "tiny", (64, 64), 64, 64),
    _case("odd", "ragged", (0, 1, 17, 0, 5), 24, 40, spare=3),
    _case("odd-backward", "ragged", (0, 1, 17, 0, 5), 24, 40, spare=3, backward=True),
    _case("ragged", "bench", _EIGHT, 768, 768, temporaries=_HIDDEN),
    _case("ragged-backward", "bench", _EIGHT, 768, 768, backward=True, temporaries=2**28),
)
