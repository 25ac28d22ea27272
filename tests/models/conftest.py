"""What the model tests share: schemas with everything in them, small configs, and strict rank promotion."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.models import count, size_space
from recscale.models.inputs import Field, Schema, Sequence, Task


def full_schema(*, dense=False, timestamps=True, events=7):
    """Both sides, id and dense fields, unequal widths, a history that shares the item table, two tasks.

    dense=True turns every id field into raw numbers, whose gradient training never needs.
    """

    def ids(name, side, width, group, table=None):
        return Field(name, side, width, None if dense else 40, table=table, group=group)

    fields = (
        ids("user", "user", 4, "who"), Field("age", "user", 3, group="who"), ids("hour", "user", 5, "when"),
        ids("item", "candidate", 6, "what", "items"), ids("shop", "candidate", 4, "what", "shops"),
        Field("price", "candidate", 2, group="price"), Field("overlap", "cross", 3, group="price"),
    )
    history = (
        ids("past_item", "user", 6, "past", "items"), ids("past_shop", "user", 4, "past", "shops"),
        ids("action", "user", 2, "past"),
    )
    sequences = (Sequence("clicks", events, history, timestamps=timestamps),)
    return Schema(fields, sequences, (Task("click"), Task("buy")))


def small_config(name, schema, target=20_000):
    """Overrides that bring a model close to `target` dense parameters, the first that `size_space` offers within 10 %."""
    offers = itertools.islice(size_space(name, schema, None, target), 500)
    return min(offers, key=lambda o: max(0.1, abs(count(name, schema, o).dense_params / target - 1)))


def task_loss(logits, labels):
    """Mean binary cross-entropy."""
    return jnp.mean(jnp.logaddexp(0.0, logits) - labels * logits)


def random_labels(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 2, shape), jnp.float32)


@pytest.fixture(autouse=True)
def _strict_rank_promotion():
    before = jax.config.jax_numpy_rank_promotion
    jax.config.update("jax_numpy_rank_promotion", "raise")
    yield
    jax.config.update("jax_numpy_rank_promotion", before)


@pytest.fixture
def schema():
    return full_schema()
