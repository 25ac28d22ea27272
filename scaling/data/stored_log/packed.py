"""A click log converted once into a folder of memory-mapped columns; training never parses text.

    <folder>/meta.json               schema, sources, report, splits, files with sizes and checksums; written last
    <folder>/rows/<field>.npy        [rows] or [rows, bag] int32 ids, [rows, width] float32 dense
    <folder>/rows/labels.npy         [rows, Y] uint8, rows/label_mask.npy the same
    <folder>/rows/time.npy           [rows] int64 request times, absent for sets without times
    <folder>/rows/domain.npy         [rows] int32, absent where there is one domain
    <folder>/rows/origin.npy         [rows] int64 file * 2^40 + row of that file, absent where rows came from no file
    <folder>/index/user.npy          [rows] int64, the group of GAUC; absent where rows have no user
    <folder>/index/request.npy       [rows] int64 ascending; where it exists, user fields and domain are stored once per
                                     request: [requests] in place of [rows]
    <folder>/index/<sequence>.npy    [rows, 2] int64: key of the row's history, and its end in the store
    <folder>/events/<sequence>/      offsets.npy [keys + 1] int64, time.npy [events] int64, <field>.npy [events, ...];
                                     events sorted by (key, time)
    <folder>/vocabulary/<table>.parquet  values in id order

Rows of one split are neighbours, in the set's training order, and rows of one request are neighbours too. A
history of any length is a slice ending at the index, so its length is chosen when reading. All numbers are
little-endian. Whatever is written or opened has passed `check`.

A folder is built under a temporary name, `meta.json` is its last file and the rename its last act, so a
conversion killed at any point leaves nothing that opens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int, Int32, Int64, Shaped, UInt8

from recscale.models.inputs import Content, Field, Schema, Sequence, Task
from recscale.scaling.records.sealed import sealed, unsealed

from .card import ReadReport
from .check import CHECK_VERSION, check_log

CONVERTER_VERSION = 3
_META = "meta.json"

# Bytes of a file read at a time for its checksum.
_READ = 1 << 24


class IncompletePackedLog(ValueError):
    """A folder that is no whole packed log: torn, truncated, or of another converter version."""


@dataclasses.dataclass
class EventStore:
    """Events of one sequence, sorted by (key, time): those of key k are offsets[k] ... offsets[k + 1] - 1.

    times: None for lists stored in the rows, whose events have no time.
    """

    offsets: Int[np.ndarray, " keys_and_end"]
    times: Int[np.ndarray, " events"] | None
    columns: dict[str, Shaped[np.ndarray, "events ..."]]


@dataclasses.dataclass
class LogArrays:
    """A converted log in memory (or in memory-mapped arrays), ready to be written.

    Attributes:
        name: registered name of the data set. schema: fields, histories and tasks.
        splits: name -> (first row, end row), contiguous.
        rows: field name -> ids or dense values, one entry per row.
        users: the group of GAUC, or None.
        times: request times, or None; ticks_per_second: 1 for seconds, 1000 for milliseconds.
        events, ends: by sequence name: its store, and the end of each row's history in it.
        keys: by sequence name: index of each row into its store's offsets; of a sequence that is not named, the users.
        vocabularies: table name -> values in id order.
        report: what happened to the rows read. facts: JSON-able provenance (sources, licence, citation, constants).
    """

    name: str
    schema: Schema
    splits: dict[str, tuple[int, int]]
    rows: dict[str, Shaped[np.ndarray, "rows ..."]]
    labels: UInt8[np.ndarray, "rows Y"]
    label_mask: UInt8[np.ndarray, "rows Y"]
    users: Int[np.ndarray, " rows"] | None
    times: Int[np.ndarray, " rows"] | None
    events: dict[str, EventStore]
    ends: dict[str, Int[np.ndarray, " rows"]]
    vocabularies: dict[str, Shaped[np.ndarray, " values"]]
    report: ReadReport
    facts: dict[str, Any]
    ticks_per_second: int = 1
    keys: dict[str, Int[np.ndarray, " rows"]] = dataclasses.field(default_factory=dict)


def write_packed(log: LogArrays, folder: str | os.PathLike[str]) -> PackedLog:
    """Writes a packed log to `folder` and opens it; a complete log already there (another process won) is kept.

    Raises:
        ImpossibleLog: values that no log can have; see `check.check_log`.
        OSError: the place cannot be written to.
    """
    folder = Path(folder)
    columns = _columns(log)
    check_log(log.schema, log.splits, columns, name=log.name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise OSError(
            f"cannot write the packed log next to {folder}: {error}; make the folder writable, or choose another --out"
        ) from error
    try:
        for path, array in columns.items():
            _write_array(building / path, array)
        for table, values in log.vocabularies.items():
            write_vocabulary(building, table, values)
        write_meta(
            building,
            name=log.name,
            schema=log.schema,
            splits=log.splits,
            ticks_per_second=log.ticks_per_second,
            report=log.report,
            facts=log.facts,
        )
        building.chmod(0o755)  # mkdtemp makes a private folder; the copy is for everyone who may read its parent
        return publish(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def write_meta(
    building: Path,
    *,
    name: str,
    schema: Schema,
    splits: dict[str, tuple[int, int]],
    ticks_per_second: int,
    report: ReadReport,
    facts: dict[str, Any],
) -> None:
    """Writes `meta.json`, the last file of a folder whose arrays are checked and complete."""
    labels = np.load(building / "rows" / "labels.npy", mmap_mode="r")
    files = sorted(path for path in building.rglob("*") if path.is_file() and path.name != _META)
    meta = {
        "converter_version": CONVERTER_VERSION,
        "checked": CHECK_VERSION,
        "name": name,
        "schema": schema.to_dict(),
        "splits": {part: list(bounds) for part, bounds in splits.items()},
        "rows": len(labels),
        "ticks_per_second": ticks_per_second,
        "report": report.to_dict(),
        "facts": facts,
        "files": {path.relative_to(building).as_posix(): path.stat().st_size for path in files},
        "crc32": {path.relative_to(building).as_posix(): _crc32(path) for path in files},
        "complete": True,
    }
    (building / _META).write_text(sealed(meta, indent=1), encoding="utf-8")


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while piece := file.read(_READ):
            checksum = zlib.crc32(piece, checksum)
    return checksum


def write_vocabulary(building: Path, table: str, values: Shaped[np.ndarray, " values"]) -> None:
    """Writes the values of a table, in id order."""
    path = building / "vocabulary" / f"{table}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        pq.write_table(pa.table({"value": pa.array(values)}), file)


def is_complete(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` holds a whole packed log of this converter version."""
    try:
        PackedLog(folder)
    except (FileNotFoundError, IncompletePackedLog):
        return False
    return True


