"""A first draft of a schema file from the log itself: columns, kinds, and what looks like a label, a user, a time."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb

from . import reading
from .clean import TICKS
from .conditions import quoted, text
from .log_schema import TableFiles
from .propose_peers import propose_fuxictr, propose_recbole

_SAMPLE_ROWS = 200_000
_LABEL = re.compile(
    r"(?:^|_)(is_?)?(click(?:ed)?|clk|like[ds]?|buy|bought|purchase[ds]?|label|convert(?:ed)?|conversion|follow|long_view|target)(?:$|_)",
    re.I,
)
_TIME = re.compile(r"(?:^|_)(ts|time|timestamp|time_ms|date|datetime|created_at|event_time)(?:$|_)", re.I)
_USER = re.compile(r"^(user|uid|userid|user_id|member|visitor|customer)(_?id)?$", re.I)
_ITEM = re.compile(
    r"(item|video|product|ad|adgroup|article|news|movie|sku|creative|candidate|doc)s?_?id$|^(item|video|product|movie)$",
    re.I,
)
_REQUEST = re.compile(r"(session|request|impression|search|query|display)_?id$", re.I)
_HISTORY = re.compile(r"hist|history|(_|^)his$|recent|previous|last_|seen|viewed", re.I)
_USER_SIDE = re.compile(
    r"^(user|u_|age|gender|sex|city|country|region|occupation|device|os|platform|language|zip|register)", re.I
)
_MEDIAN = {"low": 631_152_000, "high": 4_102_444_800}  # 1990 and 2100, seconds


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What the first rows say of a column; example: its first value."""

    name: str
    kind: str
    distinct: int
    missing: float
    least: Any
    most: Any
    example: Any


def propose_schema(paths: Sequence[Path], table: TableFiles | None = None) -> str:
    """The text of a schema file for these files, to be read and mended by a person; comments say what was seen and why.

    Raises:
        FileNotFoundError, ValueError: a file is not there, or of no known format.
    """
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
    if paths[0].suffix == ".inter":
        return propose_recbole(paths[0])
    if paths[0].suffix in (".yaml", ".yml"):
        return propose_fuxictr(paths[0])
    connection = duckdb.connect()
    kind = reading.file_format(table or TableFiles(()), paths[0])
    if kind == "parquet":
        sql = f"SELECT * FROM read_parquet({text(paths[0])})"
    elif kind == "jsonl":
        sql = f"SELECT * FROM read_json({text(paths[0])}, format='newline_delimited')"
    else:
        sql = f"SELECT * FROM read_csv({text(paths[0])}, ignore_errors=true)"
    connection.execute(f"CREATE TABLE head AS SELECT * FROM ({sql}) LIMIT {_SAMPLE_ROWS}")
    rows = connection.execute("SELECT count(*) FROM head").fetchall()[0][0]
    if not rows:
        raise ValueError(f"{paths[0]} holds no row that can be read")
    seen = [_look(connection, name, kind, rows) for name, kind in reading.columns(connection, "FROM head").items()]
    return _write(paths, kind, seen, rows, _dialect(connection, paths[0]) if kind in ("csv", "tsv") else {})


def _look(connection: duckdb.DuckDBPyConnection, name: str, kind: str, rows: int) -> _Seen:
    column = quoted(name)
    found = connection.execute(
        f"SELECT count(DISTINCT {column}), 1 - count({column}) / {rows}, min({column}), max({column}), "
        f"arg_min({column}, rowid) FROM head"
    ).fetchall()[0]
    return _Seen(name, kind, *found)


def _dialect(connection: duckdb.DuckDBPyConnection, path: Path) -> dict[str, Any]:
    delimiter, quote, header = connection.execute(
        f"SELECT Delimiter, Quote, HasHeader FROM sniff_csv({text(path)}, ignore_errors=true)"
    ).fetchall()[0]
    found: dict[str, Any] = {} if delimiter in (",", "\t") else {"delimiter": delimiter}
    if quote in ("", "\0", None):
        found["quote"] = ""
    return found | ({} if header else {"header": False})


