"""What tests of models are fed with: random arrays, models with random parameters, histories of random events."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from recscale.models.inputs.batch import Events


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def filled(make):
    """make() with all parameters random, biases, gains and generators too; nothing is compiled for them."""
    graph, state = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(0)

    def draw(leaf):
        std = leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 0.5
        return jnp.asarray(std * rng.standard_normal(leaf.shape), jnp.float32)

    return nnx.merge(graph, jax.tree.map(draw, state))


def history_of(inputs, lengths, columns=None, seed=4):
    """The inputs with all-random events, valid or not, of the given lengths."""
    ((name, old),) = inputs.user.histories.items()
    requests, most, width = old.events.shape
    rng = np.random.default_rng(seed)
    events = jnp.asarray(rng.standard_normal((requests, columns or most, width)), jnp.float32)
    delta_s = None
    if old.delta_s is not None:
        delta_s = jnp.asarray(np.cumsum(rng.integers(1, 10**5, events.shape[:2]), axis=1), jnp.int32)
    made = Events(events, jnp.asarray(lengths, jnp.int32), delta_s)
    return inputs.replace(user=inputs.user.replace(histories={name: made}))
