"""The second pass: rows encoded, sorted and written column by column as a packed log.

Everything large is sorted, joined and counted by DuckDB, which spills; Python sees one batch of rows at a time.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recscale.models.inputs import Field, Schema, Task
from recscale.models.inputs import Sequence as History
from recscale.scaling.data.stored_log.card import ReadReport, Reason
from recscale.scaling.data.stored_log.histories import history_ends
from recscale.scaling.data.stored_log.packed import PackedLog
from recscale.scaling.data.stored_log.vocabulary import UNKNOWN

from .clean import key_columns, stored_fields
from .columns import ColumnFile, DenseRule, learn_rule, sample, transform_file
from .conditions import text
from .encode import Table
from .log_schema import SPLIT_PARTS, FieldSpec, HistorySpec, LogSchema

EMBEDDING_WIDTH = 16  # default of runs; no fact of the packed data
_BATCH_ROWS = 1 << 17
_PIECE = 1 << 20
_QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)

Progress = Callable[[int, int], None]


@dataclasses.dataclass
class Packed:
    """What packing found: rows of every part, the schema, and by name the rules and raw quantiles of dense fields; keys
    of every key column, rows whose user ids were not their request's, and ids of missing values by table."""

    splits: dict[str, tuple[int, int]]
    schema: Schema
    rules: dict[str, DenseRule]
    requests: int
    keys: list[int]
    differing: int
    missing: dict[str, int]
    quantiles: dict[str, list[float]]
    domains: list[str]


