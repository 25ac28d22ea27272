"""MovieLens-100K through its shipped schemas: both published formats on 50 hand-written rows, and the real set."""

import collections
import hashlib
import json
import re

import numpy as np
import pytest
from flax import nnx

from recscale import models
from recscale.scaling.data.metrics import constant_logloss, entropy
from recscale.scaling.data.stored_log.references import IDS, TWO_FEATURES, fit_references
from recscale.scaling.data.stored_log.source import GrainSource
from recscale.scaling.training import get_config, train

# What the good rows of the fixture are, worked out from the published description and not by the code under test.
SPLIT_SIZES = {"train": 16 + 10 + 8 + 1, "valid": 2 + 1 + 1, "test": 2 + 1 + 1}
PROFILES = {1: (24, "M", "technician", "8"), 2: (53, "F", "other", "9"), 3: (None, "M", "writer", "T"),
            4: (24, "F", "writer", "0")}  # fmt: skip
FILMS = {11: (1963, ["Action", "Adventure", "War"]), 12: (1995, ["Drama", "Musical"]),
         13: (None, ["Animation", "Children's"]), 14: (None, ["unknown"])}  # fmt: skip


def film(item):
    return FILMS.get(item, (1980 + item % 4, ["Drama"]))


def good_rows(lines):
    """The accepted ratings as (user, item, rating, time, split), in row order: split, time, user, item."""
    rows, seen = [], set()
    for line in lines:
        cells = line.split()
        if len(cells) != 4 or not all(cell.isdigit() for cell in cells):
            continue
        user, item, rating, time = map(int, cells)
        if rating > 5 or time < 10**6 or user == 9 or (user, item) in seen:
            continue
        seen.add((user, item))
        rows.append((user, item, rating, time))
    out = []
    for user in sorted({row[0] for row in rows}):
        own = sorted((row for row in rows if row[0] == user), key=lambda row: (row[3], row[1]))
        for k, row in enumerate(own):
            n = len(own)
            split = 0 if 10 * k < 8 * n else 1 if 10 * k < 9 * n else 2
            out.append((*row, split))
    return sorted(out, key=lambda row: (row[4], row[3], row[0], row[1]))


def slow_ids(training):
    """value -> id by descending count, ties by value, from 2."""
    counts = collections.Counter(training)
    return {value: k + 2 for k, value in enumerate(sorted(counts, key=lambda v: (-counts[v], v)))}


@pytest.fixture(params=["recbole", "grouplens"])
def folder(request, write_recbole, write_grouplens, tmp_path):
    return {"recbole": write_recbole, "grouplens": write_grouplens}[request.param](tmp_path / request.param)


@pytest.fixture
def ratings():
    """The 50 lines the fixtures write."""
    from pathlib import Path

    text = (Path(__file__).parents[1] / "conftest.py").read_text(encoding="utf-8")
    return re.search(r'RATINGS = """\\\n(.*?)"""', text, re.DOTALL).group(1).splitlines()


def test_exact_arrays(load_movielens, folder, ratings):
    assert len(ratings) == 50
    log, rows = load_movielens(folder), good_rows(ratings)
    assert {name: end - start for name, (start, end) in log.splits.items()} == SPLIT_SIZES
    train = rows[: SPLIT_SIZES["train"]]
    assert log.labels[:, 0].tolist() == [int(row[2] >= 4) for row in rows]
    assert log.times.tolist() == [row[3] for row in rows]
    columns = {
        "user": lambda row: row[0],
        "age": lambda row: PROFILES[row[0]][0],
        "gender": lambda row: PROFILES[row[0]][1],
        "occupation": lambda row: PROFILES[row[0]][2],
        "zip": lambda row: PROFILES[row[0]][3],
        "item": lambda row: row[1],
        "year": lambda row: film(row[1])[0],
    }
    for name, value in columns.items():
        ids = slow_ids(v for v in map(value, train) if v is not None)
        assert log.column(name).tolist() == [ids.get(value(row), 1) for row in rows], name
        assert next(f for f in log.schema.fields if f.name == name).vocabulary == len(ids) + 2
    genres = slow_ids(g for row in train for g in film(row[1])[1])
    expected = [[genres.get(g, 1) for g in film(row[1])[1]] for row in rows]
    assert log.column("genre").tolist() == [(ids + [0] * 6)[:6] for ids in expected]
    assert log.vocabulary("item")[:1] == [10], "item 10 has four training rows"


