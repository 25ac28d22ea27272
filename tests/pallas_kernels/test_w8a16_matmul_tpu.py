"""The TPU kernel of the int8 product, interpreted: exact integers, odd sizes, blocks, group scales, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.pallas_kernels import targets
from recscale.pallas_kernels.cases import cases
from recscale.pallas_kernels.w8a16_matmul import quantize_int8, tpu, w8a16_matmul

KERNEL = dict(implementation="pallas_tpu", interpret=True)


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks on every axis, at small shapes; the last of each reaches beyond the array."""
    blocks = dict(rows=8, inputs=128, outputs=128)
    monkeypatch.setattr(tpu, "block_sizes", lambda *_: blocks)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_integers_are_exact(dtype, small_blocks):
    """Inputs that bfloat16 holds exactly and sums below 2^24: bit-equal to the int32 product."""
    rng = np.random.default_rng(0)
    x, wq = rng.integers(-255, 256, (19, 200)), rng.integers(-127, 128, (200, 150))
    expected = x.astype(np.int64) @ wq
    assert np.abs(expected).max() < 2**24
    found = w8a16_matmul(
        jnp.asarray(x, dtype), jnp.asarray(wq, jnp.int8), jnp.ones(150), out_dtype=jnp.float32, **KERNEL
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shape", [(1, 256, 128), (3, 100, 72), (33, 129, 7), (8, 384, 256)], ids=str)
def test_equals_the_reference(shape, small_blocks):
    """One row, odd sizes, whole blocks; W2's tolerances: 1e-6 in float32, 1e-2 in bfloat16."""
    rows, inputs, outputs = shape
    x, bias = normal(rows, inputs), normal(outputs, seed=2)
    w = normal(inputs, outputs, seed=1).at[:, 3].set(0.0).at[5, 4].set(1e3)
    wq, scale = quantize_int8(w)
    for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)):
        given = dict(bias=bias, act="gelu", out_dtype=dtype)
        found = w8a16_matmul(x.astype(dtype), wq, scale, **given, **KERNEL)
        expected = w8a16_matmul(x.astype(dtype), wq, scale, **given, implementation="reference")
        assert found.dtype == dtype and found.shape == expected.shape
        error = np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64)).max()
        assert error <= tolerance * np.abs(np.asarray(expected, np.float64)).max()


def test_each_token_has_its_matrix(small_blocks):
    x, bias = normal(4, 11, 130), normal(4, 20, seed=2)
    wq, scale = quantize_int8(normal(4, 130, 20, seed=1))
    options = dict(act="silu", out_dtype=jnp.float32, **KERNEL)
    found = w8a16_matmul(x, wq, scale, bias, token_first=True, **options)
    for t in range(4):
        np.testing.assert_allclose(
            found[t], w8a16_matmul(x[t], wq[t], scale[t], bias[t], **options), rtol=1e-6, atol=1e-6
        )
    batch_major = w8a16_matmul(x.swapaxes(0, 1), wq, scale, bias, **options)
    np.testing.assert_array_equal(batch_major.swapaxes(0, 1), found)


@pytest.mark.parametrize("tokens", [(), (2,)], ids=["one matrix", "per token"])
def test_scales_of_groups(tokens, small_blocks):
    x, (wq, scale) = normal(*tokens, 5, 384), quantize_int8(normal(*tokens, 384, 40, seed=1), group=128)
    given = dict(out_dtype=jnp.float32, token_first=bool(tokens))
    found = w8a16_matmul(x, wq, scale, **given, **KERNEL)
    expected = w8a16_matmul(x, wq, scale, **given, implementation="reference")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("case", [c for c in cases("w8a16_matmul") if c.group != "bench"], ids=lambda c: c.name)
def test_cases(case):
    arrays = case.inputs(jax.random.key(0))
    found = np.asarray(case.call(*arrays, **KERNEL), np.float64)
    expected = np.asarray(case.call(*arrays, implementation="reference", interpret=False), np.float64)
    assert np.abs(found - expected).max() <= case.rtol * np.abs(expected).max() + case.atol


def test_vmap_jit_and_reruns():
    x, (wq, scale) = normal(3, 4, 32), quantize_int8(normal(32, 24, seed=1))

    def product(rows):
        return w8a16_matmul(rows, wq, scale, out_dtype=jnp.float32, **KERNEL)

    mapped = jax.jit(jax.vmap(product))
    np.testing.assert_allclose(mapped(x), product(x), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(mapped(x), mapped(x))
    with pytest.raises(NotImplementedError, match="forward only"):
        jax.grad(lambda rows: product(rows).sum())(x)


def test_long_inputs_come_in_blocks():
    """Divisors of D where there are good ones, a masked last block where not, whole groups with group scales."""
    assert [tpu._input_block(d, 1) for d in (100, 4096, 8192, 6144, 5000)] == [100, 4096, 4096, 3072, 2048]
    assert tpu._input_block(8192, 64) == 4096 and tpu._input_block(16384, 2) == 8192


def test_what_cannot_be_served_is_refused():
    wq, scale = quantize_int8(normal(96, 4), group=48)
    with pytest.raises(NotImplementedError, match="groups of 48 inputs"):
        w8a16_matmul(normal(2, 96), wq, scale, **KERNEL)
    with pytest.raises(NotImplementedError, match="x is float16"):
        w8a16_matmul(normal(2, 96, dtype=jnp.float16), *quantize_int8(normal(96, 4)), **KERNEL)
    with pytest.raises(NotImplementedError, match="needs a TPU"):
        w8a16_matmul(normal(2, 96), *quantize_int8(normal(96, 4)), implementation="pallas_tpu")
    v5p, shape = targets.get_target("tpu-v5p"), (40960, 512)
    assert "bytes of VMEM" in tpu.obstacle(v5p, (512, 40960), shape, (2, 512), jnp.bfloat16, None)
    assert tpu.obstacle(v5p, (512, 40960), shape, (1, 512), jnp.bfloat16, None) is None
