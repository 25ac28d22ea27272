"""Lists of the best and worst earlier users of an item: never later, never the one they are made for."""

import numpy as np
import pytest

from recscale.scaling.data.feedback_lists import Feedback, feedback_lists, feedback_value, popular_neighbours

ROWS, ITEMS, USERS, K = 600, 12, 9, 3


@pytest.fixture(scope="module")
def feedback():
    rng = np.random.default_rng(0)
    item = np.minimum(rng.geometric(0.3, ROWS) - 1, ITEMS - 1)
    value = rng.integers(1, 6, ROWS).astype(float)
    return Feedback(np.arange(ROWS) // 4, rng.integers(0, USERS, ROWS), item, value, value >= 4)


NEIGHBOURS = np.asarray([[(i + 1) % 3, (i + 2) % 3] for i in range(ITEMS)])


@pytest.fixture(scope="module")
def lists(feedback):
    rng = np.random.default_rng(1)
    later = rng.integers(0, USERS, 40), rng.integers(0, ITEMS, 40)
    return *feedback_lists(feedback, K, NEIGHBOURS, then=later), later


def test_every_listed_row_is_earlier_and_of_another_user(feedback, lists):
    own, late, (users, _) = lists
    for array, positive in ((own.best, True), (own.worst, False)):
        row, place = np.nonzero(array >= 0)
        there = array[row, place]
        assert len(there) > ROWS
        assert (feedback.request[there] < feedback.request[row]).all()
        assert (feedback.user[there] != feedback.user[row]).all()
        assert (feedback.positive[there] == positive).all()
    for array in late:
        row, place = np.nonzero(array >= 0)
        assert (feedback.user[array[row, place]] != users[row]).all()


def test_lists_are_the_best_and_the_worst_of_all_there_are(feedback, lists):
    own = feedback_lists(feedback, K)[0]
    for row in range(0, ROWS, 7):
        earlier = (feedback.request < feedback.request[row]) & (feedback.user != feedback.user[row])
        same = np.flatnonzero(earlier & (feedback.item == feedback.item[row]))
        for array, positive, sign in ((own.best, True, -1), (own.worst, False, 1)):
            liked = [i for i in same if feedback.positive[i] == positive]
            expected = sorted(liked, key=lambda i: (sign * feedback.value[i], -i))[:K]
            assert [i for i in array[row] if i >= 0] == expected
            borrowed = [i for i in (lists[0].best if positive else lists[0].worst)[row] if i >= 0]
            assert borrowed[: len(expected)] == expected
            others = {feedback.item[i] for i in borrowed[len(expected) :]}
            assert others <= set(NEIGHBOURS[feedback.item[row]]) and len(set(borrowed)) == len(borrowed)


def test_rows_of_one_request_do_not_see_each_other(feedback):
    same = feedback._replace(request=np.zeros(ROWS, int))
    assert (feedback_lists(same, K)[0].best == -1).all()
    with pytest.raises(ValueError, match="sort the rows"):
        feedback_lists(feedback._replace(request=feedback.request[::-1]), K)


def test_values_are_standardised_sums():
    rating, dwell = np.asarray([1.0, 3.0, 5.0]), np.asarray([2.0, 2.0, 2.0])
    np.testing.assert_allclose(feedback_value(rating), [-(1.5**0.5), 0, 1.5**0.5])
    np.testing.assert_array_equal(feedback_value(rating, dwell, alpha=3.0), feedback_value(rating))
    np.testing.assert_allclose(feedback_value(rating, rating, alpha=2.0, beta=1.0), 3 * feedback_value(rating))


def test_neighbours_are_popular_and_near():
    rng = np.random.default_rng(2)
    vectors, positives = rng.standard_normal((20, 4)), rng.permutation(20)
    cold, near = popular_neighbours(vectors, positives, cold_share=0.7, count=3)
    assert cold.sum() == 14 and positives[cold].max() < positives[~cold].min()
    assert not cold[near].any() and not (near == np.arange(20)[:, None]).any()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    others = [i for i in np.flatnonzero(~cold) if i != 5]
    assert list(near[5]) == sorted(others, key=lambda i: -unit[5] @ unit[i])[:3]
