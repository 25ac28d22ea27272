"""Reading of tables by DuckDB: a connection of bounded memory, and files as SQL relations with numbered rows.

Text files are read as text, cell by cell, so that a value that does not fit is found by the column that needs it; the
project parses nothing itself.
"""

from __future__ import annotations

import glob
import os
from pathlib import Path

import duckdb

from .conditions import quoted, text
from .log_schema import ExplodeSpec, TableFiles

# Rows of one file: an origin is file * 2^40 + row.
ROWS_PER_FILE = 1 << 40

# DuckDB's limit holds its buffers; lists, strings in flight and this process come on top.
_SHARE_FOR_DUCKDB = 0.7
_ENDINGS = {
    ".parquet": "parquet", ".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl",
    ".json": "jsonl", ".txt": "csv",
}  # fmt: skip
_PACKED = (".gz", ".zst")


def connect(memory_bytes: float, spill: Path) -> duckdb.DuckDBPyConnection:
    """A database in memory that spills to the folder `spill` beyond its share of `memory_bytes`."""
    spill.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return duckdb.connect(
        config={
            "memory_limit": f"{max(int(memory_bytes * _SHARE_FOR_DUCKDB) >> 20, 64)}MiB",
            "temp_directory": str(spill),
            "threads": cores,
        }
    )


def find(table: TableFiles, folder: Path, what: str) -> list[Path]:
    """The files of a table, patterns expanded in order of their names.

    Raises:
        FileNotFoundError: a name or pattern has no file.
    """
    found: list[Path] = []
    for pattern in table.files:
        matches = sorted(glob.glob(str(folder / pattern), recursive=True))
        if not matches:
            raise FileNotFoundError(f"{what}: no file {pattern} in {folder}; --files DIR names the folder they lie in")
        found += [Path(match) for match in matches if Path(match) not in found]
    return found


def file_format(table: TableFiles, path: Path) -> str:
    """csv, tsv, jsonl or parquet.

    Raises:
        ValueError: the name's ending tells nothing and the schema neither.
    """
    if table.format != "auto":
        return table.format
    ending = path.with_suffix("").suffix if path.suffix in _PACKED else path.suffix
    if ending not in _ENDINGS:
        raise ValueError(f'{path}: the ending {ending!r} names no format; set format = "csv", tsv, jsonl or parquet')
    return _ENDINGS[ending]


def scan(table: TableFiles, path: Path) -> str:
    """SQL of a file's columns and `_row`, the number of the row among those that can be read.

    Lines of a text file with too few or too many cells are noted in DuckDB's table `reject_errors`.
    """
    kind, name = file_format(table, path), text(path)
    if kind == "parquet":
        source = f"read_parquet({name}, file_row_number=true)"
        return f"SELECT file_row_number AS _row, * EXCLUDE (file_row_number) FROM {source}"
    if kind == "jsonl":
        return f"SELECT row_number() OVER () - 1 AS _row, * FROM read_json({name}, format='newline_delimited')"
    options = {
        "delim": text(table.delimiter or ("\t" if kind == "tsv" else ",")),
        "quote": text(table.quote),
        "escape": text(table.quote),
        "header": str(table.header).lower(),
        "all_varchar": "true",
        "ignore_errors": "true",
        "store_rejects": "true",
        "encoding": text(table.encoding),
    }
    if table.names:
        options["names"] = "[" + ", ".join(map(text, table.names)) + "]"
    given = ", ".join(f"{key}={value}" for key, value in options.items())
    return f"SELECT row_number() OVER () - 1 AS _row, * FROM read_csv({name}, {given})"


def explode(scan: str, spec: ExplodeSpec, kind: str) -> str:
    """SQL of a relation with a row for every entry of a list, numbered anew; entries' values are columns of their own.

    Args:
        scan: SQL with the list's column, of DuckDB's type `kind`.

    Raises:
        ValueError: a text without a separator, or several names of single values.
    """
    column, structs = quoted(spec.column), kind.startswith("STRUCT")
    if not kind.endswith("]") and spec.separator is None:
        raise ValueError(f'{spec.column!r} is {kind}, no list: say what separates two candidates, separator = " "')
    if not structs and spec.inner is None and len(spec.names) > 1:
        raise ValueError(f'{spec.column!r} holds single values; give one name, or what separates theirs, inner = "-"')
    entries = column if kind.endswith("]") else f"string_split({column}, {text(spec.separator)})"
    values = []
    for place, name in enumerate(spec.names, 1):
        part = "_entry" if spec.inner is None else f"string_split(_entry, {text(spec.inner)})[{place}]"
        values.append(f"{f'_entry.{quoted(name)}' if structs else part} AS {quoted(name)}")
    return (
        f"SELECT row_number() OVER () - 1 AS _row, * EXCLUDE (_row, _entry, {column}), {', '.join(values)} "
        f"FROM (SELECT *, unnest({entries}) AS _entry FROM ({scan}))"
    )


def columns(connection: duckdb.DuckDBPyConnection, sql: str) -> dict[str, str]:
    """Column -> DuckDB type of a relation."""
    return {row[0]: row[1] for row in connection.execute(f"DESCRIBE {sql}").fetchall() if row[0] != "_row"}


def rejected(connection: duckdb.DuckDBPyConnection) -> list[tuple[int, str]]:
    """(line, text) of the lines that could not be read since the last call."""
    try:
        found = connection.execute("SELECT DISTINCT line, csv_line FROM reject_errors ORDER BY line").fetchall()
    except duckdb.CatalogException:
        return []
    connection.execute("DROP TABLE reject_errors; DROP TABLE reject_scans")
    return [(int(line), content or "") for line, content in found]


def select(names: list[str]) -> str:
    """Quoted names, joined by commas."""
    return ", ".join(map(quoted, names))
