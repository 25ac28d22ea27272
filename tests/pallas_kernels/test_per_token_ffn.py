"""Per-token layers: a dense loop per token, every form of x, gradients, the fused kernel against two layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recscale.models.layers.per_token import PerTokenFFN
from recscale.pallas_kernels import targets
from recscale.pallas_kernels.per_token_ffn import gpu, per_token_ffn, per_token_matmul, reference, tpu
from recscale.pallas_kernels.per_token_ffn.form import Form, Weights

KERNEL = dict(implementation="pallas_tpu", interpret=True)
EITHER = pytest.mark.parametrize("options", [{}, KERNEL], ids=["xla", "kernel"])

TOKENS, ROWS, WIDTH, HIDDEN = 3, 11, 128, 256


def normal(*shape, seed=0, dtype=jnp.float32, fan=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * fan**-0.5, dtype)


def operands(width=WIDTH, hidden=HIDDEN, outputs=None, dtype=jnp.float32):
    """x [T, B, D], w1, b1, w2, b2, w_gate."""
    outputs = outputs or width
    return (
        normal(TOKENS, ROWS, width, dtype=dtype),
        normal(TOKENS, width, hidden, seed=1, fan=width, dtype=dtype),
        normal(TOKENS, hidden, seed=2),
        normal(TOKENS, hidden, outputs, seed=3, fan=hidden, dtype=dtype),
        normal(TOKENS, outputs, seed=4),
        normal(TOKENS, width, hidden, seed=5, fan=width, dtype=dtype),
    )


def by_loop(act, x, w1, b1, w2, b2, w_gate=None):
    """float64, token by token."""
    x, w1, b1, w2, b2 = (np.asarray(a, np.float64) for a in (x, w1, b1, w2, b2))
    functions = {
        "gelu": lambda s: 0.5 * s * (1 + np.tanh(np.sqrt(2 / np.pi) * (s + 0.044715 * s**3))),
        "silu": lambda s: s / (1 + np.exp(-s)),
        "relu": lambda s: np.maximum(s, 0),
    }
    y = []
    for t in range(x.shape[0]):
        sums = x[t] @ w1[t] + b1[t]
        h = functions[act](sums) if w_gate is None else sums * functions[act](x[t] @ np.asarray(w_gate, np.float64)[t])
        y.append(h @ w2[t] + b2[t])
    return np.stack(y)


@pytest.fixture
def small_blocks(monkeypatch):
    """Two row blocks, the second one short, and two hidden blocks of a piece each."""
    monkeypatch.setattr(tpu, "block_sizes", lambda *_: dict(rows=8, hidden=128))


def close(found, expected, tolerance=1e-6):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@EITHER
@pytest.mark.parametrize("act, gated", [("gelu", False), ("silu", True), ("relu", False)])
def test_equals_a_loop_over_tokens(options, act, gated, small_blocks):
    x, w1, b1, w2, b2, w_gate = operands()
    w_gate = w_gate if gated else None
    found = per_token_ffn(x, w1, b1, w2, b2, w_gate=w_gate, act=act, token_first=True, **options)
    close(found, by_loop(act, x, w1, b1, w2, b2, w_gate))


@EITHER
def test_forms_of_x_agree(options, small_blocks):
    x, *weights, _ = operands()
    expected = per_token_ffn(x, *weights, token_first=True, **options)
    batch_major = x.swapaxes(0, 1)
    close(per_token_ffn(batch_major, *weights, **options), expected.swapaxes(0, 1))
    flat = per_token_ffn(batch_major.reshape(ROWS, -1), *weights, **options)
    close(flat.reshape(ROWS, TOKENS, WIDTH), expected.swapaxes(0, 1))


@EITHER
def test_transposed_weights_and_missing_biases(options, small_blocks):
    x, w1, b1, w2, b2, _ = operands()
    expected = per_token_ffn(x, w1, None, w2, None, token_first=True, **options)
    found = per_token_ffn(x, w1, None, w2.swapaxes(1, 2), None, transposed=True, token_first=True, **options)
    close(found, expected)
    plain = per_token_matmul(x, w1, b1, act="gelu", token_first=True, **options)
    close(per_token_matmul(x, w1.swapaxes(1, 2), b1, act="gelu", transposed=True, token_first=True, **options), plain)


def test_fused_equals_two_layers(small_blocks):
    x, w1, b1, w2, b2, _ = operands()
    hidden = per_token_matmul(x, w1, b1, act="gelu", token_first=True, **KERNEL)
    close(
        per_token_ffn(x, w1, b1, w2, b2, token_first=True, **KERNEL),
        per_token_matmul(hidden, w2, b2, token_first=True, **KERNEL),
    )


def test_odd_sizes_in_one_block():
    x, w1, b1, w2, b2, _ = operands(width=20, hidden=36, outputs=7)
    close(per_token_ffn(x, w1, b1, w2, b2, token_first=True, **KERNEL), by_loop("gelu", x, w1, b1, w2, b2))


def test_bfloat16_operands_keep_float32_sums(small_blocks):
    x, *weights, w_gate = operands(dtype=jnp.bfloat16)
    found = per_token_ffn(x, *weights, w_gate=w_gate, act="silu", token_first=True, **KERNEL)
    assert found.dtype == jnp.bfloat16
    given = dict(w_gate=w_gate, act="silu", token_first=True)
    close(found, per_token_ffn(x, *weights, **given, implementation="reference"), 1e-2)


@EITHER
@pytest.mark.parametrize("layout", ["tbd", "flat"])
@pytest.mark.parametrize("gated, transposed", [(False, True), (True, False)])
def test_gradients_equal_those_of_the_reference(options, layout, gated, transposed):
    x, w1, b1, w2, b2, w_gate = operands()
    x = x if layout == "tbd" else x.swapaxes(0, 1).reshape(ROWS, -1)
    w2 = w2.swapaxes(1, 2) if transposed else w2
    w_gate = w_gate if gated else None

    def loss(x, w1, b1, w2, b2, w_gate, **options):
        given = dict(w_gate=w_gate, transposed=transposed, token_first=layout == "tbd", act="silu")
        y = per_token_ffn(x, w1, b1, w2, b2, **given, **options)
        return (y * normal(*y.shape, seed=9)).sum()

    arrays = (x, w1, b1, w2, b2, w_gate)
    chosen = tuple(i for i, a in enumerate(arrays) if a is not None)
    found = jax.grad(lambda *a: loss(*a, **options), chosen)(*arrays)
    expected = jax.grad(lambda *a: loss(*a, implementation="reference"), chosen)(*arrays)
    for gradient, wanted in zip(found, expected, strict=True):
        close(gradient, wanted, 1e-5)


@EITHER
def test_gradients_of_one_layer(options):
    x, w1, b1, *_ = operands()
    given = dict(act="gelu", token_first=True)
    dy = normal(TOKENS, ROWS, HIDDEN, seed=9)
    _, pull = jax.vjp(lambda *a: per_token_matmul(*a, **given, **options), x, w1, b1)
    _, wanted = jax.vjp(lambda *a: per_token_matmul(*a, **given, implementation="reference"), x, w1, b1)
    jax.tree.map(lambda a, b: close(a, b, 1e-5), pull(dy), wanted(dy))


def test_float32_parameters_under_bfloat16_rows_keep_their_gradients():
    x, w1, b1, w2, b2, _ = operands()
    y, pull = jax.vjp(lambda x, *w: per_token_ffn(x, *w, token_first=True), x.astype(jnp.bfloat16), w1, b1, w2, b2)
    dx, *rest = pull(y)
    assert y.dtype == dx.dtype == jnp.bfloat16 and all(g.dtype == jnp.float32 for g in rest)


@pytest.mark.parametrize(
    "layout, gated, transposed",
    [
        ("tbd", True, False),
        pytest.param("flat", False, True, marks=pytest.mark.slow),
        pytest.param("btd", False, False, marks=pytest.mark.slow),
    ],
)
def test_hopper_kernel_equals_the_reference(layout, gated, transposed):
    """Fewer blocks than row tiles, a short last tile, both orders of W2; half a unit of the last of 8 bits."""
    few = dataclasses.replace(targets.get_target("h100"), sms=2)
    tokens, rows = 2, 300
    x = normal(tokens, rows, 64, dtype=jnp.bfloat16)
    x = {"tbd": x, "btd": x.swapaxes(0, 1), "flat": x.swapaxes(0, 1).reshape(rows, -1)}[layout]
    w1, w2 = normal(tokens, 64, 192, seed=1, fan=64), normal(tokens, 192, 128, seed=3, fan=192)
    weights = Weights(
        w1,
        normal(tokens, 192, seed=2),
        normal(tokens, 64, 192, seed=5, fan=64) if gated else None,
        w2.swapaxes(1, 2) if transposed else w2,
        None if transposed else normal(tokens, 128, seed=4),
    )
    form = Form("silu", layout, second_transposed=transposed)
    found = gpu.forward(form, x, weights, target=few, interpret=True)
    assert found.dtype == jnp.bfloat16
    close(found, reference.forward(form, x, weights), 2**-7)


@pytest.mark.parametrize(
    "layout, gated, transposed, layers, rows",
    [
        ("flat", True, True, 2, 40),
        pytest.param("tbd", False, False, 2, 130, marks=pytest.mark.slow),
        pytest.param("btd", False, True, 1, 130, marks=pytest.mark.slow),
    ],
)
def test_wide_hopper_layers_equal_the_reference(layout, gated, transposed, layers, rows):
    """Widths of several tiles that no tile of 256 divides, rows that end within a tile, both orders of the last W."""
    tokens, inputs, hidden, outputs = 2, 320, 192, 64
    x = normal(tokens, rows, inputs, dtype=jnp.bfloat16)
    x = {"tbd": x, "btd": x.swapaxes(0, 1), "flat": x.swapaxes(0, 1).reshape(rows, -1)}[layout]
    w1, w2 = normal(tokens, inputs, hidden, seed=1, fan=inputs), normal(tokens, hidden, outputs, seed=3, fan=hidden)
    b1, gate = normal(tokens, hidden, seed=2), normal(tokens, inputs, hidden, seed=5, fan=inputs)
    if layers == 1:
        weights = Weights(w1.swapaxes(1, 2) if transposed else w1, b1)
    else:
        w2 = w2.swapaxes(1, 2) if transposed else w2
        weights = Weights(w1, b1, gate if gated else None, w2, normal(tokens, outputs, seed=4))
    turned = {"second_transposed" if layers == 2 else "first_transposed": transposed}
    form, target = Form("silu", layout, **turned), targets.get_target("h100")
    assert gpu.obstacle(target, form, x, weights) is None and not gpu._fuses(form, x, weights, target)
    found = gpu.forward(form, x, weights, target=target, interpret=True)
    assert found.dtype == jnp.bfloat16
    close(found, reference.forward(form, x, weights), 2**-6)


@pytest.mark.slow
def test_hopper_kernel_under_the_interface():
    """Gradients and replicas through the kernel; what it leaves to XLA is refused with the reason."""
    options = dict(token_first=True, implementation="pallas_gpu", interpret=True)
    x, *weights, _ = operands(width=64, hidden=64, dtype=jnp.bfloat16)
    weights = [w.astype(jnp.float32) for w in weights]

    def loss(x, **options):
        y, pull = jax.vjp(lambda *w: per_token_ffn(x, *w, **options), *weights)
        return y, pull(y)

    found = jax.vmap(lambda x: loss(x, **options))(jnp.stack([x, 2 * x]))
    expected = jax.vmap(lambda x: loss(x, token_first=True, implementation="reference"))(jnp.stack([x, 2 * x]))
    jax.tree.map(lambda a, b: close(a, b, 2e-2), found, expected)
    with pytest.raises(NotImplementedError, match="expected bfloat16"):
        per_token_ffn(x.astype(jnp.float32), *weights, **options)
    with pytest.raises(NotImplementedError, match="multiples of 64"):
        per_token_ffn(x[..., :32], weights[0][:, :32], *weights[1:], **options)


def test_vmap_checkpoint_and_reruns(small_blocks):
    x, *weights, _ = operands()
    xs = jnp.stack([x, 2 * x])

    def loss(x, w1):
        layer = jax.checkpoint(lambda x: per_token_ffn(x, w1, *weights[1:], token_first=True, **KERNEL))
        return (layer(x) ** 2).sum()

    step = jax.jit(jax.vmap(jax.value_and_grad(loss, argnums=1), (0, None)))
    values, gradients = step(xs, weights[0])
    for i in range(2):
        value, gradient = jax.value_and_grad(loss, argnums=1)(xs[i], weights[0])
        close(values[i], value, 1e-5)
        close(gradients[i], gradient, 1e-5)
    jax.tree.map(np.testing.assert_array_equal, step(xs, weights[0]), (values, gradients))


@pytest.mark.parametrize("options", [dict(implementation="xla"), KERNEL], ids=["xla", "kernel"])
def test_a_models_layer_goes_through_it(options):
    """Values and gradients of the layer with an implementation named equal those of its two products."""
    plain, named = (PerTokenFFN(2, 8, 12, 4, rngs=nnx.Rngs(0), **given) for given in ({}, options))
    for x in (normal(2, 5, 8), normal(5, 8)):

        def value_and_gradients(layer, x=x):
            return nnx.value_and_grad(lambda layer: (layer(x) ** 2).sum())(layer)

        jax.tree.map(lambda a, b: close(a, b, 1e-5), value_and_gradients(named), value_and_gradients(plain))


def test_weights_stay_or_stream():
    """All of F where a token's weights fit half of VMEM twice, else a divisor in whole registers."""
    v5p = targets.get_target("tpu-v5p")

    def blocks(width, hidden):
        shapes = (1, width, hidden), (1, hidden, width)
        w1, w2 = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes)
        x = jax.ShapeDtypeStruct((1, 512, width), jnp.bfloat16)
        return tpu._blocks(v5p, Form("gelu", "tbd"), x, Weights(w1, w2=w2))["hidden"]

    assert blocks(768, 3072) == 3072
    assert blocks(4096, 16384) == 1024


