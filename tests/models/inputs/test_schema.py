"""Schemas: what they refuse, their sums and hash, and what models plan to read of them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from recscale.models.counts import Count, Flops, Params
from recscale.models.inputs import Content, Field, Schema, Sequence, Task, reference_schema
from recscale.models.inputs.examples import random_inputs
from recscale.models.inputs.flat import plan_flat
from recscale.models.inputs.history import (
    EventPlan,
    HistoryOptions,
    TokenShape,
    event_columns,
    longest_history,
    plan_events,
)
from recscale.models.options import refuse_unused, require_share, require_sizes

EVENT = Field("past", "user", 3, 50, table="item")
SCHEMA = Schema(
    (
        Field("user", "user", 4, 20),
        Field("age", "user", 2),
        Field("item", "candidate", 3, 50),
        Field("price", "cross", 5),
    ),
    (Sequence("clicks", 9, (Field("dwell", "user", 2), EVENT), timestamps=True), Sequence("views", 4, (EVENT,))),
    domains=3,
    content=Content(7, 11, (2, 3), 2, histories=("clicks",)),
)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Field("a", "item", 4), "expected one of user, candidate, cross"),
        (lambda: Field("a", "user", 0), "width is 0"),
        (lambda: Field("a", "user", 1, 0), "vocabulary is 0"),
        (lambda: Field("a", "user", 1, 5, bag=0), "bag is 0"),
        (lambda: Field("a", "user", 1, bag=2), "bag is 2"),
        (lambda: Sequence("s", 0, (EVENT,)), "length is 0"),
        (lambda: Sequence("s", 1, ()), "no event fields"),
        (lambda: Sequence("s", 1, (Field("a", "candidate", 1),)), "not of side 'user'"),
        (lambda: Content(0, 2, (1,), 1), "expected an item"),
        (lambda: Content(1, 1, (1,), 1), "two ids"),
        (lambda: Content(1, 2, (), 1), "a token in each"),
        (lambda: Content(1, 2, (1, 0), 1), "a token in each"),
        (lambda: Content(1, 2, (1,), 0), "a token in each"),
        (lambda: Schema((EVENT,), tasks=()), "at least one task"),
        (lambda: Schema((EVENT,), tasks=(Task("a"), Task("a"))), "task names must be unique; given twice: a"),
        (lambda: Schema((), 2 * SCHEMA.sequences), "sequence names must be unique; given twice: clicks, views"),
        (lambda: dataclasses.replace(SCHEMA, sequences=SCHEMA.sequences[1:]), "content names history 'clicks'"),
        (lambda: require_sizes(width=0), "width is 0, expected at least 1$"),
        (lambda: require_sizes(widths=(3, 0)), "expected at least 1 everywhere"),
        (lambda: require_sizes(widths=(0,)), "expected at least 1$"),
        (lambda: require_share(dropout=1.0), r"dropout is 1.0, expected a share in \[0, 1\)"),
        (lambda: require_share(dropout=-0.1), "expected a share"),
        (
            lambda: refuse_unused(HistoryOptions(recent=3), "why; mend", sequence=None, recent=3),
            "recent is 3 and has no",
        ),
        (lambda: plan_events(SCHEMA, HistoryOptions(sequence="clicks", recent=0)), "recent is 0"),
        (lambda: longest_history(PLAN, 4), "max_length is 4, but the history has 5 events"),
        (lambda: event_columns(SCHEMA, PLAN, ("past", "passed"), "actions"), "actions names passed; .* dwell, past"),
        (lambda: plan_flat(Schema((EVENT,))), "nothing to rank"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_smallest_are_allowed():
    assert Field("a", "user", 1, 1).bag == 1 and Field("a", "user", 1, 2, bag=2).bag == 2
    assert Sequence("s", 1, (EVENT,)).width == 3 and Content(1, 2, (1,), 1).histories == ()
    require_sizes(width=1, widths=(1, 2), hidden=None)
    require_share(dropout=0.0)
    refuse_unused(HistoryOptions(), "why", sequence=None, recent=None)


def test_sums_and_sides():
    assert [field.name for field in SCHEMA.user_fields] == ["user", "age"]
    assert [field.name for field in SCHEMA.candidate_fields] == ["item", "price"]
    assert SCHEMA.width == 4 + 2 + 3 + 5 and SCHEMA.sequences[0].width == 5
    assert SCHEMA.tables() == {"user": (20, 4), "item": (50, 3)}
    assert SCHEMA.embedding_params() == 20 * 4 + 50 * 3
    assert [s.length for s in SCHEMA.with_history_length(6).sequences] == [6, 4]
    extra = SCHEMA.with_extra_tables(("item",))
    assert extra.fields[:4] == SCHEMA.fields and extra.embedding_params() == 20 * 4 + 2 * 50 * 3
    assert (extra.fields[4].table_name, extra.fields[4].ids_name, extra.fields[4].side) == (
        "item_extra",
        "item",
        "candidate",
    )


def test_a_hash_names_a_schema_for_good():
    """Run tables hold it; flags that came later are left out where they are not set."""
    assert reference_schema().hash() == "319b982ef5f9" and SCHEMA.hash() == "62f913930822"
    plain = dataclasses.replace(SCHEMA, content=None).to_dict()
    assert "content" not in plain and all("ids" not in field for field in plain["fields"])
    assert all("ids" not in field for sequence in plain["sequences"] for field in sequence["fields"])
    extra = SCHEMA.with_extra_tables(("item",)).to_dict()["fields"][4]
    assert extra["ids"] == "item"


def test_the_reference_schema():
    """32 id fields of width 16 and 1,000 rows, half of them the user's, in groups of four."""
    schema = reference_schema()
    assert schema.embedding_params() == 32 * 16 * 1000 and schema.width == 512
    assert len(schema.user_fields) == len(schema.candidate_fields) == 16 and [t.name for t in schema.tasks] == ["task0"]
    assert [field.name for field in schema.fields[14:18]] == ["f14", "f15", "f16", "f17"]
    assert [field.group for field in schema.fields[12:20]] == 4 * ["user3"] + 4 * ["candidate4"]
    odd = reference_schema(5, 2, 3)
    assert (len(odd.user_fields), len(odd.fields), odd.width, len(odd.tasks)) == (2, 5, 10, 3)


