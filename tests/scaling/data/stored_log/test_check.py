"""What no log can have is refused when it is written and when it is opened, by column and row."""

import copy
import dataclasses
import shutil

import numpy as np
import pytest

from recscale.scaling.data.stored_log.check import ImpossibleLog
from recscale.scaling.data.stored_log.packed import EventStore, PackedLog, write_packed
from recscale.scaling.data.stored_log.source import GrainSource
from recscale.scaling.records.sealed import sealed, unsealed


def rows(log, name, change):
    column = log.rows[name].copy()
    change(column)
    log.rows[name] = column


def put(index, value):
    def change(column):
        column[index] = value

    return change


def labels(log):
    log.labels = log.labels.copy()
    log.labels[3, 0] = 4


def one_class(log):
    log.labels = log.labels.copy()
    log.labels[:, 1] = 1


def events(log, **changes):
    log.events = {**log.events, "clicks": dataclasses.replace(log.events["clicks"], **changes)}


def unordered(log):
    store = log.events["clicks"]
    times, start = store.times.copy(), int(store.offsets[1])
    times[start : start + 2] = times[start + 1], times[start] - 5_000
    events(log, times=times)


def ends(log, change):
    moved = log.ends["clicks"].copy()
    change(moved)
    log.ends = {**log.ends, "clicks": moved}


def late(log):
    """Row 0, early in the log, sees all events of its user."""
    ends(log, put(0, log.events["clicks"].offsets[log.users[0] + 1]))


CASES = {
    "id beyond the table": (
        lambda log: rows(log, "item", put(5, 40)),
        r"rows/item\.npy: 1 values lie outside 0 \.\.\. 39 \(first in row 5: 40\)",
    ),
    "id -1": (lambda log: rows(log, "user", put(7, -1)), r"rows/user\.npy: 1 values .* row 7: -1"),
    "id of a bag": (lambda log: rows(log, "tags", put((9, 1), 9)), r"rows/tags\.npy: 1 values .* row 9"),
    "NaN": (
        lambda log: rows(log, "price", put(2, np.nan)),
        r"rows/price\.npy: 1 values are not finite \(first in row 2",
    ),
    "label 4": (labels, r"rows/labels\.npy: 1 values lie outside 0 \.\.\. 1 \(first in row 3"),
    "one class": (one_class, r"labels of 'buy': (\d+) of \1 |labels of 'buy'"),
    "a row short": (
        lambda log: log.rows.update(item=log.rows["item"][:-1]),
        r"rows/item\.npy: 299 entries, expected 300",
    ),
    "overlapping splits": (
        lambda log: log.splits.update(valid=(200, 260)),
        "'valid' starts at row 200, inside another split",
    ),
    "a split beyond the log": (lambda log: log.splits.update(test=(260, 301)), "rows 260 to 301 of a log of 300"),
    "no training": (lambda log: log.splits.update(train=(0, 0)), "'train' has no row"),
    "events out of order": (unordered, r"events/clicks/time\.npy: event \d+ is earlier"),
    "another user's events": (
        lambda log: ends(log, put(slice(None), 10**6)),
        "histories reach outside the key's own events",
    ),
    "events at the request": (late, "histories hold events that are not strictly before the request"),
    "an event id": (
        lambda log: events(log, columns={**log.events["clicks"].columns, "item": np.full(400, 40, np.int32)}),
        r"events/clicks/item\.npy: 400 values",
    ),
    "offsets": (
        lambda log: events(log, offsets=log.events["clicks"].offsets[::-1]),
        "offsets.npy does not ascend from 0 to 400",
    ),
    "a key beyond the store": (
        lambda log: log.keys.update(clicks=np.full(300, 99)),
        "keys of rows lie outside the store",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_impossible_values_are_refused_by_column_and_row(made_up_arrays, tmp_path, case):
    log = copy.copy(made_up_arrays)
    log.rows, log.splits, log.keys = dict(log.rows), dict(log.splits), {}
    change, text = CASES[case]
    change(log)
    with pytest.raises(ImpossibleLog, match=text):
        write_packed(log, tmp_path / "log")
    assert not list(tmp_path.iterdir())


def test_a_log_without_times_may_be_any_order(made_up_arrays, tmp_path):
    store = EventStore(np.array([0, 1, 1]), None, {"item": np.array([3], np.int32)})
    schema = dataclasses.replace(made_up_arrays.schema, sequences=made_up_arrays.schema.sequences[1:])
    log = dataclasses.replace(
        made_up_arrays,
        schema=schema,
        events={"buys": store},
        ends={"buys": np.ones(300, int)},
        keys={"buys": np.zeros(300, int)},
    )
    history = GrainSource(write_packed(log, tmp_path / "log"), requests=4).batch(0).user.histories["buys"]
    assert history.length.tolist() == [1] * 4 and history.ids["item"][:, 0].tolist() == [3] * 4


@pytest.mark.parametrize("part", ["valid", "test"])
def test_an_empty_part_is_refused_before_a_training(made_up_arrays, tmp_path, part):
    log = dataclasses.replace(made_up_arrays, splits=made_up_arrays.splits | {part: (300, 300)})
    with pytest.raises(ValueError, match=f"the {part} part is empty"):
        GrainSource(write_packed(log, tmp_path / "log"), requests=4)


def test_a_folder_that_nobody_checked_is_checked_when_it_is_opened(made_up_log, tmp_path):
    copied = shutil.copytree(made_up_log.folder, tmp_path / "log")
    path = copied / "rows" / "item.npy"
    column = np.load(path)
    column[11] = 77
    np.save(path, column)
    meta = unsealed((copied / "meta.json").read_bytes())
    (copied / "meta.json").write_text(sealed(meta | {"checked": 0}))
    with pytest.raises(ImpossibleLog, match=r"rows/item\.npy: 1 values .* row 11: 77"):
        PackedLog(copied)
