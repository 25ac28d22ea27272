"""Hand-written copies of published files, and a made-up packed log."""

import numpy as np
import pytest

from recscale.models.inputs import Field, Schema, Sequence, Task
from recscale.scaling.data.importing.importer import import_log
from recscale.scaling.data.importing.shipped import schema_path
from recscale.scaling.data.stored_log.card import ReadReport
from recscale.scaling.data.stored_log.histories import history_ends
from recscale.scaling.data.stored_log.packed import EventStore, LogArrays, write_packed

# 50 lines of ratings: 43 good ones and one of each bad kind. Users 1, 2, 3, 4 have 20, 12, 10 and 1; several share a
# second; the file is in no order.
RATINGS = """\
2 10 4 880000100
1 10 5 880000000
1 11 3 880000000
1 12 4 880000000
3 14 2 880000300
1 13 2 880000050
1 14 4 880000050
2 11 5 880000100
1 15 5 880000060
1 16 1 880000070
4 10 3 880000900
1 17 4 880000080
1 18 4 880000090
1 19 2 880000100
3 10 5 880000310
1 20 3 880000110
2 12 1 880000120
1 21 5 880000120
1 22 4 880000130
1 23 2 880000140
2 13 4 880000130
1 24 1 880000150
1 25 5 880000160
1 26 4 880000200
1 27 3 880000200
2 14 2 880000140
3 11 4 880000310
1 28 5 880000210
1 29 2 880000220
2 15 5 880000140
2 16 3 880000150
3 12 3 880000320
2 17 4 880000160
2 18 4 880000170
3 13 4 880000330
2 19 1 880000180
2 20 5 880000500
2 31 2 880000600
3 15 1 880000340
3 16 5 880000350
3 17 4 880000360
3 18 2 880000370
3 30 4 880000370
4 11 5
4 12 x 880000900
4 13 - 880000900
4 14 6 880000900
4 15 4 99
1 10 2 880000999
9 10 4 880000900""".splitlines()
USERS = """\
1 24 M technician 85711
2 53 F other 94043
3 unknown M writer T8H1N
4 24 F writer 05201
5 33 F""".splitlines()
BAD_RATINGS = {
    "unparsable": 2,
    "missing_label": 1,
    "out_of_vocabulary": 1,
    "timestamp_out_of_range": 1,
    "duplicate": 1,
    "no_profile": 1,
}
GENRE_NAMES = (
    "unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy Film-Noir Horror Musical "
    "Mystery Romance Sci-Fi Thriller War Western"
).split()


def _items():
    """(item, title, year text, genres) of items 10 ... 31, with the oddities of the real file."""
    items = [(item, f"Film {item}", str(1980 + item % 4), ["Drama"]) for item in range(10, 32)]
    items[1] = (11, 'The "Great" Escape, Part 2', "1963", ["Action", "Adventure", "War"])
    items[2] = (12, "Les Misérables", "1995", ["Drama", "Musical"])
    items[3] = (13, "Before Time III (1995)", "V", ["Animation", "Children's"])
    items[4] = (14, "unknown", "unkonwn", ["unknown"])
    return items


def _table(lines):
    """Rows of cells from lines separated by blanks; `-` stands for an empty cell."""
    return [["" if cell == "-" else cell for cell in line.split()] for line in lines]


@pytest.fixture
def write_recbole():
    """Writes the set as recbole publishes it: typed header, tabs."""

    def write(folder, ratings=RATINGS, users=USERS, items=None):
        folder.mkdir(parents=True, exist_ok=True)
        head = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
        lines = [head, *("\t".join(row) for row in _table(ratings))]
        (folder / "ml-100k.inter").write_text("\n".join(lines) + "\n", encoding="utf-8")
        head = "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"
        lines = [head, *("\t".join(row) for row in _table(users))]
        (folder / "ml-100k.user").write_text("\n".join(lines) + "\n", encoding="utf-8")
        head = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
        lines = [head, *(f"{i}\t{t}\t{y}\t{' '.join(g)}" for i, t, y, g in items or _items())]
        (folder / "ml-100k.item").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder

    return write


