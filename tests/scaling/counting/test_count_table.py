"""Closed forms, jaxpr and XLA beside each other, for every registered backbone."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from recscale import models
from recscale.models.inputs import Field, Schema, Sequence, Task, reference_schema
from recscale.scaling.counting.abstract import abstract_batch, abstract_vectors, tree_params
from recscale.scaling.counting.sizing import size
from recscale.scaling.counting.table import count_table
from recscale.scaling.counting.xla_cost import xla_cost

MIXED = Schema(
    fields=(
        Field("age", "user", 3),
        Field("user", "user", 8, vocabulary=50),
        Field("item", "candidate", 8, vocabulary=40, table="items"),
        Field("tags", "candidate", 4, vocabulary=9, bag=3),
        Field("price", "candidate", 2),
        Field("match", "cross", 5),
    ),
    sequences=(
        Sequence("clicks", 6, (Field("event", "user", 8, vocabulary=40, table="items"), Field("dwell", "user", 2))),
    ),
    tasks=(Task("click"), Task("buy")),
    domains=3,
)


@pytest.mark.parametrize(
    "dense_params", [pytest.param(size, marks=pytest.mark.thorough) for size in (3e4, 101_010, 1e6)]
)
@pytest.mark.parametrize("name", models.list_models("backbone"))
@pytest.mark.slow
def test_closed_form_equals_jaxpr_and_tree(name, dense_params):
    schema = reference_schema()
    table = count_table(name, schema, size(name, schema, dense_params=dense_params).config)
    assert table.closed == table.jaxpr
    assert table.count.dense_params == table.tree_params
    assert table.agrees
    assert table.closed["forward"] == table.closed["user"] + table.closed["candidate"]
    # A head that only training has multiplies each of its weights once.
    most = table.closed["forward"] + 2 * table.count.training_only_params
    assert 2 * table.closed["forward"] < table.closed["train"] <= 3 * most


@pytest.mark.thorough
@pytest.mark.parametrize("name", models.list_models("backbone"))
def test_raw_fields_bags_and_several_tasks(name):
    config = {"tokens": 4, "width": 8} if models.get_config(name).get("tokenizer") == "cut" else {}
    schema = Schema(MIXED.fields, (), MIXED.tasks)
    table = count_table(name, schema, config)
    assert table.agrees, (table.closed, table.jaxpr)


def test_what_is_done_once_a_batch_is_counted_apart():
    config = dict(tokens=4, width=16, hidden=24, memory_slots=49, memory_topk=4, key_width=6, theta="left_nxn")
    table = count_table("msn", reference_schema(), config)
    assert table.agrees and 0 < table.closed["step"] < table.closed["train_step"] <= 3 * table.closed["step"]
    wrong = dataclasses.replace(table, closed=table.closed | {"step": 0})
    assert not wrong.agrees


def test_xla_counts_a_little_more_than_the_products():
    table = count_table("rankmixer", reference_schema(fields=8), {"width": 32, "hidden": 96, "layers": 1}, xla=True)
    for phase in ("forward", "train"):
        assert 1.0 <= table.xla_flops_per_row(phase) / table.closed[phase] < 1.5
    assert table.to_dict()["agrees"] is True
    assert table.xla_flops_per_row("user") is None


def test_xla_cost_of_a_product():
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    cost = xla_cost(lambda a, b: a @ b.T, x, x)
    assert cost.flops == pytest.approx(2 * 64 * 64 * 32, rel=0.01)
    assert cost.argument_bytes == 2 * 64 * 32 * 4
    assert cost.output_bytes == 64 * 64 * 4
    assert cost.peak_bytes == cost.argument_bytes + cost.output_bytes + cost.temporary_bytes - cost.aliased_bytes


def test_donated_arguments_are_aliased():
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    assert xla_cost(jax.jit(lambda a: a + 1.0, donate_argnums=0), x).aliased_bytes == 256 * 256 * 4
    assert xla_cost(jax.jit(lambda a: a + 1.0), x).aliased_bytes == 0


def test_abstract_batch_has_every_part_of_the_schema():
    batch = abstract_batch(MIXED, 5, 2)
    assert batch.user.ids["user"].shape == (5,) and batch.user.dense["age"].shape == (5, 3)
    assert batch.candidates.ids["tags"].shape == (5, 2, 3) and batch.candidates.dense["match"].shape == (5, 2, 5)
    assert batch.user.histories["clicks"].ids["event"].shape == (5, 6)
    assert batch.user.histories["clicks"].delta_s is None and batch.user.domain.shape == (5,)
    assert batch.labels.shape == (5, 2, 2) and batch.rows == 10
    vectors = {place: shape.shape for place, shape in abstract_vectors(MIXED, batch).items()}
    assert vectors == {
        "user.user": (5, 8),
        "candidate.item": (5, 2, 8),
        "candidate.tags": (5, 2, 3, 4),
        "history.clicks.event": (5, 6, 8),
    }


def test_tree_params_counts_parameters_only():
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones((3, 4)))
            self.seen = nnx.Variable(jnp.ones(100))

    assert tree_params(Model()) == 12
    assert tree_params(nnx.eval_shape(Model)) == 12


@pytest.mark.parametrize("name", models.list_models("encoder"))
@pytest.mark.slow
def test_sequence_encoders(name):
    table = count_table(name, MIXED)
    assert table.agrees, (table.closed, table.jaxpr, table.count.dense_params, table.tree_params)