class PackedLog:
    """A log on disk, read through memory maps.

    `len(log)` and `log[i]` give rows as dictionaries, slowly, for inspection; batches are gathered column by column.
    Pickles as its folder name: no open handle travels.

    Raises:
        FileNotFoundError: the folder has no meta.json.
        IncompletePackedLog: a file is missing or has the wrong size.
        ImpossibleLog: the folder was written before today's checks, and does not pass them.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        path = self.folder / _META
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, so {self.folder} is not a complete packed log; convert again")
        meta = unsealed(path.read_bytes())
        if meta is None:
            raise IncompletePackedLog(f"{path} is not as it was written; delete {self.folder} and convert again")
        if meta.get("converter_version") != CONVERTER_VERSION or not meta.get("complete"):
            raise IncompletePackedLog(
                f"{path}: converter version {meta.get('converter_version')}, complete "
                f"{meta.get('complete')}; expected version {CONVERTER_VERSION}, complete True. "
                "Delete the folder and convert again"
            )
        for name, size in meta["files"].items():
            column = self.folder / name
            found = column.stat().st_size if column.is_file() else None
            if found != size:
                raise IncompletePackedLog(
                    f"{column}: expected {size} bytes, found {'no file' if found is None else found}; "
                    f"delete {self.folder} and convert again"
                )
        self.meta: dict[str, Any] = meta
        self.name: str = meta["name"]
        self.schema = schema_from_dict(meta["schema"])
        self.splits: dict[str, tuple[int, int]] = {k: (v[0], v[1]) for k, v in meta["splits"].items()}
        self.report = ReadReport.from_dict(meta["report"])
        self.ticks_per_second: int = meta["ticks_per_second"]
        # Every column is mapped here, by one thread: NumPy parses a header with `ast`, and two threads doing that at
        # once (a reader's first two batches) fail now and then on Python 3.11 ("AST constructor recursion depth
        # mismatch"). As plain views: the subclass np.memmap costs microseconds on every slice.
        arrays = [path for path in meta["files"] if path.endswith(".npy")]
        mapped = {path: np.load(self.folder / path, mmap_mode="r", allow_pickle=False) for path in arrays}
        self._columns = {path: np.asarray(array) for path, array in mapped.items()}
        if meta.get("checked", 0) < CHECK_VERSION:
            check_log(self.schema, self.splits, self._columns, name=str(self.folder))

    def verify(self) -> None:
        """Reads every file and compares it with its checksum.

        Raises:
            IncompletePackedLog: one is not as it was written; names it.
        """
        for name, written in self.meta["crc32"].items():
            if _crc32(self.folder / name) != written:
                raise IncompletePackedLog(
                    f"{self.folder / name} is not as it was written; delete {self.folder} and convert again"
                )

    @property
    def identity(self) -> str:
        """Hash of what the log was made from, or of its record where nobody noted that."""
        given = self.meta["facts"].get("identity")
        return given or hashlib.sha256(json.dumps(self.meta, sort_keys=True).encode()).hexdigest()[:16]

    def column(self, field: str) -> Shaped[np.ndarray, "rows ..."]:
        """Memory-mapped values of one field, one entry per row, or per request if the field is the user's and requests
        are stored."""
        return self._columns[f"rows/{field}.npy"]

    @property
    def labels(self) -> UInt8[np.ndarray, "rows Y"]:
        return self._columns["rows/labels.npy"]

    @property
    def label_mask(self) -> UInt8[np.ndarray, "rows Y"]:
        return self._columns["rows/label_mask.npy"]

    @property
    def times(self) -> Int64[np.ndarray, " rows"] | None:
        """Request times, or None for a set without times."""
        return self._columns.get("rows/time.npy")

    @property
    def users(self) -> Int64[np.ndarray, " rows"] | None:
        """User of each row, or None for a set without users."""
        return self._columns.get("index/user.npy")

    @property
    def requests(self) -> Int64[np.ndarray, " rows"] | None:
        """Request of each row, or None where a row is a request."""
        return self._columns.get("index/request.npy")

    @property
    def domains(self) -> Int32[np.ndarray, " requests"] | None:
        """Domain of each request, or None for a set with one."""
        return self._columns.get("rows/domain.npy")

    @property
    def origins(self) -> Int64[np.ndarray, " rows"] | None:
        """File * 2^40 + row in that file of each row, or None."""
        return self._columns.get("rows/origin.npy")

    def keys(self, sequence: str) -> Int64[np.ndarray, " rows"]:
        """Index of each row into the offsets of the store of `sequence`."""
        return self._columns[f"index/{sequence}.npy"][:, 0]

    def ends(self, sequence: str) -> Int64[np.ndarray, " rows"]:
        """End of each row's history in the store of `sequence`."""
        return self._columns[f"index/{sequence}.npy"][:, 1]

    def events(self, sequence: str) -> EventStore:
        """Memory-mapped event store of one sequence."""
        fields = next(s.fields for s in self.schema.sequences if s.name == sequence)
        folder = f"events/{sequence}"
        return EventStore(
            offsets=self._columns[f"{folder}/offsets.npy"],
            times=self._columns.get(f"{folder}/time.npy"),
            columns={field.name: self._columns[f"{folder}/{field.name}.npy"] for field in fields},
        )

    def has_vocabulary(self, table: str) -> bool:
        """Whether values of a table are kept; a log may come with ids alone."""
        return (self.folder / "vocabulary" / f"{table}.parquet").exists()

    def vocabulary(self, table: str) -> Shaped[np.ndarray, " values"]:
        """Values of a table in id order; the first has id 2."""
        return pq.read_table(self.folder / "vocabulary" / f"{table}.parquet")["value"].to_numpy()

    def __len__(self) -> int:
        return self.meta["rows"]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index`: fields, labels, label_mask, user, time, and per sequence its events oldest first, whole."""
        request = index if self.requests is None else self.requests[index]
        row: dict[str, Any] = {
            field.name: self.column(field.name)[request if field.side == "user" else index]
            for field in self.schema.fields
        }
        row |= {"labels": self.labels[index], "label_mask": self.label_mask[index]}
        if self.users is not None:
            row["user_index"] = self.users[index]
        if self.times is not None:
            row["request_time"] = self.times[index]
        for sequence in self.schema.sequences:
            store, end = self.events(sequence.name), self.ends(sequence.name)[index]
            seen = slice(store.offsets[self.keys(sequence.name)[index]], end)
            row[sequence.name] = {k: v[seen] for k, v in store.columns.items()}
            if store.times is not None:
                row[sequence.name]["time"] = store.times[seen]
        return row

    def __repr__(self) -> str:
        return f"PackedLog({str(self.folder)!r})"

    def __reduce__(self):
        return PackedLog, (str(self.folder),)


def schema_from_dict(plain: dict[str, Any]) -> Schema:
    """Inverse of `Schema.to_dict`, from JSON lists."""
    sequences = tuple(
        Sequence(**(s | {"fields": tuple(Field(**field) for field in s["fields"])})) for s in plain["sequences"]
    )
    content = plain.get("content")
    return Schema(
        fields=tuple(Field(**field) for field in plain["fields"]),
        sequences=sequences,
        tasks=tuple(Task(**task) for task in plain["tasks"]),
        domains=plain["domains"],
        content=content and Content(**content | {k: tuple(content[k]) for k in ("segments", "histories")}),
    )


def _columns(log: LogArrays) -> dict[str, np.ndarray]:
    """Relative path -> array."""
    columns = {f"rows/{field.name}.npy": log.rows[field.name] for field in log.schema.fields}
    columns |= {"rows/labels.npy": log.labels, "rows/label_mask.npy": log.label_mask}
    if log.users is not None:
        columns["index/user.npy"] = np.asarray(log.users, np.int64)
    if log.times is not None:
        columns["rows/time.npy"] = log.times
    for sequence in log.schema.sequences:
        store, key = log.events[sequence.name], log.keys.get(sequence.name, log.users)
        if key is None:
            raise ValueError(f"history {sequence.name!r} has no keys and the log no users; give keys")
        ends = log.ends[sequence.name]
        columns[f"index/{sequence.name}.npy"] = np.stack([np.asarray(c, np.int64) for c in (key, ends)], axis=1)
        columns[f"events/{sequence.name}/offsets.npy"] = store.offsets
        if store.times is not None:
            columns[f"events/{sequence.name}/time.npy"] = store.times
        columns |= {f"events/{sequence.name}/{field}.npy": column for field, column in store.columns.items()}
    return columns


def _write_array(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.save(file, array.astype(array.dtype.newbyteorder("<"), copy=False))


def publish(building: Path, folder: Path) -> PackedLog:
    """Gives a whole folder its name, in one step; a complete log already there is kept."""
    if folder.is_dir() and not is_complete(folder):
        shutil.rmtree(folder)
    try:
        os.rename(building, folder)
    except OSError:
        if not is_complete(folder):  # otherwise another process published the same content first
            raise
    return PackedLog(folder)
