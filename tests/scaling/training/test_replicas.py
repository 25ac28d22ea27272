"""Replicas all at once or one after the other: the same numbers; and which models take turns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recscale import models
from recscale.scaling.data.known_truth import make_schema, preset
from recscale.scaling.training.replicas import map_replicas, take_turns


def test_in_turn_is_together_is_alone():
    def function(weights, x, scale):
        return {"y": jnp.tanh(x @ weights["w"]) * scale}, weights["w"].sum()

    key = jax.random.key(0)
    weights, x = {"w": jax.random.normal(key, (3, 5, 2))}, jax.random.normal(key, (4, 5))
    scale = jnp.arange(3.0)
    turns, together = (map_replicas(function, (0, None, 0), 3, alone)(weights, x, scale) for alone in (True, False))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), turns, together)
    first = {"w": weights["w"][:1]}
    single = map_replicas(function, (0, None, 0), 1, False)(first, x, scale[:1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[:1], rtol=1e-6), single, together)


@pytest.mark.parametrize(("replicas", "alone", "kind"), [
    (1, False, "single"), (1, True, "single"), (2, False, "together"), (2, True, "turns"), (3, True, "turns"),
])  # fmt: skip
def test_one_replica_runs_as_it_is_and_several_in_turn_or_together(replicas, alone, kind):
    program = map_replicas(lambda w, x: x @ w, (0, None), replicas, alone)
    jaxpr = jax.make_jaxpr(program)(jnp.ones((replicas, 5, 2)), jnp.ones((4, 5))).jaxpr
    found = {equation.primitive.name: equation for equation in jaxpr.eqns}
    if kind == "turns":
        assert found["scan"].params["length"] == replicas and "dot_general" not in found
    else:
        shapes = [operand.aval.shape for operand in found["dot_general"].invars]
        assert sorted(map(len, shapes)) == ([2, 2] if kind == "single" else [2, 3]) and "scan" not in found


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="on accelerators replicas run together")
def test_models_with_work_of_their_own_take_turns():
    schema = make_schema(preset("dense"))

    def turns(name, **config):
        return take_turns(nnx.eval_shape(lambda: models.build(name, schema, config, rngs=nnx.Rngs(0))))

    assert not turns("dlrm_mlp", widths=(8,)) and turns("dlrm_mlp", widths=(256,))
    assert turns("rankmixer", tokens=8, width=8, hidden=4, layers=1)