def test_histories_are_what_came_before(load_movielens, folder, ratings):
    log, rows = load_movielens(folder), good_rows(ratings)
    items = slow_ids(row[1] for row in rows[: SPLIT_SIZES["train"]])
    stars = slow_ids(row[2] for row in rows[: SPLIT_SIZES["train"]])
    source = GrainSource(log, requests=8, history_length=6)
    read = [*source.iterate(0), *source.holdout()]
    found = [(batch.user.histories["history"], r) for batch in read for r in range(8) if batch.valid[r, 0]]
    assert len(found) == len(rows)
    lengths = set()
    for (history, r), row in zip(found, rows, strict=True):
        past = sorted((e for e in rows if e[0] == row[0] and e[3] < row[3]), key=lambda e: (e[3], e[1]))[::-1][:6]
        n = len(past)
        lengths.add(n)
        assert history.length[r] == n
        assert history.ids["item"][r, :n].tolist() == [items.get(e[1], 1) for e in past]
        assert history.ids["rating"][r, :n].tolist() == [stars.get(e[2], 1) for e in past]
        assert history.delta_s[r, :n].tolist() == [row[3] - e[3] for e in past]
        assert not history.ids["item"][r, n:].any() and not history.delta_s[r, n:].any()
    assert {0, 6} <= lengths


def test_exact_report(load_movielens, folder):
    report = load_movielens(folder).report
    assert (report.rows_read, report.rows_kept) == (50, 43)
    assert {str(k): v for k, v in report.dropped.items()} == {
        "unparsable": 2,
        "missing_label": 1,
        "out_of_vocabulary": 1,
        "timestamp_out_of_range": 1,
        "duplicate": 1,
        "no_profile": 1,
    }
    first = 45 if (folder / "ml-100k.inter").exists() else 44
    said = " ".join(report.examples["unparsable"])
    assert f":{first}: wrong number of cells: '4" in said and "row 44: like = x" in said
    users, items = report.tables["users"], report.tables["items"]
    assert (users.rows_read, dict(users.dropped)) == (5, {"unparsable": 1})
    assert (items.rows_read, dict(items.dropped)) == (22, {})


def test_the_formats_agree(load_movielens, write_recbole, write_grouplens, tmp_path):
    a = load_movielens(write_recbole(tmp_path / "a"))
    b = load_movielens(write_grouplens(tmp_path / "b"))
    assert a.schema == b.schema and a.splits == b.splits
    for path in a.meta["files"].keys() - {"schema.toml"}:
        assert (a.folder / path).read_bytes() == (b.folder / path).read_bytes(), path


def test_schema(load_movielens, folder):
    schema = load_movielens(folder).schema
    assert [f.name for f in schema.user_fields] == ["user", "age", "gender", "occupation", "zip"]
    assert [f.name for f in schema.candidate_fields] == ["item", "year", "genre"]
    assert schema.fields[-1].bag == 6 and [task.name for task in schema.tasks] == ["like"]
    (history,) = schema.sequences
    assert history.timestamps and [f.table_name for f in history.fields] == ["item", "rating"]


