"""The published files of MovieLens-100K: where they may lie, what they must contain, and their rows.

Two formats hold the same data. GroupLens publishes `ml-100k.zip` with `u.data` (tab separated, no header),
`u.user` and `u.item` (separated by bars, latin-1). The wheel recbole 1.2.1 carries `ml-100k.inter`, `.user`,
`.item` (tab separated, header of `name:type`). The ratings are byte for byte equal but for the header.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from recscale.scaling.data.stored_log.card import ReadReport, Reason

NAME = "movielens-100k"
LICENCE = (
    "GroupLens research licence: research use only; acknowledge the data set in publications; no commercial "
    "use and no redistribution without permission of GroupLens, University of Minnesota. (The MIT licence of "
    "the recbole wheel covers its code, not this data.)"
)
CITATION = (
    "F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context. ACM "
    "Transactions on Interactive Intelligent Systems 5, 4, Article 19. doi:10.1145/2827872"
)
HOW_TO_GET = (
    "Get it with `recscale data movielens-100k --out DIR` (a wheel of 2.1 MB through pip), or "
    "download ml-100k.zip (4.9 MB) from grouplens.org, data sets, MovieLens 100K, and give its path. "
    "Licence: GroupLens research terms (cite, no commercial use, no redistribution)."
)
# Oldest and newest time accepted, unix seconds: 1995-01-01 and 2000-01-01. The published log lies in 1997 and 1998.
TIME_RANGE = (788_918_400, 946_684_800)
GENRES = (
    "unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy Film-Noir Horror "
    "Musical Mystery Romance Sci-Fi Thriller War Western"
).split()
MISSING = -1  # a number the profile does not give; becomes the unknown id


@dataclasses.dataclass(frozen=True)
class _File:
    """One published file: its name, size and md5, separator, and columns (header names, or just their number)."""

    name: str
    size: int
    md5: str
    separator: str
    columns: tuple[str, ...] | int
    encoding: str = "utf-8"


@dataclasses.dataclass(frozen=True)
class _Format:
    """One way the set is published: its files of ratings, users and items."""

    name: str
    files: tuple[_File, _File, _File]


_RATINGS = ("user_id:token", "item_id:token", "rating:float", "timestamp:float")
_USERS = ("user_id:token", "age:token", "gender:token", "occupation:token", "zip_code:token")
_ITEMS = ("item_id:token", "movie_title:token_seq", "release_year:token", "class:token_seq")
# The md5 of the .inter file is the publisher's reference for the copy; the others were computed from the wheel whose
# sha256 the download checks, and from a GroupLens copy whose u.data equals the body of that .inter file.
RECBOLE = _Format("recbole", (
    _File("ml-100k.inter", 1_979_230, "a8a8c3f165aedc53f63b5dc0a0463b14", "\t", _RATINGS),
    _File("ml-100k.user", 22_697, "ac50ecbab626dbefa83288a3593f92ab", "\t", _USERS),
    _File("ml-100k.item", 66_632, "fb748e97e64d9a35421d06d7083d0959", "\t", _ITEMS),
))  # fmt: skip
GROUPLENS = _Format("grouplens", (
    _File("u.data", 1_979_173, "6e47046882bad158b0efbb84cd5cb987", "\t", 4),
    _File("u.user", 22_628, "1b53539edc13caad0282c8500608a319", "|", 5),
    _File("u.item", 236_344, "c9e7f390115d79079537301d5204f3f7", "|", 5 + len(GENRES), "latin-1"),
))  # fmt: skip
_FOLDERS = ("", "ml-100k", "recbole/dataset_example/ml-100k")
_ARCHIVES = ("recbole-1.2.1*.whl", "ml-100k.zip")


@dataclasses.dataclass(frozen=True)
class Tables:
    """The three files of one copy, ratings, users and items, as bytes. origin: the folder or archive they come from."""

    format: _Format
    origin: Path
    contents: tuple[bytes, ...]

    def content(self) -> list[tuple[_File, bytes]]:
        """Each file's description and bytes."""
        return list(zip(self.format.files, self.contents, strict=True))

    def digest(self) -> str:
        """sha256 of format and contents: what a packed copy is made of."""
        return hashlib.sha256(b"\0".join([self.format.name.encode(), *self.contents])).hexdigest()


