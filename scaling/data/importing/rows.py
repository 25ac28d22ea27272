"""The cleaned rows as one relation: duplicates gone, requests formed, every row in its part, negatives drawn.

After `make_rows` the database has the relation `rows`: the columns of the first pass, and s (0 train, 1 valid, 2 test),
rt (time of the request) and r0 (first row of the request), which keep a request together.
"""

from __future__ import annotations

import datetime
import fnmatch
from collections.abc import Sequence
from pathlib import Path

import duckdb

from recscale.scaling.data.stored_log.card import ReadReport, Reason

from . import reading
from .clean import stored_fields
from .conditions import text
from .log_schema import SPLIT_PARTS, LogSchema

_BINS = 1 << 16
_SHARES = 1_000_000  # parts by hash are decided to this precision


def read_cleaned(
    connection: duckdb.DuckDBPyConnection, schema: LogSchema, cleaned: Sequence[Path], files: Sequence[str]
) -> ReadReport:
    """Makes the relation `good` of usable rows, and reports the others by reason. files: names of the log's files."""
    listed = "[" + ", ".join(text(path) for path in cleaned) + "]"
    connection.execute(f"CREATE OR REPLACE VIEW every AS SELECT * FROM read_parquet({listed})")
    report = ReadReport(rows_read=_one(connection, "SELECT count(*) FROM every"))
    for reason, count in connection.execute(
        "SELECT reason, count(*) FROM every WHERE reason IS NOT NULL GROUP BY reason ORDER BY reason"
    ).fetchall():
        examples = connection.execute(
            f"SELECT rid, detail FROM every WHERE reason = {text(reason)} ORDER BY rid LIMIT 3"
        ).fetchall()
        for place, (rid, detail) in enumerate(examples):
            rest = count - len(examples) + 1 if not place else 1
            report.drop(Reason(reason), f"{where(rid, files)}: {detail}", rest)
    connection.execute("CREATE OR REPLACE VIEW good AS SELECT * FROM every WHERE reason IS NULL")
    if "d0" in reading.columns(connection, "FROM every"):
        connection.execute(
            "CREATE OR REPLACE TABLE again AS SELECT rid FROM every "
            "SEMI JOIN (SELECT d0, d1 FROM every WHERE reason IS NULL GROUP BY d0, d1 HAVING count(*) > 1) "
            "USING (d0, d1) WHERE reason IS NULL QUALIFY row_number() OVER (PARTITION BY d0, d1 ORDER BY rid) > 1"
        )
        repeated = _one(connection, "SELECT count(*) FROM again")
        for place, (rid,) in enumerate(connection.execute("SELECT rid FROM again ORDER BY rid LIMIT 3").fetchall()):
            what = f"the same {', '.join(schema.unique)}" if schema.unique else "the same values"
            report.drop(
                Reason.DUPLICATE,
                f"{where(rid, files)}: {what} as an earlier row",
                1 if place else repeated - min(repeated, 3) + 1,
            )
        if repeated:
            connection.execute(
                "CREATE OR REPLACE VIEW good AS SELECT * FROM every ANTI JOIN again USING (rid) WHERE reason IS NULL"
            )
    return report


def make_rows(
    connection: duckdb.DuckDBPyConnection, schema: LogSchema, files: Sequence[str], work: Path, ticks: int
) -> None:
    """Makes the relation `rows` from `good`. ticks: of the log's times, per second.

    Raises:
        LogSchemaError: requests of several users, or rows that belong to no part.
    """
    time = "t" if schema.time is not None else "NULL::BIGINT"
    if schema.request or schema.negatives is not None:
        _with_requests(connection, schema, time)
    else:
        connection.execute(f"CREATE OR REPLACE VIEW whole AS SELECT *, {time} AS rt, rid AS r0 FROM good")
    _with_parts(connection, schema, files, ticks)
    if schema.negatives is not None:
        _with_negatives(connection, schema)
    if schema.request or schema.negatives is not None or schema.split.by == "user":
        # Made by joins: written once, for many columns are counted from it.
        path = work / "rows.parquet"
        connection.execute(f"COPY rows TO {text(path)} (FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1)")
        connection.execute(f"CREATE OR REPLACE VIEW rows AS SELECT * FROM read_parquet({text(path)})")