PLAN = plan_events(SCHEMA, HistoryOptions(sequence="clicks", recent=5))


def test_events_that_are_read():
    assert PLAN == EventPlan("clicks", 5, 5 + 8, True, True, True) and PLAN.params == 64 * 8
    views = plan_events(SCHEMA, HistoryOptions(sequence="views", recent=50))
    assert views == EventPlan("views", 4, 3, False, False, True) and views.params == 0
    raw = dataclasses.replace(SCHEMA, sequences=(Sequence("clicks", 9, (Field("dwell", "user", 2),), timestamps=True),))
    assert (
        not plan_events(raw, HistoryOptions(time_feature="none")).trained and plan_events(raw, HistoryOptions()).trained
    )
    assert (longest_history(PLAN, None), longest_history(PLAN, 5), longest_history(PLAN, 8)) == (5, 5, 8)
    assert event_columns(SCHEMA, PLAN, ("past", "dwell"), "actions") == ((2, 3, 4), (0, 1))


def test_halves_of_a_flat_model():
    tokens = TokenShape(user=2, candidate=1, width=3)
    plan = plan_flat(SCHEMA, tokens)
    assert (plan.user, plan.candidate) == (("user", "age"), ("item", "price"))
    assert (plan.user_width, plan.candidate_width, plan.width) == (6 + 6, 8 + 3, 23)
    assert plan.split_flops(10) == Flops(240, 220)
    for shape, trained in (
        (TokenShape(), (False, False)),
        (tokens, (True, True)),
        (dataclasses.replace(tokens, user_trained=False), (False, True)),
        (dataclasses.replace(tokens, candidate_trained=False), (True, False)),
    ):
        raw = plan_flat(SCHEMA, shape, keep=lambda field: field.is_dense)
        assert (raw.user, raw.candidate) == (("age",), ("price",))
        assert (raw.user_trained, raw.candidate_trained) == trained
    flops = plan_flat(SCHEMA, keep=lambda field: field.is_dense).split_flops(10)
    assert flops == Flops(40, 100, 40, 100)
    inputs = random_inputs(SCHEMA, 2, 3)
    history = jnp.arange(12.0).reshape(2, 2, 3)
    joined = plan.join_user(inputs.user, history)
    expected = [inputs.user.fields["user"], inputs.user.fields["age"], history.reshape(2, 6)]
    np.testing.assert_array_equal(joined, np.concatenate(expected, axis=1))
    with pytest.raises(ValueError, match="built for 1 history tokens, the sequence encoder gave 0"):
        plan.join_candidates(inputs.candidates)
    nothing = plan_flat(SCHEMA, keep=lambda field: False)
    assert nothing.join_user(inputs.user) is None and nothing.join_candidates(inputs.candidates).shape == (2, 3, 0)