def test_vocabularies_come_from_training_alone(load_movielens, write_recbole, tmp_path, ratings):
    """New items in validation and test rows change no training id, and are unknown."""
    items = [(item, f"Film {item}", str(1900 + item), ["Drama"]) for item in range(10, 120)]
    held = {row[:2]: row for row in good_rows(ratings) if row[4] > 0}
    changed = []
    for line in ratings:
        cells = line.split()
        key = tuple(int(cell) if cell.isdigit() else None for cell in cells[:2])
        if len(cells) == 4 and key in held and int(cells[3]) == held[key][3]:
            cells[1] = str(100 + len([1 for a, b in zip(changed, ratings, strict=False) if a != b]))
        changed.append(" ".join(cells))
    before = load_movielens(write_recbole(tmp_path / "a", items=items))
    after = load_movielens(write_recbole(tmp_path / "b", ratings=changed, items=items))
    train, rest = slice(*after.splits["train"]), slice(after.splits["train"][1], None)
    for name in ("user", "age", "gender", "occupation", "zip", "item", "year", "genre"):
        np.testing.assert_array_equal(after.column(name)[train], before.column(name)[train])
        np.testing.assert_array_equal(after.vocabulary(name), before.vocabulary(name))
    assert (after.column("item")[rest] == 1).all() and (after.column("year")[rest] == 1).all()
    assert after.meta["facts"]["out_of_vocabulary"]["test"]["item"] == 1.0


def test_a_row_does_not_depend_on_its_own_time_or_later(load_movielens, write_recbole, tmp_path, ratings):
    """Ratings at or after the request, the row's own included, leave its features alone (not its label)."""
    rows = good_rows(ratings)
    plain = load_movielens(write_recbole(tmp_path / "a"))
    place = next(k for k, row in enumerate(rows) if row[4] == 2 and row[0] == 1)
    user, _, _, time, _ = rows[place]
    changed = []
    for line in ratings:
        cells = line.split()
        if len(cells) == 4 and cells[0] == str(user) and cells[2].isdigit() and int(cells[3]) >= time:
            cells[2] = str(6 - int(cells[2]))  # these are test rows, so no vocabulary moves
        changed.append(" ".join(cells))
    assert changed != ratings
    other = load_movielens(write_recbole(tmp_path / "b", ratings=changed))
    assert other.labels[place] != plain.labels[place]
    a, b = plain[place], other[place]
    for name in a.keys() - {"labels"}:
        np.testing.assert_equal(a[name], b[name])


def test_every_registered_architecture_takes_the_schema(load_movielens, write_recbole, tmp_path):
    schema = load_movielens(write_recbole(tmp_path / "set")).schema
    names = [name for name in models.list_models() if name != "lemur"]  # it encodes content, and these items have none
    assert names
    for name in names:
        model = nnx.eval_shape(lambda name=name: models.build(name, schema, rngs=nnx.Rngs(0)))
        assert models.count(name, schema).dense_params > 0 and model is not None


# The real set --------------------------------------------------------------------------------------------------------


def test_published_constants(ml100k):
    log = ml100k
    sizes = {name: end - start for name, (start, end) in log.splits.items()}
    assert sizes == {"train": 80_367, "valid": 10_037, "test": 9_596}
    assert (log.report.rows_read, log.report.rows_kept, dict(log.report.dropped)) == (100_000, 100_000, {})
    label = log.labels[:, 0].astype(float)
    split = {name: label[slice(*bounds)] for name, bounds in log.splits.items()}
    assert label.mean() == pytest.approx(0.55375, abs=1e-5)
    assert entropy(label.mean()) == pytest.approx(0.68736, abs=1e-5)
    assert split["train"].mean() == pytest.approx(0.57269, abs=1e-5)
    assert split["valid"].mean() == pytest.approx(0.48212, abs=1e-5)
    assert split["test"].mean() == pytest.approx(0.47009, abs=1e-5)
    assert constant_logloss(split["train"].mean(), split["test"]) == pytest.approx(0.71258, abs=1e-5)
    assert entropy(split["test"].mean()) == pytest.approx(0.69136, abs=1e-5)
    history = log.meta["facts"]["events_before_request"]["history"]
    assert history["test_median"] == 172 and history["empty_share"] == pytest.approx(0.021, abs=5e-4)
    # Three quarters of the rows share their second with another row of the same user.
    together = np.stack([log.users, log.times], axis=1)
    _, place, count = np.unique(together, axis=0, return_inverse=True, return_counts=True)
    assert (count[place] > 1).mean() == pytest.approx(0.76, abs=5e-3)


