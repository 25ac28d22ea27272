"""One request-major batch from numbered rows of a packed log, column by column; no Python per row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Bool, Int, Int32

from recscale.models.inputs import Batch, CandidateSide, Field, History, Schema, Sequence, UserSide

from .histories import newest_first, seconds_before
from .packed import PackedLog


def gather(
    log: PackedLog,
    schema: Schema,
    rows: Int[np.ndarray, "R C"],
    valid: Bool[np.ndarray, "R C"],
    rows_of: Mapping[str, Int32[np.ndarray, " ids"]] | None = None,
) -> Batch:
    """The batch whose request r, candidate c is row rows[r, c] where valid[r, c], and zeros elsewhere.

    rows: legal row numbers even where not valid; all rows of a request share user and time, so
    the user side is read from column 0. A request is real if its first candidate is. schema: the log's, with histories
    of the length to read. rows_of: of tables whose ids are hashed, id -> row. Returns NumPy arrays in the layout of
    `Batch`.
    """
    reader = _Reader(log, rows_of or {})
    first, real = rows[:, 0], valid[:, 0]
    request = first if log.requests is None else log.requests[first]
    user = UserSide(
        *reader.fields(schema.user_fields, request, real),
        histories={sequence.name: reader.history(sequence, first, real) for sequence in schema.sequences},
        domain=None if log.domains is None else np.where(real, log.domains[request], 0).astype(np.int32),
    )
    candidates = CandidateSide(*reader.fields(schema.candidate_fields, rows, valid))
    present = valid[..., None]
    return Batch(
        user=user,
        candidates=candidates,
        labels=(log.labels[rows] * present).astype(np.float32),
        label_mask=(log.label_mask[rows] * present).astype(np.float32),
        valid=valid,
    )


class _Reader:
    """Columns of a log at given rows."""

    def __init__(self, log: PackedLog, rows_of: Mapping[str, np.ndarray]):
        self._log, self._rows_of = log, rows_of

    def fields(
        self, fields: Iterable[Field], rows: np.ndarray, real: np.ndarray
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """(ids, dense) of the fields at `rows`, zero where not real; id 0 is padding."""
        ids: dict[str, np.ndarray] = {}
        dense: dict[str, np.ndarray] = {}
        for field in fields:
            values = self._log.column(field.name)[rows]
            if field.table_name in self._rows_of and not field.is_dense:
                values = self._rows_of[field.table_name][values]
            if not real.all():
                values[~real] = 0
            (dense if field.is_dense else ids)[field.name] = values
        return ids, dense

    def history(self, sequence: Sequence, rows: np.ndarray, real: np.ndarray) -> History:
        """The newest events of the rows, none where not real."""
        log = self._log
        store = log.events(sequence.name)
        starts, ends = store.offsets[log.keys(sequence.name)[rows]], log.ends(sequence.name)[rows]
        positions, mask, lengths = newest_first(starts, np.where(real, ends, starts), sequence.length)
        ids: dict[str, np.ndarray] = {}
        dense: dict[str, np.ndarray] = {}
        for field in sequence.fields:
            column = store.columns[field.name]
            if not len(column):  # nobody has a history: position 0 is not there
                column = np.zeros((1, *column.shape[1:]), column.dtype)
            values = column.take(positions, axis=0)
            if field.table_name in self._rows_of and not field.is_dense:
                values = self._rows_of[field.table_name][values]
            np.multiply(values, mask.reshape(mask.shape + (1,) * (values.ndim - 2)), out=values)
            (dense if field.is_dense else ids)[field.name] = values
        delta = None
        if sequence.timestamps:
            if log.times is None or store.times is None:
                raise ValueError(f"sequence {sequence.name!r} wants timestamps, but log {log.name!r} has no times")
            times = store.times if len(store.times) else np.zeros(1, np.int64)
            delta = seconds_before(log.times[rows], times.take(positions), mask, log.ticks_per_second)
        return History(ids=ids, dense=dense, length=lengths, delta_s=delta)
