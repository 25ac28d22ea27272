"""The history of a row: the user's events strictly before the request time, newest first.

The rule lives here and nowhere else. `history_ends` decides, once per data set, which events a row may see;
`newest_first` turns that decision into positions, for any length, at read time. Events at the request's own
time are excluded: within one tick their order means nothing, and the row's own event is among them.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64


def history_ends(
    offsets: Int[np.ndarray, " users_and_end"],
    event_times: Int[np.ndarray, " events"],
    users: Int[np.ndarray, " rows"],
    request_times: Int[np.ndarray, " rows"],
) -> Int64[np.ndarray, " rows"]:
    """End of each row's history in the event store: offsets[u] + number of u's events with time < request time.

    Args:
        offsets: events of user u are offsets[u] ... offsets[u+1] - 1.
        event_times: ascending inside each user.
        users: index into offsets. request_times: same unit as the events.

    Returns:
        The row sees events offsets[u] ... end - 1. Found by a bisection over all rows at once, so no product of user
        and time has to fit an integer.
    """
    low, high = offsets[users].astype(np.int64), offsets[users + 1].astype(np.int64)
    while True:
        open_rows = np.flatnonzero(low < high)
        if not open_rows.size:
            return low
        middle = (low[open_rows] + high[open_rows]) // 2
        before = event_times[middle] < request_times[open_rows]
        low[open_rows[before]] = middle[before] + 1
        high[open_rows[~before]] = middle[~before]


def newest_first(
    starts: Int[np.ndarray, " R"], ends: Int[np.ndarray, " R"], length: int
) -> tuple[Int64[np.ndarray, "R {length}"], Bool[np.ndarray, "R {length}"], Int32[np.ndarray, " R"]]:
    """Positions in the event store of the newest `length` events of each row: end - 1, end - 2, ...

    Args:
        starts, ends: the row's events are start ... end - 1. length: padded length S.

    Returns:
        positions: column 0 the newest; padding points at 0 and must be masked. mask: True on events. lengths:
        min(end - start, S); 0 is legal.
    """
    lengths = np.minimum(ends - starts, length)
    back = np.arange(length, dtype=np.int64)
    mask = back[None, :] < lengths[:, None]
    positions = (ends - 1)[:, None] - back[None, :]
    positions *= mask
    return positions, mask, lengths.astype(np.int32)


def seconds_before(
    request_times: Int[np.ndarray, " R"],
    event_times: Int[np.ndarray, "R S"],
    mask: Bool[np.ndarray, "R S"],
    ticks_per_second: int = 1,
) -> Int32[np.ndarray, "R S"]:
    """Seconds from each event to its request, 0 on padding.

    The difference is taken in int64, because a unix time in float32 is off by up to 64 s and in int32
    milliseconds wrap; only the difference, cut at 2^31 - 1 s (68 years), goes to the device.
    """
    seconds = request_times[:, None] - event_times
    if ticks_per_second != 1:
        seconds //= ticks_per_second
    np.minimum(seconds, np.iinfo(np.int32).max, out=seconds)
    seconds *= mask
    return seconds.astype(np.int32)
