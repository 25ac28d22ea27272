"""What the training loop needs from a data set: batches by index, a fixed holdout, and metrics of its logits.

Batch k is a pure function of (source, k), so the position in the data is the step number and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from recscale.models.inputs import Batch, Schema


@runtime_checkable
class Source(Protocol):
    """A stream of request-major batches.

    Attributes:
        schema: fields, histories and tasks of every batch.
        requests: R, requests per batch.
        candidates: C, candidates per request.
        on_device: True if `batch(k)` may be traced with a traced int32 k (generation inside the training step);
            False if batches come from the host through `iterate`.
        total_rows: rows of one pass, None for an endless stream.
        batches: batches in all passes together (padded last ones included), None for an endless stream.
    """

    schema: Schema
    requests: int
    candidates: int
    on_device: bool
    total_rows: int | None
    batches: int | None

    def batch(self, index: Any) -> Batch:
        """Batch `index`: traced jnp arrays if `on_device`, NumPy arrays otherwise."""
        ...

    def iterate(self, start: int) -> Iterator[Batch]:
        """Batches start, start + 1, ... with read-ahead; the same arrays as `batch(k)`."""
        ...

    def holdout(self) -> Iterator[Batch]:
        """The fixed evaluation batches, all of one shape, never trained on."""
        ...

    def evaluate(self, logits: np.ndarray, metrics: Sequence[str] = ()) -> dict[str, Any]:
        """Metrics of holdout logits [batches, R, C, Y]: at least logloss, ne, auc, gauc, calibration, base_rate.

        metrics: names or addresses of further ones, from `data.metrics`, to be evaluated on the same rows
        (`recscale.scaling.data.metrics.evaluate`). A source without this argument has none.
        """
        ...

    def facts(self) -> dict[str, Any]:
        """JSON-able provenance for run.json: name, seeds, counts of rejected rows by reason, known constants."""
        ...