def where(rid: int, files: Sequence[str]) -> str:
    """File and row, counted from 1, of an origin."""
    return f"{files[rid // reading.ROWS_PER_FILE]} row {rid % reading.ROWS_PER_FILE + 1}"


def quantile(connection: duckdb.DuckDBPyConnection, column: str, source: str, shares: Sequence[float]) -> list[int]:
    """For each share the least value with at least that share of the rows below it, by counting: exact at any size."""
    low, high, rows = connection.execute(f"SELECT min({column}), max({column}), count(*) {source}").fetchall()[0]
    found = []
    for share in shares:
        before, start, end = 0, low, high + 1
        while end - start > 1:
            width = -(-(end - start) // _BINS)
            counts = connection.execute(
                f"SELECT ({column} - {start}) // {width} AS bin, count(*) {source} AND {column} >= {start} AND "
                f"{column} < {end} GROUP BY bin ORDER BY bin"
            ).fetchall()
            for place, count in counts:
                if before + count > share * rows:
                    start, end = start + place * width, min(start + (place + 1) * width, end)
                    break
                before += count
            else:
                start = end = end
                break
        found.append(start)
    return found


def _with_requests(connection: duckdb.DuckDBPyConnection, schema: LogSchema, time: str) -> None:
    own = "" if schema.request else ", hash(rid) AS q0, hash(1, rid) AS q1"
    user = "count(DISTINCT k0) > 1" if schema.user else "false"
    connection.execute(
        f"CREATE OR REPLACE TABLE requests AS SELECT q0, q1, min({time}) AS rt, min(rid) AS r0, {user} AS mixed "
        f"FROM (SELECT *{own} FROM good) GROUP BY q0, q1"
    )
    mixed = _one(connection, "SELECT count(*) FROM requests WHERE mixed")
    if mixed:
        raise schema.error(
            ("request",),
            f"{mixed:,} requests have rows of several users; add the user's column {schema.user!r} to request",
        )
    connection.execute(
        f"CREATE OR REPLACE VIEW whole AS SELECT * FROM (SELECT *{own} FROM good) "
        "JOIN (SELECT q0, q1, rt, r0 FROM requests) USING (q0, q1)"
    )


def _with_parts(connection: duckdb.DuckDBPyConnection, schema: LogSchema, files: Sequence[str], ticks: int) -> None:
    split = schema.split
    if split.by == "time":
        if split.valid_from is not None and split.test_from is not None:
            cuts = [int(_moment(date) * ticks) for date in (split.valid_from, split.test_from)]
        else:
            shares = [split.train, split.train + split.valid]
            cuts = quantile(connection, "rt", "FROM whole WHERE true", shares)
        part = f"CASE WHEN rt < {cuts[0]} THEN 0 WHEN rt < {cuts[1]} THEN 1 ELSE 2 END"
    elif split.by == "random":
        train, valid = (round(share * _SHARES) for share in (split.train, split.train + split.valid))
        draw = f"hash({split.seed}, r0) % {_SHARES}"
        part = f"CASE WHEN {draw} < {train} THEN 0 WHEN {draw} < {valid} THEN 1 ELSE 2 END"
    elif split.by == "user":
        part = _part_of_user(schema)
    else:
        part = _named_part(connection, schema, files)
    connection.execute(f"CREATE OR REPLACE VIEW rows AS SELECT * FROM (SELECT *, {part} AS s FROM whole) WHERE s >= 0")


def _part_of_user(schema: LogSchema) -> str:
    """Rows of a user by time and ties: the first share trains, or all but the last ones."""
    order = ", ".join(["rt", "r0", *(f"x{place}" for place in range(len(schema.ties))), "rid"])
    if not schema.request:
        order = ", ".join(["rt", *(f"x{place}" for place in range(len(schema.ties))), "rid"])
    place, count = f"(row_number() OVER (PARTITION BY k0 ORDER BY {order}) - 1)", "count(*) OVER (PARTITION BY k0)"
    split = schema.split
    if split.last:
        return (
            f"CASE WHEN {place} >= {count} - {split.last} THEN 2 "
            f"WHEN {place} >= {count} - {2 * split.last} THEN 1 ELSE 0 END"
        )
    # Shares in millionths, so that 0.8 of 10 rows are 8 and never 9.
    train, valid = (round(share * _SHARES) for share in (split.train, split.train + split.valid))
    return (
        f"CASE WHEN {place} * {_SHARES} < {count} * {train} THEN 0 "
        f"WHEN {place} * {_SHARES} < {count} * {valid} THEN 1 ELSE 2 END"
    )


def _named_part(connection: duckdb.DuckDBPyConnection, schema: LogSchema, files: Sequence[str]) -> str:
    """Parts by the value of a column or by file; without validation the last tenth of training, in order."""
    split, cases, taken = schema.split, [], dict[int, str]()
    for place, name in enumerate(SPLIT_PARTS):
        wanted = split.parts.get(name, ())
        if split.by == "column":
            members = ", ".join(map(text, wanted))
            condition = f"part IN ({members})" if wanted else None
        else:
            chosen = [k for k, file in enumerate(files) if any(fnmatch.fnmatch(file, pattern) for pattern in wanted)]
            if wanted and not chosen:
                raise schema.error(("split", "parts"), f"no file of the log is called {', '.join(wanted)}")
            for k in chosen:
                if taken.setdefault(k, name) != name:
                    raise schema.error(("split", "parts"), f"{files[k]} is named by the parts {taken[k]} and {name}")
            members = ", ".join(map(str, chosen))
            condition = f"rid // {reading.ROWS_PER_FILE} IN ({members})" if chosen else None
        if condition is not None:
            cases.append(f"WHEN {condition} THEN {place}")
    part = f"CASE {' '.join(cases)} ELSE -1 END"
    if "valid" in split.parts:
        return part
    by = "rt" if schema.time is not None else "r0"
    (cut,) = quantile(connection, by, f"FROM (SELECT *, {part} AS s FROM whole) WHERE s = 0", [0.9])
    return f"CASE WHEN {part} = 0 AND {by} >= {cut} THEN 1 ELSE {part} END"


def _with_negatives(connection: duckdb.DuckDBPyConnection, schema: LogSchema) -> None:
    """Adds sampled candidates to every positive request; they are no events and their label is 0."""
    spec = schema.negatives
    assert spec is not None
    stored = stored_fields(schema)
    drawn = f"f{schema.fields.index(schema.field(spec.within))}"
    own = [f"f{k}" for k, f in enumerate(schema.fields) if f.side == "candidate" and f.name in stored]
    power = 0.0 if spec.law == "uniform" else float(spec.law.partition(":")[2] or 1.0)
    others = "".join(f", arg_min({name}, rid) AS {name}" for name in own if name != drawn)
    connection.execute(
        f"CREATE OR REPLACE TABLE items AS SELECT *, sum(weight) OVER (ORDER BY {drawn}) AS upto "
        f"FROM (SELECT {drawn}{others}, CAST(ceil(1024 * pow(count(*), {power})) AS BIGINT) AS weight "
        f"FROM rows WHERE s = 0 AND {drawn} IS NOT NULL GROUP BY {drawn})"
    )
    total = _one(connection, "SELECT sum(weight) FROM items")
    if not total:
        raise schema.error(("negatives", "within"), "the training part holds no value to draw from")
    events = [f"e{k}" for k, history in enumerate(schema.histories) if history.source == "log"]
    changed = [f"i.{name} AS {name}" for name in own]
    changed += [f"false AS l{k}" for k in range(len(schema.labels))] + [f"false AS {name}" for name in events]
    # Numbers of the draw stand above those of files, so origins stay different.
    changed.append("p.rid + (p.draw << 55) AS rid")
    connection.execute(
        f"CREATE OR REPLACE TABLE drawn AS SELECT p.* REPLACE ({', '.join(changed)}) "
        f"FROM (SELECT *, hash({spec.seed}, rid, draw) % {total} AS place "
        f"FROM rows, (SELECT unnest(range(1, {spec.per_positive + 1})) AS draw) WHERE l0) p "
        "ASOF JOIN items i ON p.place < i.upto"
    )
    connection.execute("CREATE OR REPLACE TABLE observed AS FROM rows")
    connection.execute(
        "CREATE OR REPLACE VIEW rows AS FROM observed UNION ALL BY NAME SELECT * EXCLUDE (draw, place) FROM drawn"
    )


def _moment(date: str) -> float:
    moment = datetime.datetime.fromisoformat(date)
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()


def _one(connection: duckdb.DuckDBPyConnection, sql: str) -> int:
    return connection.execute(sql).fetchall()[0][0] or 0
