"""The first pass over a log: every row typed, its labels decided, and the reason why it cannot be used, if any.

The result is one Parquet file for each file of the log, of numbered columns (`Names`), with a column `reason` that is
NULL for a usable row. What it costs is one reading of the log; everything later reads these files.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterable, Mapping
from pathlib import Path

import duckdb

from recscale.pallas_kernels.names import nearest
from recscale.scaling.data.stored_log.card import Reason

from . import conditions, reading
from .conditions import quoted, text
from .log_schema import FieldSpec, HistorySpec, LogSchema, TableFiles

TICKS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000, "order": 1}
_STAMP_TICKS = 1_000_000  # of timestamps and strptime formats
_PROBE_ROWS = 100_000
_MOST_UNREADABLE = 0.5
_INTEGERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER")
_MEDIAN_YEARS = (1990, 2100)


@dataclasses.dataclass(frozen=True)
class Column:
    """SQL of one column of the result. raw: what it is read from. trouble: (SQL, reason) of what is unusable."""

    sql: str
    raw: str
    keys: tuple[str, ...]
    trouble: tuple[tuple[str, Reason], ...]


class Cleaner:
    """The first pass of one schema over one kind of file.

    Args:
        schema: the schema file. connection: DuckDB. folder: what file patterns are relative to.
        labelled: whether the rows have labels; those of rows to be scored have none.

    Raises:
        LogSchemaError: a column there is not (the nearest is named), or one that its kind cannot hold.
    """

    def __init__(
        self, schema: LogSchema, connection: duckdb.DuckDBPyConnection, folder: Path, *, labelled: bool = True
    ):
        self.labelled = labelled
        self.schema, self.connection, self.folder = schema, connection, folder
        self.files = reading.find(schema.log, folder, f"{schema.path}: files of [log]")
        self.found = reading.columns(connection, self._rows(self.files[0]))
        # Rows of side tables, and the lines of them that could not be read.
        self.joined: dict[str, tuple[int, list[tuple[int, str]]]] = {}
        for name, join in schema.joins.items():
            self._materialise(name, join.table, join.on)
        self._add_columns()
        self.ticks = self._ticks()
        self.columns = self._columns()

    @property
    def file_names(self) -> list[str]:
        """Of the log's files: their places below the folder."""
        folder = self.folder
        return [p.relative_to(folder).as_posix() if p.is_relative_to(folder) else p.name for p in self.files]

    def source(self, index: int) -> str:
        """SQL of the rows of file `index` with joined and further columns."""
        sql, joins = f"SELECT * FROM ({self._rows(self.files[index])}) AS log", self.schema.joins
        for name, join in joins.items():
            sql += f" LEFT JOIN {quoted('join_' + name)} USING ({quoted(join.on)})"
        for name, expression in self.schema.columns.items():
            sql = f"SELECT *, {expression} AS {quoted(name)} FROM ({sql})"
        return sql

    def _rows(self, path: Path) -> str:
        """SQL of a file's rows, lists of candidates opened."""
        scan, spec, here = reading.scan(self.schema.log, path), self.schema.explode, ("log", "explode")
        if spec is None:
            return scan
        known = reading.columns(self.connection, scan)
        self._need(spec.column, here, known)
        try:
            return reading.explode(scan, spec, known[spec.column])
        except ValueError as error:
            raise self.schema.error(here, str(error)) from error

    def write(self, index: int, path: Path, part: tuple[int, int] | None) -> None:
        """Writes the cleaned rows of file `index`, those of one part of the log if one is named."""
        sql = self._clean_sql(index, part)
        self.connection.execute(f"COPY ({sql}) TO {text(path)} (FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1)")

    def probe(self) -> None:
        """Refuses, from the first rows of the first file, times of another unit and columns that cannot hold values.

        Raises:
            LogSchemaError: names the line and what to write there.
        """
        limited = f"FROM (SELECT * FROM ({self.source(0)}) LIMIT {_PROBE_ROWS})"
        wanted = ["count(*)"]
        for column in self.columns.values():
            unreadable = [sql for sql, reason in column.trouble if reason in (Reason.UNPARSABLE, Reason.WRONG_LENGTH)]
            bad = " OR ".join(unreadable) or "false"
            wanted += [f"count({column.raw})", f"count(*) FILTER ({bad})", f"any_value({column.raw}) FILTER ({bad})"]
        median = f"CAST(quantile_disc({self.columns['t'].sql}, 0.5) AS BIGINT)" if "t" in self.columns else "NULL"
        ((total, *counts, time),) = self.connection.execute(
            f"SELECT {', '.join(wanted)}, {median} {limited}"
        ).fetchall()
        if not total:
            raise self.schema.error(("log", "files"), f"{self.files[0]} holds no row that can be read")
        for place, column in enumerate(self.columns.values()):
            there, bad, example = counts[3 * place : 3 * place + 3]
            if bad > _MOST_UNREADABLE * max(there, 1):
                raise self.schema.error(column.keys, self._mend(column, bad, there, example))
        self._check_median(time)

    def _mend(self, column: Column, bad: int, there: int, example: object) -> str:
        found = f"{bad:,} of the first {there:,} values cannot be read, for example {example!r}"
        if column.keys[0] == "time":
            return f"{found}; set unit to s, ms, us, ns or a strptime format that fits"
        if column.keys[0] == "labels":
            return f'{found}; say when the label is positive, as positive = "== 1"'
        field = self.schema.field(column.keys[1]) if column.keys[0] == "fields" else None
        if field is not None and field.kind == "dense":
            return f'{found} as numbers; use kind = "id" for names'
        if field is not None and field.kind == "vector":
            return f"{found} as {field.size} numbers; set size to the length of the vectors"
        return f'{found} as whole numbers; use type = "text"'

    def _check_median(self, time: int | None) -> None:
        spec = self.schema.time
        if spec is None or time is None or spec.unit == "order":
            return
        low, high = (datetime.datetime(year, 1, 1, tzinfo=datetime.UTC).timestamp() for year in _MEDIAN_YEARS)
        if low <= time / self.ticks < high:
            return
        fitting = [unit for unit, ticks in TICKS.items() if unit != "order" and low <= time / ticks < high]
        mend = f'unit = "{fitting[0]}"' if fitting else 'unit = "order" if these are no clock times'
        raise self.schema.error(
            ("time", "unit"),
            f"the median of {spec.column!r} is {time:,}, which read as {spec.unit or 'a timestamp'} lies outside "
            f"{_MEDIAN_YEARS[0]} ... {_MEDIAN_YEARS[1]}; set {mend}",
        )

    def _materialise(self, name: str, table: TableFiles, key: str) -> None:
        here = ("joins", name)
        paths = reading.find(table, self.folder, f"{self.schema.path}: files of [joins.{name}]")
        sql = " UNION ALL BY NAME ".join(
            f"SELECT * REPLACE (_row + {place * reading.ROWS_PER_FILE} AS _row) FROM ({reading.scan(table, path)})"
            for place, path in enumerate(paths)
        )
        found = reading.columns(self.connection, sql)
        for side, known in (("table", found), ("log", self.found)):
            if key not in known:
                raise self.schema.error((*here, "on"), f"the {side} has no column {key!r}{nearest(key, known)}")
        own = [column for column in found if column == key or column not in self.found]
        as_log = f"TRY_CAST({quoted(key)} AS {self.found[key]})"
        chosen = ", ".join(as_log + f" AS {quoted(key)}" if column == key else quoted(column) for column in own)
        self.connection.execute(
            f"CREATE OR REPLACE TABLE {quoted('join_' + name)} AS SELECT {chosen}, true AS {quoted('_has_' + name)} "
            f"FROM ({sql}) QUALIFY row_number() OVER (PARTITION BY {as_log} ORDER BY _row) = 1"
        )
        rows = self.connection.execute(f"SELECT count(*) FROM {quoted('join_' + name)}").fetchall()[0][0]
        self.joined[name] = (rows, reading.rejected(self.connection))
        self.found |= {column: found[column] for column in own}

    def _add_columns(self) -> None:
        for name in self.schema.columns:
            try:
                self.found = reading.columns(self.connection, self.source(0))
            except duckdb.Error as error:
                raise self.schema.error(("columns", name), f"DuckDB cannot evaluate it: {error}") from error
        self.found = {name: kind for name, kind in self.found.items() if not name.startswith("_has_")}

    def _need(self, column: str, keys: tuple[str, ...], known: Mapping[str, str] | None = None) -> str:
        """The column's quoted name, if there is such a column."""
        known = self.found if known is None else known
        if column not in known:
            listed = ", ".join(list(known)[:30])
            raise self.schema.error(keys, f"there is no column {column!r}{nearest(column, known)}; there are {listed}")
        return quoted(column)

    def _given(self, column: str, keys: tuple[str, ...]) -> str:
        """The column, NULL where a text is empty."""
        name = self._need(column, keys)
        return f"NULLIF({name}, '')" if self.found[column] == "VARCHAR" else name

    def condition(
        self,
        condition: str,
        keys: tuple[str, ...],
        column: str | None = None,
        known: Mapping[str, str] | None = None,
    ) -> str:
        """SQL of a condition of the schema, about the log's columns or those of another table."""
        known = self.found if known is None else known
        try:
            sql = conditions.to_sql(condition, column)
        except conditions.ConditionError as error:
            raise self.schema.error(keys, str(error)) from error
        for name in conditions.columns_of(condition, column):
            self._need(name, keys, known)
        return sql

    def _ticks(self) -> int:
        time = self.schema.time
        return TICKS.get(time.unit or "", _STAMP_TICKS) if time is not None else 1

    def _columns(self) -> dict[str, Column]:
        """Every column of the result that has a value of its own, by its name there."""
        schema, columns, stored = self.schema, {}, stored_fields(self.schema)
        if schema.time is not None:
            columns["t"] = self.time_column(schema.time.column, self.found, ("time",))
        for place, key in enumerate(key_columns(schema)):
            columns[f"k{place}"] = self._key(key)
        for place in range(len(schema.labels)):
            columns[f"l{place}"] = self._label(place)
        for place, field in enumerate(schema.fields):
            if field.name in stored:
                columns[f"f{place}"] = self.field_column(field, self.found, ("fields", field.name))
        for place, history in enumerate(schema.histories):
            for at, name in enumerate(history.fields if history.columns else ()):
                columns[f"h{place}_{at}"] = self._list(history, schema.field(name))
        return columns

    def _key(self, column: str) -> Column:
        keys = ("user",) if column == self.schema.user else ("histories",)
        fields = [field for field in self.schema.fields if field.column == column and field.kind == "id"]
        given = self._given(column, keys)
        value = _whole(given, self.found[column]) if self._is_int(column, fields) else f"CAST({given} AS VARCHAR)"
        return Column(
            value, given, keys, ((f"{given} IS NULL", Reason.MISSING_KEY), (f"{value} IS NULL", Reason.UNPARSABLE))
        )

    def _is_int(self, column: str, fields: Iterable[FieldSpec]) -> bool:
        asked = [field.type for field in fields if field.type is not None]
        return (asked[0] if asked else "int" if self.found[column] in _INTEGERS else "text") == "int"

    def time_column(self, column: str, found: Mapping[str, str], keys: tuple[str, ...]) -> Column:
        """The time of a column in ticks since 1970."""
        spec = self.schema.time
        assert spec is not None
        if column not in found:
            raise self.schema.error((*keys, "column"), f"there is no column {column!r}{nearest(column, found)}")
        raw, kind = quoted(column), found[column]
        if spec.unit in TICKS:
            value = _whole(raw, kind)
        elif kind.startswith(("TIMESTAMP", "DATE")):
            value = f"epoch_us(CAST({raw} AS TIMESTAMP))"
        elif spec.unit is None:
            raise self.schema.error(
                keys, f'{column!r} is {kind}, no timestamp: give unit = "s", ms, us, ns or a format'
            )
        else:
            stamp = f"try_strptime(CAST({raw} AS VARCHAR), {text(spec.unit)})"
            zoned = stamp if spec.zone == "UTC" else f"CAST({stamp} AT TIME ZONE {text(spec.zone)} AS TIMESTAMPTZ)"
            value = f"epoch_us({zoned})"
        trouble = [(f"{raw} IS NULL", Reason.MISSING_KEY), (f"{value} IS NULL", Reason.UNPARSABLE)]
        if spec.unit != "order":
            low, high = (_ticks_of(date, self.ticks) for date in (spec.earliest, spec.latest))
            trouble.append((f"{value} NOT BETWEEN {low} AND {high - 1}", Reason.TIMESTAMP_OUT_OF_RANGE))
        return Column(value, raw, (*keys, "unit"), tuple(trouble))

    def _label(self, place: int) -> Column:
        label = self.schema.labels[place]
        if not self.labelled:
            return Column("false", "NULL", ("labels", label.name), ())
        here = ("labels", label.name)
        given = self._given(label.column, (*here, "column"))
        rule = label.positive or "== 1"
        value = self.condition(rule, (*here, "positive"), label.column)
        unreadable = f"({given} IS NOT NULL AND {value} IS NULL)"
        trouble = [(unreadable, Reason.UNPARSABLE)]
        possible = label.valid or (None if label.positive else "in [0, 1]")
        if possible is not None:
            valid = self.condition(possible, (*here, "valid"), label.column)
            trouble.append((f"({given} IS NOT NULL AND NOT {valid})", Reason.OUT_OF_VOCABULARY))
        return Column(value, given, (*here, "positive" if label.positive else "column"), tuple(trouble))

    def field_column(self, field: FieldSpec, found: Mapping[str, str], keys: tuple[str, ...]) -> Column:
        """The typed value of a field in a table with those columns."""
        if field.column not in found:
            raise self.schema.error(
                (*keys, "column"),
                f"field {field.name!r}: there is no column {field.column!r}{nearest(field.column, found)}",
            )
        raw, kind = quoted(field.column), found[field.column]
        listed = kind.endswith("]")
        if field.kind in ("id", "dense") and listed:
            raise self.schema.error((*keys, "kind"), f'{field.column!r} holds lists ({kind}): kind = "ids" or "vector"')
        if field.kind in ("ids", "vector") and not listed and field.separator is None:
            raise self.schema.error(
                (*keys, "kind"), f'{field.column!r} is {kind}, no list: say what separates its values, separator = "|"'
            )
        given = f"NULLIF({raw}, '')" if kind == "VARCHAR" else raw
        if field.kind == "id":
            wants_int = (field.type or ("int" if kind in _INTEGERS else "text")) == "int"
            value = _whole(given, kind) if wants_int else f"CAST({given} AS VARCHAR)"
            sure = kind in _INTEGERS or not wants_int  # there every value can be read
            trouble = () if sure else ((f"({given} IS NOT NULL AND {value} IS NULL)", Reason.UNPARSABLE),)
            return Column(value, given, (*keys, "type"), trouble)
        if field.kind == "dense":
            return self._dense(field, given, kind, keys)
        if field.kind == "ids":
            values = self.list_sql(given, kind, field, field.separator)
            short = f"list_slice({values}, 1, {field.max_length})"
            return Column(short, given, (*keys, "type"), self._list_trouble(values, kind, field))
        items = f"string_split({given}, {text(field.separator)})" if not listed else given
        value = f"list_transform({items}, lambda x: TRY_CAST(x AS FLOAT))"
        odd = f"({given} IS NOT NULL AND len({items}) <> {field.size})"
        endless = f"list_contains(list_transform({value}, lambda x: x IS NULL OR NOT isfinite(x)), true)"
        return Column(value, given, (*keys, "size"), ((odd, Reason.WRONG_LENGTH), (endless, Reason.NOT_FINITE)))

    def _dense(self, field: FieldSpec, given: str, kind: str, keys: tuple[str, ...]) -> Column:
        mark = self.schema.log.decimal
        number = f"replace({given}, {text(mark)}, '.')" if mark != "." and kind == "VARCHAR" else given
        value = f"TRY_CAST({number} AS DOUBLE)"
        trouble = [
            (f"({given} IS NOT NULL AND {value} IS NULL)", Reason.UNPARSABLE),
            (f"NOT isfinite({value})", Reason.NOT_FINITE),
        ]
        if field.missing is None and not field.buckets:
            trouble.append((f"{given} IS NULL", Reason.MISSING_VALUE))
        return Column(value, given, (*keys, "kind"), tuple(trouble))

    def _list(self, history: HistorySpec, field: FieldSpec) -> Column:
        column, keys = history.columns[field.name], ("histories", history.name)
        raw = self._need(column, keys)
        kind = self.found[column]
        if not kind.endswith("]") and history.separator is None:
            raise self.schema.error(
                keys, f'{column!r} is {kind}, no list: say what separates its values, separator = "|"'
            )
        given = f"NULLIF({raw}, '')" if kind == "VARCHAR" else raw
        values = self.list_sql(given, kind, field, history.separator)
        trouble = self._list_trouble(values, kind, field)
        if history.order == "newest first":
            values = f"list_reverse({values})"
        return Column(values, given, keys, trouble)

    def _list_trouble(self, values: str, kind: str, field: FieldSpec) -> tuple[tuple[str, Reason], ...]:
        """A value that cannot be read; every piece of a text is one."""
        if kind == "VARCHAR" and field.type != "int":
            return ()
        return ((f"list_contains(list_transform({values}, lambda x: x IS NULL), true)", Reason.UNPARSABLE),)

    def list_sql(self, given: str, kind: str, field: FieldSpec, separator: str | None) -> str:
        """SQL of a list of typed ids, empty texts left out."""
        if not kind.endswith("]"):
            given = f"list_filter(string_split({given}, {text(separator)}), lambda x: x <> '')"
            kind = "VARCHAR[]"
        inner = kind.removesuffix("[]")
        wants_int = (field.type or ("int" if inner in _INTEGERS else "text")) == "int"
        if inner == "VARCHAR" and not wants_int:
            return given
        item = _whole("x", inner) if wants_int else "CAST(x AS VARCHAR)"
        return f"list_transform({given}, lambda x: {item})"

    def _clean_sql(self, index: int, part: tuple[int, int] | None) -> str:
        schema = self.schema
        origin = f"CAST({index * reading.ROWS_PER_FILE} + _row AS BIGINT)"
        chosen = [f"{origin} AS rid", *(f"{column.sql} AS {name}" for name, column in self.columns.items())]
        for place, label in enumerate(schema.labels):
            observed = label.mask if self.labelled else None
            mask = self.condition(observed, ("labels", label.name, "mask")) if observed else "true"
            chosen.append(f"coalesce({mask}, false) AND {self.columns[f'l{place}'].raw} IS NOT NULL AS m{place}")
        for place, history in enumerate(schema.histories):
            if history.source == "log" and self.labelled:
                where = self.condition(history.where, ("histories", history.name, "where")) if history.where else "true"
                chosen.append(f"coalesce({where}, false) AS e{place}")
        if schema.request:
            wanted = [self._need(column, ("request",)) for column in schema.request]
            chosen += [f"hash({', '.join(wanted)}) AS q0", f"hash(1, {', '.join(wanted)}) AS q1"]
        if schema.domain is not None:
            chosen.append(f"CAST({self._need(schema.domain[0], ('domain', 'column'))} AS VARCHAR) AS dom")
        if schema.split.by == "column":
            assert schema.split.column is not None
            chosen.append(f"CAST({self._need(schema.split.column, ('split', 'column'))} AS VARCHAR) AS part")
        chosen += [f"{self._tie(column)} AS x{place}" for place, column in enumerate(schema.ties)]
        unique = self._unique()
        chosen += [f"hash({unique}) AS d0", f"hash(1, {unique}) AS d1"] if unique else []
        bad, reason, detail = self._reason()
        chosen += [f"{reason} AS reason", f"{detail} AS detail"]
        sql = f"SELECT {', '.join(chosen)} FROM (SELECT *, {bad} AS _bad FROM ({self.source(index)}))"
        limits = [self.condition(schema.where, ("log", "where"))] if schema.where else []
        if part is not None:
            limits.append(f"hash(2, {self._slice_key()}) % {part[1]} = {part[0] - 1}")
        return sql + (f" WHERE {' AND '.join(limits)}" if limits else "")

    def _tie(self, column: str) -> str:
        name = self._need(column, ("log", "ties"))
        fields = [field for field in self.schema.fields if field.column == column and field.kind == "id"]
        return _whole(name, self.found[column]) if self._is_int(column, fields) else name

    def _unique(self) -> str | None:
        """SQL of what no two rows share; rows of a log without time may well be equal."""
        if self.schema.unique:
            return ", ".join(self._need(column, ("log", "unique")) for column in self.schema.unique)
        if self.schema.time is None:
            return None
        return ", ".join(sorted({quoted(name) for name in self.found}))

    def _slice_key(self) -> str:
        """SQL of what is never cut by parts: a request, else a user."""
        if self.schema.request:
            return reading.select(list(self.schema.request))
        if self.schema.user:
            return self._need(self.schema.user, ("user",))
        return reading.select(list(self.found))

    def _reason(self) -> tuple[str, str, str]:
        """SQL of the number of the first case that makes a row unusable, and of the reason and value of that number
        `_bad`; NULL for a good row."""
        cases = []
        for name, join in self.schema.joins.items():
            if join.required:
                cases.append(
                    (
                        f"{quoted('_has_' + name)} IS NULL",
                        Reason.NO_PROFILE,
                        f"{text(join.on + ' = ')} || {quoted(join.on)}",
                    )
                )
        nothing = " AND ".join(f"{self.columns[f'l{place}'].raw} IS NULL" for place in range(len(self.schema.labels)))
        for name, column in self.columns.items():
            label = text(f"{column.keys[0] if column.keys[0] in ('time', 'user') else column.keys[1]} = ")
            shown = f"{label} || coalesce(left(CAST({column.raw} AS VARCHAR), 60), 'nothing')"
            cases += [(sql, reason, shown) for sql, reason in column.trouble]
            if self.labelled and name == f"l{len(self.schema.labels) - 1}":
                cases.append((f"({nothing})", Reason.MISSING_LABEL, "'no label'"))
        # A row without a label is that, whatever else it lacks.
        cases.sort(key=lambda case: case[1] != Reason.MISSING_LABEL)
        bad = " ".join(f"WHEN {sql} THEN {number}" for number, (sql, _, _) in enumerate(cases))
        reason = " ".join(f"WHEN {number} THEN {text(str(reason))}" for number, (_, reason, _) in enumerate(cases))
        said = " ".join(f"WHEN {number} THEN {shown}" for number, (_, _, shown) in enumerate(cases))
        return f"CASE {bad} END", f"CASE _bad {reason} END", f"CASE _bad {said} END"


