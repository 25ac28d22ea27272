"""One request-major batch from numbered rows of a packed log, column by column; no Python per row."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Int

from recscale.models.inputs import Batch, CandidateSide, Field, History, Sequence, UserSide

from .histories import newest_first, seconds_before
from .packed import PackedLog


def gather(
    log: PackedLog, sequences: tuple[Sequence, ...], rows: Int[np.ndarray, "R C"], valid: Bool[np.ndarray, "R C"]
) -> Batch:
    """The batch whose request r, candidate c is row rows[r, c] where valid[r, c], and zeros elsewhere.

    rows: legal row numbers even where not valid; all rows of a request share user and time, so
    the user side is read from column 0. A request is real if its first candidate is. sequences: the schema's,
    at the length to read. Returns NumPy arrays in the layout of `Batch`.
    """
    first, real = rows[:, 0], valid[:, 0]
    user = UserSide(
        *_fields(log, [f for f in log.schema.fields if f.side == "user"], first, real),
        histories={sequence.name: _history(log, sequence, first, real) for sequence in sequences},
    )
    candidates = CandidateSide(*_fields(log, log.schema.candidate_fields, rows, valid))
    present = valid[..., None]
    return Batch(
        user=user,
        candidates=candidates,
        labels=(log.labels[rows] * present).astype(np.float32),
        label_mask=(log.label_mask[rows] * present).astype(np.float32),
        valid=valid,
    )


def _fields(
    log: PackedLog, fields: Iterable[Field], rows: np.ndarray, real: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(ids, dense) of the fields at `rows`, zero where not real; id 0 is padding."""
    ids: dict[str, np.ndarray] = {}
    dense: dict[str, np.ndarray] = {}
    for field in fields:
        values = log.column(field.name)[rows]
        if not real.all():
            values[~real] = 0
        (dense if field.is_dense else ids)[field.name] = values
    return ids, dense


def _history(log: PackedLog, sequence: Sequence, rows: np.ndarray, real: np.ndarray) -> History:
    store = log.events(sequence.name)
    starts, ends = store.offsets[log.users[rows]], log.ends(sequence.name)[rows]
    positions, mask, lengths = newest_first(starts, np.where(real, ends, starts), sequence.length)
    ids: dict[str, np.ndarray] = {}
    dense: dict[str, np.ndarray] = {}
    for field in sequence.fields:
        values = store.columns[field.name].take(positions, axis=0)
        np.multiply(values, mask.reshape(mask.shape + (1,) * (values.ndim - 2)), out=values)
        (dense if field.is_dense else ids)[field.name] = values
    delta = None
    if sequence.timestamps:
        if log.times is None:
            raise ValueError(f"sequence {sequence.name!r} wants timestamps, but log {log.name!r} has no times")
        delta = seconds_before(log.times[rows], store.times.take(positions), mask, log.ticks_per_second)
    return History(ids=ids, dense=dense, length=lengths, delta_s=delta)
