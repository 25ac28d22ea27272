"""The contract of a data set: what a run asks for, and what the training loop needs in return.

A data set is a callable that takes a `SourceRequest` and returns a `Source`; `sources` finds it by name, under the
entry-point group `recscale.datasets` or as `package.module:attribute`. Whoever brings one writes

    schema                fields, histories and tasks of every batch
    batch(k), iterate(k)  training batches by number, NumPy arrays [R, ...] and [R, C, ...]
    holdout()             the batches that are evaluated, all of one shape
    evaluate(logits)      their metrics; `recscale.scaling.data.metrics.evaluate_binary` gives those of one task
    facts()               what run.json says about the data

and the sizes below. Batch k is a pure function of (source, k), so the position in the data is the step number and
nothing else: a run that was stopped goes on with the same rows.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from recscale.models.inputs import Batch, Schema

# Requests of an endless stream that may be trained on: it is evaluated on requests from this number on.
ENDLESS_REQUESTS = 2**31

Order = Literal["time", "shuffle"]
ORDERS: tuple[Order, ...] = typing.get_args(Order)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The keys a `data` section may hold. None, and 0 or "" where they mean nothing, stand for the default.

    Attributes:
        name: registered name of the set, or `package.module:attribute`.
        preset, overrides: known-truth preset and the fields laid over it; another set may read them as it likes.
        log_seed: which stream of the known-truth log; the key of `order="shuffle"` elsewhere.
        root: folder of a stored log, or of whatever another set reads.
        history_length: events per history; None keeps the schema's.
        holdout_rows: rows of the holdout; of a set with validation and test splits, the most of each.
        order, passes: reading order and number of passes over the training rows of a downloaded set.
        log: identity of the stored log the run was planned on; one with another is refused.
        embedding_width: width of every embedding of a stored log; None keeps 16.
        embedding_rows: most rows of a table of a stored log; ids of larger ones are hashed. None keeps all.
        metrics: names or addresses of further metrics of the holdout; see `recscale.scaling.data.metrics`.
        extra_tables: id fields that get a second table, for models that read it; see `Schema.with_extra_tables`.

    Raises:
        ValueError: an order there is not.
    """

    name: str
    preset: str | None = None
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    log_seed: int = 0
    root: str | None = None
    history_length: int | None = None
    holdout_rows: int | None = None
    order: Order = "time"
    passes: int = 1
    log: str | None = None
    embedding_width: int | None = None
    embedding_rows: int | None = None
    metrics: tuple[str, ...] = ()
    extra_tables: tuple[str, ...] = ()

    def __post_init__(self):
        check_order(self.order)


@dataclasses.dataclass(frozen=True)
class SourceRequest:
    """What a run asks of a data set.

    Attributes:
        config: the run's `data` section.
        requests, candidates: R of the global batch, and C.
        cache_dir: folder for converted copies and stored results; None = beside the data, or none.
        host, hosts: this process's share of every batch.
    """

    config: DataConfig
    requests: int
    candidates: int = 1
    cache_dir: Path | None = None
    host: int = 0
    hosts: int = 1


@runtime_checkable
class Source(Protocol):
    """A stream of request-major batches, a fixed holdout, and metrics of its logits.

    Attributes (plain attributes will do):
        schema: fields, histories and tasks of every batch.
        requests: R, requests per batch.
        candidates: C, candidates per request.
        on_device: True if `batch(k)` may be traced with a traced int32 k (generation inside the training step);
            False if batches come from the host through `iterate`.
        total_rows: rows of one pass, None for an endless stream.
        batches: batches in all passes together (padded last ones included), None for an endless stream, of which
            requests below `ENDLESS_REQUESTS` are trained on and none of them is in the holdout.
    """

    @property
    def schema(self) -> Schema: ...
    @property
    def requests(self) -> int: ...
    @property
    def candidates(self) -> int: ...
    @property
    def on_device(self) -> bool: ...
    @property
    def total_rows(self) -> int | None: ...
    @property
    def batches(self) -> int | None: ...

    def batch(self, index: Any) -> Batch:
        """Batch `index`: traced jnp arrays if `on_device`, NumPy arrays otherwise."""
        ...

    def iterate(self, start: int) -> Iterator[Batch]:
        """Batches start, start + 1, ... with read-ahead; the same arrays as `batch(k)`."""
        ...

    def holdout(self) -> Iterator[Batch]:
        """The fixed evaluation batches, all of one shape, never trained on."""
        ...

    def evaluate(self, logits: Float[np.ndarray, "batches R C Y"], metrics: Sequence[str] = ()) -> dict[str, Any]:
        """Metrics of holdout logits: at least logloss, ne, auc, gauc, calibration, base_rate.

        metrics: names or addresses of further ones, from `data.metrics`, to be evaluated on the same rows
        (`recscale.scaling.data.metrics.evaluate`). A source without this argument has none.
        """
        ...

    def facts(self) -> dict[str, Any]:
        """JSON-able provenance for run.json: name, seeds, counts of rejected rows by reason, known constants."""
        ...


@runtime_checkable
class Recordable(Source, Protocol):
    """A source that makes batches on the device and can keep those of a run in memory instead."""

    def recorded_bytes(self, batches: int) -> int:
        """Memory that `record` takes; 0 if batches are made in the step after all."""
        ...

    def record(self, batches: int) -> Any | None:
        """Batches 0 ... batches - 1 as a pytree of device arrays, or None."""
        ...

    def replay(self, record: Any, index: Any) -> Batch:
        """Batch `index`, which may be traced, of what `record` returned."""
        ...


@runtime_checkable
class Verifiable(Source, Protocol):
    """A source whose rows lie in files that may have been damaged."""

    def verify(self) -> None:
        """Reads them all; raises ValueError, naming the file, if one is not as it was written."""
        ...


def check_order(order: str) -> None:
    """Raises ValueError if rows cannot be read in that order."""
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}, expected one of {', '.join(ORDERS)}")
