"""Named shapes of `w8a16_matmul`: bfloat16 activations and results, one scale per output, no bias.

"w8-16" and "w8-64" are a serving layer at few rows, "w8-256" one of a large model, "w8-tokens" one matrix per token.
Rivals are XLA products: of the same int8 weights, widened in the program, and of bfloat16 ones, which are twice the
bytes and are among a case's arrays for that alone.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from recscale.pallas_kernels.cases import Case
from recscale.pallas_kernels.dispatch import KERNELS

from .api import w8a16_matmul


def _inputs(key, rows: int, inputs: int, outputs: int, tokens: int | None):
    lead = () if tokens is None else (tokens,)
    x_key, w_key, scale_key = jax.random.split(key, 3)
    x = jax.random.normal(x_key, (*lead, rows, inputs), jnp.bfloat16)
    wq = jax.random.randint(w_key, (*lead, inputs, outputs), -127, 128, jnp.int8)
    scale = jax.random.uniform(scale_key, (*lead, outputs), jnp.float32, 0.5, 1.5)
    return x, wq, scale, (wq * scale[..., None, :]).astype(jnp.bfloat16)


def _call(x, wq, scale, w, *, implementation, interpret=False):
    del w
    return w8a16_matmul(x, wq, scale, token_first=wq.ndim == 3, implementation=implementation, interpret=interpret)


def _bfloat16(x, wq, scale, w):
    return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def _widened(x, wq, scale, w):
    return (jnp.matmul(x, wq.astype(x.dtype), preferred_element_type=jnp.float32) * scale[..., None, :]).astype(x.dtype)


def _case(name: str, group: str, rows: int, inputs: int, outputs: int, tokens: int | None = None) -> Case:
    each = inputs * outputs + 4 * outputs + 2 * rows * (inputs + outputs)
    return Case(
        operation="w8a16_matmul",
        name=name,
        group=group,
        inputs=functools.partial(_inputs, rows=rows, inputs=inputs, outputs=outputs, tokens=tokens),
        call=_call,
        bytes_moved=(tokens or 1) * each,
        flops=(tokens or 1) * 2 * rows * inputs * outputs,
        temporaries=_temporaries(group, rows, 4 * outputs * (tokens or 0)),
        rivals={"bf16 x widened int8 (XLA)": _widened, "bf16 x bf16 (XLA)": _bfloat16},
        rtol=1e-2,
    )


def _temporaries(group: str, rows: int, scales: int) -> dict[str, int]:
    """Odd sizes: operands are padded. Few rows on a GPU: float32 sums of each part of D. One matrix per token: v5p and
    7x lay the scales out anew, so many bytes.
    """
    if group != "bench":
        return dict.fromkeys(KERNELS["w8a16_matmul"], 2**18)
    return {"pallas_tpu": scales, "pallas_gpu": 2**20 if rows <= 16 else 0}


CASES = (
    _case("tiny", "tiny", 8, 128, 128),
    _case("odd", "ragged", 3, 100, 72),
    _case("odd-tokens", "ragged", 3, 100, 72, tokens=5),
    _case("w8-16", "bench", 16, 1024, 4096),
    _case("w8-64", "bench", 64, 1024, 4096),
    _case("w8-256", "bench", 256, 4096, 16384),
    _case("w8-tokens", "bench", 512, 768, 3072, tokens=16),
)