def md5(content: bytes) -> str:
    """The hex digest files are published with."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def find_tables(root: str | Path) -> Tables:
    """Reads the three files from a wheel, a zip, or a folder that holds them, unpacked or in one of those archives.

    Raises:
        FileNotFoundError: nothing there, or one of the three files is missing; names the file and how to get it.
        ValueError: the archive is not a whole zip file.
    """
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"{root} does not exist. {HOW_TO_GET}")
    if root.is_file():
        return _from_archive(root)
    for folder in (root / name for name in _FOLDERS):
        for kind in (RECBOLE, GROUPLENS):
            if any((folder / file.name).is_file() for file in kind.files):
                return _read(kind, folder, lambda name, at=folder: (at / name).read_bytes())
    for pattern in _ARCHIVES:
        for archive in sorted(root.glob(pattern)):
            return _from_archive(archive)
    wanted = " or ".join(", ".join(file.name for file in kind.files) for kind in (RECBOLE, GROUPLENS))
    raise FileNotFoundError(
        f"{NAME}: found neither {wanted} nor an archive {' or '.join(_ARCHIVES)} in {root}. {HOW_TO_GET}"
    )


def verify(tables: Tables, *, allow_modified: bool = False) -> list[str]:
    """Compares size and md5 of the three files with the published ones; returns a warning per file that differs.

    Raises:
        ValueError: a file differs and `allow_modified` is False.
    """
    warnings = []
    for file, content in tables.content():
        found = md5(content)
        if found != file.md5:
            short = len(content) < file.size
            warnings.append(
                f"{file.name} in {tables.origin} is not the published file: {len(content)} bytes, "
                f"md5 {found}; expected {file.size} bytes, md5 {file.md5}{' (truncated?)' if short else ''}"
            )
    if warnings and not allow_modified:
        raise ValueError(
            f"{NAME}: " + "\n".join(warnings) + "\nTo read it all the same convert it first: recscale data "
            f"{NAME} --source {tables.origin} --out DIR --allow-modified. {HOW_TO_GET}"
        )
    return warnings


def parse_ratings(
    tables: Tables, users: dict[int, tuple], items: dict[int, tuple], report: ReadReport
) -> list[tuple[int, int, int, int]]:
    """Accepted ratings (user, item, rating, unix seconds) in file order; `report` counts every other line."""
    accepted: list[tuple[int, int, int, int]] = []
    seen: set[tuple[int, int]] = set()
    for where, cells, line in _lines(*tables.content()[0], report):
        problem = _rating_problem(cells, users, items, seen)
        if problem is not None:
            report.drop(problem, f"{where}: {line!r}")
            continue
        user, item, rating, time = (_integer(cell) for cell in cells)
        seen.add((user, item))
        accepted.append((user, item, rating, time))
    return accepted


def parse_users(tables: Tables, report: ReadReport) -> dict[int, tuple[int, str, str, str]]:
    """Profiles by user: age (missing if it is no number), gender, occupation, first character of the zip code."""
    users: dict[int, tuple[int, str, str, str]] = {}
    for where, cells, line in _lines(*tables.content()[1], report):
        user = _key(cells[0], users, report, where, line)
        if user is None:
            continue
        age = _integer(cells[1], MISSING)
        if age == MISSING:
            report.repair(Reason.UNPARSABLE, f"{where}: age {cells[1]!r}")
        users[user] = (age, cells[2], cells[3], cells[4][:1])
    return users


def parse_items(tables: Tables, report: ReadReport) -> dict[int, tuple[int, list[str]]]:
    """Year and genres by item. The year is the last parenthesis of the title if it is a year, else missing."""
    items: dict[int, tuple[int, list[str]]] = {}
    for where, cells, line in _lines(*tables.content()[2], report):
        item = _key(cells[0], items, report, where, line)
        if item is None:
            continue
        if tables.format is RECBOLE:
            text, genres = cells[2], cells[3].split()
        else:
            text = (re.findall(r"\(([^()]*)\)", cells[1]) or [""])[-1]
            genres = [genre for genre, flag in zip(GENRES, cells[5:], strict=True) if flag == "1"]
        year = int(text) if re.fullmatch(r"\d{4}", text) else MISSING
        if year == MISSING:
            report.repair(Reason.UNPARSABLE, f"{where}: year {text!r}")
        items[item] = (year, genres)
    return items


def _from_archive(path: Path) -> Tables:
    try:
        with zipfile.ZipFile(path) as archive:
            names = {Path(name).name: name for name in archive.namelist()}
            for kind in (RECBOLE, GROUPLENS):
                if any(file.name in names for file in kind.files):
                    return _read(kind, path, lambda name: archive.read(names[name]))
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is not a whole zip or wheel ({error}); it may be truncated. {HOW_TO_GET}") from error
    raise FileNotFoundError(f"{path} holds neither ml-100k.inter nor u.data. {HOW_TO_GET}")


def _read(kind: _Format, origin: Path, read: Callable[[str], bytes]) -> Tables:
    content = []
    for file in kind.files:
        try:
            content.append(read(file.name))
        except (FileNotFoundError, KeyError) as error:
            raise FileNotFoundError(
                f"{NAME}: {file.name} is missing from {origin}, which holds others of the set. {HOW_TO_GET}"
            ) from error
    return Tables(kind, origin, tuple(content))


def _lines(file: _File, content: bytes, report: ReadReport) -> Iterator[tuple[str, list[str], str]]:
    """(file:line, cells, line) of every line with the right number of cells; the others count as unparsable."""
    try:
        text = content.decode(file.encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name} is not {file.encoding} text ({error}); it may be damaged") from error
    lines = text.removesuffix("\n").split("\n")  # not splitlines: latin-1 titles may hold characters it breaks at
    width, first = file.columns, 1
    if not isinstance(width, int):
        _check_header(file.name, width, lines[0].rstrip("\r").split(file.separator))
        width, first = len(width), 2
    for number, raw in enumerate(lines[first - 1 :], start=first):
        line = raw.rstrip("\r")
        cells = line.split(file.separator)
        report.rows_read += 1
        where = f"{file.name}:{number}"
        if len(cells) == width:
            yield where, cells, line
        else:
            report.drop(Reason.UNPARSABLE, f"{where}: {len(cells)} cells instead of {width}: {line!r}")


def _check_header(file: str, columns: tuple[str, ...], found: list[str]) -> None:
    unknown = [name for name in found if name not in columns]
    missing = [name for name in columns if name not in found]
    if found != list(columns):
        raise ValueError(
            f"{file}: expected columns {', '.join(columns)}; found {', '.join(found)}"
            + (f"; unknown column {', '.join(map(repr, unknown))}" if unknown else "")
            + (f"; missing column {', '.join(map(repr, missing))}" if missing else "")
        )


def _key(cell: str, seen: dict[int, tuple], report: ReadReport, where: str, line: str) -> int | None:
    key = _integer(cell, MISSING)
    if key == MISSING or key in seen:
        report.drop(Reason.UNPARSABLE if key == MISSING else Reason.DUPLICATE, f"{where}: {line!r}")
        return None
    return key


def _rating_problem(
    cells: list[str], users: dict[int, tuple], items: dict[int, tuple], seen: set[tuple[int, int]]
) -> Reason | None:
    if not cells[2].strip():
        return Reason.MISSING_LABEL
    user, item, rating, time = (_number(cell) for cell in cells)
    if user is None or item is None or rating is None or time is None or int(time) != time:
        return Reason.UNPARSABLE
    if rating not in (1, 2, 3, 4, 5):
        return Reason.OUT_OF_VOCABULARY
    if not TIME_RANGE[0] <= time < TIME_RANGE[1]:
        return Reason.TIMESTAMP_OUT_OF_RANGE
    if user not in users or item not in items:
        return Reason.NO_PROFILE
    return Reason.DUPLICATE if (user, item) in seen else None


def _number(cell: str) -> float | int | None:
    """The number written in a cell, an int where it is written as one, None if it is no finite number."""
    if re.fullmatch(r"\s*[+-]?\d+\s*", cell, re.ASCII):
        return int(cell)
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if abs(value) < float("inf") else None


def _integer(cell: str, otherwise: int = MISSING) -> int:
    value = _number(cell)
    return int(value) if value is not None and value >= 0 and int(value) == value else otherwise
