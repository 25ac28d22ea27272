"""Dense optimisers: the rate is the caller's, decay spares biases and gains, bad settings are named."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from in_float64 import in_float64
from tiny_models import model_of

from recscale.models import list_models
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
def test_an_update_follows_from_its_constants(name):
    b1, b2, eps = 0.8, 0.5, 0.1
    first, second = 0.5, -2.0
    optimizer = dense_optimizer(name, b1=b1, b2=b2, eps=eps)
    state = optimizer.init({"x": jnp.zeros(())})
    for gradient in (first, second):
        update, state = optimizer.update({"x": jnp.float32(gradient)}, state)
    mean = (b1 * (1 - b1) * first + (1 - b1) * second) / (1 - b1**2)
    square = b2 * (1 - b2) * first**2 + (1 - b2) * second**2
    expected = {
        "adamw": mean / (np.sqrt(square / (1 - b2**2)) + eps),
        "adam": mean / (np.sqrt(square / (1 - b2**2)) + eps),
        "rmsprop": second / np.sqrt(square + eps),
        "adagrad": second / np.sqrt(0.1 + first**2 + second**2 + eps),
    }[name]
    np.testing.assert_allclose(update["x"], expected, rtol=1e-5)


# The last names of matrices in all architectures, whatever their rank; all others are gains, biases and embeddings.
MATRICES = {
    "kernel",
    "kernels",
    "up",
    "gate",
    "out",
    "router",
    "second",
    "between",
    "outward",
    "shared",
    "beta",
    "target",
}
MATRICES |= {"keys", "theta", "core"}
FLAGS = [
    ("rankmixer", dict(experts=3, active_ratio=0.5)),
    ("rankmixer", dict(norm_per_token=True)),
    ("mdl", dict(token_state="split", qkv_bias=True)),
    ("lemur", dict(predictor="lstm")),
    ("pkm", dict(score="tucker")),
    ("pkm", dict(score_scale="learned")),
    ("dcnv2", dict(rank=3, experts=2)),
    ("dcnv2", dict(batch_norm=True)),
    ("dhen_lite", dict(ensemble="weighted")),
    ("ug_rankmixer", dict(compensation="per_token")),
    ("longer", dict(query_strategy="learnable")),
    ("msn", dict(module="msn_smoe")),
    ("lmn", dict(target="learned")),
]


@pytest.mark.parametrize(("name", "flags"), [*((name, {}) for name in list_models()), *FLAGS])
def test_decay_moves_the_matrices_of_every_architecture_and_nothing_else(name, flags):
    """Gains, biases and embeddings per token, head or expert are matrices by their rank."""
    params = nnx.state(nnx.eval_shape(lambda: model_of(name, flags)), nnx.Param)
    ones, zeros = (jax.tree.map(lambda a, v=v: np.full(a.shape, v, np.float32), params) for v in (1, 0))
    optimizer = dense_optimizer("adamw", weight_decay=0.5)
    updates = in_float64(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])(zeros, ones)
    for path, update in nnx.to_flat_state(updates):
        last = [part for part in path if isinstance(part, str)][-1]
        assert (np.asarray(update.get_value()) == (0.5 if last in MATRICES else 0.0)).all(), path


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