def _write(paths: Sequence[Path], kind: str, seen: Sequence[_Seen], rows: int, dialect: dict[str, Any]) -> str:
    lines = [
        f"# Proposed from the first {rows:,} rows of {paths[0].name}; read every line, then:",
        "#     recscale data import FILE --out DIR",
    ]
    label = [c for c in seen if _is_label(c)]
    clock = next(
        (c for c in seen if c.kind.startswith(("TIMESTAMP", "DATE")) or (_TIME.search(c.name) and _unit(c))), None
    )
    request = next((c for c in seen if _REQUEST.search(c.name)), None)
    user = next((c for c in seen if _USER.match(c.name)), None)
    item = next((c for c in seen if _ITEM.search(c.name) and c is not user), None)
    if user:
        lines.append(f"user = {json.dumps(user.name)}  # {user.distinct:,} values")
    if clock:
        unit = "" if clock.kind.startswith(("TIMESTAMP", "DATE")) else f", unit = {json.dumps(_unit(clock))}"
        lines.append(f"time = {{column = {json.dumps(clock.name)}{unit}}}  # {clock.least} to {clock.most}")
    if request:
        lines.append(f"request = [{json.dumps(request.name)}]  # rows that share it are candidates of one request")
    names = "[" + ", ".join(json.dumps(path.name) for path in paths) + "]"
    lines += ["", "[log]", f"files = {names}", f'format = "{kind}"']
    lines += [f"{key} = {json.dumps(value)}" for key, value in dialect.items()]
    if dialect.get("header") is False:
        lines.append(f"names = {json.dumps([c.name for c in seen])}  # the file has no header")
    if not label:
        lines += [
            "",
            "# No column looks like a label: name it, and when it is positive.",
            "[labels.click]",
            'column = "?"',
        ]
    for c in label:
        rule = "" if _is_binary(c) else f'\npositive = ">= {c.most}"  # values {c.least} to {c.most}'
        lines += ["", f"[labels.{_key(c.name)}]", f"column = {json.dumps(c.name)}{rule}"]
    histories, used = [], {c.name for c in (*label, clock) if c is not None} | ({request.name} if request else set())
    for c in seen:
        if c.name in used:
            continue
        if _HISTORY.search(c.name) and (c.kind.endswith("]") or _separator(c)):
            histories.append(c)
            continue
        lines += ["", *_field(c, user, item, rows)]
    lines += _history_lines(histories, user, item, clock, label)
    lines += ["", "[split]"]
    if clock:
        lines += [
            'by = "time"  # the last tenth tests, the one before it validates',
            "train = 0.8",
            "valid = 0.1",
            "test = 0.1",
        ]
    else:
        lines += ['by = "random"  # no time was found', "train = 0.8", "valid = 0.1", "test = 0.1"]
    return "\n".join(lines) + "\n"


def _field(c: _Seen, user: _Seen | None, item: _Seen | None, rows: int) -> list[str]:
    side = "user" if c is user or _USER_SIDE.match(c.name) else "candidate"
    said = f"{c.distinct:,} values, {100 * c.missing:.1f} % missing, for example {str(c.example)[:40]!r}"
    lines = [f"[fields.{_key(c.name)}]  # {said}"]
    if _key(c.name) != c.name:
        lines.append(f"column = {json.dumps(c.name)}")
    lines.append(f'side = "{side}"' + ("" if c is user or c is item else "  # a guess: user, candidate or cross"))
    if c.kind.endswith("]"):
        if c.kind.startswith(("FLOAT", "DOUBLE")):
            return [*lines, 'kind = "vector"', f"size = {len(c.example or [])}"]
        return [*lines, 'kind = "ids"']
    if c.kind == "VARCHAR" and (separator := _separator(c)):
        return [*lines, 'kind = "ids"', f"separator = {json.dumps(separator)}"]
    dense = c.kind in ("FLOAT", "DOUBLE") or c.kind.startswith("DECIMAL")
    counts = c.kind in ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT") and re.search(
        r"num|count|price|duration|_days|amount|(^|_)age$", c.name, re.I
    )
    if dense or counts:
        positive = isinstance(c.least, int | float) and c.least >= 0 and c.most > 100
        lines += ['kind = "dense"', f'transform = "{"log1p" if positive else "standard"}"']
        return [*lines, 'missing = "indicator"'] if c.missing else lines
    lines.append('kind = "id"')
    if c.distinct > rows / 10 and c is not user:
        lines.append("min_count = 2  # rare values share the unknown row")
    return lines


def _history_lines(
    stored: Sequence[_Seen], user: _Seen | None, item: _Seen | None, clock: _Seen | None, label: Sequence[_Seen]
) -> list[str]:
    lines: list[str] = []
    target = json.dumps(_key(item.name)) if item else '"?"'
    if user and item and clock:
        lines += ["", "[histories.history]  # the user's earlier rows", 'from = "log"']
        if label and _is_binary(label[0]):
            lines.append(f'where = "{label[0].name} == 1"')
        lines += [f"fields = [{target}]", "length = 64"]
    for c in stored:
        lines += ["", f"[histories.{_key(c.name)}]", f"column = {json.dumps(c.name)}", f"fields = [{target}]"]
        if not c.kind.endswith("]"):
            lines.append(f"separator = {json.dumps(_separator(c))}")
        lines.append('order = "oldest first"  # check it')
    return lines


def _is_binary(c: _Seen) -> bool:
    return c.kind == "BOOLEAN" or (c.least in (0, "0") and c.most in (1, "1"))


def _is_label(c: _Seen) -> bool:
    return bool(_LABEL.search(c.name)) and c.distinct <= 10 and not c.kind.endswith("]")


def _unit(c: _Seen) -> str | None:
    """The unit in which a number is a time of our days."""
    if not isinstance(c.most, int | float):
        return None
    fitting = (unit for unit, ticks in TICKS.items() if _MEDIAN["low"] <= c.most / ticks < _MEDIAN["high"])
    return next(fitting, None)


def _separator(c: _Seen) -> str | None:
    if c.kind != "VARCHAR" or not isinstance(c.example, str):
        return None
    found = [mark for mark in ("|", ",", ";", "^") if mark in f"{c.example}{c.least}{c.most}"]
    return found[0] if found and " " not in c.example else None


def _key(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)
