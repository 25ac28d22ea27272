"""The kernels of the int8 product, interpreted: exact integers, odd sizes, blocks, split inputs, tokens, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import normal

from recscale.pallas_kernels import targets
from recscale.pallas_kernels.w8a16_matmul import gpu, quantize_int8, tpu, w8a16_matmul

TPU, GPU = (dict(implementation=name, interpret=True) for name in ("pallas_tpu", "pallas_gpu"))
BF16 = jnp.bfloat16

SLOW = pytest.mark.slow  # Hopper's interpreter takes seconds for each block
BOTH = pytest.mark.parametrize("kernel", [TPU, GPU], ids=["tpu", "gpu"])
HOPPER_SLOWLY = pytest.mark.parametrize("kernel", [TPU, pytest.param(GPU, marks=SLOW)], ids=["tpu", "gpu"])


def rows_for(kernel, *shape):
    """Hopper's kernel takes bfloat16 rows alone."""
    return normal(*shape, dtype=jnp.float32 if kernel is TPU else BF16)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several TPU blocks on every axis, at small shapes; the last of each reaches beyond the array."""
    monkeypatch.setattr(tpu, "block_sizes", lambda *_: dict(rows=8, inputs=128, outputs=128))


@pytest.mark.parametrize(
    "kernel, dtype, rows, inputs, outputs",
    [
        (TPU, jnp.float32, 19, 200, 150),
        (TPU, BF16, 19, 200, 150),
        (GPU, BF16, 3, 130, 20),
        pytest.param(GPU, BF16, 3, 300, 150, marks=SLOW),
        pytest.param(GPU, BF16, 19, 300, 150, marks=SLOW),
    ],
)
def test_integers_are_exact(kernel, dtype, rows, inputs, outputs):
    """Inputs that bfloat16 holds exactly and sums below 2^24: bit-equal to the int32 product, whole or split over D."""
    rng = np.random.default_rng(0)
    x, wq = rng.integers(-255, 256, (rows, inputs)), rng.integers(-127, 128, (inputs, outputs))
    expected = x.astype(np.int64) @ wq
    assert np.abs(expected).max() < 2**24
    given = jnp.asarray(x, dtype), jnp.asarray(wq, jnp.int8), jnp.ones(outputs)
    np.testing.assert_array_equal(w8a16_matmul(*given, out_dtype=jnp.float32, **kernel), expected)


TPU_SHAPES = ((1, 256, 128), (3, 100, 72), (33, 129, 7), (8, 384, 256))
GPU_SHAPES = (
    ((3, 100, 72), jnp.float32),
    ((1, 256, 128), jnp.float32),
    ((33, 129, 7), jnp.float32),
    ((300, 100, 64), BF16),
    ((300, 100, 64), jnp.float32),
)


@pytest.mark.parametrize(
    "kernel, shape, dtype",
    [
        *((TPU, shape, dtype) for shape in TPU_SHAPES for dtype in (jnp.float32, BF16)),
        (GPU, (3, 100, 72), BF16),
        *(pytest.param(GPU, *given, marks=SLOW) for given in GPU_SHAPES),
    ],
)
def test_equals_the_reference(kernel, shape, dtype):
    """One row, odd sizes, whole blocks, two row tiles; a zero column and an outlier; 1e-6 in float32, 1e-2 in bfloat16.

    dtype: of the result, and of the rows where the kernel takes both.
    """
    rows, inputs, outputs = shape
    x, bias = rows_for(kernel, rows, inputs), normal(outputs, seed=2)
    x = x.astype(dtype) if kernel is TPU else x
    w = normal(inputs, outputs, seed=1).at[:, 3].set(0.0).at[5, 4].set(1e3)
    wq, scale = quantize_int8(w)
    options = dict(bias=bias, act="gelu", out_dtype=dtype)
    found = w8a16_matmul(x, wq, scale, **options, **kernel)
    expected = w8a16_matmul(x, wq, scale, **options, implementation="reference")
    assert found.dtype == dtype and found.shape == expected.shape
    error = np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64)).max()
    assert error <= (1e-2 if dtype == BF16 else 1e-6) * np.abs(np.asarray(expected, np.float64)).max()


@pytest.mark.parametrize(
    "kernel, rows",
    [(TPU, 11), *(pytest.param(GPU, rows, marks=SLOW) for rows in (5, 20))],
    ids=["tpu", "gpu", "gpu-20"],
)
def test_each_token_has_its_matrix(kernel, rows):
    """By the reference, token by token, in both orders of the rows' axes; the same bits again."""
    x, bias = rows_for(kernel, 2, rows, 130), normal(2, 20, seed=2)
    wq, scale = quantize_int8(normal(2, 130, 20, seed=1))
    options = dict(act="silu", out_dtype=jnp.float32)
    found = w8a16_matmul(x, wq, scale, bias, token_first=True, **options, **kernel)
    for t in range(2):
        one = w8a16_matmul(x[t], wq[t], scale[t], bias[t], **options, implementation="reference")
        np.testing.assert_allclose(found[t], one, rtol=1e-5, atol=1e-5)
    batch_major = w8a16_matmul(x.swapaxes(0, 1), wq, scale, bias, **options, **kernel)
    np.testing.assert_array_equal(batch_major.swapaxes(0, 1), found)


