"""What the model tests share: schemas with everything in them, small configs, and strict rank promotion."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.models import count, size_space
from recscale.models.inputs import Field, Schema, Sequence, Task


def _full_schema(*, dense=False, timestamps=True, events=7):
    """Both sides, id and dense fields, unequal widths, a history that shares the item table, two tasks.

    dense=True turns every id field into raw numbers, whose gradient training never needs.
    """

    def ids(name, side, width, group, table=None):
        return Field(name, side, width, None if dense else 40, table=table, group=group)

    fields = (
        ids("user", "user", 4, "who"),
        Field("age", "user", 3, group="who"),
        ids("hour", "user", 5, "when"),
        ids("item", "candidate", 6, "what", "items"),
        ids("shop", "candidate", 4, "what", "shops"),
        Field("price", "candidate", 2, group="price"),
        Field("overlap", "cross", 3, group="price"),
    )
    history = (
        ids("past_item", "user", 6, "past", "items"),
        ids("past_shop", "user", 4, "past", "shops"),
        ids("action", "user", 2, "past"),
    )
    sequences = (Sequence("clicks", events, history, timestamps=timestamps),)
    return Schema(fields, sequences, (Task("click"), Task("buy")))


def _small_config(name, schema, target=20_000):
    """Overrides for about `target` dense parameters: the first that `size_space` offers within 10 %, or the nearest."""
    offers, found = itertools.islice(size_space(name, schema, None, target), 500), []
    for offer in offers:
        found.append((abs(count(name, schema, offer).dense_params / target - 1), len(found), offer))
        if found[-1][0] < 0.1:
            break
    return min(found)[2]


def _task_loss(logits, labels):
    """Mean binary cross-entropy."""
    return jnp.mean(jnp.logaddexp(0.0, logits) - labels * logits)


def _random_labels(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 2, shape), jnp.float32)


@pytest.fixture(scope="session")
def full_schema():
    """The function that makes schemas."""
    return _full_schema


@pytest.fixture(scope="session")
def schema():
    return _full_schema()


@pytest.fixture(scope="session")
def small_config():
    return functools.lru_cache(maxsize=None)(_small_config)


@pytest.fixture(scope="session")
def task_loss():
    return _task_loss


@pytest.fixture(scope="session")
def random_labels():
    return _random_labels


@pytest.fixture(autouse=True, scope="module")
def _settings():
    """No implicit rank promotion; quick compilation, since these tests compile hundreds of tiny programs."""
    promotion = jax.config.jax_numpy_rank_promotion
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_numpy_rank_promotion", promotion)
    jax.config.update("jax_disable_most_optimizations", False)