def test_drawn_inputs_lie_where_they_should():
    inputs = random_inputs(SCHEMA, 200, 2)
    user, content = inputs.user, inputs.user.content
    clicks, views = user.histories["clicks"], user.histories["views"]
    real = np.arange(9)[None] < np.asarray(clicks.length)[:, None]
    assert set(np.asarray(user.domain)) == {0, 1, 2} and views.delta_s is None
    assert set(np.asarray(clicks.length)) == set(range(10)) and (np.asarray(clicks.events)[~real] == 0).all()
    ages = np.asarray(clicks.delta_s)
    assert (ages[~real] == 0).all() and ages.max() <= 9 * 86_400 and ages[:, 0].max() > 80_000
    assert set(np.asarray(content.tokens).ravel()) == set(range(1, 11)) and content.tokens.shape == (200, 2)
    assert set(np.asarray(content.history["clicks"])[real]) == set(range(7))
    assert (np.asarray(content.history["clicks"])[~real] == -1).all()
    assert 60_000 < np.asarray(content.query).max() < 2**16
    items = inputs.candidates.content
    assert set(np.asarray(items.ids).ravel()) == set(range(7)) and items.tokens.shape == (200, 2, 5)
    assert set(np.asarray(items.tokens).ravel()) == set(range(1, 11))
    plain = random_inputs(reference_schema(), 3, 2)
    assert plain.user.domain is None and plain.user.content is None and plain.candidates.content is None


def test_counts_add_up_by_part():
    """Training makes every product three times, less what no gradient needs."""
    params = Params(*range(1, 9)) + Params(dense=100, slots=1)
    assert params == Params(101, 2, 3, 4, 5, 6, 7 + 1, 8)
    flops = Flops(*range(1, 10)) + Flops(user=100, step_training=1)
    assert flops == Flops(101, 2, 3, 4, 5, 6, 7, 8, 10)
    found = Count.of(params, flops, 1000, 50)
    assert (found.train_flops_user, found.train_flops_candidate) == (3 * (101 + 8) - 3, 3 * (2 + 5) - 4)
    assert (found.forward_flops_per_row, found.train_flops_per_row) == (103, 324 + 17)
    assert (found.forward_flops_step, found.train_flops_step) == (6, 3 * (6 + 10) - 7)
    assert (found.dense_params, found.active_params, found.memory_slots) == (101, 101 - 5, 8)
    assert (found.head_params, found.tokenizer_params, found.memory_params) == (3, 2, 4)
    assert (found.training_only_params, found.position_params, found.encoder_params) == (6, 8, 50)
    assert found.embedding_params == 1000 and Count.of(Params(), Flops(), 0).memory_slots is None