@pytest.mark.parametrize("tokens", [(), (2,)], ids=["one matrix", "per token"])
def test_scales_of_groups(tokens):
    x, (wq, scale) = normal(*tokens, 5, 384), quantize_int8(normal(*tokens, 384, 40, seed=1), group=128)
    given = dict(out_dtype=jnp.float32, token_first=bool(tokens))
    found = w8a16_matmul(x, wq, scale, **given, **TPU)
    expected = w8a16_matmul(x, wq, scale, **given, implementation="reference")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@SLOW
@pytest.mark.parametrize("act", [None, "relu"])
def test_activations(act):
    x, (wq, scale) = rows_for(GPU, 8, 64), quantize_int8(normal(64, 40, seed=1))
    options = dict(act=act, out_dtype=jnp.float32)
    expected = w8a16_matmul(x, wq, scale, **options, implementation="reference")
    np.testing.assert_allclose(w8a16_matmul(x, wq, scale, **options, **GPU), expected, rtol=1e-5, atol=1e-5)


@HOPPER_SLOWLY
def test_vmap_jit_and_reruns(kernel):
    x, (wq, scale) = rows_for(kernel, 2, 3, 64), quantize_int8(normal(64, 16, seed=1))
    mapped = jax.jit(jax.vmap(lambda x: w8a16_matmul(x, wq, scale, out_dtype=jnp.float32, **kernel)))
    found = mapped(x)
    np.testing.assert_allclose(found, w8a16_matmul(x, wq, scale, out_dtype=jnp.float32), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(mapped(x), found)


@BOTH
def test_differentiating_is_refused(kernel):
    wq, scale = quantize_int8(normal(64, 16))
    with pytest.raises(NotImplementedError, match="forward only"):
        jax.grad(lambda x: w8a16_matmul(x, wq, scale, out_dtype=jnp.float32, **kernel).sum())(rows_for(kernel, 2, 64))


def test_long_inputs_come_in_blocks():
    """Divisors of D where there are good ones, a masked last block where not, whole groups with group scales."""
    assert [tpu._input_block(d, 1) for d in (100, 4096, 8192, 6144, 5000)] == [100, 4096, 4096, 3072, 2048]
    assert tpu._input_block(8192, 64) == 4096 and tpu._input_block(16384, 2) == 8192


def test_the_number_of_sms_decides_how_inputs_are_split():
    h100 = targets.get_target("h100")
    shape = dict(tokens=1, rows=16, inputs=1024, outputs=4096)
    assert gpu._plan(h100, **shape).splits == 4
    assert gpu._plan(dataclasses.replace(h100, sms=64), **shape).splits == 2
    assert gpu._plan(h100, **shape | dict(rows=17)).splits == 1
    assert gpu._plan(h100, **shape | dict(tokens=16)).splits == 1
    odd = gpu._plan(h100, **shape | dict(inputs=1000, outputs=128))  # 8 tiles of inputs for 132 SMs
    assert (odd.splits, odd.tiles_each, odd.input_tiles) == (8, 1, 8)


def test_xla_stays_the_automatic_choice():
    """No kernel has been measured against it: on a GPU target None still is XLA, which a CPU can run."""
    x, (wq, scale) = rows_for(GPU, 2, 64), quantize_int8(normal(64, 16, seed=1))
    expected = w8a16_matmul(x, wq, scale, implementation="xla")
    with targets.compiling_for("h100"):
        np.testing.assert_array_equal(w8a16_matmul(x, wq, scale), expected)


@pytest.mark.parametrize(
    "x, scale, options, reason",
    [
        (normal(2, 64, dtype=jnp.float16), jnp.ones(16), TPU, "x is float16"),
        (normal(2, 64), jnp.ones((2, 16)), TPU, "groups of 32 inputs"),
        (normal(2, 64), jnp.ones(16), dict(implementation="pallas_tpu"), "needs a TPU"),
        (normal(2, 64), jnp.ones(16), GPU, "x is float32"),
        (normal(2, 64, dtype=BF16), jnp.ones((2, 16)), GPU, "2 groups"),
        (normal(0, 64, dtype=BF16), jnp.ones(16), GPU, "empty axis"),
        (normal(2, 64, dtype=BF16), jnp.ones(16), dict(implementation="pallas_gpu"), "needs a Hopper GPU"),
    ],
    ids=["float16", "tpu groups", "no tpu", "float32", "gpu groups", "no rows", "no gpu"],
)
def test_refusals_name_their_reason(x, scale, options, reason):
    with pytest.raises(NotImplementedError, match=reason):
        w8a16_matmul(x, jnp.ones((64, 16), jnp.int8), scale, **options)


def test_a_matrix_beyond_vector_memory_is_refused_with_group_scales_alone(monkeypatch):
    monkeypatch.undo()  # in blocks of the kernel's own choice
    v5p, shape = targets.get_target("tpu-v5p"), (40960, 512)
    assert "bytes of VMEM" in tpu.obstacle(v5p, (512, 40960), shape, (2, 512), jnp.bfloat16, None)
    assert tpu.obstacle(v5p, (512, 40960), shape, (1, 512), jnp.bfloat16, None) is None
