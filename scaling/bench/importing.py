"""Speed and memory of an import: 10,000,000 made-up rows of 30 columns, from Parquet files to a packed log.

The import runs in a process of its own, as `recscale data import` starts it; its peak of resident memory, which counts
mapped files too, is the operating system's figure. The log lies in the page cache when it starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import duckdb

from recscale.scaling.data.stored_log.packed import PackedLog
from recscale.scaling.records.provenance import cores

ROWS = 10_000_000
FILES = 4
_IDS = {
    "shop": 50_000, "category": 300, "brand": 5_000, "city": 400, "device": 30, "channel": 8, "hour": 24,
    "query": 100_000, "creative": 20_000, "page": 60, "campaign": 3_000,
    "region": 120,
}  # fmt: skip
_NUMBERS = 12
_START_S = 1_700_000_000

# Goals at two cores and 2 GB.
_ROWS_PER_CORE_S = 50_000
_BEYOND_LIMIT = 500_000_000


def measure_import(*, rows: int = ROWS, memory_mb: int = 2_000) -> dict[str, Any]:
    """Writes the log, imports it and returns what that took.

    Args:
        rows: of the log. memory_mb: of the import's `--memory`.

    Returns:
        rows_per_s, cpu_s, rows_per_cpu_s, peak_bytes and beyond_limit_bytes (peak less `--memory`); the size of the log
        and of what was packed; `passed`: 50,000 rows/s for each core, and a peak of at most 500 MB beyond `--memory`.
    """
    with tempfile.TemporaryDirectory() as folder:
        schema = write_wide_log(Path(folder) / "log", rows)
        out = Path(folder) / "packed"
        words = ["data", "import", str(schema), "--out", str(out), "--memory", f"{memory_mb}MB"]
        start = time.perf_counter()
        command = [sys.executable, "-c", "from recscale.scaling.cli import main; main()", *words]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - start
        if os.waitstatus_to_exitcode(status):
            raise RuntimeError(f"recscale {' '.join(words)} ended with code {os.waitstatus_to_exitcode(status)}")
        log = PackedLog(out)
        packed = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        read = sum(path.stat().st_size for path in schema.parent.glob("*.parquet"))
    peak, cpu_s = used.ru_maxrss * 1024, used.ru_utime + used.ru_stime
    speed, beyond = rows / wall_s, peak - memory_mb * 1_000_000
    return {
        "rows": len(log),
        "columns": 30,
        "cores": len(cores()),
        "wall_s": wall_s,
        "rows_per_s": speed,
        "cpu_s": cpu_s,
        "rows_per_cpu_s": rows / cpu_s,
        "memory_bytes": memory_mb * 1_000_000,
        "peak_bytes": peak,
        "beyond_limit_bytes": beyond,
        "parquet_bytes": read,
        "packed_bytes": packed,
        "passed": speed >= _ROWS_PER_CORE_S * min(len(cores()), 2) and beyond <= _BEYOND_LIMIT,
    }


def write_wide_log(folder: Path, rows: int) -> Path:
    """Writes Parquet files of 30 columns and `wide.toml` into `folder`; returns the schema file.

    Columns: user, item (text), a set of tags, time, two labels, twelve ids and twelve numbers, one with holes. Items
    and the other ids are skewed: the square of a uniform number.
    """
    folder.mkdir(parents=True)
    users, items = max(rows // 50, 10), max(rows // 100, 10)

    def uniform(number: int) -> str:
        return f"(hash(i, {number}) % 1000003 / 1000003.0)"

    def skewed(number: int, size: int) -> str:
        return f"CAST(floor({size} * {uniform(number)} * {uniform(number)}) AS BIGINT)"

    columns = [
        f"CAST(hash(i, 0) % {users} AS BIGINT) AS user_id",
        f"'i' || {skewed(1, items)} AS item_id",
        f"'t' || {skewed(2, 50)} || '|t' || (50 + {skewed(3, 50)}) AS tags",
        f"{_START_S} + i * 3 AS ts",
        f"CAST({uniform(4)} < 0.2 AS TINYINT) AS is_click",
        f"CAST({uniform(5)} < 0.05 AS TINYINT) AS is_buy",
    ]
    for number, (name, size) in enumerate(_IDS.items()):
        value = skewed(10 + number, size)
        columns.append(f"'{name[0]}' || {value} AS {name}" if number % 2 else f"{value} AS {name}")
    columns += [f"CAST({uniform(30 + k)} * {10 ** (k % 4)} AS DOUBLE) AS x{k}" for k in range(1, _NUMBERS)]
    columns.append(f"CASE WHEN {uniform(30)} < 0.9 THEN {uniform(29)} END AS x0")
    with duckdb.connect() as connection:
        for part in range(FILES):
            low, high = part * rows // FILES, (part + 1) * rows // FILES
            connection.execute(
                f"COPY (SELECT {', '.join(columns)} FROM range({low}, {high}) AS t(i)) "
                f"TO '{folder}/part-{part}.parquet' (FORMAT parquet)"
            )
    schema = folder / "wide.toml"
    schema.write_text(_schema(), encoding="utf-8")
    return schema


def _schema() -> str:
    lines = ['user = "user_id"', 'time = {column = "ts", unit = "s"}', "", "[log]", 'files = ["part-*.parquet"]']
    lines += ["", "[labels.click]", 'column = "is_click"', "", "[labels.buy]", 'column = "is_buy"']
    lines += ["", "[fields.user_id]", 'side = "user"', 'kind = "id"']
    lines += ["", "[fields.item_id]", 'side = "candidate"', 'kind = "id"', "min_count = 2"]
    lines += ["", "[fields.tags]", 'side = "candidate"', 'kind = "ids"', 'separator = "|"', "max_length = 2"]
    for name in _IDS:
        lines += ["", f"[fields.{name}]", 'side = "candidate"', 'kind = "id"']
    for k in range(_NUMBERS):
        lines += ["", f"[fields.x{k}]", 'side = "candidate"', 'kind = "dense"', 'transform = "standard"']
        lines += ['missing = "indicator"'] if not k else []
    lines += ["", "[histories.clicks]", 'from = "log"', 'where = "is_click == 1"', 'fields = ["item_id"]']
    return "\n".join([*lines, "", "[split]", 'by = "time"', ""])
