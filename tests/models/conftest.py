"""What the model tests share: schemas with everything in them, small configs, and strict rank promotion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from flax import nnx
from in_float64 import in_float64

from recscale.models import build, count
from recscale.models.domains.stale_bank import BankState
from recscale.models.inputs import Content, Field, Schema, Sequence, Task
from recscale.models.inputs.examples import random_inputs
from recscale.scaling.counting.jaxpr_flops import count_flops
from recscale.scaling.parallel import RULES


def _full_schema(*, dense=False, timestamps=True, events=7):
    """Both sides, id and dense fields, unequal widths, a history that shares the item table, content, two tasks.

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
    content = Content(40, 12, segments=(3, 2), query_length=2, histories=("clicks",))
    return Schema(fields, sequences, (Task("click"), Task("buy")), content=content)


def _task_loss(logits, labels):
    """Mean binary cross-entropy."""
    return jnp.mean(jnp.logaddexp(0.0, logits) - labels * logits)


def _random_labels(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 2, shape), jnp.float32)


def _axes_have_rules(state):
    """Every named axis of every variable can be split over a mesh, or is known to stay whole."""
    for path, variable in nnx.to_flat_state(state):
        names = variable.get_metadata().get("logical_axes") or ()
        assert {name for name in names if name is not None} <= set(RULES), (path, names)


def _check_variant(name, schema, config):
    """A configuration builds, its closed forms are those of its arrays and programs, and its logits are finite."""

    def make():
        return build(name, schema, config, rngs=nnx.Rngs(0))

    # A bank is no parameter; one of zeros was written at step 0.
    graph, params, bank = nnx.split(nnx.eval_shape(make), nnx.Not(BankState), ...)
    _axes_have_rules(params)
    _axes_have_rules(bank)
    inputs = random_inputs(schema, 2, 3)
    counted = count(name, schema, config)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == counted.dense_params
    once = count_flops(lambda p, b, u: nnx.merge(graph, p, b).encode_user(u), params, bank, inputs.user)
    assert once == 2 * counted.forward_flops_user
    total = count_flops(lambda p, b, i: nnx.merge(graph, p, b)(i).logits, params, bank, inputs)
    assert total == once + 6 * counted.forward_flops_candidate
    # Drawn here, because compiling an initialisation takes longer than the rest.
    values = jax.tree.map(lambda leaf: 0.3 * np.random.default_rng(0).standard_normal(leaf.shape, np.float32), params)
    empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), bank)
    out = in_float64(lambda p, b, i: nnx.merge(graph, p, b)(i).logits)(values, empty, inputs)
    assert out.shape == (2, 3, len(schema.tasks)) and jnp.isfinite(out).all()


@pytest.fixture(scope="session")
def full_schema():
    """The function that makes schemas."""
    return _full_schema


@pytest.fixture(scope="session")
def schema():
    return _full_schema()


@pytest.fixture(scope="session")
def small_config():
    return small_models.small_config


@pytest.fixture(scope="session")
def check_variant():
    return _check_variant


@pytest.fixture(scope="session")
def axes_have_rules():
    return _axes_have_rules


@pytest.fixture(scope="session")
def task_loss():
    return _task_loss


@pytest.fixture(scope="session")
def random_labels():
    return _random_labels


@pytest.fixture(autouse=True, scope="module")
def _settings():
    """No implicit rank promotion."""
    promotion = jax.config.jax_numpy_rank_promotion
    jax.config.update("jax_numpy_rank_promotion", "raise")
    yield
    jax.config.update("jax_numpy_rank_promotion", promotion)
