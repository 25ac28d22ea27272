"""Order, masks, positions, ages and truncation of histories."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recscale.models.inputs import Events, Field, Schema, Sequence
from recscale.models.inputs.examples import random_inputs
from recscale.models.inputs.history import (
    TimeFeature,
    choose_sequence,
    random_suffixes,
    read_history,
    time_bucket,
    uses_time,
)


def history(length=(0, 2, 4), columns=4, width=3):
    rng = np.random.default_rng(0)
    ages = np.cumsum(rng.integers(0, 1000, (len(length), columns)), axis=1)
    events = rng.standard_normal((len(length), columns, width))
    return Events(jnp.asarray(events, jnp.float32), jnp.asarray(length, jnp.int32), jnp.asarray(ages, jnp.int32))


def two_sequences(timestamps=False):
    fields = (Field("e", "user", 3, 10),)
    sequences = (Sequence("buys", 4, fields, timestamps), Sequence("clicks", 9, fields, timestamps))
    return Schema((Field("item", "candidate", 3, 10),), sequences)


def test_view_masks_the_old_end():
    given = history()
    view = read_history(given)
    np.testing.assert_array_equal(view.valid, [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(view.position, [0, 1, 2, 3])
    np.testing.assert_array_equal(view.events[1, :2], given.events[1, :2])
    assert (np.asarray(view.events)[1, 2:] == 0).all() and (np.asarray(view.delta_s)[1, 2:] == 0).all()


def test_shorter_history_keeps_the_newest_columns():
    view = read_history(history(), 3)
    np.testing.assert_array_equal(view.events[2], history().events[2, :3])
    np.testing.assert_array_equal(view.valid.sum(axis=1), [0, 2, 3])


def test_nan_on_padding_is_replaced_and_has_no_gradient():
    given = history()
    poisoned = given.replace(events=given.events.at[0].set(jnp.nan).at[1, 2:].set(jnp.inf))
    np.testing.assert_array_equal(read_history(poisoned).events, read_history(given).events)
    grad = jax.grad(lambda e: jnp.sum(read_history(given.replace(events=e)).events ** 2))(poisoned.events)
    assert jnp.isfinite(grad).all() and (np.asarray(grad)[0] == 0).all()


def test_order_check():
    read_history(history(), check=True)
    ages = history().delta_s
    with pytest.raises(ValueError, match="request 2: delta_s"):
        read_history(history().replace(delta_s=ages.at[2].set(ages[2, ::-1])), check=True)
    read_history(history().replace(delta_s=ages.at[0].set(ages[0, ::-1])), check=True)  # all padding
    with pytest.raises(ValueError, match=r"expected \[0, 4\]"):
        read_history(history(length=(0, 5)), check=True)


def test_time_buckets():
    seconds = jnp.asarray([0, 1, 2, 3, 10, 86_400, 2**31 - 1], jnp.int32)
    expected = np.clip(np.floor(2 * np.log2(1.0 + np.asarray(seconds, np.float64))), 0, 63)
    np.testing.assert_array_equal(time_bucket(seconds), expected)


def test_time_feature_appends_zero_on_padding():
    view = read_history(history())
    wide = TimeFeature(rngs=nnx.Rngs(0))(view)
    assert wide.events.shape == (3, 4, 3 + 8)
    assert (np.asarray(wide.events)[1, 2:] == 0).all() and (np.asarray(wide.events)[1, :2, 3:] != 0).all()
    np.testing.assert_array_equal(wide.events[..., :3], view.events)


def test_choosing_a_sequence():
    schema = two_sequences()
    assert choose_sequence(schema, "clicks").length == 9
    with pytest.raises(ValueError, match="several histories"):
        choose_sequence(schema, None)
    with pytest.raises(ValueError, match="histories are buys, clicks"):
        choose_sequence(schema, "views")
    with pytest.raises(ValueError, match="no sequences"):
        choose_sequence(Schema(schema.fields), None)


def test_time_feature_flag():
    with_times, without = (two_sequences(flag).sequences[0] for flag in (True, False))
    assert uses_time(with_times, "auto") and not uses_time(without, "auto") and not uses_time(with_times, "none")
    with pytest.raises(ValueError, match="no timestamps"):
        uses_time(without, "bucket")


def test_random_inputs_obey_the_rules(schema):
    inputs = random_inputs(schema, 50, 2, seed=3)
    events = inputs.user.histories["clicks"]
    read_history(events, check=True)
    assert int(events.length.min()) == 0 and int(events.length.max()) == 7
    again = random_inputs(schema, 50, 2, seed=3)
    jax.tree.map(np.testing.assert_array_equal, inputs, again)
    assert (inputs.user.fields["user"] != random_inputs(schema, 50, 2, seed=4).user.fields["user"]).any()
    for field in schema.candidate_fields:
        assert inputs.candidates.fields[field.name].shape == (50, 2, field.width)


# ---- random suffixes


def suffixes(lengths, columns, seed=0):
    """(before, after): a history of these lengths, and cut by a U-shaped share."""
    user = random_inputs(two_sequences(), 1, 1).user
    old = history(lengths, columns)
    cut = jax.jit(lambda u, k: random_suffixes(u, k, 0.5, 0.5))(
        user.replace(histories={"h": old}), jax.random.key(seed)
    )
    return old, cut.histories["h"]


def test_random_suffixes_cut_to_the_newest_events():
    lengths = [64] * 1_999 + [3]
    old, cut = suffixes(lengths, 64)
    length = np.asarray(cut.length)
    np.testing.assert_array_equal(cut.events, old.events)
    assert (length % 8 == 0)[:-1].all() and length.min() >= 1 and length.max() == 64 and length[-1] <= 3
    assert abs(length[:-1].mean() - 36) < 2 and ((length == 8) | (length == 64)).mean() > 0.4  # U-shaped
    np.testing.assert_array_equal(suffixes(lengths, 64)[1].length, length)


def test_random_suffixes_cut_short_histories_too():
    """Up to 8 columns a multiple of 8 would be all of them."""
    length = np.asarray(suffixes([8] * 500, 8)[1].length)
    assert set(length) == set(range(1, 9)) and ((length == 1) | (length == 8)).mean() > 0.4
    assert set(np.asarray(suffixes([12] * 500, 12)[1].length)) == {8, 12}


def test_histories_are_cut_by_draws_of_their_own():
    user = random_inputs(two_sequences(), 1, 1).user
    both = user.replace(histories={name: history([64] * 500, 64) for name in ("a", "b")})
    cut = jax.jit(lambda u, k: random_suffixes(u, k, 0.5, 0.5))(both, jax.random.key(0))
    a, b = (np.asarray(cut.histories[name].length, float) for name in ("a", "b"))
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.15 and set(a) == set(b)
