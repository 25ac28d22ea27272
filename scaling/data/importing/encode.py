"""Vocabularies from the training rows, and values as ids: SQL over the relation `rows`.

Ids of a table: 0 padding, 1 unknown (unseen in training, or too rare), then the training values from the commonest
down, ties by value; last a row of missing values where a field asks for one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from recscale.scaling.data.stored_log.vocabulary import FIRST_ID, UNKNOWN

from .clean import stored_fields
from .conditions import text
from .log_schema import FieldSpec, LogSchema

_BATCH_ROWS = 1 << 17


@dataclasses.dataclass(frozen=True)
class Table:
    """One embedding table: its relation (value, id) in the database, or rows values are hashed into.

    rows: padding and unknown included. missing: id of missing values.
    """

    name: str
    rows: int
    relation: str | None
    missing: int
    hash: int | None = None

    def join(self, value: str, alias: str) -> str:
        """SQL that looks `value` up as `alias`; nothing where values are hashed."""
        return f" LEFT JOIN {self.relation} AS {alias} ON {alias}.value = {value}" if self.relation else ""

    def sql(self, value: str, alias: str) -> str:
        """SQL of the id of a value, after `join`."""
        known = f"{FIRST_ID} + hash({value}) % {self.hash}" if self.hash else f"coalesce({alias}.id, {UNKNOWN})"
        return f"CAST(CASE WHEN {value} IS NULL THEN {self.missing} ELSE {known} END AS INTEGER)"


def make_tables(
    connection: duckdb.DuckDBPyConnection, schema: LogSchema, building: Path, folder: Path
) -> dict[str, Table]:
    """Counts, numbers and writes every vocabulary. folder: where vocabulary files of the schema lie."""
    tables: dict[str, Table] = {}
    for name in dict.fromkeys(field.table for field in schema.fields if field.kind in ("id", "ids")):
        fields = [field for field in schema.fields if field.table == name]
        own_row = any(field.kind == "id" and field.missing in (None, "row") for field in fields)
        hashed = fields[0].hash
        if hashed:
            size, relation = hashed, None
        else:
            relation = f'"table_{len(tables)}"'
            size = _vocabulary(connection, schema, fields, relation, building, folder)
        last = FIRST_ID + size
        tables[name] = Table(name, last + own_row, relation, last if own_row else UNKNOWN, hashed)
    return tables


def read_tables(
    connection: duckdb.DuckDBPyConnection, schema: LogSchema, log: Path, rows: dict[str, int]
) -> dict[str, Table]:
    """The tables of a log that was imported before, so that further rows get the same ids. rows: of every table."""
    tables: dict[str, Table] = {}
    for name, count in rows.items():
        fields = [field for field in schema.fields if field.table == name and field.kind in ("id", "ids")]
        own_row = any(field.kind == "id" and field.missing in (None, "row") for field in fields)
        relation = None if fields[0].hash else f'"table_{len(tables)}"'
        if relation is not None:
            connection.execute(
                f"CREATE OR REPLACE TABLE {relation} AS "
                f"SELECT value, CAST({FIRST_ID} + file_row_number AS INTEGER) AS id "
                f"FROM read_parquet({text(log / 'vocabulary' / f'{name}.parquet')}, file_row_number=true)"
            )
        tables[name] = Table(name, count, relation, count - 1 if own_row else UNKNOWN, fields[0].hash)
    return tables


def bag_tables(
    connection: duckdb.DuckDBPyConnection, columns: Iterable[tuple[str, Table]], work: Path
) -> dict[str, str]:
    """Columns of lists as lists of ids: column -> relation (rid, ids), to be joined to `rows`."""
    found = {}
    for column, table in columns:
        path = work / f"bag_{column}.parquet"
        connection.execute(
            f"COPY (SELECT rid, list({table.sql('v', 'w')} ORDER BY place) AS ids "
            f"FROM (SELECT rid, unnest({column}) AS v, unnest(range(len({column}))) AS place "
            f"FROM rows WHERE len({column}) > 0){table.join('v', 'w')} GROUP BY rid) "
            f"TO {text(path)} (FORMAT parquet)"
        )
        found[column] = f"read_parquet({text(path)})"
    return found


def _vocabulary(
    connection: duckdb.DuckDBPyConnection,
    schema: LogSchema,
    fields: list[FieldSpec],
    relation: str,
    building: Path,
    folder: Path,
) -> int:
    """Makes the relation (value, id) of a table and its file; returns the number of values."""
    if fields[0].vocabulary is not None:
        listed = (folder / fields[0].vocabulary).read_text(encoding="utf-8").split("\n")
        values = pa.array([line for line in listed if line])
        if fields[0].type == "int":
            values = values.cast(pa.int64())
        given = pa.table({"value": values})
        counted = "SELECT value FROM given"
        connection.register("given", given)
    else:
        sources = " UNION ALL ".join(_values(schema, field) for field in fields if _values(schema, field))
        least = max(field.min_count for field in fields)
        counted = (
            f"SELECT value FROM (SELECT value, count(*) AS n FROM ({sources}) WHERE value IS NOT NULL GROUP BY value) "
            f"WHERE n >= {least} ORDER BY n DESC, value"
        )
    connection.execute(
        f"CREATE OR REPLACE TABLE {relation} AS "
        f"SELECT value, CAST({FIRST_ID} - 1 + row_number() OVER () AS INTEGER) AS id FROM ({counted})"
    )
    path = building / "vocabulary" / f"{fields[0].table}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    reader = connection.sql(f"SELECT value FROM {relation} ORDER BY id").to_arrow_reader(_BATCH_ROWS)
    count = 0
    with pq.ParquetWriter(path, reader.schema) as writer:
        for batch in reader:
            count += batch.num_rows
            writer.write_batch(batch)
    return count


def _values(schema: LogSchema, field: FieldSpec) -> str:
    """SQL of the training values of a field: of its rows, else of the events before validation, or of stored lists."""
    place = schema.fields.index(field)
    if field.name in stored_fields(schema):
        column = f"f{place}" if field.kind == "id" else f"unnest(f{place})"
        return f"SELECT {column} AS value FROM rows WHERE s = 0"
    if any(other.table == field.table and other.side != "event" for other in schema.fields):
        return ""  # counted where the table's own rows are
    for number, history in enumerate(schema.histories):
        if field.name in history.fields:
            if history.columns:
                column = f"h{number}_{history.fields.index(field.name)}"
                return f"SELECT unnest({column}) AS value FROM rows WHERE s = 0"
            before = f"(SELECT coalesce(min(rt), {2**62}) FROM rows WHERE s = 1)"
            return f"SELECT f{place} AS value FROM events_{number} WHERE t < {before}"
    return ""
