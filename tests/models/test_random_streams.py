"""Random streams of every architecture: no key is used twice, not by blocks, halves, steps or replicas."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from in_float64 import in_float64, keys_drawn_from
from tiny_models import config_of, config_type, data_of, model_of, schema_of

from recscale.models import build, list_models


def dropouts(name):
    """All dropout of an architecture; separated ones have the flag and refuse it."""
    flags = [field.name for field in dataclasses.fields(config_type(name)) if "dropout" in field.name]
    return {} if name.startswith("ug_") else dict.fromkeys(flags, 0.5)


@pytest.mark.parametrize("name", list_models())
def test_initial_parameters_are_drawn_by_keys_of_their_own(name):
    def drawn():
        return nnx.split(build(name, schema_of(name), config_of(name), rngs=nnx.Rngs(0)))[1]

    with keys_drawn_from() as draws:
        in_float64(drawn)()
    keys = sum(draws, [])
    assert len(set(keys)) == len(keys) > 1


@pytest.mark.parametrize("name", [name for name in list_models() if dropouts(name)])
def test_every_dropout_of_a_pass_draws_for_itself(name):
    flags = dropouts(name)
    graph = nnx.split(nnx.eval_shape(lambda: model_of(name, flags)))[0]
    state = in_float64(lambda: nnx.split(model_of(name, flags))[1])()

    def trained(state, inputs, key):
        return nnx.merge(graph, state, copy=True)(inputs, key=key).logits

    with keys_drawn_from() as draws:
        run = in_float64(trained)
        first = run(state, data_of(name)[0], jax.random.key(0))
    # One draw may use a key twice: LEMUR samples by the hash of an item's id.
    keys = [key for draw in draws for key in set(draw)]
    assert len(set(keys)) == len(keys) > 0
    assert not np.allclose(first, run(state, data_of(name)[0], jax.random.key(1)))
