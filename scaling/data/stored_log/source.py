"""A stored log as a data set: batches by number, read ahead by Grain's threads, evaluated on held-out splits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jaxtyping import Float, Shaped

from recscale.models.inputs import Batch, Field, Schema
from recscale.scaling.data.metrics import base_rate, constant_logloss, entropy, evaluate, evaluate_binary
from recscale.scaling.data.source import Order, SourceRequest, check_order
from recscale.scaling.records.advice import advised

from .check import check_holdout
from .gather import gather
from .order import Requests, mix, permute
from .packed import PackedLog
from .vocabulary import FIRST_ID


class GrainSource:
    """Batches of the training split, the valid and test splits as holdout, under the "honest" protocol.

    Under that protocol validation chooses (learning rate, stopping) and test is only reported, so `evaluate`
    returns the test metrics under the plain names and the validation metrics as `valid_*`.

    Batch k holds requests kR ... kR + R - 1 of pass k // batches_per_pass, in stored order ("time") or under
    a permutation keyed by (seed, pass) ("shuffle"). The last batch of a pass is padded with valid=False,
    never dropped. Host h of n holds the h-th n-th of every batch; n never changes the global batch.

    Args:
        log: the packed log.
        requests, candidates: R of the global batch, and C.
        history_length: events per history; None keeps the schema's. Longer than any history is legal.
        holdout_rows: most rows per held-out split, taken evenly spaced; None or 0 keeps all.
        embedding_width, embedding_rows: width of all tables, and most rows of one, padding and unknown included: ids of
            a larger table are hashed. None keeps the log's.
        order, seed, passes: see above. passes above 1 repeats rows, which is flagged in `facts`.
        host, hosts: this process and their number; hosts must divide requests.
        threads, prefetch: Grain's read threads (0 reads in the caller) and batches read ahead.
    """

    on_device = False
    protocol = "honest"

    def __init__(
        self,
        log: PackedLog,
        *,
        requests: int,
        candidates: int = 1,
        history_length: int | None = None,
        holdout_rows: int | None = None,
        order: Order = "time",
        seed: int = 0,
        passes: int = 1,
        embedding_width: int | None = None,
        embedding_rows: int | None = None,
        host: int = 0,
        hosts: int = 1,
        threads: int = 2,
        prefetch: int = 4,
    ):
        _check(requests, candidates, history_length, order, passes, host, hosts)
        self.log = log
        self.schema = _with_embeddings(
            _with_history_length(log.schema, history_length), embedding_width, embedding_rows
        )
        # Of tables that are hashed: id -> row. One small array a table, in place of a hash of every id read.
        self._rows_of = {
            name: _hashed(rows, self.schema.tables()[name][0])
            for name, (rows, _) in log.schema.tables().items()
            if rows > self.schema.tables()[name][0]
        }
        self.requests, self.candidates = requests, candidates
        self.order, self.seed, self.passes = order, seed, passes
        self._host, self._hosts = host, hosts
        self._read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch if threads else 0)
        check_holdout(log.splits, f"log {log.name!r} at {log.folder}")
        groups = functools.partial(
            Requests, candidates=candidates, users=log.users, times=log.times, requests=log.requests
        )
        self._train = groups(*log.splits["train"])
        self._holdout = {name: groups(*log.splits[name]) for name in ("valid", "test")}
        self._held = {name: _evenly(part, holdout_rows, candidates) for name, part in self._holdout.items()}
        self.batches_per_pass = -(-len(self._train) // requests)
        self.batches = self.batches_per_pass * passes

    @property
    def total_rows(self) -> int:
        """Rows of one pass over the training split."""
        start, end = self.log.splits["train"]
        return end - start

    def batch(self, index: int) -> Batch:
        """Batch `index` as NumPy arrays (this host's slice), the same whenever and wherever it is asked for.

        Raises:
            IndexError: index is outside 0 ... batches - 1.
        """
        index = int(index)
        if not 0 <= index < self.batches:
            raise IndexError(
                f"batch {index} does not exist: {self.log.name} has {self.batches} batches "
                f"of {self.requests} requests in {self.passes} pass(es) of {self.total_rows} rows; train on "
                "fewer examples or raise data.passes"
            )
        epoch, place = divmod(index, self.batches_per_pass)
        local = self.requests // self._hosts
        position = place * self.requests + self._host * local + np.arange(local)
        real = position < len(self._train)
        request = np.where(real, position, 0)
        if self.order == "shuffle":
            request = permute(request, len(self._train), self.seed, epoch)
        return self._gather(self._train, request, real)

    def iterate(self, start: int = 0) -> Iterator[Batch]:
        """Batches start, start + 1, ... to the end of the last pass, read ahead by Grain's threads.

        The result is a Grain iterator: `get_state` and `set_state` work and count from `start`.
        """
        if not 0 <= start <= self.batches:
            raise IndexError(f"cannot start at batch {start}: there are {self.batches}")
        return iter(grain.MapDataset.range(start, self.batches).map(self.batch).to_iter_dataset(self._read))

    def holdout(self) -> Iterator[Batch]:
        """The held-out batches, validation first, then test; every one of R requests, the last of each split padded.

        The same whole batches on every host.
        """
        for name, held in self._held.items():
            for start in range(0, held.size, self.requests):
                request, real = self._padded(held[start : start + self.requests])
                yield self._gather(self._holdout[name], request, real)

    def vocabularies(self) -> dict[str, Shaped[np.ndarray, " n"]]:
        """Table -> values in id order, the first of id 2; "<table>/rows" -> row of each id, where ids are hashed."""
        names = [name for name in self.schema.tables() if self.log.has_vocabulary(name)]
        found = {name: self.log.vocabulary(name) for name in names}
        return found | {f"{name}/rows": rows for name, rows in self._rows_of.items() if name in found}

    def batches_of(self, log: PackedLog) -> Iterator[tuple[Batch, np.ndarray]]:
        """Batches of every row of another log of the same schema, and the numbers of their valid rows, in order."""
        everything = Requests(0, len(log), self.candidates, log.users, log.times, log.requests)
        for start in range(0, len(everything), self.requests):
            request, real = self._padded(np.arange(start, min(start + self.requests, len(everything))))
            rows, exists = everything.rows(request, self.candidates)
            valid = exists & real[:, None]
            yield gather(log, self.schema, rows, valid, self._rows_of), rows[valid]

    @property
    def holdout_batches(self) -> int:
        return sum(-(-held.size // self.requests) for held in self._held.values())

    def evaluate(self, logits: Float[np.ndarray, " ..."], metrics: Sequence[str] = ()) -> dict[str, Any]:
        """Metrics of the logits of `holdout()`, [batches, R, C, Y], in float64 on the host.

        Keys of the first task: those of `evaluate_binary` with users as groups, plus constant_logloss and constant_ne,
        what predicting the training base rate for every row scores on the same rows; plain names are test,
        `valid_<name>` validation. Further tasks carry their name in front: `<task>_logloss`,
        `valid_<task>_logloss`. `metrics` names further metrics, evaluated per split and task with users as groups.

        Raises:
            ValueError: the logits do not have the shape of the holdout.
        """
        expected = (self.holdout_batches, self.requests, self.candidates, len(self.schema.tasks))
        if logits.shape != expected:
            raise ValueError(f"holdout logits have shape {logits.shape}, expected [batches, R, C, Y] = {expected}")
        result: dict[str, Any] = {}
        first_batch = 0
        for name, held in self._held.items():
            count = -(-held.size // self.requests)
            rows, exists = self._holdout[name].rows(held, self.candidates)
            part = logits[first_batch : first_batch + count].reshape(-1, *expected[2:])[: held.size]
            first_batch += count
            if held.size:
                result |= self._metrics(part, rows, exists, "" if name == "test" else f"{name}_", metrics)
        return result

    def verify(self) -> None:
        """See `PackedLog.verify`."""
        self.log.verify()

    def facts(self) -> dict[str, Any]:
        """Provenance of everything a number depends on: log, protocol, order, passes, splits, rejects."""
        padded = (self.batches_per_pass * self.requests * self.candidates - self.total_rows) * self.passes
        return {
            "name": self.log.name,
            "packed": self.log.folder.name,
            "folder": str(self.log.folder.absolute()),
            "protocol": self.protocol,
            "selected_on": "valid",
            "reported_on": "test",
            "order": self.order,
            "shuffle_seed": self.seed if self.order == "shuffle" else None,
            "passes": self.passes,
            "multi_pass": self.passes > 1,
            "batches": self.batches,
            "padded_rows": padded,
            "unique_examples": self.total_rows,
            "holdout_requests": {name: int(held.size) for name, held in self._held.items()},
            "history_length": {s.name: s.length for s in self.schema.sequences},
            "splits": {name: end - start for name, (start, end) in self.log.splits.items()},
            "base_rates": {name: self._base_rate(name) for name in self.log.splits},
            "schema_hash": self.schema.hash(),
            "report": self.log.report.to_dict(),
            **self.log.meta["facts"],
        }

    def __repr__(self) -> str:
        sizes = f"requests={self.requests}, candidates={self.candidates}"
        return f"GrainSource({self.log!r}, {sizes}, order={self.order!r})"

    def _gather(self, part: Requests, request: np.ndarray, real: np.ndarray) -> Batch:
        rows, exists = part.rows(request, self.candidates)
        return gather(self.log, self.schema, rows, exists & real[:, None], self._rows_of)

    def _padded(self, request: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        missing = self.requests - request.size
        return np.pad(request, (0, missing), mode="edge"), np.arange(self.requests) < request.size

    def _base_rate(self, split: str) -> float | None:
        rows = slice(*self.log.splits[split])
        labels, mask = self.log.labels[rows, 0], self.log.label_mask[rows, 0]
        return base_rate(labels, mask) if mask.any() else None

    def _metrics(
        self, logits: np.ndarray, rows: np.ndarray, exists: np.ndarray, prefix: str, further: Sequence[str]
    ) -> dict[str, Any]:
        train = slice(*self.log.splits["train"])
        users = None if self.log.users is None else self.log.users[rows]
        result: dict[str, Any] = {}
        for y, task in enumerate(self.schema.tasks):
            labels, mask = self.log.labels[rows, y], self.log.label_mask[rows, y] * exists
            metrics = evaluate_binary(logits[..., y], labels, mask=mask, groups=users)
            rate = base_rate(self.log.labels[train, y], self.log.label_mask[train, y])
            metrics["constant_logloss"] = constant_logloss(rate, labels, mask)
            own = entropy(metrics["base_rate"])
            metrics["constant_ne"] = metrics["constant_logloss"] / own if own else float("nan")
            own_group = np.broadcast_to(np.arange(len(rows))[:, None], rows.shape)
            groups = own_group if users is None else users  # without users every request is a group
            metrics |= evaluate(further, logits[..., y], labels, mask=mask, groups=groups)
            name = prefix if y == 0 else f"{prefix}{task.name}_"
            result |= {name + key: value for key, value in metrics.items()}
        return result


def stored(asked: SourceRequest) -> GrainSource:
    """The data set `stored` of a run: the log that `recscale data import` put into the folder `data.root`.

    Raises:
        FileNotFoundError: no root is given, or there is no log.
        ValueError: overrides are given, or the log is not the one the run was planned on.
    """
    config = asked.config
    if config.overrides:
        raise ValueError(f"{config.name} takes no overrides, found {', '.join(config.overrides)}")
    log = PackedLog(stored_folder(config.root))
    if config.log is not None and log.identity != config.log:
        raise ValueError(
            f"{log.folder} holds the log {log.identity}, but this run was planned on {config.log}; "
            "give --data the folder of that one"
        )
    return GrainSource(
        log,
        requests=asked.requests,
        candidates=asked.candidates,
        history_length=config.history_length,
        holdout_rows=config.holdout_rows,
        order=config.order,
        seed=config.log_seed,
        passes=config.passes,
        embedding_width=config.embedding_width,
        embedding_rows=config.embedding_rows,
        host=asked.host,
        hosts=asked.hosts,
    )


def stored_folder(root: str | None) -> Path:
    """The folder of a stored log, checked to be given and to be there."""
    if not root:
        raise FileNotFoundError(
            "data.root is empty; give the folder of an imported log (--data DIR). "
            f"{advised('recscale', 'data', 'import', 'SCHEMA', '--out', 'DIR')} makes one"
        )
    if not (Path(root) / "meta.json").is_file():
        raise FileNotFoundError(
            f"{root} holds no imported log (no meta.json); "
            f"{advised('recscale', 'data', 'import', 'SCHEMA', '--out', root)} makes one"
        )
    return Path(root)


def _check(
    requests: int, candidates: int, history_length: int | None, order: str, passes: int, host: int, hosts: int
) -> None:
    for name, value in dict(requests=requests, candidates=candidates, passes=passes, hosts=hosts).items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if history_length is not None and history_length < 1:
        raise ValueError(f"history_length is {history_length}, expected at least 1 (None keeps the schema's)")
    check_order(order)
    if requests % hosts or not 0 <= host < hosts:
        raise ValueError(
            f"host {host} of {hosts} cannot share {requests} requests: hosts must divide them, host < hosts"
        )


def _with_history_length(schema: Schema, length: int | None) -> Schema:
    """The event store holds whole histories, so unlike `Schema.with_history_length` this may also lengthen them."""
    if length is None:
        return schema
    return dataclasses.replace(schema, sequences=tuple(dataclasses.replace(s, length=length) for s in schema.sequences))


def _with_embeddings(schema: Schema, width: int | None, most_rows: int | None) -> Schema:
    """The schema with every table of that width, and of so many rows at most."""
    if most_rows is not None and most_rows <= FIRST_ID:
        raise ValueError(
            f"data.embedding_rows is {most_rows}, expected more than {FIRST_ID}: padding and unknown take two"
        )

    def changed(field: Field) -> Field:
        if field.vocabulary is None:
            return field
        rows = min(field.vocabulary, most_rows or field.vocabulary)
        return dataclasses.replace(field, vocabulary=rows, width=width or field.width)

    sequences = tuple(dataclasses.replace(s, fields=tuple(map(changed, s.fields))) for s in schema.sequences)
    return dataclasses.replace(schema, fields=tuple(map(changed, schema.fields)), sequences=sequences)


def _hashed(ids: int, rows: int) -> np.ndarray:
    """Row of every id of a table of `ids` in one of `rows`: padding and unknown keep theirs."""
    found = FIRST_ID + (mix(np.arange(ids, dtype=np.uint64)) % np.uint64(rows - FIRST_ID)).astype(np.int32)
    found[:FIRST_ID] = np.arange(FIRST_ID)
    return found.astype(np.int32)


def _evenly(part: Requests, most_rows: int | None, candidates: int) -> np.ndarray:
    """Request numbers of a holdout: all, or about most_rows / candidates of them, evenly spaced over the split."""
    count = len(part)
    if most_rows and most_rows < part.end - part.start:
        count = min(count, max(most_rows // candidates, 1))
    return np.arange(count) * len(part) // max(count, 1)
