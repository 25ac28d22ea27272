"""int8 weights: quantisation error, exact integer products, both layouts, group scales, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import normal

from recscale.pallas_kernels.w8a16_matmul import dequantize, quantize_int8, w8a16_matmul

BOTH = pytest.mark.parametrize("implementation", ["xla", "reference"])


def integers(*shape, high, seed=0):
    return np.random.default_rng(seed).integers(-high, high + 1, shape)


@BOTH
@pytest.mark.parametrize("dtype, scales", [(jnp.float32, (40,)), (jnp.bfloat16, (40,)), (jnp.bfloat16, (2, 40))])
def test_integers_are_exact(implementation, dtype, scales):
    """Inputs that bfloat16 holds exactly and sums below 2^24: bit-equal to the int32 product."""
    x, wq = integers(5, 96, high=255), integers(96, 40, high=127, seed=1)
    expected = x.astype(np.int64) @ wq
    assert np.abs(expected).max() < 2**24
    found = w8a16_matmul(
        jnp.asarray(x, dtype),
        jnp.asarray(wq, jnp.int8),
        jnp.ones(scales),
        out_dtype=jnp.float32,
        implementation=implementation,
    )
    np.testing.assert_array_equal(found, expected)


@BOTH
@pytest.mark.parametrize("shape", [(1, 256, 128), (3, 100, 72), (33, 128, 7)], ids=str)
@pytest.mark.parametrize("group", [None, "half"])
def test_random_products_equal_the_dequantised_ones(implementation, shape, group):
    rows, inputs, outputs = shape
    x, bias = normal(rows, inputs), normal(outputs, seed=2)
    wq, scale = quantize_int8(normal(inputs, outputs, seed=1), group=inputs // 2 if group else None)
    for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)):
        given = x.astype(dtype)
        exact = np.asarray(given, np.float64) @ np.asarray(dequantize(wq, scale), np.float64) + np.asarray(bias)
        found = w8a16_matmul(given, wq, scale, bias, out_dtype=dtype, implementation=implementation)
        assert found.dtype == dtype and found.shape == (rows, outputs)
        error = np.abs(np.asarray(found, np.float64) - exact).max()
        assert error < tolerance * np.abs(exact).max()


@pytest.mark.parametrize("act", ["gelu", "relu", "silu"])
def test_activation_follows_the_bias(act):
    x, bias = normal(4, 16), normal(8, seed=2)
    wq, scale = quantize_int8(normal(16, 8, seed=1))
    plain = w8a16_matmul(x, wq, scale, bias, out_dtype=jnp.float32)
    for implementation in ("xla", "reference"):
        found = w8a16_matmul(x, wq, scale, bias, act=act, out_dtype=jnp.float32, implementation=implementation)
        np.testing.assert_allclose(found, getattr(jax.nn, act)(plain), rtol=1e-5, atol=1e-6)


def test_quantisation_error_is_at_most_half_a_step():
    w = np.array(normal(6, 100, 72))
    w[:, :, 3] = 0.0  # a column of zeros
    w[0, 17, 5] = 1e4  # one outlier takes the whole range of its column
    for group in (None, 25):
        wq, scale = quantize_int8(jnp.asarray(w), group=group)
        assert wq.dtype == jnp.int8 and scale.shape == ((6, 72) if group is None else (6, 4, 72))
        assert int(jnp.abs(wq).max()) == 127
        step = scale[:, None] if group is None else jnp.repeat(scale, group, axis=1)
        # half a step, and the rounding of scale * wq itself
        assert (np.abs(w - np.asarray(dequantize(wq, scale))) <= np.asarray(step) * (0.5 + 1e-5)).all()
    wq, scale = quantize_int8(jnp.asarray(w))
    np.testing.assert_array_equal(scale[:, 3], 1.0)
    np.testing.assert_array_equal(wq[:, :, 3], 0)
    assert jnp.isfinite(w8a16_matmul(normal(2, 6, 100), wq, scale, out_dtype=jnp.float32)).all()


def test_one_input_per_scale_keeps_magnitudes():
    wq, scale = quantize_int8(jnp.asarray([[0.5, -2.0], [0.0, 3.0], [-0.25, 1.0]]), group=1)
    np.testing.assert_array_equal(wq, [[127, -127], [0, 127], [-127, 127]])
    np.testing.assert_allclose(scale * 127, [[0.5, 2], [127, 3], [0.25, 1]], rtol=1e-6)


@BOTH
@pytest.mark.parametrize("group", [None, 3])
def test_an_odd_number_of_inputs(implementation, group):
    """9 inputs, 2 tokens, against float64 products of what the integers stand for; the result is bfloat16."""
    x, bias = np.asarray(normal(4, 2, 9)), np.asarray(normal(2, 5, seed=2))
    wq, scale = quantize_int8(normal(2, 9, 5, seed=1), group=group)
    wide = np.repeat(np.asarray(scale).reshape(2, -1, 5), group or 9, axis=1)
    expected = np.einsum("btd,tdf->btf", x, np.asarray(wq, np.float64) * wide) + bias
    found = w8a16_matmul(jnp.asarray(x), wq, scale, jnp.asarray(bias), implementation=implementation)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-8, atol=1e-6)


def test_rounding_is_half_to_even():
    w = jnp.asarray([[127.0], [0.5], [1.5], [2.5], [-0.5], [-1.5]])
    np.testing.assert_array_equal(quantize_int8(w)[0][:, 0], [127, 0, 2, 2, 0, -2])


def test_gaussian_weights_lose_less_than_a_hundredth():
    w = normal(1024, 64)
    error = dequantize(*quantize_int8(w)) - w
    assert float(jnp.linalg.norm(error) / jnp.linalg.norm(w)) < 0.01


@BOTH
@pytest.mark.parametrize("group", [None, 6])
def test_per_token_form_is_a_loop_over_tokens(implementation, group):
    tokens, rows, inputs, outputs = 3, 5, 12, 7
    x, bias = normal(rows, tokens, inputs), normal(tokens, outputs, seed=2)
    wq, scale = quantize_int8(normal(tokens, inputs, outputs, seed=1), group=group)
    options = dict(out_dtype=jnp.float32, implementation=implementation)
    found = w8a16_matmul(x, wq, scale, bias, **options)
    for t in range(tokens):
        np.testing.assert_allclose(
            found[:, t], w8a16_matmul(x[:, t], wq[t], scale[t], bias[t], **options), rtol=1e-5, atol=1e-5
        )
    major = w8a16_matmul(x.swapaxes(0, 1), wq, scale, bias, token_first=True, **options)
    np.testing.assert_array_equal(major.swapaxes(0, 1), found)


def test_leading_axes_are_rows():
    wq, scale = quantize_int8(normal(8, 4, seed=1))
    x = normal(2, 3, 8)
    found = w8a16_matmul(x, wq, scale, out_dtype=jnp.float32)
    np.testing.assert_allclose(found[1], w8a16_matmul(x[1], wq, scale, out_dtype=jnp.float32), rtol=1e-6)


def test_runs_under_jit_and_vmap():
    x, (wq, scale) = normal(4, 3, 8), quantize_int8(normal(8, 5, seed=1))
    plain = w8a16_matmul(x, wq, scale, out_dtype=jnp.float32)
    mapped = jax.jit(jax.vmap(lambda row: w8a16_matmul(row, wq, scale, out_dtype=jnp.float32)))(x)
    np.testing.assert_allclose(mapped, plain, rtol=1e-6)


@pytest.mark.parametrize("argument", [0, 2, 3])
def test_differentiating_is_refused(argument):
    wq, scale = quantize_int8(normal(8, 4, seed=1))
    arguments = [normal(2, 8), wq, scale, jnp.zeros(4)]

    def total(value):
        given = [*arguments[:argument], value, *arguments[argument + 1 :]]
        return w8a16_matmul(*given, out_dtype=jnp.float32).sum()

    with pytest.raises(NotImplementedError, match="forward only"):
        jax.grad(total)(arguments[argument])


TOKENS = dict(wq=jnp.zeros((3, 8, 4), jnp.int8), scale=jnp.ones((3, 4)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(x=jnp.zeros((2, 7))), "expected 8 inputs"),
        (dict(x=jnp.zeros((2, 8), jnp.int32)), "expected a float dtype"),
        (dict(wq=jnp.zeros((8, 4))), "expected int8"),
        (dict(scale=jnp.ones(5)), "scale has shape"),
        (dict(scale=jnp.ones((3, 4))), "scale has shape"),
        (dict(scale=jnp.ones(4, jnp.bfloat16)), "expected float32"),
        (dict(bias=jnp.ones(5)), "bias has shape"),
        (dict(act="tanh"), "act is 'tanh'"),
        (dict(token_first=True), "one matrix per token"),
        (dict(wq=jnp.zeros((3, 8, 4), jnp.int8), scale=jnp.ones((3, 4))), r"expected \[B, 3, 8\]"),
        (TOKENS | dict(x=jnp.zeros((3, 2, 8))), r"expected \[B, 3, 8\]"),
        (TOKENS | dict(x=jnp.zeros((2, 3, 8)), token_first=True), r"expected \[3, B, 8\]"),
        (dict(x=jnp.zeros(())), "expected 8 inputs"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_arguments_are_explained(changed, message):
    given = dict(x=jnp.zeros((2, 8)), wq=jnp.zeros((8, 4), jnp.int8), scale=jnp.ones(4)) | changed
    with pytest.raises(ValueError, match=message):
        w8a16_matmul(**given)


def test_what_does_not_exist_is_refused():
    wq, scale = quantize_int8(normal(8, 4))
    with pytest.raises(NotImplementedError, match="pallas_gpu"):
        w8a16_matmul(normal(2, 8), wq, scale, implementation="pallas_gpu")
    with pytest.raises(ValueError, match="interpret"):
        w8a16_matmul(normal(2, 8), wq, scale, interpret=True)
    for group in (3, 0):
        with pytest.raises(ValueError, match=f"group is {group}"):
            quantize_int8(normal(8, 4), group=group)
    with pytest.raises(ValueError, match="weights have shape"):
        quantize_int8(normal(8))
