"""The history of a row: the user's events strictly before the request time, newest first.

The rule lives here and nowhere else. `history_ends` decides, once per data set, which events a row may see;
`newest_first` turns that decision into positions, for any length, at read time. Events at the request's own
time are excluded: within one tick their order means nothing, and the row's own event is among them.
"""

from __future__ import annotations

import numpy as np


def history_ends(
    offsets: np.ndarray, event_times: np.ndarray, users: np.ndarray, request_times: np.ndarray
) -> np.ndarray:
    """End of each row's history in the event store: offsets[u] + number of u's events with time < request
    time.

    Args:
        offsets: int64 [users + 1]; events of user u are offsets[u] ... offsets[u+1] - 1.
        event_times: int64 [events], ascending inside each user.
        users: int64 [rows], index into offsets. request_times: int64 [rows], same unit as the events.

    Returns:
        int64 [rows]; the row sees events offsets[u] ... end - 1. Found by a bisection over all rows at once,
        so no product of user and time has to fit an integer.
    """
    users = np.asarray(users)
    low, high = np.asarray(offsets)[users].astype(np.int64), np.asarray(offsets)[users + 1].astype(np.int64)
    while True:
        open_rows = np.flatnonzero(low < high)
        if not open_rows.size:
            return low
        middle = (low[open_rows] + high[open_rows]) // 2
        before = event_times[middle] < request_times[open_rows]
        low[open_rows[before]] = middle[before] + 1
        high[open_rows[~before]] = middle[~before]


def newest_first(starts: np.ndarray, ends: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions in the event store of the newest `length` events of each row: end - 1, end - 2, ...

    Args:
        starts, ends: int64 [R], the row's events are start ... end - 1. length: padded length S.

    Returns:
        positions: int64 [R, S], column 0 the newest; padding points at 0 and must be masked.
        mask: bool [R, S], True on events. lengths: int32 [R] = min(end - start, S); 0 is legal.
    """
    lengths = np.minimum(ends - starts, length)
    back = np.arange(length, dtype=np.int64)
    mask = back[None, :] < lengths[:, None]
    positions = (ends - 1)[:, None] - back[None, :]
    positions *= mask
    return positions, mask, lengths.astype(np.int32)


def seconds_before(
    request_times: np.ndarray, event_times: np.ndarray, mask: np.ndarray, ticks_per_second: int = 1
) -> np.ndarray:
    """Seconds from each event to its request: int32 [R, S], 0 on padding.

    The difference is taken in int64, because a unix time in float32 is off by up to 64 s and in int32
    milliseconds wrap; only the difference, cut at 2^31 - 1 s (68 years), goes to the device.
    """
    seconds = np.asarray(request_times)[:, None] - event_times
    if ticks_per_second != 1:
        seconds //= ticks_per_second
    np.minimum(seconds, np.iinfo(np.int32).max, out=seconds)
    seconds *= mask
    return seconds.astype(np.int32)
