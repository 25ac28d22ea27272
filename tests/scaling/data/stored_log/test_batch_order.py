"""The keyed permutation and the grouping of rows into requests."""

import numpy as np
import pytest

from recscale.scaling.data.stored_log.order import Requests, permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 256, 1000, 4097])
def test_every_position_once(size):
    image = permute(np.arange(size), size, seed=11, epoch=2)
    assert sorted(image.tolist()) == list(range(size))


def test_seeds_and_passes_differ_and_batches_agree():
    size = 5000
    whole = permute(np.arange(size), size, seed=1, epoch=0)
    assert (whole != permute(np.arange(size), size, seed=2, epoch=0)).mean() > 0.99
    assert (whole != permute(np.arange(size), size, seed=1, epoch=1)).mean() > 0.99
    np.testing.assert_array_equal(whole[1234:1300], permute(np.arange(1234, 1300), size, seed=1, epoch=0))


def test_the_permutation_looks_random():
    """Correlation of position and image, and of neighbours, within four standard errors of independence."""
    size = 20_000
    for seed in (0, -1, 2**40):
        image = permute(np.arange(size), size, seed=seed).astype(float)
        assert abs(np.corrcoef(np.arange(size), image)[0, 1]) < 4 / np.sqrt(size)
        assert abs(np.corrcoef(image[1:], image[:-1])[0, 1]) < 4 / np.sqrt(size)


def test_positions_outside_are_refused():
    with pytest.raises(ValueError, match=r"0 \.\.\. 9, found 0 \.\.\. 10"):
        permute(np.arange(11), 10, seed=0)
    with pytest.raises(ValueError, match="size 0"):
        permute(np.arange(0), 0, seed=0)


def test_requests_are_runs_of_one_user_and_time():
    users = np.array([7, 1, 1, 1, 1, 1, 2, 2, 1, 9])
    times = np.array([0, 5, 5, 5, 5, 5, 5, 6, 6, 9])
    requests = Requests(1, 9, 2, users, times)
    rows, exists = requests.rows(np.arange(len(requests)), 2)
    assert rows.tolist() == [[1, 2], [3, 4], [5, 5], [6, 6], [7, 7], [8, 8]]
    assert exists.tolist() == [[True, True], [True, True], *[[True, False]] * 4]
    single = Requests(1, 9, 1, users, None)
    assert len(single) == 8
    assert single.rows(np.array([0, 7]), 1)[0].tolist() == [[1], [8]]
    assert len(Requests(4, 4, 3, users, times)) == 0


def test_candidates_without_times_are_refused():
    with pytest.raises(ValueError, match="no request times"):
        Requests(0, 3, 2, np.zeros(3, int), None)
