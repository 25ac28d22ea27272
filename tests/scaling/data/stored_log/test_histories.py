"""Which events a row may see, and in which order."""

import numpy as np
import pytest

from recscale.scaling.data.stored_log.histories import history_ends, newest_first, seconds_before

USERS, EVENTS, ROWS = 12, 300, 400


@pytest.fixture(scope="module")
def store():
    """Events of 12 users (one has none) at 40 distinct times, so that ties are everywhere, and rows to look from."""
    rng = np.random.default_rng(3)
    owner, time = rng.integers(0, USERS - 1, EVENTS), rng.integers(0, 40, EVENTS)
    place = np.lexsort((time, owner))
    offsets = np.searchsorted(owner[place], np.arange(USERS + 1))
    rows = rng.integers(0, USERS, ROWS), rng.integers(-3, 44, ROWS)
    return owner[place], time[place], offsets, *rows


def test_ends_equal_a_count_of_strictly_earlier_events(store):
    owner, time, offsets, users, now = store
    expected = [
        offsets[u] + sum(1 for o, t in zip(owner, time, strict=True) if o == u and t < at)
        for u, at in zip(users, now, strict=True)
    ]
    assert history_ends(offsets, time, users, now).tolist() == expected


@pytest.mark.parametrize("length", [1, 5, 64])
def test_newest_first_equals_a_slow_reader(store, length):
    owner, time, offsets, users, now = store
    ends = history_ends(offsets, time, users, now)
    positions, mask, lengths = newest_first(offsets[users], ends, length)
    assert positions.shape == mask.shape == (ROWS, length) and lengths.dtype == np.int32
    seen = set()
    for row, (user, at) in enumerate(zip(users, now, strict=True)):
        events = [e for e in range(EVENTS) if owner[e] == user and time[e] < at][::-1][:length]
        seen.add(min(len(events), 2))
        assert positions[row][mask[row]].tolist() == events
        assert lengths[row] == len(events) and mask[row, : len(events)].all()
    assert 0 in seen, "some rows have no history"


def test_events_at_or_after_the_request_change_nothing(store):
    """What a row is given may not depend on any event at its own time or later."""
    owner, time, offsets, users, now = store
    value = np.random.default_rng(0).integers(0, 1000, EVENTS)
    ends = history_ends(offsets, time, users, now)
    for row in range(0, ROWS, 7):
        future = time >= now[row]
        changed_value = np.where(future, -1, value)
        later = np.where(future, time + 10_000, time)  # still at or after the request
        place = np.lexsort((later, owner))
        one = slice(row, row + 1)
        again = history_ends(offsets, later[place], users[one], now[one])
        before = _read(value, time, offsets[users[one]], ends[one], now[one])
        after = _read(changed_value[place], later[place], offsets[users[one]], again, now[one])
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(a, b)


def _read(value, time, starts, ends, now):
    positions, mask, lengths = newest_first(starts, ends, 16)
    return value[positions] * mask, lengths, seconds_before(now, time[positions], mask)


def test_large_times_and_users_need_no_common_integer():
    """Microseconds since 1970 times a billion users overflow int64; the search must not combine them."""
    offsets = np.array([0, 3])
    times = np.array([0, 2**62, 2**62 + 1])
    assert history_ends(offsets, times, np.array([0, 0]), np.array([2**62 + 1, 2**62])).tolist() == [2, 1]


def test_seconds_are_exact_where_float32_is_not():
    now, before = np.array([893_286_638_000]), np.array([[893_286_637_000, 893_286_580_999, 5]])
    found = seconds_before(now, before, np.array([[True, True, False]]), ticks_per_second=1000)
    assert found.dtype == np.int32 and found.tolist() == [[1, 57, 0]]
    far = seconds_before(np.array([2**60]), np.array([[0]]), np.array([[True]]))
    assert far.tolist() == [[2**31 - 1]], "cut, not wrapped"