def test_the_constant_prediction_through_the_source(ml100k):
    source = GrainSource(ml100k, requests=1024)
    rate = source.facts()["base_rates"]["train"]
    logits = np.full((source.holdout_batches, 1024, 1, 1), np.log(rate / (1 - rate)))
    result = source.evaluate(logits)
    assert result["logloss"] == pytest.approx(0.71258, abs=1e-5) == result["constant_logloss"]
    assert result["auc"] == 0.5 == result["gauc"]
    assert result["rows"] == 9_596 and result["valid_rows"] == 10_037
    assert result["ne"] == pytest.approx(0.71258 / 0.69136, abs=3e-5)
    json.dumps([result, source.facts()])


@pytest.mark.slow
def test_the_logistic_regression_reaches_its_figures(ml100k):
    """Ridge logistic regression on user and item bias; strength .7 wins on validation."""
    references = fit_references(ml100k, strengths=(0.35, 0.5, 0.7, 1.0))
    found = references[IDS]
    assert found["strength"] == 0.7
    assert found["logloss"] == pytest.approx(0.5584, abs=5e-5)
    assert found["auc"] == pytest.approx(0.7871, abs=5e-5)
    assert found["gauc"] == pytest.approx(0.711, abs=5e-4)
    assert references[TWO_FEATURES]["logloss"] < found["logloss"] + 0.02


@pytest.mark.slow
def test_the_default_run_beats_the_logistic_regression(ml100k, tmp_path):
    """`recscale train dcnv2 --dataset DIR --out RUN` with nothing else set."""
    config = get_config("dcnv2", "stored")
    config.data.root = str(ml100k.folder)
    record = train(config, tmp_path)
    print(record["metrics"]["logloss"], record["metrics"]["auc"], record["metrics"]["gauc"], record["work"]["epochs"])
    assert record["metrics"]["logloss"] < fit_references(ml100k)[IDS]["logloss"]


@pytest.mark.slow
def test_one_pass_of_a_small_model_is_below_the_constant(ml100k, tmp_path):
    """Plumbing from file to metrics, not a trend: one pass ends below .70, a model that learned nothing is at .7126."""
    config = get_config("rankmixer", "stored")
    config.data.root = str(ml100k.folder)
    config.model.width, config.model.hidden, config.model.layers = 32, 64, 1
    config.training.requests, config.training.examples = 512, 0
    record = train(config, tmp_path)
    assert record["status"] == "done"
    assert record["metrics"]["logloss"] < 0.70 and record["metrics"]["valid_logloss"] < 0.70
    assert record["data"]["report"]["rows_kept"] == 100_000


# SHA-256 of what the hand-written adapter of before made of the real set.
PINNED = {
    "rows/age.npy": "2f8c291ea6de954a",
    "rows/gender.npy": "e6ed904ae945028b",
    "rows/genre.npy": "83a97c7e3d095de3",
    "rows/item.npy": "e32e70807def443f",
    "rows/label_mask.npy": "7afaec9db2d1f347",
    "rows/labels.npy": "23eb28d157f335ef",
    "rows/occupation.npy": "e4bb17b27d60cb3b",
    "rows/time.npy": "53aca2c30561ced6",
    "rows/user.npy": "5d64e79bd0476509",
    "rows/year.npy": "5eba5d71c6a00811",
    "rows/zip.npy": "06690f2c02f7de7c",
    "events/history/item.npy": "940e0501d0e6835f",
    "events/history/offsets.npy": "9e00f3e4452642b6",
    "events/history/rating.npy": "aefa67738db2bddb",
    "events/history/time.npy": "c595313ef540461c",
}


def test_the_real_set_is_what_the_adapter_made(ml100k):
    """The columns of the hand-written adapter that the schema replaced, byte for byte."""
    found = {}
    for path in PINNED:
        array = np.ascontiguousarray(np.load(ml100k.folder / path))
        found[path] = hashlib.sha256(array.tobytes()).hexdigest()[:16]
    assert found == PINNED
