"""MovieLens-100K (100,000 ratings, 943 users, 1,682 films) as a packed log for binary ranking.

    task     like = rating >= 4
    fields   user, age, gender, occupation, zip (first character); item, year, genre (a set)
    history  the user's earlier ratings: item (same table as the candidate's), rating, seconds ago
    split    within each user: sort by (time, item); of n ratings, number k (from 0) goes to train if k < ceil(.8 n),
             to valid if k < ceil(.9 n), else to test: 80,367 / 10,037 / 9,596 rows

The split moves the base rate (.573 train, .482 valid, .470 test), so the constant of the training split
scores .71258 on test while the entropy of test itself is .69136. Three quarters of the rows share their
second with another row of the same user, hence histories strictly before the request. 100,000 rows carry no
scaling exponent: this set checks the plumbing on real input.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from recscale.models.inputs import Field, Schema, Sequence, Task
from recscale.scaling.data.source import Source, SourceRequest
from recscale.scaling.data.stored_log.card import DEFAULT_MAX_DROPPED, ReadReport
from recscale.scaling.data.stored_log.histories import history_ends
from recscale.scaling.data.stored_log.packed import (
    CONVERTER_VERSION,
    EventStore,
    LogArrays,
    PackedLog,
    is_complete,
    write_packed,
)
from recscale.scaling.data.stored_log.source import grain_source
from recscale.scaling.data.stored_log.vocabulary import PADDING, Vocabulary, build_vocabulary, unknown_share

from .movielens_files import (
    CITATION,
    HOW_TO_GET,
    LICENCE,
    MISSING,
    NAME,
    Tables,
    find_tables,
    md5,
    parse_items,
    parse_ratings,
    parse_users,
    verify,
)

ADAPTER_VERSION = 1
EMBEDDING_WIDTH = 16
HISTORY_LENGTH = 64  # default read length; the packed log holds every history whole
LIKE_FROM = 4  # ratings from here on are the positive label
_SPLITS = ("train", "valid", "test")


def load(
    root: str | Path,
    *,
    max_dropped: float = DEFAULT_MAX_DROPPED,
    allow_modified: bool = False,
    cache_dir: str | Path | None = None,
) -> PackedLog:
    """Opens the packed copy of the files at `root`, converting them first if there is none.

    Args:
        root: a recbole 1.2.1 wheel, GroupLens' ml-100k.zip, or a folder holding either, packed or unpacked.
        max_dropped: largest share of rejected rows accepted.
        allow_modified: read files whose checksum differs from the published one; recorded as a warning in the facts.
        cache_dir: folder to pack into; None = `packed` beside the files, where a packed copy is looked for first.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: checksum, header or encoding wrong, or no row left to train on.
        TooManyRowsDropped: more than `max_dropped` of the rows was rejected.
    """
    tables = find_tables(root)
    key = hashlib.sha256(f"{tables.digest()} {CONVERTER_VERSION} {ADAPTER_VERSION}".encode()).hexdigest()[:16]
    beside = Path(root) if Path(root).is_dir() else Path(root).parent
    places = [beside / "packed", *([] if cache_dir is None else [Path(cache_dir)])]
    for folder in (place / NAME / key for place in places if place.is_dir()):
        if is_complete(folder):  # somebody accepted these very files
            log = PackedLog(folder)
            log.report.check(NAME, max_dropped)
            return log
    warnings = verify(tables, allow_modified=allow_modified)
    return write_packed(convert(tables, max_dropped=max_dropped, warnings=warnings), places[-1] / NAME / key)


def movielens_100k(asked: SourceRequest) -> Source:
    """The data set `movielens-100k` of a run; `data.root` is the folder of its files.

    Raises:
        FileNotFoundError: no root is given, or a file is missing.
        ValueError: overrides are given, or what `load` says about the files.
    """
    config = asked.config
    if config.overrides:
        raise ValueError(f"{config.name} takes no overrides, found {', '.join(config.overrides)}")
    if config.root is None:
        raise FileNotFoundError(
            f"{config.name}: data.root is empty; give the folder of the data set (--data DIR). {HOW_TO_GET}"
        )
    log = load(
        config.root, max_dropped=config.max_dropped, allow_modified=config.allow_modified, cache_dir=asked.cache_dir
    )
    return grain_source(log, asked)


def convert(
    tables: Tables, *, max_dropped: float = DEFAULT_MAX_DROPPED, warnings: list[str] | None = None
) -> LogArrays:
    """Parses the three files, splits within users, and builds vocabularies from the training rows."""
    report = ReadReport(tables={"users": ReadReport(), "items": ReadReport()})
    users = parse_users(tables, report.tables["users"])
    items = parse_items(tables, report.tables["items"])
    ratings = np.array(parse_ratings(tables, users, items, report), np.int64).reshape(-1, 4)
    report.check(NAME, max_dropped)
    if not len(ratings):
        raise ValueError(f"{NAME}: {tables.origin} holds no usable rating.\n{report.summary()}")

    events = ratings[np.lexsort((ratings[:, 1], ratings[:, 3], ratings[:, 0]))]  # by user, time, item
    user_ids, user_of_event, per_user = np.unique(events[:, 0], return_inverse=True, return_counts=True)
    offsets = np.r_[0, np.cumsum(per_user)]
    split = _split(np.arange(len(events)) - offsets[user_of_event], per_user[user_of_event])
    # Rows: one block per split, each in time order.
    order = np.lexsort((events[:, 1], events[:, 0], events[:, 3], split))
    row_user, row_item, row_rating, row_time = events[order].T
    bounds = np.searchsorted(split[order], np.arange(len(_SPLITS) + 1))
    train = slice(0, bounds[1])

    vocabularies, rows = _profile_columns(row_user, row_item, users, items, train)
    vocabularies["rating"] = build_vocabulary(row_rating[train])
    users_index = user_of_event[order]
    ends = history_ends(offsets, events[:, 3], users_index, row_time)
    store = EventStore(
        offsets=offsets,
        times=events[:, 3].copy(),
        columns={
            "item": vocabularies["item"].encode(events[:, 1]),
            "rating": vocabularies["rating"].encode(events[:, 2]),
        },
    )
    splits = {name: (int(bounds[k]), int(bounds[k + 1])) for k, name in enumerate(_SPLITS)}
    schema = _schema({name: vocabulary.size for name, vocabulary in vocabularies.items()}, rows["genre"].shape[1])
    return LogArrays(
        name=NAME,
        schema=schema,
        splits=splits,
        rows=rows,
        labels=(row_rating >= LIKE_FROM).astype(np.uint8)[:, None],
        label_mask=np.ones((len(row_rating), 1), np.uint8),
        users=users_index,
        times=row_time,
        events={"history": store},
        ends={"history": ends},
        vocabularies={name: vocabulary.values for name, vocabulary in vocabularies.items()},
        report=report,
        facts=_facts(tables, rows, splits, len(user_ids), ends - offsets[users_index], warnings or []),
    )


def _split(position: np.ndarray, count: np.ndarray) -> np.ndarray:
    """0 train, 1 valid, 2 test: position k of n is train below ceil(.8 n), valid below ceil(.9 n), exactly."""
    return (position >= -(-8 * count // 10)).astype(np.int64) + (position >= -(-9 * count // 10))


def _profile_columns(
    row_user: np.ndarray, row_item: np.ndarray, users: dict[int, tuple], items: dict[int, tuple], train: slice
) -> tuple[dict[str, Vocabulary], dict[str, np.ndarray]]:
    """Vocabularies from the training rows, and the id column of every field for all rows."""
    user_list, user_place = np.unique(row_user, return_inverse=True)
    item_list, item_place = np.unique(row_item, return_inverse=True)
    profiles = [users[int(user)] for user in user_list]
    films = [items[int(item)] for item in item_list]
    values: dict[str, np.ndarray] = {"user": row_user}
    for place, name in enumerate(("age", "gender", "occupation", "zip")):
        values[name] = np.array([profile[place] for profile in profiles])[user_place]
    values["item"] = row_item
    values["year"] = np.array([film[0] for film in films])[item_place]
    genres = np.full((len(films), max(2, *(len(film[1]) for film in films), 2)), "", dtype="U16")
    for row, film in zip(genres, films, strict=True):
        row[: len(film[1])] = film[1]
    values["genre"] = genres[item_place]

    vocabularies: dict[str, Vocabulary] = {}
    rows: dict[str, np.ndarray] = {}
    for name, column in values.items():
        absent = column == ("" if column.dtype.kind == "U" else MISSING)
        vocabularies[name] = build_vocabulary(column[train][~absent[train]])
        rows[name] = vocabularies[name].encode(column)
    rows["genre"][values["genre"] == ""] = PADDING
    return vocabularies, rows


def _schema(sizes: dict[str, int], genres: int) -> Schema:
    def field(name: str, side: Any, group: str, bag: int = 1) -> Field:
        return Field(name, side, EMBEDDING_WIDTH, vocabulary=sizes[name], group=group, bag=bag)

    return Schema(
        fields=(
            field("user", "user", "user"),
            *(field(name, "user", "profile") for name in ("age", "gender", "occupation", "zip")),
            field("item", "candidate", "item"),
            field("year", "candidate", "content"),
            field("genre", "candidate", "content", bag=genres),
        ),
        sequences=(
            Sequence(
                "history",
                HISTORY_LENGTH,
                fields=(field("item", "user", "history"), field("rating", "user", "history")),
                timestamps=True,
            ),
        ),
        tasks=(Task("like"),),
    )


def _facts(
    tables: Tables,
    rows: dict[str, np.ndarray],
    splits: dict[str, tuple[int, int]],
    users: int,
    history: np.ndarray,
    warnings: list[str],
) -> dict[str, Any]:
    test = slice(*splits["test"])
    return {
        "format": tables.format.name,
        "sources": [
            {"file": file.name, "bytes": len(content), "md5": md5(content)} for file, content in tables.content()
        ],
        "warnings": warnings,
        "time_unit": "s",
        "label": f"rating >= {LIKE_FROM}",
        "users": users,
        "out_of_vocabulary": {
            split: {name: unknown_share(column[slice(*bounds)]) for name, column in rows.items()}
            for split, bounds in splits.items()
        },
        "events_before_request": {
            "empty_share": float(np.mean(history == 0)),
            "max": int(history.max()),
            "test_median": float(np.median(history[test])) if history[test].size else None,
        },
        "licence": LICENCE,
        "citation": CITATION,
    }
