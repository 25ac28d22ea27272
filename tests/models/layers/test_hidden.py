"""Dropout and batch norm of baselines: off in evaluation, blind to padding, counted, and without a trace when off."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import filled, normal
from flax import nnx
from in_float64 import in_float64

from recscale.models import build, count
from recscale.models.inputs.examples import random_inputs
from recscale.models.layers.hidden import BatchNorm, Hidden, HiddenOptions, RunningStatistic
from recscale.scaling.training import get_config
from recscale.scaling.training.config import run_id

KEY = jax.random.key(3)
BASELINES = {
    "dlrm_mlp": dict(widths=(9, 5)),
    "dcnv2": dict(widths=(9, 5), tower=(4,)),
    "mmoe": dict(experts=2, hidden=6, expert_width=5),
    "wukong": dict(width=6, layers=1),
    "autoint": dict(width=6, layers=1),
    "dhen_lite": dict(width=6, layers=1),
    "hiformer": dict(width=6, layers=1, hidden=8),
    "din+dlrm_mlp": dict(backbone=dict(widths=(9, 5))),
    "onetrans_lite": dict(width=8, layers=1),
}


def with_options(config, **options):
    return config | ({"backbone": config["backbone"] | options} if "backbone" in config else options)


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_drops_in_training_alone(schema, name):
    plain = filled(lambda: build(name, schema, BASELINES[name], rngs=nnx.Rngs(0)))
    model = filled(lambda: build(name, schema, with_options(BASELINES[name], hidden_dropout=0.5), rngs=nnx.Rngs(0)))
    inputs = random_inputs(schema, 2, 3)
    served, trained = (in_float64(lambda m, key: m(inputs, key=key).logits, fixed) for fixed in (1, ()))
    np.testing.assert_array_equal(served(model, None), served(plain, None))
    dropped = trained(model, KEY)
    assert not np.allclose(dropped, trained(plain, KEY))
    np.testing.assert_array_equal(dropped, trained(model, KEY))
    assert not np.allclose(dropped, trained(model, jax.random.key(4)))


@pytest.mark.parametrize("name", ["dlrm_mlp", "dcnv2"])
def test_batch_norm_is_counted_and_its_statistics_are_state(schema, name):
    config = BASELINES[name] | {"batch_norm": True}
    model = build(name, schema, config, rngs=nnx.Rngs(0))
    sizes = jax.tree.map(jnp.size, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    assert sum(jax.tree.leaves(sizes)) == count(name, schema, config).dense_params
    assert count(name, schema, config).dense_params == count(name, schema, BASELINES[name]).dense_params + 2 * (9 + 5)
    inputs = random_inputs(schema, 4, 3)
    before = jax.tree.leaves(nnx.state(model, RunningStatistic))
    model(inputs)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.leaves(nnx.state(model, RunningStatistic)))
    model(inputs, key=KEY)
    after = jax.tree.leaves(nnx.state(model, RunningStatistic))
    assert len(after) == 4 and all(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_padding_does_not_enter_batch_statistics():
    x, valid = normal(8, 3), jnp.arange(8) < 6
    norm, other = BatchNorm(3, momentum=1.0), BatchNorm(3, momentum=1.0)
    y = norm(x, train=True, valid=valid)
    np.testing.assert_allclose(y[:6].mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(y[:6].std(axis=0), 1, rtol=1e-4)
    np.testing.assert_allclose(other(x[:6], train=True), y[:6], rtol=1e-6)
    np.testing.assert_allclose(norm(x[:6]), y[:6], rtol=1e-5, atol=1e-6)  # running statistics are those of that batch


def test_dropout_keeps_the_mean_and_layers_draw_apart():
    x = jnp.ones((4096, 4))
    options = HiddenOptions(hidden_dropout=0.25)
    first, second = (Hidden(4, layer, "relu", options)(x, KEY) for layer in (0, 1))
    assert {0.0, float(np.float32(1 / 0.75))} == set(np.unique(first).tolist())
    assert abs(float(first.mean()) - 1) < 0.02 and not np.array_equal(first, second)


def test_what_is_off_leaves_a_runs_id_alone():
    config = get_config("din+dlrm_mlp")
    name = run_id(config)
    with config.unlocked():
        del config.model.backbone["hidden_dropout"], config.model.backbone["batch_norm"]
    assert run_id(config) == name
    config = get_config("din+dlrm_mlp")
    config.model.backbone.hidden_dropout = 0.1
    assert run_id(config) != name
    with pytest.raises(ValueError, match="hidden_dropout is 1"):
        dataclasses.replace(HiddenOptions(), hidden_dropout=1.0)
