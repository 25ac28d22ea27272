"""int8 weights after training: error bounds, every backbone, bytes and checkpoints. AUC: tests/scaling/training."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from recscale.models import build, list_models
from recscale.models.inputs.examples import random_inputs
from recscale.models.layers.dense import FFN, Dense, SplitDense
from recscale.models.layers.per_token import PerTokenDense, PerTokenFFN
from recscale.models.layers.quantisation import Int8Kernel, Int8Scale, Int8Values, quantize, stored_bytes
from recscale.models.layers.towers import Towers

R, C = 4, 3

SMALL = dict(tokens=4, width=16, hidden=8)

# Each takes seconds to compile; two of them stand for the rest where time is short.
QUICK = ("rankmixer", "dcnv2")
BACKBONES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow, id=name) for name in list_models("backbone")
]


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def int8_kernels(model):
    return {path: m for path, m in nnx.iter_modules(model) if isinstance(m, Int8Kernel)}


@pytest.mark.parametrize("transposed", [False, True])
def test_error_of_a_layer_is_at_most_half_a_step(transposed):
    layer = PerTokenDense(3, 40, 24, transposed=transposed, rngs=nnx.Rngs(0))
    layer.kernel[...] = layer.kernel[...].at[1].set(0.0)  # a token whose channels are all zero
    small = quantize(layer)
    weights = layer.kernel[...].swapaxes(1, 2) if transposed else layer.kernel[...]
    error = jnp.abs(weights - small.kernel[...])
    assert (error <= small.kernel.scale[...][:, None] * (0.5 + 1e-5)).all()
    np.testing.assert_array_equal(small.kernel.scale[...][1], 1.0)
    found = small(normal(3, 5, 40))
    assert jnp.isfinite(found).all()
    np.testing.assert_array_equal(found[1], jnp.broadcast_to(layer.bias[...][1], (5, 24)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", ["dense", "per_token", "transposed", "shared_input", "split"])
def test_a_layer_multiplies_by_the_dequantised_weights(kind, dtype):
    make = {
        "dense": lambda: Dense(40, 24, dtype=dtype, rngs=nnx.Rngs(0)),
        "per_token": lambda: PerTokenDense(3, 40, 24, dtype=dtype, rngs=nnx.Rngs(0)),
        "transposed": lambda: PerTokenDense(3, 40, 24, transposed=True, dtype=dtype, rngs=nnx.Rngs(0)),
        "shared_input": lambda: PerTokenDense(3, 40, 24, dtype=dtype, rngs=nnx.Rngs(0)),
        "split": lambda: SplitDense(15, 25, 24, dtype=dtype, rngs=nnx.Rngs(0)),
    }
    layer, small = make[kind](), quantize(make[kind]())
    weights = small.kernel[...]
    layer.kernel[...] = weights.swapaxes(1, 2) if kind == "transposed" else weights
    x = normal(*{"per_token": (3, 5, 40), "transposed": (3, 5, 40)}.get(kind, (6, 40))).astype(dtype)

    def run(m):
        if kind != "split":
            return m(x)
        return m.score(m.encode_user(x[:2, :15]), x[:, 15:].reshape(2, 3, 25))

    found, expected = run(small), run(layer)
    assert found.dtype == expected.dtype == dtype
    # In bfloat16 the float layer rounds its weights, the int8 one only its result.
    tolerance = 1e-6 if dtype == jnp.float32 else 1e-2
    assert float(jnp.abs(found - expected).max()) <= tolerance * float(jnp.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_serves_with_int8_kernels(name, schema, small_config):
    config = small_config(name, schema)
    params = jax.jit(lambda: nnx.split(build(name, schema, config, rngs=nnx.Rngs(0)))[1])()
    graph = nnx.split(nnx.eval_shape(lambda: build(name, schema, config, rngs=nnx.Rngs(0))))[0]
    model = nnx.merge(graph, params)
    small = quantize(model)
    assert not int8_kernels(model) and int8_kernels(small)
    inputs = random_inputs(schema, R, C, seed=1)
    expected = np.asarray(jax.jit(lambda m, i: m(i).logits)(model, inputs))
    state = jax.jit(lambda m, u: m.encode_user(u))(small, inputs.user)
    found = np.asarray(jax.jit(lambda m, s, c: m.score(s, c).logits)(small, state, inputs.candidates))
    assert 0 < np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_two_calls_are_one_with_int8_kernels(schema):
    small = quantize(build("din+rankmixer", schema, dict(backbone=SMALL), rngs=nnx.Rngs(0)))
    inputs = random_inputs(schema, R, C, seed=1)
    staged = small.score(small.encode_user(inputs.user), inputs.candidates).logits
    np.testing.assert_array_equal(small(inputs).logits, staged)
    np.testing.assert_allclose(jax.jit(lambda m, i: m(i).logits)(small, inputs), staged, rtol=1e-5, atol=1e-5)


def test_kernels_take_a_quarter_and_the_rest_stays(schema):
    model = build("rankmixer", schema, dict(tokens=4, width=64, hidden=256), rngs=nnx.Rngs(0))
    small = quantize(model)
    weights = sum(4 * m.values.size for m in int8_kernels(small).values())
    assert len(int8_kernels(small)) == 4 and weights == 2 * 2 * 4 * 4 * 64 * 256
    assert stored_bytes(small, Int8Values) * 4 == weights
    assert stored_bytes(small, Int8Scale) == 4 * 2 * 4 * (64 + 256)
    saved = weights - stored_bytes(small, Int8Values, Int8Scale)
    assert stored_bytes(model) - stored_bytes(small) == saved
    assert isinstance(small.tokenizer.user.kernel, nnx.Param) and isinstance(small.towers, Towers)
    assert stored_bytes(nnx.eval_shape(lambda: quantize(model))) == stored_bytes(small)


@pytest.mark.slow
def test_the_choice_of_layers_is_an_argument():
    class Two(nnx.Module):
        def __init__(self):
            self.a, self.router = FFN(8, 6, rngs=nnx.Rngs(0)), Dense(8, 2, rngs=nnx.Rngs(0))
            self.b = PerTokenFFN(2, 8, 6, rngs=nnx.Rngs(0))

    assert set(int8_kernels(quantize(Two()))) == {
        ("a", "up", "kernel"),
        ("a", "down", "kernel"),
        ("b", "up", "kernel"),
        ("b", "down", "kernel"),
    }
    only = quantize(Two(), skip=lambda path, module: isinstance(module, FFN) or path == ("b",))
    assert set(int8_kernels(only)) == {("router", "kernel")}
    assert set(int8_kernels(quantize(only))) == {
        ("router", "kernel"), ("a", "up", "kernel"), ("a", "down", "kernel"), ("b", "up", "kernel"),
        ("b", "down", "kernel"),
    }  # fmt: skip
    with pytest.raises(ValueError, match="Towers has no dense or per-token layer"):
        quantize(Towers(4, 1, rngs=nnx.Rngs(0)))


def test_training_an_int8_model_is_refused(schema):
    small = quantize(build("rankmixer", schema, SMALL, rngs=nnx.Rngs(0)))
    graph, params, rest = nnx.split(small, nnx.Param, ...)
    inputs = random_inputs(schema, 2, 1)
    with pytest.raises(NotImplementedError, match="forward only"):
        jax.grad(lambda p: nnx.merge(graph, p, rest)(inputs).logits.sum())(params)


def test_an_int8_model_survives_a_checkpoint(schema, tmp_path):
    small = quantize(build("rankmixer", schema, SMALL, rngs=nnx.Rngs(0)))
    inputs = random_inputs(schema, R, C)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "served", nnx.to_pure_dict(nnx.state(small)))
        checkpointer.wait_until_finished()
        empty = nnx.eval_shape(lambda: quantize(build("rankmixer", schema, SMALL, rngs=nnx.Rngs(1))))
        graph, shapes = nnx.split(empty)
        nnx.replace_by_pure_dict(
            shapes, checkpointer.restore(tmp_path / "served", jax.tree.map(lambda x: x, nnx.to_pure_dict(shapes)))
        )
    np.testing.assert_array_equal(nnx.merge(graph, shapes)(inputs).logits, small(inputs).logits)
