"""The Hopper kernel of the int8 product, interpreted: exact integers, odd sizes, split inputs, tokens, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.pallas_kernels import targets
from recscale.pallas_kernels.w8a16_matmul import gpu, quantize_int8, w8a16_matmul

KERNEL = dict(implementation="pallas_gpu", interpret=True)
BF16 = jnp.bfloat16


def normal(*shape, seed=0, dtype=BF16):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


SLOW = pytest.mark.slow  # the interpreter takes seconds for each block


@pytest.mark.parametrize(
    "rows, inputs, outputs",
    [(3, 130, 20), pytest.param(3, 300, 150, marks=SLOW), pytest.param(19, 300, 150, marks=SLOW)],
)
def test_integers_are_exact(rows, inputs, outputs):
    """Inputs that bfloat16 holds exactly and sums below 2^24: bit-equal to the int32 product, whole or split over D."""
    rng = np.random.default_rng(0)
    x, wq = rng.integers(-255, 256, (rows, inputs)), rng.integers(-127, 128, (inputs, outputs))
    expected = x.astype(np.int64) @ wq
    assert np.abs(expected).max() < 2**24
    found = w8a16_matmul(
        jnp.asarray(x, BF16), jnp.asarray(wq, jnp.int8), jnp.ones(outputs), out_dtype=jnp.float32, **KERNEL
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((3, 100, 72), BF16),
        *(
            pytest.param(shape, dtype, marks=SLOW)
            for shape, dtype in (
                ((3, 100, 72), jnp.float32),
                ((1, 256, 128), jnp.float32),
                ((33, 129, 7), jnp.float32),
                ((300, 100, 64), BF16),
                ((300, 100, 64), jnp.float32),
            )
        ),
    ],
    ids=str,
)
def test_equals_the_reference(shape, dtype):
    """One row, odd sizes, two row tiles; a zero column and an outlier; 1e-6 in float32, 1e-2 in bfloat16."""
    rows, inputs, outputs = shape
    x, bias = normal(rows, inputs), normal(outputs, seed=2, dtype=jnp.float32)
    w = normal(inputs, outputs, seed=1, dtype=jnp.float32).at[:, 3].set(0.0).at[5, 4].set(1e3)
    wq, scale = quantize_int8(w)
    options = dict(bias=bias, act="gelu", out_dtype=dtype)
    found = w8a16_matmul(x, wq, scale, **options, **KERNEL)
    expected = w8a16_matmul(x, wq, scale, **options, implementation="reference")
    assert found.dtype == dtype and found.shape == expected.shape
    error = np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64)).max()
    assert error <= (1e-2 if dtype == BF16 else 1e-6) * np.abs(np.asarray(expected, np.float64)).max()


@SLOW
@pytest.mark.parametrize("rows", [5, 20])
def test_each_token_has_its_matrix(rows):
    x, bias = normal(2, rows, 130), normal(2, 20, seed=2, dtype=jnp.float32)
    wq, scale = quantize_int8(normal(2, 130, 20, seed=1, dtype=jnp.float32))
    options = dict(act="silu", out_dtype=jnp.float32)
    found = w8a16_matmul(x, wq, scale, bias, token_first=True, **options, **KERNEL)
    for t in range(2):
        one = w8a16_matmul(x[t], wq[t], scale[t], bias[t], **options, implementation="reference")
        np.testing.assert_allclose(found[t], one, rtol=1e-5, atol=1e-5)


@SLOW
def test_layouts_and_reruns():
    x, (wq, scale) = normal(5, 2, 130), quantize_int8(normal(2, 130, 20, seed=1, dtype=jnp.float32))
    found = w8a16_matmul(x, wq, scale, **KERNEL)
    np.testing.assert_array_equal(found, w8a16_matmul(x, wq, scale, **KERNEL))
    token_first = w8a16_matmul(x.swapaxes(0, 1), wq, scale, token_first=True, **KERNEL)
    np.testing.assert_array_equal(token_first.swapaxes(0, 1), found)


@SLOW
@pytest.mark.parametrize("act", [None, "relu"])
def test_activations(act):
    x, (wq, scale) = normal(8, 64), quantize_int8(normal(64, 40, seed=1, dtype=jnp.float32))
    options = dict(act=act, out_dtype=jnp.float32)
    found = w8a16_matmul(x, wq, scale, **options, **KERNEL)
    expected = w8a16_matmul(x, wq, scale, **options, implementation="reference")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@SLOW
def test_runs_under_jit_and_vmap():
    x, (wq, scale) = normal(2, 3, 64), quantize_int8(normal(64, 16, seed=1, dtype=jnp.float32))
    call = jax.jit(jax.vmap(lambda x: w8a16_matmul(x, wq, scale, out_dtype=jnp.float32, **KERNEL)))
    np.testing.assert_allclose(call(x), w8a16_matmul(x, wq, scale, out_dtype=jnp.float32), rtol=1e-5, atol=1e-5)


def test_the_number_of_sms_decides_how_inputs_are_split():
    h100 = targets.get_target("h100")
    shape = dict(tokens=1, rows=16, inputs=1024, outputs=4096)
    assert gpu._plan(h100, **shape).splits == 4
    assert gpu._plan(dataclasses.replace(h100, sms=64), **shape).splits == 2
    assert gpu._plan(h100, **shape | dict(rows=17)).splits == 1
    assert gpu._plan(h100, **shape | dict(tokens=16)).splits == 1
    odd = gpu._plan(h100, **shape | dict(inputs=1000, outputs=128))  # 8 tiles of inputs for 132 SMs
    assert (odd.splits, odd.tiles_each, odd.input_tiles) == (8, 1, 8)


def test_differentiating_is_refused():
    wq, scale = quantize_int8(normal(64, 16, dtype=jnp.float32))
    with pytest.raises(NotImplementedError, match="forward only"):
        jax.grad(lambda x: w8a16_matmul(x, wq, scale, out_dtype=jnp.float32, **KERNEL).sum())(normal(2, 64))


def test_xla_stays_the_automatic_choice():
    """No kernel has been measured against it: on a GPU target None still is XLA, which a CPU can run."""
    x, (wq, scale) = normal(2, 64), quantize_int8(normal(64, 16, seed=1, dtype=jnp.float32))
    expected = w8a16_matmul(x, wq, scale, implementation="xla")
    with targets.compiling_for("h100"):
        np.testing.assert_array_equal(w8a16_matmul(x, wq, scale), expected)


@pytest.mark.parametrize(
    "x, scale, options, reason",
    [
        (normal(2, 64, dtype=jnp.float32), jnp.ones(16), KERNEL, "x is float32"),
        (normal(2, 64), jnp.ones((2, 16)), KERNEL, "2 groups"),
        (normal(0, 64), jnp.ones(16), KERNEL, "empty axis"),
        (normal(2, 64), jnp.ones(16), dict(implementation="pallas_gpu"), "needs a Hopper GPU"),
    ],
    ids=["float32", "groups", "no rows", "no gpu"],
)
def test_refusals_name_their_reason(x, scale, options, reason):
    with pytest.raises(NotImplementedError, match=reason):
        w8a16_matmul(x, jnp.ones((64, 16), jnp.int8), scale, **options)
