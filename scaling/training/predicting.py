"""Scores of new rows by the model of a finished run."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.special import expit

from recscale.scaling.data.importing.encode_rows import encode_rows
from recscale.scaling.data.importing.reading import ROWS_PER_FILE
from recscale.scaling.data.stored_log.packed import PackedLog
from recscale.scaling.data.stored_log.source import GrainSource
from recscale.scaling.records.files import replacing

from .model_files import restore_model


def predict_file(run: Path, file: Path, out: Path, root: str | None = None) -> tuple[int, str]:
    """Writes a Parquet file of `row` (of the file, from 0), and `<label>_logit`, `<label>_probability`; returns the
    number of scored rows and what happened to the others.

    Raises:
        FileNotFoundError: no model, or the log it was trained on is not there.
        ValueError: the run's data set is no imported log, or the file lacks a column.
    """
    trainer, state, source = restore_model(run, root)
    if not isinstance(source, GrainSource):
        raise ValueError(f"{run} was trained on {source.facts()['name']}; only models of imported logs score files")
    with tempfile.TemporaryDirectory(prefix="recscale-predict-") as work:
        log, report = encode_rows(source.log, file, Path(work))
        rows, logits = [], []
        for batch, numbers in source.batches_of(log):
            found = trainer.batch_logits(state, batch)[0]
            logits.append(found[batch.valid])
            rows.append(numbers)
    assert isinstance(log, PackedLog) and log.origins is not None
    number = log.origins[np.concatenate(rows)] % ROWS_PER_FILE
    order, values = np.argsort(number), np.concatenate(logits)
    columns: dict[str, np.ndarray] = {"row": number[order]}
    for y, task in enumerate(source.schema.tasks):
        columns[f"{task.name}_logit"] = values[order, y]
        columns[f"{task.name}_probability"] = expit(values[order, y])
    with replacing(out) as temporary:
        pq.write_table(pa.table(columns), temporary)
    return len(number), report.summary()
