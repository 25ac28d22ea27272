"""Dense optimisers: the rate is the caller's, decay spares biases and gains, bad settings are named."""

from typing import get_args

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recscale.scaling.training.optimizers import Optimizer, dense_optimizer

PARAMS = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones((2, 3)), "gain": jnp.ones(3)}
GRADS = {"kernel": jnp.full((2, 3), 0.5), "bias": jnp.full((2, 3), -2.0), "gain": jnp.zeros(3)}


def test_adamw_equals_optax_at_the_same_rate():
    ours = dense_optimizer("adamw", weight_decay=0.1)
    rival = optax.adamw(1e-2, weight_decay=0.1, mask={"kernel": True, "bias": False, "gain": False})
    a, b = ours.init(PARAMS), rival.init(PARAMS)
    mine, other = PARAMS, PARAMS
    for _ in range(3):
        updates, a = ours.update(GRADS, a, mine)
        mine = {k: mine[k] - 1e-2 * updates[k] for k in mine}
        updates, b = rival.update(GRADS, b, other)
        other = optax.apply_updates(other, updates)
    for name in PARAMS:
        np.testing.assert_allclose(mine[name], other[name], rtol=1e-6)


@pytest.mark.parametrize("name", get_args(Optimizer))
def test_every_optimizer_descends(name):
    optimizer = dense_optimizer(name)
    updates, _ = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)
    assert (updates["kernel"] > 0).all() and (updates["bias"] < 0).all() and not updates["gain"].any()


def test_clipping_bounds_the_global_norm():
    optimizer = dense_optimizer("rmsprop", clip_norm=1e-3, b2=0.0, eps=1.0)
    updates, _ = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)
    assert optax.tree.norm(updates) <= 1e-3


@pytest.mark.parametrize(
    "arguments, words",
    [(dict(name="lion"), "training.optimizer is 'lion'"), (dict(name="adam", weight_decay=0.1), "use 'adamw'")],
)
def test_bad_settings_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        dense_optimizer(**arguments)
