"""int8 weights after training: error bounds, every backbone, bytes and checkpoints. AUC: tests/scaling/training."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from drawn import filled, normal
from flax import nnx
from in_float64 import in_float64

from recscale.models import build, list_models
from recscale.models.inputs import reference_schema
from recscale.models.inputs.examples import random_inputs
from recscale.models.layers.dense import FFN, Dense, SplitDense
from recscale.models.layers.per_token import PerTokenDense, PerTokenFFN
from recscale.models.layers.per_token_moe import PerTokenExperts
from recscale.models.layers.quantisation import Int8Kernel, Int8Scale, Int8Values, quantize, stored_bytes
from recscale.models.layers.towers import Towers

R, C = 4, 3

SMALL = dict(tokens=4, width=16, hidden=8)


def int8_kernels(model):
    return {path: m for path, m in nnx.iter_modules(model) if isinstance(m, Int8Kernel)}


@pytest.mark.parametrize("transposed", [False, True])
def test_error_of_a_layer_is_at_most_half_a_step(transposed):
    layer = PerTokenDense(3, 40, 24, transposed=transposed, rngs=nnx.Rngs(0))
    layer.kernel[...] = layer.kernel[...].at[1].set(0.0)  # a token whose channels are all zero
    small = quantize(layer)
    error = jnp.abs(layer.kernel[...] - small.kernel[...])  # stored alike
    assert (error <= jnp.expand_dims(small.kernel.scale[...], 2 if transposed else 1) * (0.5 + 1e-5)).all()
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
    layer.kernel[...] = small.kernel[...]
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
@pytest.mark.parametrize("name", list_models("backbone"))
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


SPARSE = [
    ("rankmixer", dict(tokens=4, width=16, hidden=32, layers=1, experts=4)),
    ("rankmixer", dict(tokens=4, width=16, hidden=32, layers=1, experts=4, router="topk", active_ratio=0.5)),
    ("tokenmixer_large", dict(tokenizer="cut", tokens=4, width=16, hidden=32, layers=1, experts=4, active=3)),
]


@pytest.mark.parametrize("kind", ["ffn", "swiglu"])
def test_experts_multiply_by_the_dequantised_weights(kind):
    layer = PerTokenExperts(2, 8, 6, 3, kind=kind, rngs=nnx.Rngs(0))
    small, x, gates = quantize(layer), normal(2, 5, 8), normal(2, 5, 3, seed=1)
    for name in ("up", "gate", "out") if kind == "swiglu" else ("up", "out"):
        kernel, float_kernel = getattr(small, name), getattr(layer, name)
        assert isinstance(kernel, Int8Kernel) and kernel.scale.shape == (2, 3, 8 if name == "out" else 6)
        assert 0 < float(jnp.abs(float_kernel[...] - kernel[...]).max()) < 0.01
        float_kernel[...] = kernel[...]
    run = in_float64(lambda m: m.masked(x, gates))
    np.testing.assert_allclose(run(small), run(layer), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["masked", "capacity", "ragged"])
@pytest.mark.parametrize(("name", "config"), SPARSE, ids=str)
def test_sparse_models_are_quantised_on_every_path(schema, name, config, path):
    """The int8 model is the float model with the weights it stands for."""
    model = build(name, schema, config | dict(expert_path=path), rngs=nnx.Rngs(0))
    small = quantize(model)
    kernels = int8_kernels(small)
    parts = {path[-1] for path in kernels if path[-2] == "experts"}
    assert parts == {"up", "out"} | ({"gate"} if name == "tokenmixer_large" else set())
    assert not any("router" in str(path) for path in kernels)
    for where, kernel in kernels.items():
        parent = model
        for step in where[:-1]:
            parent = parent[step] if isinstance(step, int) else getattr(parent, step)
        weights = getattr(parent, where[-1])
        assert 0 < float(jnp.abs(weights[...] - kernel[...]).max()) < 0.01
        weights[...] = kernel[...]
    inputs = random_inputs(schema, R, C, seed=1)
    run = jax.jit(lambda m, i: m(i).logits)
    np.testing.assert_allclose(run(small, inputs), run(model, inputs), rtol=1e-5, atol=1e-5)


LARGE = ("rankmixer_100m", "tokenmixer_large_100m", "wukong_100m", "autoint_100m", "hiformer_100m", "dhen_lite_100m")
LARGE += ("mmoe_100m", "dlrm_mlp_100m", "dcnv2_100m")
FLAGS = {
    "sparse rankmixer": ("rankmixer_100m", dict(experts=8)),
    "sparse tokenmixer_large": ("tokenmixer_large_100m", dict(experts=8)),
    "ug_rankmixer": ("ug_rankmixer", dict(tokens=16, width=768, hidden=2176)),
    "ug_tokenmixer_large": ("ug_tokenmixer_large", dict(tokenizer="cut", tokens=16, width=512, hidden=512)),
    "mixture of dcnv2": ("dcnv2", dict(cross_layers=3, rank=256, experts=8, widths=(6912, 6912))),
}


@pytest.mark.parametrize("case", [*LARGE, *FLAGS])
def test_starter_sizes_keep_a_quarter_of_their_bytes(case):
    """Whole models, with all that stays float32: tokenizers, towers, norms, routers, biases."""
    name, config = FLAGS.get(case, (case, None))

    def make():
        return build(name, reference_schema(), config, rngs=nnx.Rngs(0))

    small = nnx.eval_shape(lambda: quantize(make()))
    share = stored_bytes(small) / stored_bytes(nnx.eval_shape(make))
    assert 0.25 < share < 0.27, share


def test_int8_weights_are_split_over_a_mesh_as_the_float_ones():
    layer = PerTokenDense(3, 8, 6, transposed=True, axes=("hidden", "embed"), rngs=nnx.Rngs(0))
    small = quantize(layer)
    assert small.kernel.values.get_metadata("logical_axes") == ("tokens", "hidden", "embed")
    assert small.kernel.scale.get_metadata("logical_axes") == ("tokens", "embed")


@pytest.mark.slow
def test_two_calls_are_one_with_int8_kernels(schema):
    small = quantize(build("din+rankmixer", schema, dict(backbone=SMALL), rngs=nnx.Rngs(0)))
    inputs = random_inputs(schema, R, C, seed=1)
    staged = small.score(small.encode_user(inputs.user), inputs.candidates).logits
    np.testing.assert_array_equal(small(inputs).logits, staged)
    np.testing.assert_allclose(jax.jit(lambda m, i: m(i).logits)(small, inputs), staged, rtol=1e-5, atol=1e-5)


def test_kernels_take_a_quarter_and_the_rest_stays(schema):
    model = filled(lambda: build("rankmixer", schema, dict(tokens=4, width=64, hidden=256), rngs=nnx.Rngs(0)))
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
    small = quantize(filled(lambda: build("rankmixer", schema, SMALL, rngs=nnx.Rngs(0))))
    graph, params, rest = nnx.split(small, nnx.Param, ...)
    inputs = random_inputs(schema, 2, 1)
    with pytest.raises(NotImplementedError, match="forward only"):
        jax.eval_shape(jax.grad(lambda p: nnx.merge(graph, p, rest)(inputs).logits.sum()), params)


def test_an_int8_model_survives_a_checkpoint(schema, tmp_path):
    small = quantize(filled(lambda: build("rankmixer", schema, SMALL, rngs=nnx.Rngs(0))))
    inputs = random_inputs(schema, R, C)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "served", nnx.to_pure_dict(nnx.state(small)))
        checkpointer.wait_until_finished()
        empty = nnx.eval_shape(lambda: quantize(build("rankmixer", schema, SMALL, rngs=nnx.Rngs(1))))
        graph, shapes = nnx.split(empty)
        nnx.replace_by_pure_dict(
            shapes, checkpointer.restore(tmp_path / "served", jax.tree.map(lambda x: x, nnx.to_pure_dict(shapes)))
        )
    served = in_float64(lambda m: m(inputs).logits)
    np.testing.assert_array_equal(served(nnx.merge(graph, shapes)), served(small))
