"""Embedding tables: touched rows equal the plain lookup, padding never counts, sharing is by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recscale.models.inputs import Batch, CandidateSide, Content, Field, History, Schema, Sequence, UserSide
from recscale.models.inputs.tables import (
    EmbeddingTables,
    embed,
    embed_candidates,
    embed_user,
    find_touched,
    gather_touched,
    touched_lookup,
)

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


def test_tables_start_small(tables):
    item = np.asarray(tables.arrays()["item"])
    assert item.shape == (ITEMS, 4) and item.std() == pytest.approx(0.01, rel=0.02) and abs(item.mean()) < 1e-4


def ids_alone(vocabulary, ids, **options):
    """A schema of one candidate field, and a batch of one request with these ids, the last one padding."""
    ids = jnp.asarray([ids], jnp.int32)
    one = jnp.ones((1, ids.shape[1], 1))
    valid = jnp.arange(ids.shape[1])[None] < ids.shape[1] - 1
    batch = Batch(UserSide(ids={}, dense={}, histories={}), CandidateSide({"a": ids}, {}), one, one, valid)
    return Schema((Field("a", "candidate", 2, vocabulary, **options),)), batch


def test_whole_and_sorted_tables_clamp_what_lies_beyond():
    """Four ids: a table of four rows is taken whole, one of five is sorted. The padded one hits nothing."""
    touched = find_touched(*ids_alone(4, [9, -3, 1, 2]))["a"]
    np.testing.assert_array_equal(touched.rows, [0, 1, 2, 3])
    np.testing.assert_array_equal(touched.hit, [True, True, False, True])
    np.testing.assert_array_equal(touched.positions["candidate.a"], [[3, 0, 1, 2]])
    touched = find_touched(*ids_alone(5, [9, -3, 1, 2]))["a"]
    np.testing.assert_array_equal(touched.rows, [0, 1, 4, 5])
    np.testing.assert_array_equal(touched.hit, [True, True, True, False])
    np.testing.assert_array_equal(touched.positions["candidate.a"][0, :3], [2, 0, 1])


def test_id_0_of_a_bag_alone_is_padding():
    """Of two candidates, the second one padding."""
    schema, batch = ids_alone(5, [[1, 0, 3], [2, 2, 2]], bag=3)
    table = jnp.arange(10.0).reshape(5, 2)
    inputs = embed(schema, batch, lambda name, place, ids: table[ids])
    np.testing.assert_array_equal(inputs.candidates.fields["a"][0, 0], (table[1] + table[3]) / 2)
    touched = find_touched(schema, batch)["a"]
    assert set(np.asarray(touched.rows)[np.asarray(touched.hit)].tolist()) == {1, 3}


def test_content_is_handed_on_with_its_padding():
    """Items of padded candidates and events are -1; tokens and queries stay as they are."""
    event = Field("past", "user", 2, 9)
    schema = Schema(
        (Field("a", "candidate", 2, 9),),
        (Sequence("clicks", 3, (event,)),),
        content=Content(7, 11, (2,), 2, histories=("clicks",)),
    )
    items, tokens = jnp.asarray([[4, 5]]), jnp.asarray([[[1, 2], [3, 4]]])
    history = History(
        {"past": jnp.ones((1, 3), jnp.int32), "content_item": jnp.asarray([[6, 5, 4]])}, {}, jnp.asarray([2])
    )
    asked = {"query": jnp.asarray([3]), "query_content": jnp.asarray([[8, 9]])}
    candidates = CandidateSide({"a": items, "content_item": items, "content": tokens}, {})
    one = jnp.ones((1, 2, 1))
    batch = Batch(UserSide(asked, {}, {"clicks": history}), candidates, one, one, jnp.asarray([[True, False]]))
    inputs = embed(schema, batch, lambda name, place, ids: jnp.ones((*ids.shape, 2)))
    found, query = inputs.candidates.content, inputs.user.content
    np.testing.assert_array_equal(found.ids, [[4, -1]])
    np.testing.assert_array_equal(found.tokens, tokens)
    np.testing.assert_array_equal(query.history["clicks"], [[6, 5, -1]])
    assert query.query.tolist() == [3] and query.tokens.tolist() == [[8, 9]]
    whole = embed_candidates(schema, candidates, lambda name, place, ids: jnp.ones((*ids.shape, 2)))
    np.testing.assert_array_equal(whole.content.ids, items)
    assert whole.valid is None


def test_a_padded_request_has_no_history():
    user = make_batch().user
    looked_up = embed_user(make_schema(), user, lambda name, place, ids: jnp.ones((*ids.shape, 4)))
    np.testing.assert_array_equal(looked_up.histories["history"].length, user.histories["history"].length)
    found = embed_user(
        make_schema(), user, lambda name, place, ids: jnp.ones((*ids.shape, 4)), jnp.arange(R) != 5
    ).histories["history"]
    np.testing.assert_array_equal(found.length, [0, 1, 2, 3, 4, 0, 5, 0])
    np.testing.assert_array_equal(np.asarray(found.events).sum(axis=(1, 2)), 4 * np.asarray(found.length))
