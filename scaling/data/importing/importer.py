"""Import of a log: two passes, each of files that are there whole or not at all, so a killed import goes on.

    first pass     every file of the log -> STAGE/clean/<k>.parquet, typed rows with reasons (or one part of them)
    second pass    all of them -> splits, vocabularies, sorted and encoded columns -> the packed folder, in one rename

The second pass takes the first passes of several parts as it takes one, so merged parts are one import.

10^10 rows of 30 columns, on paper: the first pass runs at a part's own speed (100,000 rows/s on two cores: 28 hours of
such a machine, or half an hour on 64 of them) and leaves about 1 TB of cleaned rows; the second pass sorts them once on
one machine, with about as much again of temporary disk, and writes 1.2 TB of packed columns.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from recscale.scaling.data.stored_log.card import DEFAULT_MAX_DROPPED, ReadReport, Reason
from recscale.scaling.data.stored_log.check import check_holdout, check_log
from recscale.scaling.data.stored_log.packed import PackedLog, is_complete, publish, write_meta
from recscale.scaling.data.stored_log.vocabulary import unknown_share
from recscale.scaling.records.files import replacing, write_atomically

from . import reading
from .clean import Cleaner, clean_events, stored_fields
from .conditions import text
from .encode import bag_tables, make_tables
from .log_schema import LogSchema, TableFiles, read_log_schema
from .pack import Packed, Packer, note_differing
from .rows import make_rows, read_cleaned

IMPORTER_VERSION = 1
DEFAULT_MEMORY = 2e9
SCHEMA_FILE = "schema.toml"
_PART = "part.json"
_SHOWN_REJECTS = 3
_PIECE = 1 << 20

# (what is being done, share done, rows done or None)
Progress = Callable[[str, float, int | None], None]


class OtherImport(ValueError):
    """The folder holds something else than this import would put there."""


def import_log(
    schema_file: Path | str,
    out: Path | str,
    *,
    folder: Path | str | None = None,
    memory_bytes: float = DEFAULT_MEMORY,
    max_dropped: float = DEFAULT_MAX_DROPPED,
    progress: Progress = lambda what, share, rows: None,
) -> PackedLog:
    """Imports a log into the folder `out`; one imported already, of the same schema and files, is opened.

    Args:
        schema_file: the TOML file. folder: where its files lie; None = beside it.
        memory_bytes: what the import may use, whatever the log's size. max_dropped: largest share of rejected rows.

    Raises:
        LogSchemaError, FileNotFoundError: before the first pass ends.
        TooManyRowsDropped: with the table of reasons.
        OtherImport: `out` holds another log.
    """
    schema, out = read_log_schema(schema_file), Path(out)
    folder = Path(folder) if folder is not None else schema.path.parent
    identity, sources = identify(schema, folder)
    if _is_there(out, identity):
        return PackedLog(out)
    work = out.with_name(f"{out.name}.importing")
    stage = work / "stage"
    if (work / _PART).is_file() and json.loads((work / _PART).read_text())["identity"] != identity:
        shutil.rmtree(work)
    write_atomically(work / _PART, json.dumps({"identity": identity}))
    first_pass(schema, folder, stage, (identity, sources), memory_bytes=memory_bytes, progress=progress)
    log = second_pass([stage], out, work, memory_bytes=memory_bytes, max_dropped=max_dropped, progress=progress)
    shutil.rmtree(work)
    return log


def import_part(
    schema_file: Path | str,
    out: Path | str,
    part: tuple[int, int],
    *,
    folder: Path | str | None = None,
    memory_bytes: float = DEFAULT_MEMORY,
    progress: Progress = lambda what, share, rows: None,
) -> Path:
    """The first pass over part i of n (from 1) of a log, for `merge_parts`; requests and users are never cut."""
    schema, out = read_log_schema(schema_file), Path(out)
    folder = Path(folder) if folder is not None else schema.path.parent
    sources = identify(schema, folder)
    if (out / _PART).is_file():
        found = json.loads((out / _PART).read_text())
        if found["identity"] != sources[0] or found["part"] != list(part):
            raise OtherImport(f"{out} holds part {found['part']} of another import; give --out a folder of its own")
        return out
    first_pass(schema, folder, out, sources, part=part, memory_bytes=memory_bytes, progress=progress)
    return out


def merge_parts(
    parts: Sequence[Path | str],
    out: Path | str,
    *,
    memory_bytes: float = DEFAULT_MEMORY,
    max_dropped: float = DEFAULT_MAX_DROPPED,
    progress: Progress = lambda what, share, rows: None,
) -> PackedLog:
    """The log of all its parts: the same bytes as one import.

    Raises:
        ValueError: parts that are missing, given twice or of different imports.
    """
    stages, out = [Path(part) for part in parts], Path(out)
    facts = [_read_part(stage) for stage in stages]
    if len({fact["identity"] for fact in facts}) > 1:
        raise ValueError("these parts are of different schemas or files: import them from the same ones")
    wanted = {(k + 1, facts[0]["part"][1]) for k in range(facts[0]["part"][1])}
    given = [tuple(fact["part"]) for fact in facts]
    if set(given) != wanted or len(given) != len(wanted):
        lacking = ", ".join(f"{i}/{n}" for i, n in sorted(wanted - set(given))) or "none"
        raise ValueError(f"expected each of {len(wanted)} parts once; missing: {lacking}; given: {given}")
    if _is_there(out, facts[0]["identity"]):
        return PackedLog(out)
    work = out.with_name(f"{out.name}.importing")
    log = second_pass(stages, out, work, memory_bytes=memory_bytes, max_dropped=max_dropped, progress=progress)
    shutil.rmtree(work)
    return log


def identify(schema: LogSchema, folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """Hash of the schema and of every file it names, and the files with size and hash."""
    tables = [(schema.log, "[log]"), *((join.table, f"[joins.{name}]") for name, join in schema.joins.items())]
    tables += [
        (TableFiles((history.source,)), f"[histories.{history.name}]")
        for history in schema.histories
        if history.source not in (None, "log")
    ]
    sources = []
    for table, what in tables:
        for path in reading.find(table, folder, f"{schema.path}: files of {what}"):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            sources.append(
                {
                    "file": path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path),
                    "bytes": path.stat().st_size,
                    "sha256": digest,
                }
            )
    plain = [IMPORTER_VERSION, schema.digest(), sources]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16], sources


def first_pass(
    schema: LogSchema,
    folder: Path,
    stage: Path,
    sources: tuple[str, list[dict[str, Any]]],
    *,
    memory_bytes: float,
    part: tuple[int, int] | None = None,
    progress: Progress,
) -> None:
    """Cleans every file of the log into `stage`; files that are there already stay."""
    if (stage / _PART).is_file():
        return
    (stage / "clean").mkdir(parents=True, exist_ok=True)
    connection = reading.connect(memory_bytes, stage / "spill")
    try:
        cleaner = Cleaner(schema, connection, folder)
        cleaner.probe()
        reading.rejected(connection)
        for index, file in enumerate(cleaner.files):
            target = stage / "clean" / f"{index:05d}.parquet"
            what = f"reading {file.name} ({index + 1} of {len(cleaner.files)})"
            if not target.is_file():
                with _watching(connection, what, progress), replacing(target) as temporary:
                    cleaner.write(index, temporary, part)
                    write_atomically(target.with_suffix(".json"), json.dumps(reading.rejected(connection)))
        for place, history in enumerate(schema.histories):
            target = stage / f"events_{place}.parquet"
            if (
                history.source not in (None, "log")
                and not target.is_file()
                and part in (None, (1, part[1] if part else 1))
            ):
                with _watching(connection, f"reading {history.source}", progress), replacing(target) as temporary:
                    clean_events(cleaner, history, temporary)
        files, ticks, joined = cleaner.file_names, cleaner.ticks, cleaner.joined
    finally:
        connection.close()
    shutil.rmtree(stage / "spill", ignore_errors=True)
    write_atomically(stage / SCHEMA_FILE, schema.path.read_bytes())
    for field in schema.fields:
        if field.vocabulary is not None:
            write_atomically(stage / field.vocabulary, (folder / field.vocabulary).read_bytes())
    facts = {"identity": sources[0], "sources": sources[1], "files": files, "ticks": ticks, "joined": joined}
    facts |= {"part": part and list(part)}
    write_atomically(stage / _PART, json.dumps(facts, indent=1))


def second_pass(
    stages: Sequence[Path],
    out: Path,
    work: Path,
    *,
    memory_bytes: float,
    max_dropped: float,
    progress: Progress,
) -> PackedLog:
    """Packs the cleaned rows of all stages and gives the folder its name."""
    facts = _read_part(stages[0])
    schema = read_log_schema(stages[0] / SCHEMA_FILE)
    building = work / "packed"
    for folder in (building, work / "columns"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    connection = reading.connect(memory_bytes, work / "spill")
    try:
        with _watching(connection, "counting rows and vocabularies", progress):
            report = _read_report(connection, schema, stages, facts)
            report.check(schema.name, max_dropped)
            if not report.rows_kept:
                raise ValueError(f"{schema.name}: no usable row.\n{report.summary()}")
            _read_events(connection, schema, stages, report)
            make_rows(connection, schema, facts["files"], work / "columns", facts["ticks"])
            tables = make_tables(connection, schema, building, stages[0])
            bags = bag_tables(connection, list_columns(schema, tables), work / "columns")
        packer = Packer(connection, schema, tables, bags, building, work / "columns")
        with _watching(connection, "sorting", progress):
            packed = packer.write(lambda done, total: progress("packing", done / max(total, 1), done))
    finally:
        connection.close()  # its memory goes before the arrays are checked
    note_differing(report, packed)
    progress("checking", 0.0, None)
    columns = {path.relative_to(building).as_posix(): np.load(path, mmap_mode="r") for path in building.rglob("*.npy")}
    check_holdout(packed.splits, schema.name)
    check_log(packed.schema, packed.splits, columns, name=schema.name)
    shutil.copyfile(stages[0] / SCHEMA_FILE, building / SCHEMA_FILE)
    write_meta(
        building,
        name=schema.name,
        schema=packed.schema,
        splits=packed.splits,
        ticks_per_second=facts["ticks"],
        report=report,
        facts=_facts(schema, facts, packed, columns, {name: table.rows for name, table in tables.items()}),
    )
    del columns
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    return publish(building, out)


def _is_there(out: Path, identity: str) -> bool:
    """Whether `out` is this import, whole; refuses a folder that is something else."""
    if is_complete(out):
        found = PackedLog(out).meta["facts"].get("identity")
        if found != identity:
            raise OtherImport(f"{out} holds the import of another schema or other files ({found}); give another --out")
        return True
    if out.is_dir() and any(out.iterdir()):
        raise OtherImport(f"{out} is a folder that holds something else; give --out a new folder")
    return False


def _read_part(stage: Path) -> dict[str, Any]:
    path = stage / _PART
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the part is not finished; run its import again")
    return json.loads(path.read_text(encoding="utf-8"))


def _read_report(
    connection: duckdb.DuckDBPyConnection, schema: LogSchema, stages: Sequence[Path], facts: dict[str, Any]
) -> ReadReport:
    files = facts["files"]
    cleaned = [path for stage in stages for path in sorted((stage / "clean").glob("*.parquet"))]
    report = read_cleaned(connection, schema, cleaned, files)
    for index, file in enumerate(files):  # every part reads the whole text, so one of them tells
        lines = json.loads((stages[0] / "clean" / f"{index:05d}.json").read_text(encoding="utf-8"))
        report.rows_read += len(lines)
        _note_rejected(report, file, lines)
    for name, (rows, lines) in facts["joined"].items():
        table = report.tables[name] = ReadReport(rows_read=rows + len(lines))
        _note_rejected(table, name, lines)
    return report


def _note_rejected(report: ReadReport, file: str, lines: Sequence[tuple[int, str]]) -> None:
    for place, (line, content) in enumerate(lines[:_SHOWN_REJECTS]):
        rest = len(lines) - len(lines[:_SHOWN_REJECTS]) + 1 if not place else 1
        report.drop(Reason.UNPARSABLE, f"{file}:{line}: wrong number of cells: {content!r}", rest)


def _read_events(
    connection: duckdb.DuckDBPyConnection, schema: LogSchema, stages: Sequence[Path], report: ReadReport
) -> None:
    """Makes the relations events_<k>; events that cannot be used are reported with their table."""
    for place, history in enumerate(schema.histories):
        if history.source in (None, "log"):
            continue
        paths = [
            text(stage / f"events_{place}.parquet") for stage in stages if (stage / f"events_{place}.parquet").is_file()
        ]
        connection.execute(f"CREATE OR REPLACE VIEW all_events AS SELECT * FROM read_parquet([{', '.join(paths)}])")
        counts = connection.execute(
            "SELECT reason, count(*), min(rid) FROM all_events GROUP BY reason ORDER BY reason"
        ).fetchall()
        table = ReadReport(rows_read=sum(count for _, count, _ in counts))
        for reason, count, first in counts:
            if reason is not None:
                table.drop(Reason(reason), f"{history.source} row {first + 1}", count)
        table.check(f"{schema.name}: events of {history.name}", 1.0)
        report.tables[history.name] = table
        connection.execute(
            f"CREATE OR REPLACE VIEW events_{place} AS "
            f"SELECT * FROM read_parquet([{', '.join(paths)}]) WHERE reason IS NULL"
        )


def list_columns(schema: LogSchema, tables: dict[str, Any]) -> list[tuple[str, Any]]:
    """(column, table) of every column that holds lists of ids."""
    stored = stored_fields(schema)
    found = [
        (f"f{place}", tables[field.table])
        for place, field in enumerate(schema.fields)
        if field.kind == "ids" and field.name in stored
    ]
    for number, history in enumerate(schema.histories):
        if history.columns:
            found += [(f"h{number}_{at}", tables[schema.field(name).table]) for at, name in enumerate(history.fields)]
    return found


def _facts(
    schema: LogSchema, part: dict[str, Any], packed: Packed, columns: dict[str, np.ndarray], rows: dict[str, int]
) -> dict[str, Any]:
    return {
        "identity": part["identity"],
        "sources": part["sources"],
        "importer_version": IMPORTER_VERSION,
        "time_unit": schema.time and (schema.time.unit or "timestamp"),
        "labels": {label.name: f"{label.column} {label.positive or '== 1'}" for label in schema.labels},
        "split": schema.plain.get("split", {"by": schema.split.by}),
        "negatives": schema.plain.get("negatives"),
        "users": packed.keys[0] if schema.user else None,
        "requests": packed.requests,
        "tables": rows,
        "missing": packed.missing,
        "domains": packed.domains,
        "dense": {name: vars(rule) | {"quantiles": packed.quantiles[name]} for name, rule in packed.rules.items()},
        "out_of_vocabulary": _unknown_shares(packed, columns),
        "events_before_request": {
            history.name: _lengths(
                columns[f"index/{history.name}.npy"],
                columns[f"events/{history.name}/offsets.npy"],
                packed.splits["test"],
            )
            for history in schema.histories
        },
        "licence": schema.plain["log"].get("licence"),
        "citation": schema.plain["log"].get("citation"),
    }


def _unknown_shares(packed: Packed, columns: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Split -> field -> share of unknown ids."""
    request = columns.get("index/request.npy")
    found: dict[str, dict[str, float]] = {}
    for split, (start, end) in packed.splits.items():
        found[split] = {}
        for field in packed.schema.fields:
            if field.is_dense:
                continue
            low, high = start, end
            if request is not None and field.side == "user":
                low, high = int(request[start]), int(request[end - 1]) + 1
            found[split][field.name] = unknown_share(columns[f"rows/{field.name}.npy"][low:high])
    return found


def _lengths(index: np.ndarray, offsets: np.ndarray, test: tuple[int, int]) -> dict[str, float]:
    counts = np.concatenate(
        [
            index[start : start + _PIECE, 1] - offsets[index[start : start + _PIECE, 0]]
            for start in range(0, len(index), _PIECE)
        ]
    )
    quantiles = np.quantile(counts, [0.5, 0.9, 0.99])
    return {
        "empty_share": float(np.mean(counts == 0)),
        "max": int(counts.max()),
        **dict(zip(("median", "q90", "q99"), map(float, quantiles), strict=True)),
        "test_median": float(np.median(counts[slice(*test)])),
    }


@contextlib.contextmanager
def _watching(connection: duckdb.DuckDBPyConnection, what: str, progress: Progress) -> Iterator[None]:
    """Reports what DuckDB says about its query twice a second."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            progress(what, max(connection.query_progress(), 0.0) / 100, None)

    progress(what, 0.0, None)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