def key_columns(schema: LogSchema) -> list[str]:
    """Columns of the log whose values own events; the user's first."""
    owners = [schema.user] if schema.user else []
    owners += [history.key for history in schema.histories if history.key and not history.columns]
    return list(dict.fromkeys(owners))


def stored_fields(schema: LogSchema) -> set[str]:
    """Fields that rows of the log have: all but those of events of other tables and of stored lists alone."""
    own = {field.name for field in schema.fields if field.side != "event"}
    return own.union(*(history.fields for history in schema.histories if history.source == "log"))


def clean_events(cleaner: Cleaner, history: HistorySpec, path: Path) -> None:
    """Writes the events of a table of their own: k the key, t the time, f<i> the declared fields, with reasons."""
    schema, here = cleaner.schema, ("histories", history.name)
    assert history.source is not None and schema.time is not None
    table = TableFiles((history.source,))
    file = reading.find(table, cleaner.folder, f"{schema.path}: from of [histories.{history.name}]")[0]
    sql = reading.scan(table, file)
    found = reading.columns(cleaner.connection, sql)
    key = history.key or schema.user
    assert key is not None
    if key not in found:
        raise schema.error((*here, "key"), f"{file} has no column {key!r}{nearest(key, found)}")
    as_rows = cleaner.columns[f"k{key_columns(schema).index(key)}"]
    whole = not as_rows.sql.startswith("CAST") or "BIGINT" in as_rows.sql
    value = _whole(quoted(key), found[key]) if whole else f"CAST({quoted(key)} AS VARCHAR)"
    time = cleaner.time_column(history.time or schema.time.column, found, (*here, "time"))
    fields = {
        schema.fields.index(schema.field(name)): cleaner.field_column(schema.field(name), found, (*here, "fields"))
        for name in history.fields
    }
    trouble = [(f"{value} IS NULL", Reason.MISSING_KEY), *time.trouble]
    trouble += [case for column in fields.values() for case in column.trouble]
    reason = " ".join(f"WHEN {sql} THEN {text(str(reason))}" for sql, reason in trouble)
    chosen = [f"{value} AS k", f"{time.sql} AS t", *(f"{column.sql} AS f{place}" for place, column in fields.items())]
    where = cleaner.condition(history.where, (*here, "where"), known=found) if history.where else "true"
    cleaner.connection.execute(
        f"COPY (SELECT _row AS rid, {', '.join(chosen)}, CASE {reason} END AS reason FROM ({sql}) WHERE {where}) "
        f"TO {text(path)} (FORMAT parquet)"
    )


def _whole(value: str, kind: str) -> str:
    """SQL of a whole number; NULL for anything else, 3.5 included."""
    if kind in _INTEGERS:
        return f"CAST({value} AS BIGINT)"
    number = f"TRY_CAST({value} AS DOUBLE)"
    return f"CASE WHEN {number} = floor({number}) THEN TRY_CAST({value} AS BIGINT) END"


def _ticks_of(date: str, ticks: int) -> int:
    moment = datetime.datetime.fromisoformat(date)
    moment = moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
    return int(moment.timestamp()) * ticks