def test_what_cannot_be_served_is_refused():
    x, w1, b1, w2, b2, w_gate = operands(width=20, hidden=36)
    with pytest.raises(NotImplementedError, match="multiples of 128"):
        per_token_ffn(x.swapaxes(0, 1), w1, b1, w2, b2, **KERNEL)
    with pytest.raises(NotImplementedError, match="needs a TPU"):
        per_token_ffn(x, w1, b1, w2, b2, token_first=True, implementation="pallas_tpu")
    with pytest.raises(ValueError, match="interpret=True"):
        per_token_ffn(x, w1, b1, w2, b2, token_first=True, interpret=True)
    with pytest.raises(ValueError, match=r"x has shape \(3, 11, 20\)"):
        per_token_ffn(x, w1, b1, w2, b2)
    with pytest.raises(ValueError, match=r"w2 has shape \(3, 36, 20\), expected"):
        per_token_ffn(x, w1, b1, w2, b2, transposed=True, token_first=True)
    with pytest.raises(ValueError, match="b1 has shape"):
        per_token_ffn(x, w1, b2, w2, b2, token_first=True)
    with pytest.raises(ValueError, match="w_gate is bfloat16"):
        per_token_ffn(x, w1, b1, w2, b2, w_gate=w_gate.astype(jnp.bfloat16), token_first=True)
    with pytest.raises(ValueError, match="act is 'tanh'"):
        per_token_ffn(x, w1, b1, w2, b2, act="tanh", token_first=True)
    with pytest.raises(NotImplementedError, match="per_token_matmul cannot run as 'pallas_tpu'"):
        per_token_matmul(x, w1, token_first=True, implementation="pallas_tpu")
    for given in ((w1[0], b1, w2), (w1, b1, w2[0])):
        with pytest.raises(ValueError, match="expected one matrix per T"):
            per_token_ffn(x, *given, b2, token_first=True)
    with pytest.raises(ValueError, match=r"expected \[T, B, D\] \(token_first=True"):
        per_token_ffn(x[0], w1, b1, w2, b2, token_first=True)
    with pytest.raises(ValueError, match=r"expected \[B, T, D\] or \[B, T\*D\]"):
        per_token_ffn(x[None], w1, b1, w2, b2)
    with pytest.raises(ValueError, match="x is float16"):
        per_token_matmul(x.astype(jnp.float16), w1, token_first=True)