class Packer:
    """Writes one packed log.

    Args:
        connection: a database with the relations `rows` and, for events of their own tables, `events_<k>`.
        schema: the schema file. tables: by name. bags: columns of lists -> relation (rid, ids).
        building: the folder to fill. work: a folder for what is needed on the way.
        rules: of dense fields, where they are known already. known: a log whose keys, domains and events are taken.
    """

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        schema: LogSchema,
        tables: dict[str, Table],
        bags: dict[str, str],
        building: Path,
        work: Path,
        rules: dict[str, DenseRule] | None = None,
        known: PackedLog | None = None,
    ):
        self.connection, self.schema, self.tables, self.bags = connection, schema, tables, bags
        self.building, self.work = building, work
        self.stored = stored_fields(schema)
        self.fields = [field for field in schema.fields if field.side != "event"]
        self.has_requests = bool(schema.request or schema.negatives is not None)
        self.has_time = schema.time is not None
        self.keys = key_columns(schema)
        self.lists = [history for history in schema.histories if history.columns]
        self.rules = dict(rules or {})
        self.known = known
        self.quantiles: dict[str, list[float]] = {}
        self._learnt = bool(rules)

    def write(self, progress: Progress = lambda done, total: None) -> Packed:
        """Writes every array; returns what is to be recorded."""
        keys = [self._key_table(place) for place in range(len(self.keys))]
        domains = self._domains()
        files = self._files()
        total = self.connection.execute("SELECT count(*) FROM rows").fetchall()[0][0]
        rows, ends, request, differing = 0, [0, 0, 0], -1, 0
        last: tuple[Any, ...] | None = None
        previous: dict[str, np.ndarray] = {}
        for batch in self._stream(domains, keys):
            columns = {name: batch.column(name) for name in batch.schema.names}
            part = columns["s"].to_numpy(zero_copy_only=False)
            for s in range(3):
                ends[s] += int(np.count_nonzero(part == s))
            first = np.ones(batch.num_rows, bool)
            if self.has_requests:
                named = [columns[name].to_numpy(zero_copy_only=False) for name in ("s", "q0", "q1")]
                first = np.logical_or.reduce([np.r_[True, values[1:] != values[:-1]] for values in named])
                now = tuple(int(values[0]) for values in named)
                first[0] = last is None or now != last
                last = tuple(int(values[-1]) for values in named)
                number = request + np.cumsum(first)
                files["index/request"].append(number)
                differing += self._differing(columns, first, previous)
                request = int(number[-1])
            self._append(files, columns, first)
            rows += batch.num_rows
            progress(rows, total)
        for file in files.values():
            file.close()
        bounds = np.r_[0, np.cumsum(ends)]
        splits = {name: (int(bounds[k]), int(bounds[k + 1])) for k, name in enumerate(SPLIT_PARTS)}
        self._transform(splits)
        for place, history in enumerate(self.schema.histories):
            if history.columns:
                continue
            if self.known is None:
                self._events(place, history, keys)
            else:
                self._known_events(history, self.known)
        return Packed(
            splits=splits,
            schema=self._schema(len(domains), splits["train"][1]),
            rules=self.rules,
            requests=request + 1 if self.has_requests else rows,
            keys=keys,
            differing=differing,
            missing={name: table.missing for name, table in self.tables.items() if table.missing > UNKNOWN},
            quantiles=self.quantiles,
            domains=domains,
        )

    def _key_table(self, place: int) -> int:
        """Makes the relation key_<place> (value, idx), numbers by value; returns how many keys there are."""
        if self.known is not None:
            stored = text(self.known.folder / "keys" / f"{place}.parquet")
            self.connection.execute(
                f"CREATE OR REPLACE TABLE key_{place} AS SELECT value, file_row_number AS idx "
                f"FROM read_parquet({stored}, file_row_number=true)"
            )
            return self.connection.execute(f"SELECT count(*) FROM key_{place}").fetchall()[0][0]
        self.connection.execute(
            f"CREATE OR REPLACE TABLE key_{place} AS SELECT k AS value, row_number() OVER (ORDER BY k) - 1 AS idx "
            f"FROM (SELECT DISTINCT k{place} AS k FROM rows)"
        )
        path = self.building / "keys" / f"{place}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.connection.execute(f"COPY (SELECT value FROM key_{place} ORDER BY idx) TO {text(path)} (FORMAT parquet)")
        return self.connection.execute(f"SELECT count(*) FROM key_{place}").fetchall()[0][0]

    def _domains(self) -> list[str]:
        """Values with a domain of their own; the others share the last one."""
        if self.schema.domain is None:
            return []
        if self.known is not None:
            return self.known.meta["facts"]["domains"]
        found = self.connection.execute(
            "SELECT dom, count(*) AS n FROM rows WHERE s = 0 AND dom IS NOT NULL GROUP BY dom ORDER BY n DESC, dom"
        ).fetchall()
        total = sum(n for _, n in found)
        return [value for value, n in found if n >= self.schema.domain[1] * total]

    def _id(self, field: FieldSpec, alias: str, joins: list[str], value: str) -> str:
        table = self.tables[field.table]
        joins.append(table.join(value, alias))
        return table.sql(value, alias)

    def _stream(self, domains: Sequence[str], keys: Sequence[int]) -> Iterator[pa.RecordBatch]:
        """Rows in the order of the log, encoded."""
        chosen, joins = ["s", "r.rid AS rid"], []
        order = ["s"]
        if self.has_time:
            chosen.append("rt")
            order.append("rt")
        for place in range(len(self.keys)):
            joins.append(f" LEFT JOIN key_{place} AS key{place} ON key{place}.value = r.k{place}")
            # A key the known log has not seen comes after all others, and has no events.
            chosen.append(f"coalesce(key{place}.idx, {keys[place]}) AS k{place}")
            if not place and self.schema.user:
                order.append("k0")
        if self.has_requests:
            chosen += ["q0", "q1"]
            order.append("r0")
        chosen += [f"{kind}{place}" for place in range(len(self.schema.labels)) for kind in ("l", "m")]
        for field in self.fields:
            column = self._column(field)
            if field.kind == "id":
                chosen.append(f"{self._id(field, f'v_{column}', joins, f'r.{column}')} AS {column}")
            elif field.kind == "ids":
                joins.append(f" LEFT JOIN {self.bags[column]} AS b_{column} ON b_{column}.rid = r.rid")
                chosen.append(f"b_{column}.ids AS {column}")
            else:
                chosen.append(f"CAST(r.{column} AS {'FLOAT[]' if field.kind == 'vector' else 'FLOAT'}) AS {column}")
        for number, history in enumerate(self.schema.histories):
            for at in range(len(history.fields) if history.columns else 0):
                column = f"h{number}_{at}"
                joins.append(f" LEFT JOIN {self.bags[column]} AS b_{column} ON b_{column}.rid = r.rid")
                chosen.append(f"b_{column}.ids AS {column}")
        if self.schema.domain is not None:
            cases = " ".join(f"WHEN {text(value)} THEN {place}" for place, value in enumerate(domains))
            chosen.append(f"CAST({f'CASE dom {cases} ELSE {len(domains)} END' if domains else 0} AS INTEGER) AS dom")
        ties = [f"x{place}" for place in range(len(self.schema.ties))]
        sql = (
            f"SELECT {', '.join(chosen)} FROM rows AS r{''.join(joins)} ORDER BY {', '.join([*order, *ties, 'r.rid'])}"
        )
        yield from self.connection.sql(sql).to_arrow_reader(_BATCH_ROWS)

    def _column(self, field: FieldSpec) -> str:
        return f"f{self.schema.fields.index(field)}"

    def _files(self) -> dict[str, ColumnFile]:
        """Every array that is written row by row; raw numbers of dense fields wait in `work`."""
        tasks = (len(self.schema.labels),)
        wanted: dict[str, tuple[Any, tuple[int, ...]]] = {
            "rows/labels": (np.uint8, tasks), "rows/label_mask": (np.uint8, tasks), "rows/origin": (np.int64, ()),
        }  # fmt: skip
        if self.has_time:
            wanted["rows/time"] = (np.int64, ())
        if self.schema.user:
            wanted["index/user"] = (np.int64, ())
        if self.has_requests:
            wanted["index/request"] = (np.int64, ())
        if self.schema.domain is not None:
            wanted["rows/domain"] = (np.int32, ())
        for field in self.fields:
            if field.kind == "dense":
                continue
            shape = {"id": (), "ids": (field.max_length,), "vector": (field.size or 1,)}[field.kind]
            wanted[f"rows/{field.name}"] = (np.float32 if field.kind == "vector" else np.int32, shape)
        for place in range(1 if self.schema.user else 0, len(self.keys)):
            wanted[f"key_{place}"] = (np.int64, ())
        for history in self.lists:
            wanted[f"index/{history.name}"] = (np.int64, (2,))
            wanted[f"events/{history.name}/offsets"] = (np.int64, ())
            wanted |= {f"events/{history.name}/{name}": (np.int32, ()) for name in history.fields}
        files = {
            name: ColumnFile((self.work if name.startswith("key_") else self.building) / f"{name}.npy", *how)
            for name, how in wanted.items()
        }
        for field in self.fields:
            if field.kind == "dense":
                files[f"rows/{field.name}"] = ColumnFile(self._raw(field), np.float32)
        for history in self.lists:
            files[f"events/{history.name}/offsets"].append(np.zeros(1, np.int64))
        return files

    def _raw(self, field: FieldSpec) -> Path:
        return self.work / f"raw_{self._column(field)}.npy"

    def _append(self, files: dict[str, ColumnFile], columns: dict[str, pa.Array], first: np.ndarray) -> None:
        """Writes one batch; what belongs to the user only where a request begins."""
        labels = range(len(self.schema.labels))
        mask = np.stack([_flags(columns[f"m{place}"]) for place in labels], axis=1)
        files["rows/label_mask"].append(mask)
        files["rows/labels"].append(np.stack([_flags(columns[f"l{place}"]) for place in labels], axis=1) * mask)
        files["rows/origin"].append(columns["rid"].to_numpy(zero_copy_only=False))
        if self.has_time:
            files["rows/time"].append(columns["rt"].to_numpy(zero_copy_only=False))
        if self.schema.user:
            files["index/user"].append(columns["k0"].to_numpy(zero_copy_only=False))
        for place in range(1 if self.schema.user else 0, len(self.keys)):
            files[f"key_{place}"].append(columns[f"k{place}"].to_numpy(zero_copy_only=False))
        if self.schema.domain is not None:
            files["rows/domain"].append(columns["dom"].to_numpy(zero_copy_only=False)[first])
        for field in self.fields:
            column = columns[self._column(field)]
            if field.kind == "ids":
                values = _padded(column, field.max_length, np.int32)
            elif field.kind == "vector":
                values = _padded(column, field.size or 1, np.float32)
            else:
                values = column.to_numpy(zero_copy_only=False)
            files[f"rows/{field.name}"].append(values[first] if field.side == "user" else values)
        for history in self.lists:
            self._append_lists(files, columns, history)

    def _append_lists(self, files: dict[str, ColumnFile], columns: dict[str, pa.Array], history: HistorySpec) -> None:
        """The lists of one batch; of unequal ones the newest events that all have."""
        number = self.schema.histories.index(history)
        lists = [columns[f"h{number}_{at}"] for at in range(len(history.fields))]
        lengths = np.stack([_lengths(values) for values in lists])
        kept = lengths.min(axis=0)
        offsets = files[f"events/{history.name}/offsets"]
        before, key = files[f"events/{history.name}/{history.fields[0]}"].length, offsets.length - 1
        for name, values, length in zip(history.fields, lists, lengths, strict=True):
            flat = values.flatten().to_numpy(zero_copy_only=False)
            place = np.arange(flat.size) - np.repeat(np.cumsum(length) - length, length)
            files[f"events/{history.name}/{name}"].append(flat[place >= np.repeat(length - kept, length)])
        ends = before + np.cumsum(kept)
        offsets.append(ends)
        files[f"index/{history.name}"].append(np.stack([key + np.arange(kept.size), ends], axis=1))

    def _differing(self, columns: dict[str, pa.Array], first: np.ndarray, previous: dict[str, np.ndarray]) -> int:
        """Rows whose user ids are not those of their request's first row, which are kept."""
        differs = np.zeros(len(first), bool)
        start = np.maximum.accumulate(np.where(first, np.arange(len(first)), -1))
        for field in self.fields:
            if field.side == "user" and field.kind == "id":
                values = columns[self._column(field)].to_numpy(zero_copy_only=False)
                before = previous[field.name][-1] if field.name in previous else values[0]
                own = np.where(start >= 0, values[np.maximum(start, 0)], before)
                differs |= values != own
                previous[field.name] = own[-1:]
        return int(differs.sum())

    def _transform(self, splits: dict[str, tuple[int, int]]) -> None:
        """Columns of dense fields from their raw numbers, by rules learnt from the training rows."""
        train = splits["train"][1]
        if self.has_requests and train:
            request = np.load(self.building / "index" / "request.npy", mmap_mode="r")
        for field in self.fields:
            if field.kind != "dense":
                continue
            raw = np.load(self._raw(field), mmap_mode="r")
            if not self._learnt:
                count = int(request[train - 1]) + 1 if self.has_requests and field.side == "user" and train else train
                shown = sample(raw[:count])
                self.quantiles[field.name] = np.quantile(shown[~np.isnan(shown)], _QUANTILES).tolist() if count else []
                self.rules[field.name] = learn_rule(field.transform, field.missing, raw[:count])
            transform_file(self._raw(field), self.building / "rows" / f"{field.name}.npy", self.rules[field.name])

    def _events(self, place: int, history: HistorySpec, keys: list[int]) -> None:
        """The store of one history of events, and the end of every row's history in it."""
        key = self.keys.index(history.key or self.schema.user or "")
        fields = [self.schema.field(name) for name in history.fields]
        joins = [f" JOIN key_{key} AS key ON key.value = e.{f'k{key}' if history.source == 'log' else 'k'}"]
        chosen = ["key.idx AS key", "e.t AS t"]
        for field in fields:
            column = self._column(field)
            if field.kind == "id":
                chosen.append(f"{self._id(field, f'v_{column}', joins, f'e.{column}')} AS {column}")
            else:
                chosen.append(f"CAST(e.{column} AS FLOAT) AS {column}")
        source = f"(SELECT * FROM rows WHERE e{place})" if history.source == "log" else f"events_{place}"
        ties = [f"x{k}" for k in range(len(self.schema.ties))] if history.source == "log" else []
        order = ["key", "e.t", *ties, "e.rid"]
        sql = f"SELECT {', '.join(chosen)} FROM {source} AS e{''.join(joins)} ORDER BY {', '.join(order)}"
        folder = self.building / "events" / history.name
        times = ColumnFile(folder / "time.npy", np.int64)
        files = {
            field.name: ColumnFile(folder / f"{field.name}.npy", np.int32) if field.kind == "id"
            else ColumnFile(folder / f"{field.name}.npy", np.float32, (self._event_rule(field).width,))
            for field in fields
        }  # fmt: skip
        counts = np.zeros(keys[key], np.int64)
        for batch in self.connection.sql(sql).to_arrow_reader(_BATCH_ROWS):
            counts += np.bincount(batch.column("key").to_numpy(zero_copy_only=False), minlength=keys[key])
            times.append(batch.column("t").to_numpy(zero_copy_only=False))
            for field in fields:
                values = batch.column(self._column(field)).to_numpy(zero_copy_only=False)
                files[field.name].append(values if field.kind == "id" else self._event_rule(field).apply(values))
        for file in (times, *files.values()):
            file.close()
        offsets = np.r_[0, np.cumsum(counts)]
        np.save(folder / "offsets.npy", offsets)
        self._ends(history, key, offsets)

    def _known_events(self, history: HistorySpec, known: PackedLog) -> None:
        """The known log's store, with one more key that has no events."""
        source, folder = known.folder / "events" / history.name, self.building / "events" / history.name
        folder.mkdir(parents=True)
        for file in source.iterdir():
            shutil.copyfile(file, folder / file.name)
        offsets = np.load(source / "offsets.npy")
        offsets = np.r_[offsets, offsets[-1]]
        np.save(folder / "offsets.npy", offsets)
        self._ends(history, self.keys.index(history.key or self.schema.user or ""), offsets)

    def _event_rule(self, field: FieldSpec) -> DenseRule:
        """Numbers of events know no training part: they are taken as they are, or as logarithms."""
        if field.transform not in ("none", "log1p"):
            raise self.schema.error(
                ("fields", field.name, "transform"), f"field {field.name!r} is of events: transform none or log1p"
            )
        return learn_rule(field.transform, field.missing, np.empty(0, np.float32))

    def _ends(self, history: HistorySpec, key: int, offsets: np.ndarray) -> None:
        """Writes (key, end) of every row, in pieces."""
        event_times = np.load(self.building / "events" / history.name / "time.npy", mmap_mode="r")
        times = np.load(self.building / "rows" / "time.npy", mmap_mode="r")
        index = ColumnFile(self.building / "index" / f"{history.name}.npy", np.int64, (2,))
        for start, owners in self._row_keys(key, len(times)):
            request_times = np.asarray(times[start : start + len(owners)])
            ends = history_ends(offsets, np.asarray(event_times), owners, request_times)
            index.append(np.stack([owners, ends], axis=1))
        index.close()

    def _row_keys(self, key: int, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        if not key and self.schema.user:
            users = np.load(self.building / "index" / "user.npy", mmap_mode="r")
        else:
            users = np.load(self.work / f"key_{key}.npy", mmap_mode="r")
        for start in range(0, rows, _PIECE):
            yield start, np.asarray(users[start : start + _PIECE])

    def _schema(self, domains: int, training_rows: int) -> Schema:
        """The model's schema: fields in the order of the file."""
        fields = []
        for spec in self.fields:
            if spec.kind in ("id", "ids"):
                bag = spec.max_length if spec.kind == "ids" else 1
                vocabulary, table, width = self.tables[spec.table].rows, spec.table, EMBEDDING_WIDTH
            elif spec.kind == "vector":
                bag, vocabulary, table, width = 1, None, None, spec.size or 1
            else:
                rule = self.rules[spec.name]
                bag, vocabulary, table = 1, rule.vocabulary, None
                width = rule.width if vocabulary is None else EMBEDDING_WIDTH
            side: Any = spec.side
            table = None if table == spec.name else table
            fields.append(Field(spec.name, side, width, vocabulary, table, spec.group or spec.side, bag))
        histories = tuple(self._history_schema(history) for history in self.schema.histories)
        # A task's loss is a mean over its observed labels: a rare one would move a shared table far more than it knows.
        mask = np.load(self.building / "rows" / "label_mask.npy", mmap_mode="r")[:training_rows]
        observed = np.count_nonzero(mask, axis=0) / max(training_rows, 1)
        tasks = tuple(
            Task(label.name, label.weight or float(share) or 1.0)
            for label, share in zip(self.schema.labels, observed, strict=True)
        )
        return Schema(tuple(fields), histories, tasks, domains + 1 if self.schema.domain is not None and domains else 1)

    def _history_schema(self, history: HistorySpec) -> History:
        fields = []
        for spec in (self.schema.field(name) for name in history.fields):
            if spec.kind == "id":
                table = None if spec.table == spec.name else spec.table
                rows = self.tables[spec.table].rows
                fields.append(Field(spec.name, "user", EMBEDDING_WIDTH, rows, table, history.name))
            else:
                fields.append(Field(spec.name, "user", self._event_rule(spec).width, group=history.name))
        clock = not history.columns and self.schema.time is not None and self.schema.time.unit != "order"
        return History(history.name, history.length, tuple(fields), timestamps=clock)


def note_differing(report: ReadReport, packed: Packed) -> None:
    """Records rows whose user ids were replaced by those of their request."""
    if packed.differing:
        report.repair(
            Reason.USER_SIDE_DIFFERS, "a request's later rows take the first row's user fields", packed.differing
        )


def _flags(values: pa.Array) -> np.ndarray:
    return values.fill_null(False).to_numpy(zero_copy_only=False).astype(np.uint8)


def _lengths(values: pa.Array) -> np.ndarray:
    return pc.call_function("list_value_length", [values]).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)


def _padded(values: pa.Array, width: int, dtype: Any) -> np.ndarray:
    """Lists as an array [n, width], cut or filled with 0 at the end."""
    lengths = _lengths(values)
    flat = values.flatten().to_numpy(zero_copy_only=False)
    row = np.repeat(np.arange(lengths.size), lengths)
    place = np.arange(flat.size) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    out = np.zeros((lengths.size, width), dtype)
    kept = place < width
    out[row[kept], place[kept]] = flat[kept]
    return out
