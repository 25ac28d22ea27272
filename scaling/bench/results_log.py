"""Results of a long measurement on disk, a line each, so that the same command goes on where it was ended."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from recscale.scaling.records.files import write_atomically
from recscale.scaling.records.plain import plain


class ResultsLog:
    """Rows with an `id` of their own, in whole lines, each written in one go.

    Args:
        path: of the file; a last line that was cut off is dropped.

    Attributes:
        rows: of this call and those before.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_bytes() if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            write_atomically(path, whole)
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._lock, self._open = threading.Lock(), True

    def add(self, row: dict[str, Any]) -> None:
        """Keeps a row, unless the log is closed or has its id already."""
        with self._lock:
            if self._open and row["id"] not in self.ids():
                os.write(self._file, (json.dumps(plain(row)) + "\n").encode())
                self.rows.append(row)

    def ids(self) -> set[str]:
        return {row["id"] for row in self.rows}

    def close(self) -> None:
        """Nothing is added any more."""
        with self._lock:
            if self._open:
                os.close(self._file)
            self._open = False
