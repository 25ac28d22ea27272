"""Run tables from files: csv, parquet, jsonl, or the folder of a sweep."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": pd.read_csv,
    ".parquet": pd.read_parquet,
    ".jsonl": lambda path: pd.read_json(path, lines=True),
}


def read(path: str | Path) -> pd.DataFrame:
    """A run table from a csv, parquet or jsonl file, or from a sweep directory that holds `runs.parquet`.

    Raises ValueError naming the file: absent, of an unknown format, unreadable as what its ending says, or without
    columns.
    """
    path = Path(path)
    if path.is_dir():
        inside = path / "runs.parquet"
        if not inside.exists():
            found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
            raise ValueError(
                f"{path} has no runs.parquet (found {found}); collect the sweep first, or name a table file"
            )
        path = inside
    if not path.exists():
        raise ValueError(f"no such table: {path}")
    if path.suffix not in READERS:
        raise ValueError(f"{path.name}: unknown table format {path.suffix!r}; expected {', '.join(READERS)}")
    try:
        table = READERS[path.suffix](path)
    except ValueError as error:  # of pandas and pyarrow, which do not name the file
        raise ValueError(f"{path} cannot be read as {path.suffix.removeprefix('.')}: {error}") from error
    if not len(table.columns):
        raise ValueError(f"{path} holds no table: it has no columns")
    return table
