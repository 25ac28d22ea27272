"""The one boundary of stored logs: what the importer, `write_packed` and the reader refuse, named by column and row.

A log is a mapping from relative paths (those of the packed folder) to arrays. Arrays are read in pieces, so a mapping
of memory-mapped files costs no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Shaped

from recscale.models.inputs import Field, Schema, Sequence

# Format of what was checked: a folder that records a lower one is checked again when it is opened.
CHECK_VERSION = 1
_PIECE = 1 << 20

Columns = Mapping[str, Shaped[np.ndarray, "..."]]


class ImpossibleLog(ValueError):
    """Values that no log can have; the text has one line a column, with the number of values and the first row."""


def check_log(schema: Schema, splits: Mapping[str, tuple[int, int]], columns: Columns, *, name: str = "log") -> None:
    """Raises `ImpossibleLog` unless the arrays are a log of that schema.

    Checked: lengths of columns; splits that overlap, leave the log, or leave a training part empty or of one class; ids
    outside the table; dense values that are not finite; labels and masks outside {0, 1}; users and keys outside their
    range; requests that are no neighbours; event stores whose offsets or times do not ascend; histories that reach into
    another key's events, or hold events that are not strictly before the request.
    """
    found = list(_problems(schema, splits, columns))
    if found:
        raise ImpossibleLog(f"{name} cannot be a log:\n  " + "\n  ".join(found))


def check_holdout(splits: Mapping[str, tuple[int, int]], where: str) -> None:
    """Raises ValueError if validation or test has no row: nothing could be chosen or reported after a training."""
    for part in ("valid", "test"):
        start, end = splits.get(part, (0, 0))
        if end <= start:
            raise ValueError(f"{where}: the {part} part is empty; a run needs rows of train, valid and test to report")


def _problems(schema: Schema, splits: Mapping[str, tuple[int, int]], columns: Columns) -> Iterator[str]:
    labels = columns["rows/labels.npy"]
    rows = len(labels)
    yield from _split_problems(splits, rows)
    wrong_length = [
        f"{path}: {len(array):,} entries, expected {expected:,}"
        for path, array, expected in _row_columns(schema, columns, rows)
        if len(array) != expected
    ]
    if wrong_length:  # the other checks read rows side by side
        yield from wrong_length
        return
    for place in ("rows/labels.npy", "rows/label_mask.npy"):
        if columns[place].shape != (rows, len(schema.tasks)):
            yield f"{place}: shape {columns[place].shape}, expected {(rows, len(schema.tasks))}"
        yield from _outside(place, columns[place], 0, 1)
    yield from _class_problems(schema, splits, columns)
    for field in schema.fields:
        yield from _values(f"rows/{field.name}.npy", columns[f"rows/{field.name}.npy"], field)
    if "rows/domain.npy" in columns:
        yield from _outside("rows/domain.npy", columns["rows/domain.npy"], 0, schema.domains - 1)
    if "index/request.npy" in columns:
        yield from _request_problems(columns["index/request.npy"])
    for sequence in schema.sequences:
        yield from _history_problems(sequence, columns, rows)


def _row_columns(schema: Schema, columns: Columns, rows: int) -> Iterator[tuple[str, np.ndarray, int]]:
    """(path, array, expected length) of everything with one entry per row or per request."""
    request = columns.get("index/request.npy")
    requests = rows if request is None or not len(request) else int(request[-1]) + 1
    user_side = {f"rows/{field.name}.npy" for field in schema.user_fields} | {"rows/domain.npy"}
    for path, array in columns.items():
        if path.startswith(("rows/", "index/")):
            yield path, array, requests if path in user_side else rows


def _split_problems(splits: Mapping[str, tuple[int, int]], rows: int) -> Iterator[str]:
    at = 0
    for name, (start, end) in sorted(splits.items(), key=lambda item: item[1]):
        if start < at:
            yield f"split {name!r} starts at row {start:,}, inside another split that ends at {at:,}"
        if end < start or end > rows:
            yield f"split {name!r} is rows {start:,} to {end:,} of a log of {rows:,}"
        at = max(at, end)
    start, end = splits.get("train", (0, 0))
    if end <= start:
        yield "split 'train' has no row"


def _class_problems(schema: Schema, splits: Mapping[str, tuple[int, int]], columns: Columns) -> Iterator[str]:
    train = slice(*splits.get("train", (0, 0)))
    for y, task in enumerate(schema.tasks):
        observed = columns["rows/label_mask.npy"][train, y] > 0
        positives = int(np.count_nonzero(columns["rows/labels.npy"][train, y][observed]))
        if positives in (0, int(observed.sum())):
            yield f"labels of {task.name!r}: {positives:,} of {int(observed.sum()):,} training rows are positive"


def _values(path: str, array: np.ndarray, field: Field) -> Iterator[str]:
    if field.is_dense:
        if array.shape[1:] != (field.width,):
            yield f"{path}: shape {array.shape}, expected [rows, {field.width}]"
            return
        yield from _count(path, array, lambda part: ~np.isfinite(part), "values are not finite")
        return
    if array.dtype.kind not in "iu":
        yield f"{path}: {array.dtype} values, expected integer ids"
        return
    yield from _outside(path, array, 0, (field.vocabulary or 1) - 1)


def _outside(path: str, array: np.ndarray, low: int, high: int) -> Iterator[str]:
    def wrong(part: np.ndarray) -> np.ndarray:
        return (part < low) | (part > high)

    yield from _count(path, array, wrong, f"values lie outside {low} ... {high}")


def _count(path: str, array: np.ndarray, wrong: Callable[[Any], Bool[np.ndarray, ...]], words: str) -> Iterator[str]:
    """One line if `wrong` holds anywhere: how many values, the first row and what stands there."""
    count, first = 0, -1
    for start in range(0, len(array), _PIECE):
        bad = wrong(array[start : start + _PIECE])
        number = int(np.count_nonzero(bad))
        if number and first < 0:
            first = start + int(np.argmax(bad.reshape(len(bad), -1).any(axis=1)))
        count += number
    if count:
        yield f"{path}: {count:,} {words} (first in row {first:,}: {np.asarray(array[first]).tolist()})"


def _request_problems(request: np.ndarray) -> Iterator[str]:
    if len(request) and request[0] != 0:
        yield f"index/request.npy starts at {request[0]}, expected 0"
    steps = np.diff(request)
    bad = (steps < 0) | (steps > 1)
    if bad.any():
        yield f"index/request.npy: rows of one request are no neighbours (first at row {int(np.argmax(bad)) + 1:,})"


def _history_problems(sequence: Sequence, columns: Columns, rows: int) -> Iterator[str]:
    folder = f"events/{sequence.name}"
    offsets, times = columns[f"{folder}/offsets.npy"], columns.get(f"{folder}/time.npy")
    stored = {field.name: columns[f"{folder}/{field.name}.npy"] for field in sequence.fields}
    lengths = {name: len(array) for name, array in stored.items()} | ({} if times is None else {"time": len(times)})
    if len(set(lengths.values())) > 1:
        yield f"{folder}: columns of unequal length: {lengths}"
        return
    events = max(lengths.values())
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != events or (np.diff(offsets) < 0).any():
        yield f"{folder}/offsets.npy does not ascend from 0 to {events:,}, the number of events"
        return
    for field in sequence.fields:
        yield from _values(f"{folder}/{field.name}.npy", stored[field.name], field)
    if times is not None:
        yield from _order_problems(folder, offsets, times)
    yield from _range_problems(sequence.name, columns, offsets, times, rows)


def _order_problems(folder: str, offsets: np.ndarray, times: np.ndarray) -> Iterator[str]:
    starts = np.asarray(offsets)
    for start in range(1, len(times), _PIECE):
        backward = np.flatnonzero(np.diff(times[start - 1 : start + _PIECE]) < 0) + start
        inside = backward[~np.isin(backward, starts)]
        if inside.size:
            yield f"{folder}/time.npy: event {int(inside[0]):,} is earlier than the one before it of the same key"
            return


def _range_problems(
    name: str, columns: Columns, offsets: np.ndarray, times: np.ndarray | None, rows: int
) -> Iterator[str]:
    index, request_times = columns[f"index/{name}.npy"], columns.get("rows/time.npy")
    keys = len(offsets) - 1
    wrong = {"keys of rows lie outside the store": [], "histories reach outside the key's own events": []}
    wrong |= {"histories hold events that are not strictly before the request": []}
    key_words, range_words, late_words = wrong
    for start in range(0, rows, _PIECE):
        key, end = index[start : start + _PIECE, 0], index[start : start + _PIECE, 1]
        outside = (key < 0) | (key >= keys)
        wrong[key_words].append(start + np.flatnonzero(outside))
        key = np.where(outside, 0, key)
        beyond = ~outside & ((end < offsets[key]) | (end > offsets[key + 1]))
        wrong[range_words].append(start + np.flatnonzero(beyond))
        if times is not None and request_times is not None and len(times):
            some = ~outside & ~beyond & (end > offsets[key])
            last = times[np.where(some, end - 1, 0)]
            late = some & (last >= request_times[start : start + _PIECE])
            wrong[late_words].append(start + np.flatnonzero(late))
    for words, parts in wrong.items():
        bad = np.concatenate(parts) if parts else np.empty(0, int)
        if bad.size:
            yield f"index/{name}.npy: {bad.size:,} {words} (first in row {int(bad[0]):,})"
