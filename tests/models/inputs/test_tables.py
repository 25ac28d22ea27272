"""Embedding tables: touched rows equal the plain lookup, padding never counts, sharing is by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recscale.models.inputs import Batch, CandidateSide, Field, History, Schema, Sequence, UserSide
from recscale.models.inputs.tables import EmbeddingTables, embed, find_touched, gather_touched, touched_lookup

ITEMS = 50_000
R, C, S = 8, 3, 5


def make_schema() -> Schema:
    return Schema(
        fields=(
            Field("user", "user", 4, 40),
            Field("item", "candidate", 4, ITEMS),
            Field("genres", "candidate", 3, 20, bag=3),
        ),
        sequences=(Sequence("history", S, (Field("past", "user", 4, ITEMS, table="item"),)),),
    )


def make_batch(seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    history = History(
        ids={"past": jnp.asarray(rng.integers(0, ITEMS, (R, S)), jnp.int32)},
        dense={},
        length=jnp.asarray([0, 1, 2, 3, 4, 5, 5, 0], jnp.int32),
    )
    valid = np.ones((R, C), bool)
    valid[-1] = False
    valid[0, 2] = False
    return Batch(
        user=UserSide(
            ids={"user": jnp.asarray(rng.integers(0, 40, R), jnp.int32)}, dense={}, histories={"history": history}
        ),
        candidates=CandidateSide(
            ids={
                "item": jnp.asarray(rng.integers(0, ITEMS, (R, C)), jnp.int32),
                "genres": jnp.asarray(rng.integers(0, 3, (R, C, 3)), jnp.int32),
            },
            dense={},
        ),
        labels=jnp.zeros((R, C, 1)),
        label_mask=jnp.ones((R, C, 1)),
        valid=jnp.asarray(valid),
    )


@pytest.fixture(scope="module")
def tables() -> EmbeddingTables:
    return EmbeddingTables(make_schema(), rngs=nnx.Rngs(0))


def test_touched_lookup_equals_the_plain_one_where_it_counts(tables):
    batch = make_batch()
    touched = find_touched(make_schema(), batch)
    inputs = embed(make_schema(), batch, touched_lookup(gather_touched(tables.arrays(), touched), touched))
    plain = tables.lookup(batch)
    valid = np.asarray(batch.valid)
    np.testing.assert_array_equal(inputs.user.fields["user"][:-1], plain.user.fields["user"][:-1])
    np.testing.assert_array_equal(inputs.candidates.fields["item"][valid], plain.candidates.fields["item"][valid])
    np.testing.assert_array_equal(
        inputs.user.histories["history"].events[:-1], plain.user.histories["history"].events[:-1]
    )


def test_touched_rows_are_exactly_the_ids_of_real_positions():
    batch = make_batch()
    touched = find_touched(make_schema(), batch)["item"]
    expected = set(np.asarray(batch.candidates.ids["item"])[np.asarray(batch.valid)].tolist())
    past, length = np.asarray(batch.user.histories["history"].ids["past"]), batch.user.histories["history"].length
    for r in range(R - 1):
        expected |= set(past[r, : int(length[r])].tolist())
    rows = np.asarray(touched.rows)[np.asarray(touched.hit)]
    assert set(rows.tolist()) == expected
    assert len(rows) == len(expected)
    assert touched.rows.shape[0] == R * C + R * S, "arrays of a step must not grow with the table"


def test_a_small_table_is_taken_whole_and_marks_hits():
    touched = find_touched(make_schema(), make_batch())["genres"]
    ids = np.asarray(make_batch().candidates.ids["genres"])[np.asarray(make_batch().valid)]
    assert touched.rows.shape == (20,)
    assert set(np.flatnonzero(touched.hit)) == set(np.unique(ids[ids > 0]))


def test_a_bag_is_the_mean_of_its_non_zero_ids(tables):
    batch = make_batch()
    genres = jnp.zeros((R, C, 3), jnp.int32).at[0, 0].set(jnp.asarray([2, 0, 5]))
    batch = batch.replace(candidates=batch.candidates.replace(ids={**batch.candidates.ids, "genres": genres}))
    out = tables.lookup(batch).candidates.fields["genres"]
    table = tables.arrays()["genres"]
    np.testing.assert_allclose(out[0, 0], (table[2] + table[5]) / 2, rtol=1e-6)
    assert not np.asarray(out[1]).any(), "an empty bag is zero"


def test_events_beyond_the_length_are_zero_with_zero_gradient(tables):
    batch = make_batch()

    def total(table):
        values = {**tables.arrays(), "item": table}
        inputs = embed(make_schema(), batch, lambda name, place, ids: values[name][ids])
        return jnp.sum(inputs.user.histories["history"].events)

    grad = jax.grad(total)(tables.arrays()["item"])
    past = np.asarray(batch.user.histories["history"].ids["past"])
    hidden = set(past[0]) | set(past[-1])
    shown = {int(i) for r in range(1, R - 1) for i in past[r, : int(batch.user.histories["history"].length[r])]}
    assert not np.asarray(grad[jnp.asarray(sorted(hidden - shown))]).any()
    assert np.asarray(grad[jnp.asarray(sorted(shown))]).any(axis=1).all()


def test_sharing_a_table_needs_equal_sizes():
    with pytest.raises(ValueError, match="shares table 'item'"):
        Schema(fields=(Field("item", "candidate", 4, 10), Field("past", "user", 8, 10, table="item")))


def test_schema_names_must_be_unique():
    with pytest.raises(ValueError, match="given twice: a"):
        Schema(fields=(Field("a", "user", 4, 10), Field("a", "candidate", 4, 10)))


def test_a_table_may_have_any_name():
    """Names of methods among them: a Flax dictionary keeps its entries as attributes."""
    fields = [Field(name, "candidate", 2, 5, table=name) for name in ("items", "keys", "values")]
    tables = EmbeddingTables(Schema(tuple(fields)), rngs=nnx.Rngs(0))
    assert {name: array.shape for name, array in tables.arrays().items()} == dict.fromkeys(
        ("items", "keys", "values"), (5, 2)
    )
    ids = {name: jnp.asarray([[3]], jnp.int32) for name in ("items", "keys", "values")}
    user = UserSide(ids={}, dense={}, histories={})
    one = jnp.ones((1, 1, 1))
    found = tables.lookup(Batch(user, CandidateSide(ids=ids, dense={}), one, one, jnp.ones((1, 1), bool)))
    np.testing.assert_array_equal(found.candidates.fields["keys"][0, 0], tables.arrays()["keys"][3])
