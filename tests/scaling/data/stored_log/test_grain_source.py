"""Batches by number: equal to a slow reader, whatever the hosts, threads, restarts and order."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from recscale.scaling.data.metrics import auc, logloss
from recscale.scaling.data.source import Source
from recscale.scaling.data.stored_log.packed import write_packed
from recscale.scaling.data.stored_log.source import GrainSource


def slow_batch(arrays, source, index):
    """The rows of training batch `index`, in stored order, one candidate per request, as nested Python values."""
    start = arrays.splits["train"][0] + index * source.requests
    out = []
    for row in range(start, start + source.requests):
        if row >= arrays.splits["train"][1]:
            out.append(None)
            continue
        histories = {}
        for sequence in source.schema.sequences:
            store, user = arrays.events[sequence.name], arrays.users[row]
            past = [
                e for e in range(store.offsets[user], store.offsets[user + 1]) if store.times[e] < arrays.times[row]
            ]
            histories[sequence.name] = past[::-1][: sequence.length]
        out.append((row, histories))
    return out


@pytest.mark.parametrize("length", [None, 1, 50])
def test_batches_equal_a_slow_reader(made_up_arrays, made_up_log, length):
    source = GrainSource(made_up_log, requests=64, history_length=length)
    assert isinstance(source, Source)
    empty = 0
    for index in range(source.batches):
        batch = source.batch(index)
        for r, expected in enumerate(slow_batch(made_up_arrays, source, index)):
            if expected is None:
                assert not batch.valid[r, 0] and not batch.label_mask[r].any() and not batch.labels[r].any()
                assert batch.candidates.ids["item"][r, 0] == 0 == batch.user.ids["user"][r]
                assert batch.user.histories["clicks"].length[r] == 0
                continue
            row, histories = expected
            assert batch.valid[r, 0]
            for name in ("user", "age"):
                found = batch.user.ids if name == "user" else batch.user.dense
                np.testing.assert_array_equal(found[name][r], made_up_arrays.rows[name][row])
            for name in ("item", "tags", "match"):
                np.testing.assert_array_equal(batch.candidates.ids[name][r, 0], made_up_arrays.rows[name][row])
            np.testing.assert_array_equal(batch.candidates.dense["price"][r, 0], made_up_arrays.rows["price"][row])
            np.testing.assert_array_equal(batch.label_mask[r, 0], made_up_arrays.label_mask[row])
            for name, events in histories.items():
                history, store, n = batch.user.histories[name], made_up_arrays.events[name], len(events)
                empty += n == 0
                assert history.length[r] == n
                for field, column in store.columns.items():
                    found = (history.dense if field == "dwell" else history.ids)[field][r]
                    np.testing.assert_array_equal(found[:n], column[events])
                    assert not found[n:].any()
                if name == "clicks":
                    seconds = (made_up_arrays.times[row] - store.times[events]) // 1000
                    np.testing.assert_array_equal(history.delta_s[r, :n], seconds)
                    assert not history.delta_s[r, n:].any()
                else:
                    assert history.delta_s is None
    assert empty, "some rows have no history"


def test_shapes_and_types(made_up_log):
    batch = GrainSource(made_up_log, requests=8, candidates=3, history_length=5).batch(0)
    assert batch.valid.shape == (8, 3) and batch.valid.dtype == bool
    assert batch.labels.shape == batch.label_mask.shape == (8, 3, 2)
    assert batch.labels.dtype == batch.label_mask.dtype == np.float32
    assert batch.candidates.ids["tags"].shape == (8, 3, 3) and batch.candidates.dense["price"].shape == (8, 3, 1)
    clicks = batch.user.histories["clicks"]
    assert clicks.ids["item"].shape == (8, 5) and clicks.ids["tags"].shape == (8, 5, 3)
    assert clicks.dense["dwell"].shape == (8, 5, 2) and clicks.delta_s.shape == (8, 5)
    assert all(leaf.dtype in (np.int32, np.float32, bool) for leaf in jax.tree.leaves(batch))


@pytest.mark.parametrize("candidates", [1, 2, 4])
@pytest.mark.parametrize("order", ["time", "shuffle"])
def test_every_training_row_once_per_pass(made_up_arrays, made_up_log, candidates, order):
    source = GrainSource(made_up_log, requests=16, candidates=candidates, order=order, passes=2)
    start, end = made_up_arrays.splits["train"]
    # Price is a random number per row, so it names the row.
    expected = sorted(made_up_arrays.rows["price"][start:end, 0].tolist())
    orders = []
    for epoch in range(2):
        batches = [source.batch(epoch * source.batches_per_pass + k) for k in range(source.batches_per_pass)]
        found = np.concatenate([b.candidates.dense["price"][b.valid][:, 0] for b in batches])
        assert sorted(found.tolist()) == expected
        orders.append(found.tolist())
        for b in batches:
            for r in range(16):
                users = {made_up_arrays.users[made_up_arrays.rows["price"][:, 0] == p].item()
                         for p in b.candidates.dense["price"][r][b.valid[r]][:, 0]}  # fmt: skip
                assert len(users) <= 1
    assert (orders[0] == orders[1]) == (order == "time")
    padded = source.batches_per_pass * 16 * candidates - (end - start)
    assert source.facts()["padded_rows"] == 2 * padded
    assert source.total_rows == end - start and source.facts()["multi_pass"]


@pytest.mark.parametrize("order", ["time", "shuffle"])
def test_hosts_share_the_global_batch(made_up_log, order):
    whole = GrainSource(made_up_log, requests=48, order=order, seed=5).batch(3)
    for hosts in (2, 4):
        parts = [
            GrainSource(made_up_log, requests=48, order=order, seed=5, host=h, hosts=hosts).batch(3)
            for h in range(hosts)
        ]
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        jax.tree.map(np.testing.assert_array_equal, joined, whole)


@pytest.mark.parametrize("threads", [0, 4])
@pytest.mark.parametrize("start", [0, 5])
def test_iterating_equals_asking(made_up_log, threads, start):
    source = GrainSource(made_up_log, requests=16, order="shuffle", passes=2, threads=threads)
    read = list(source.iterate(start))
    assert len(read) == source.batches - start > 10
    for offset, batch in enumerate(read):
        jax.tree.map(np.testing.assert_array_equal, batch, source.batch(start + offset))


def test_iterator_state_is_restored_unchanged(made_up_log):
    source = GrainSource(made_up_log, requests=16)
    iterator = source.iterate(0)
    for _ in range(4):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = next(iterator)
    again = source.iterate(0)
    again.set_state(state)
    assert again.get_state() == state
    jax.tree.map(np.testing.assert_array_equal, next(again), expected)


def test_seeds_give_other_orders(made_up_log):
    a, b = (GrainSource(made_up_log, requests=16, order="shuffle", seed=s).batch(0) for s in (0, 1))
    assert (a.candidates.dense["price"] != b.candidates.dense["price"]).any()


def test_batches_outside_the_passes_are_refused(made_up_log):
    source = GrainSource(made_up_log, requests=16, passes=2)
    with pytest.raises(IndexError, match=r"batch 28 does not exist: .* 28 batches of 16 requests in 2 pass"):
        source.batch(28)
    with pytest.raises(IndexError, match="cannot start at batch 29"):
        source.iterate(29)


@pytest.mark.parametrize("candidates", [1, 3])
def test_evaluate_reports_test_and_validation(made_up_arrays, made_up_log, candidates):
    source = GrainSource(made_up_log, requests=16, candidates=candidates)
    batches = list(source.holdout())
    assert len(batches) == source.holdout_batches
    assert all(batch.valid.shape == (16, candidates) for batch in batches)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(len(batches), 16, candidates, 2)).astype(np.float32)
    result = source.evaluate(logits)

    # The same numbers from the batches themselves.
    valid_requests = source.facts()["holdout_requests"]["valid"]
    first_test = -(-valid_requests // 16)
    for prefix, part in (("valid_", slice(0, first_test)), ("", slice(first_test, None))):
        stack = jax.tree.map(lambda *leaves: np.stack(leaves), *batches[part])
        for task, name in ((0, ""), (1, "buy_")):
            mask = stack.label_mask[..., task] * stack.valid
            z, y = logits[part, ..., task], stack.labels[..., task]
            assert result[f"{prefix}{name}logloss"] == pytest.approx(logloss(z, y, mask), rel=1e-12)
            assert result[f"{prefix}{name}auc"] == pytest.approx(auc(z, y, mask), rel=1e-12)
            assert result[f"{prefix}{name}rows"] == mask.sum()
            train = slice(*made_up_arrays.splits["train"])
            seen = made_up_arrays.labels[train, task][made_up_arrays.label_mask[train, task] > 0].mean()
            constant = logloss(np.full(y.shape, np.log(seen / (1 - seen))), y, mask)
            assert result[f"{prefix}{name}constant_logloss"] == pytest.approx(constant, rel=1e-9)
    assert result["gauc_weighting"] == "rows"
    json.dumps([result, source.facts()])


def test_evaluate_wants_the_holdouts_shape(made_up_log):
    source = GrainSource(made_up_log, requests=16)
    with pytest.raises(ValueError, match=r"shape \(2, 16, 1, 2\), expected \[batches, R, C, Y\] = \(7, 16, 1, 2\)"):
        source.evaluate(np.zeros((2, 16, 1, 2)))


def test_holdout_rows_are_spread_over_each_split(made_up_arrays, made_up_log):
    source = GrainSource(made_up_log, requests=4, holdout_rows=10)
    assert source.facts()["holdout_requests"] == {"valid": 10, "test": 10}
    held = np.concatenate([b.candidates.dense["price"][b.valid][:, 0] for b in source.holdout()])
    expected = [
        made_up_arrays.rows["price"][start + k * (end - start) // 10, 0]
        for start, end in (made_up_arrays.splits["valid"], made_up_arrays.splits["test"])
        for k in range(10)
    ]
    np.testing.assert_array_equal(held, expected)
    assert GrainSource(made_up_log, requests=4, holdout_rows=10**6).facts()["holdout_requests"]["test"] == 40


def test_no_training_row_is_in_the_holdout(made_up_log):
    source = GrainSource(made_up_log, requests=16)
    trained = {p for b in source.iterate(0) for p in b.candidates.dense["price"][b.valid][:, 0].tolist()}
    held = {p for b in source.holdout() for p in b.candidates.dense["price"][b.valid][:, 0].tolist()}
    assert len(trained) + len(held) == 300 and not trained & held


def test_a_log_without_times(made_up_arrays, tmp_path):
    schema = made_up_arrays.schema
    blind = dataclasses.replace(schema.sequences[0], timestamps=False)
    arrays = dataclasses.replace(
        made_up_arrays, times=None, schema=dataclasses.replace(schema, sequences=(blind, schema.sequences[1]))
    )
    log = write_packed(arrays, tmp_path / "log")
    assert log.times is None
    assert GrainSource(log, requests=8).batch(0).user.histories["clicks"].delta_s is None
    with pytest.raises(ValueError, match="no request times"):
        GrainSource(log, requests=8, candidates=2)
    wanting = write_packed(dataclasses.replace(made_up_arrays, times=None), tmp_path / "wanting")
    with pytest.raises(ValueError, match="'clicks' wants timestamps, but log 'made-up' has no times"):
        GrainSource(wanting, requests=8).batch(0)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (dict(requests=0), "requests is 0"),
        (dict(requests=8, candidates=0), "candidates is 0"),
        (dict(requests=8, order="random"), "'random', expected one of time, shuffle"),
        (dict(requests=8, hosts=3), "host 0 of 3 cannot share 8 requests"),
        (dict(requests=8, hosts=2, host=2), "host 2 of 2"),
        (dict(requests=8, passes=0), "passes is 0"),
        (dict(requests=8, history_length=0), "history_length is 0"),
    ],
)
def test_bad_arguments_are_named(made_up_log, arguments, text):
    with pytest.raises(ValueError, match=text):
        GrainSource(made_up_log, **arguments)