@pytest.fixture
def write_grouplens():
    """Writes the same set as GroupLens publishes it: no header, bars, latin-1, genre flags, year inside the title."""

    def write(folder, ratings=RATINGS, users=USERS):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "u.data").write_text("\n".join("\t".join(row) for row in _table(ratings)) + "\n")
        (folder / "u.user").write_text("\n".join("|".join(row) for row in _table(users)) + "\n")
        lines = []
        for item, title, year, genres in _items():
            title = title if year == "unkonwn" else f"{title} ({year})"
            flags = ["1" if name in genres else "0" for name in GENRE_NAMES]
            lines.append("|".join([str(item), title, "01-Jan-1995", "", "http://example.org", *flags]))
        (folder / "u.item").write_text("\n".join(lines) + "\n", encoding="latin-1")
        return folder

    return write


@pytest.fixture(scope="session")
def load_movielens():
    """Imports a folder of the set's files, in whichever published format."""

    def load(folder, max_dropped=0.2):
        kind = "movielens-100k" if (folder / "ml-100k.inter").exists() else "movielens-100k-grouplens"
        return import_log(
            schema_path(kind), folder.with_name(f"{folder.name}-packed"), folder=folder, max_dropped=max_dropped
        )

    return load


@pytest.fixture(scope="session")
def made_up_arrays():
    """A random log with everything the format can hold: bags, dense fields, two tasks with holes, two sequences, ms."""
    return make_arrays()


def make_arrays(rows=300, users=9, seed=0):
    rng = np.random.default_rng(seed)
    user, tick = rng.integers(0, users - 1, rows), rng.integers(0, 60, rows) * 1700 + 1_600_000_000_000
    tick.sort()
    split = np.repeat([0, 1, 2], [rows - 90, 50, 40])
    order = np.lexsort((user, tick, split))  # rows of one request are neighbours
    user, tick, split = user[order], tick[order], split[order]
    events, ends = {}, {}
    for name, amount in (("clicks", 400), ("buys", 30)):
        owner, time = rng.integers(0, users - 1, amount), rng.integers(0, 60, amount) * 1700 + 1_600_000_000_000
        place = np.lexsort((time, owner))
        owner, time = owner[place], time[place]
        offsets = np.searchsorted(owner, np.arange(users + 1))
        columns = {"item": rng.integers(2, 40, amount, dtype=np.int32)}
        if name == "clicks":
            columns["tags"] = rng.integers(0, 9, (amount, 3), dtype=np.int32)
            columns["dwell"] = rng.random((amount, 2), dtype=np.float32)
        events[name] = EventStore(offsets, time, columns)
        ends[name] = history_ends(offsets, time, user, tick)
    schema = Schema(
        fields=(
            Field("user", "user", 4, vocabulary=20),
            Field("age", "user", 3),
            Field("item", "candidate", 4, vocabulary=40),
            Field("tags", "candidate", 4, vocabulary=9, bag=3),
            Field("price", "candidate", 1),
            Field("match", "cross", 4, vocabulary=5),
        ),
        sequences=(
            Sequence(
                "clicks",
                6,
                (
                    Field("item", "user", 4, vocabulary=40),
                    Field("tags", "user", 4, vocabulary=9, bag=3),
                    Field("dwell", "user", 2),
                ),
                timestamps=True,
            ),
            Sequence("buys", 2, (Field("item", "user", 4, vocabulary=40),)),
        ),
        tasks=(Task("click"), Task("buy")),
    )
    columns = {
        "user": (user + 2).astype(np.int32),
        "age": rng.random((rows, 3), dtype=np.float32)[user],
        "item": rng.integers(2, 40, rows, dtype=np.int32),
        "tags": rng.integers(0, 9, (rows, 3), dtype=np.int32),
        "price": rng.random((rows, 1), dtype=np.float32),
        "match": rng.integers(0, 5, rows, dtype=np.int32),
    }
    bounds = np.searchsorted(split, np.arange(4))
    return LogArrays(
        name="made-up",
        schema=schema,
        splits={name: (int(bounds[k]), int(bounds[k + 1])) for k, name in enumerate(("train", "valid", "test"))},
        rows=columns,
        labels=rng.integers(0, 2, (rows, 2), dtype=np.uint8),
        label_mask=(rng.random((rows, 2)) < 0.9).astype(np.uint8),
        users=user,
        times=tick,
        events=events,
        ends=ends,
        vocabularies={"item": np.arange(100, 138)},
        report=ReadReport(rows_read=rows),
        facts={"licence": "none"},
        ticks_per_second=1000,
    )


@pytest.fixture(scope="session")
def made_up_log(made_up_arrays, tmp_path_factory):
    return write_packed(made_up_arrays, tmp_path_factory.mktemp("packed") / "made-up")
