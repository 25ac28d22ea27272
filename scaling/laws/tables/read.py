"""Run tables from files as people have them: text with any delimiter, JSON, Parquet, Feather, compressed or not; the
folder of a sweep; and what other trackers of experiments leave behind.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow

from recscale.scaling.records.runs import TABLE, has_records, run_table

from . import adapters
from .columns import typed

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_COMPRESSED = (".gz", ".zst", ".bz2", ".lz4")
_TYPED = (".parquet", ".feather")
_INDEX = ("", "Unnamed: 0")  # what `DataFrame.to_csv` and reading it again make of an index
_NOTES = "recscale_notes"


def read(path: str | Path) -> pd.DataFrame:
    """A run table from a file, a sweep's folder, or a folder of W&B or TensorBoard runs.

    Of a sweep's folder the records of its runs are read, which are checked and never out of date; `runs.parquet` where
    there are none.

    Files: .csv, .tsv, .json, .jsonl, .ndjson, .parquet, .feather, the text ones also as .gz, .zst, .bz2 or .lz4.
    Columns get their types as `tables.columns` describes. What was decided on the way is in `notes(table)`.

    Raises ValueError naming the file: absent, of an unknown format, unreadable as what its ending says, without columns
    or with two columns of one name, or with numbers that cannot be read as such.
    """
    path = Path(path)
    if has_records(path):
        return _with_notes(run_table(path), [])
    if path.is_dir() and not (path / TABLE).exists():
        table, told = adapters.from_folder(path)
        return _with_notes(table, told)
    path = path / TABLE if path.is_dir() else path
    if not path.exists():
        raise ValueError(f"no such table: {path}")
    endings = [ending.lower() for ending in path.suffixes]
    packed = bool(endings) and endings[-1] in _COMPRESSED
    ending = (endings[:-1] if packed else endings)[-1:]
    reader = READERS.get(ending[0]) if ending else None
    if reader is None:
        raise ValueError(
            f"{path.name}: unknown table format {''.join(endings[-2:] if packed else endings[-1:])!r}; expected "
            f"{', '.join(READERS)}, the text ones also with {', '.join(_COMPRESSED)}"
        )
    told: list[str] = []
    try:
        table = reader(_content(path, packed), told)
        if not len(table.columns):
            raise ValueError("it has no columns")
        twice = table.columns[table.columns.duplicated()]
        if len(twice):
            raise ValueError(f"two columns are called {twice[0]!r}; rename one")
        table = _without_index(table, told)
        table = table if ending[0] in _TYPED else typed(table)
    except (ValueError, TypeError, OSError, KeyError, pyarrow.ArrowException) as error:  # which do not name the file
        raise ValueError(f"{path} cannot be read as {ending[0].removeprefix('.')}: {error}") from error
    table, mapped = adapters.from_export(table)
    return _with_notes(table, [*told, *mapped])


def notes(table: pd.DataFrame) -> tuple[str, ...]:
    """What `read` decided about a table: its delimiter, a column left out, names and words of other trackers mapped."""
    return tuple(table.attrs.get(_NOTES, ()))


def _with_notes(table: pd.DataFrame, told: list[str]) -> pd.DataFrame:
    table.attrs[_NOTES] = told
    return table


def _content(path: Path, packed: bool) -> bytes:
    with pyarrow.input_stream(str(path), compression="detect" if packed else None) as stream:
        return stream.read()


def _delimited(content: bytes, told: list[str]) -> pd.DataFrame:
    """Text with the delimiter that splits the header into the most names; every value is left as text."""
    text = content.decode("utf-8-sig")
    header = text.lstrip("\r\n").partition("\n")[0]
    mark = max(_DELIMITERS, key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=mark)
    names, *rows = [line for line in lines if line] or [[]]
    if not any(name.strip() for name in names):
        raise ValueError("it holds no table: the first line names no columns")
    for number, row in enumerate(rows, 1):
        if len(row) != len(names):
            raise ValueError(f"row {number} has {len(row)} values for {len(names)} columns: {mark.join(row)[:60]!r}")
    if mark != ",":
        told.append(f"columns are separated by {_DELIMITERS[mark]}")
    return pd.DataFrame(rows, columns=[name.strip() for name in names], dtype=object)


def _json(content: bytes, _: list[str]) -> pd.DataFrame:
    """A list of runs, or what `DataFrame.to_json` writes; settings inside settings become `outer.inner`."""
    found = json.loads(content)
    if isinstance(found, dict) and {"data", "schema"} <= set(found):
        found = found["data"]
    if isinstance(found, dict) and {"data", "columns"} <= set(found):
        return pd.DataFrame(found["data"], columns=found["columns"])
    return pd.DataFrame(found) if isinstance(found, dict) else _records(found)


def _json_lines(content: bytes, _: list[str]) -> pd.DataFrame:
    return _records([json.loads(line) for line in content.splitlines() if line.strip()])


def _records(found: Any) -> pd.DataFrame:
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ValueError("it is no list of runs, each an object of columns and values")
    return pd.json_normalize(found)


READERS: dict[str, Callable[[bytes, list[str]], pd.DataFrame]] = {
    ".csv": _delimited,
    ".tsv": _delimited,
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    # Compares the pages with their checksums, where the writer left any.
    ".parquet": lambda content, _: pd.read_parquet(io.BytesIO(content), page_checksum_verification=True),
    ".feather": lambda content, _: pd.read_feather(io.BytesIO(content)),
}


def _without_index(table: pd.DataFrame, told: list[str]) -> pd.DataFrame:
    """The table without the running number that `DataFrame.to_csv` writes as a nameless first column."""
    first = table.columns[0]
    if str(first) in _INDEX and table[first].astype(str).str.fullmatch(r"\d+").all() and table[first].is_unique:
        told.append(f"the first column, {first!r}, is a saved index (0, 1, 2, ...) and is left out")
        return table.drop(columns=[first])
    return table.rename(columns={first: "index"}) if first == "" else table
