"""From files to a packed log: equal to a slow reader, whatever the format, the parts and the kills."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recscale.scaling.data.importing.importer import OtherImport, import_log, import_part, merge_parts
from recscale.scaling.data.importing.log_schema import LogSchemaError
from recscale.scaling.data.made_up_shop import write_shop
from recscale.scaling.data.stored_log.card import TooManyRowsDropped
from recscale.scaling.data.stored_log.source import GrainSource

ROWS, RARE = 600, 20


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return with_rare_items(write_shop(tmp_path_factory.mktemp("shop"), ROWS, users=12))


@pytest.fixture(scope="module")
def log(shop):
    return import_log(shop, shop.parent / "packed", memory_bytes=3e8)


def with_rare_items(schema):
    schema.write_text(schema.read_text().replace("min_count = 2", f"min_count = {RARE}"))
    return schema


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def slow_ids(values):
    counts = pd.Series(list(values)).value_counts()
    order = sorted(counts.index, key=lambda value: (-counts[value], value))
    return {value: place + 2 for place, value in enumerate(order)}


def test_rows_equal_a_slow_reader(shop, log):
    table = pq.read_table(shop.parent / "log.parquet").to_pandas()
    origin = log.origins
    assert sorted(origin.tolist()) == list(range(ROWS))
    rows = table.iloc[origin].reset_index(drop=True)
    assert (np.diff(log.times) >= 0).all() and log.times.tolist() == rows["ts"].tolist()
    assert log.splits == {"train": (0, 480), "valid": (480, 540), "test": (540, 600)}
    train = rows.iloc[:480]
    for field in ("user_id", "city", "category"):
        ids = slow_ids(train[field])
        assert log.column(field).tolist() == [ids.get(value, 1) for value in rows[field]]
    assert log.labels[:, 0].tolist() == rows["is_click"].tolist()
    assert log.labels[:, 1].tolist() == (rows["is_buy"] * rows["is_click"]).tolist()
    assert log.label_mask[:, 1].tolist() == rows["is_click"].tolist() and (log.label_mask[:, 0] == 1).all()
    weights = [task.weight for task in log.schema.tasks]
    assert weights == [1.0, train["is_click"].mean()], "every observed label counts alike"
    np.testing.assert_allclose(log.column("price")[:, 0], np.log1p(rows["price"]), rtol=1e-6)
    ages = train["age"].dropna()
    expected = ((rows["age"] - ages.mean()) / ages.std(ddof=0)).fillna(0)
    np.testing.assert_allclose(log.column("age")[:, 0], expected, rtol=1e-4, atol=1e-5)
    assert log.column("age")[:, 1].tolist() == rows["age"].isna().astype(float).tolist()
    tags = slow_ids(tag for value in train["tags"] for tag in value)
    expected = [([tags.get(tag, 1) for tag in value] + [0] * 4)[:4] for value in rows["tags"]]
    assert log.column("tags").tolist() == expected
    position = log.column("position")
    assert position.min() >= 2 and (np.diff(pd.Series(position).groupby(rows["position"]).first()) >= 0).all()


def test_rare_values_are_unknown(shop, log):
    table = pq.read_table(shop.parent / "log.parquet").to_pandas().iloc[log.origins].reset_index(drop=True)
    counts = table["item_id"].iloc[:480].value_counts()
    rare = table["item_id"].map(counts).fillna(0) < RARE
    assert rare.any() and ((log.column("item_id") == 1) == rare).all()
    assert log.vocabulary("item_id").tolist() == [v for v in slow_ids(table["item_id"].iloc[:480]) if counts[v] >= RARE]


def test_histories_equal_a_slow_reader(shop, log):
    rows = pq.read_table(shop.parent / "log.parquet").to_pandas().iloc[log.origins].reset_index(drop=True)
    carts = pq.read_table(shop.parent / "carts.parquet").to_pandas()
    ids = {value: place + 2 for place, value in enumerate(log.vocabulary("item_id").tolist())}
    source = GrainSource(log, requests=ROWS)
    batches = [source.batch(0), *source.holdout()]
    found = [(batch.user.histories, r) for batch in batches for r in range(ROWS) if batch.valid[r, 0]]
    lengths = set()
    for (histories, r), row in zip(found, rows.itertuples(), strict=True):
        clicks = rows[(rows.user_id == row.user_id) & (rows.ts < row.ts) & (rows.is_click == 1)].iloc[::-1][:32]
        put = (
            carts[(carts.user_id == row.user_id) & (carts.ts < row.ts)].sort_values("ts", kind="stable").iloc[::-1][:16]
        )
        viewed = row.viewed[::-1][:8].tolist()
        for name, items in (("clicks", clicks.item_id), ("carts", put.item_id), ("viewed", viewed)):
            n = len(items)
            assert histories[name].length[r] == n
            assert histories[name].ids["item_id"][r, :n].tolist() == [ids.get(item, 1) for item in items]
        assert histories["clicks"].delta_s[r, : len(clicks)].tolist() == ((row.ts - clicks.ts) // 1000).tolist()
        lengths.add(min(len(clicks), 5))
    assert {0, 5} <= lengths


def test_text_is_read_as_columns_are(shop, log, tmp_path):
    schema = with_rare_items(write_shop(tmp_path, ROWS, form="csv", users=12))
    text = schema.read_text()
    for name in ("user_id", "category"):  # numbers in a text file are texts unless the schema says otherwise
        text = text.replace(f"[fields.{name}]", f'[fields.{name}]\ntype = "int"')
    schema.write_text(text)
    other = import_log(schema, tmp_path / "packed")
    for path in log.meta["files"]:
        if path.endswith(".npy"):
            np.testing.assert_array_equal(np.load(other.folder / path), np.load(log.folder / path), err_msg=path)


def test_parts_merged_are_one_import(shop, log, tmp_path):
    parts = [import_part(shop, tmp_path / f"part{k}", (k, 2)) for k in (1, 2)]
    with pytest.raises(ValueError, match="missing: 2/2"):
        merge_parts(parts[:1], tmp_path / "packed")
    merged = merge_parts(parts, tmp_path / "packed")
    assert contents(merged.folder) == contents(log.folder)
    sizes = [sum(pq.read_metadata(path).num_rows for path in part.glob("clean/*.parquet")) for part in parts]
    assert sum(sizes) == ROWS and min(sizes) > 0


def test_again_nothing_is_done_and_another_log_is_refused(shop, log, tmp_path):
    stamp = (log.folder / "meta.json").stat().st_mtime_ns
    assert import_log(shop, log.folder).identity == log.identity
    assert (log.folder / "meta.json").stat().st_mtime_ns == stamp
    with pytest.raises(OtherImport, match="another schema or other files"):
        import_log(write_shop(tmp_path, 50, users=5), log.folder)


# What an import has written when it is killed: moments from its first file to the last ones before the folder's name.
MOMENTS = (
    "part.json",
    "stage/clean/00000.parquet",
    "stage/part.json",
    "packed/keys/0.parquet",
    "packed/rows/price.npy",
)


@pytest.mark.slow
@pytest.mark.parametrize("written", MOMENTS)
def test_a_killed_import_ends_with_the_same_bytes(shop, log, tmp_path, written):
    words = ["data", "import", str(shop), "--out", str(tmp_path / "packed")]
    command = [sys.executable, "-c", "from recscale.scaling.cli import main; main()", *words]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (tmp_path / "packed.importing" / written).exists() and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "killed before it was through"
    again = import_log(shop, tmp_path / "packed")
    assert contents(again.folder) == contents(log.folder)
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def csv_log(folder, lines, **replace):
    """A log of four columns with a minimal schema, changed by text."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.csv").write_text("user,item,ts,click,price\n" + "\n".join(lines) + "\n")
    schema = SCHEMA
    for old, new in replace.get("changes", {}).items():
        assert old in schema
        schema = schema.replace(old, new)
    (folder / "log.toml").write_text(schema)
    return folder / "log.toml"


SCHEMA = """\
user = "user"
time = {column = "ts", unit = "s"}
[log]
files = ["log.csv"]
[labels.click]
column = "click"
[fields.user]
side = "user"
kind = "id"
[fields.item]
side = "candidate"
kind = "id"
[fields.price]
side = "candidate"
kind = "dense"
[histories.past]
from = "log"
fields = ["item"]
[split]
by = "time"
"""
ITEM = '[fields.item]\nside = "candidate"\nkind = "id"'
GOOD = [f"u{k % 7},i{k % 5},{1_600_000_000 + k},{k % 2},{k / 4}" for k in range(200)]


def test_bad_rows_are_counted_by_reason_and_named(tmp_path):
    bad = {
        "u1,i1,soon,1,1.0": "unparsable",
        "u1,i1,1600000001,1,cheap": "unparsable",
        "u1,i1,1600000001": "unparsable",
        "u1,i1,1600000001,,1.0": "missing_label",
        "u1,i1,1600000001,3,1.0": "out_of_vocabulary",
        ",i1,1600000001,1,1.0": "missing_key",
        "u1,i1,1600000001,1,inf": "not_finite",
        "u1,i1,1600000001,1,": "missing_value",
        "u1,i1,16,1,1.0": "timestamp_out_of_range",
        GOOD[3]: "duplicate",
    }
    schema = csv_log(tmp_path, [*GOOD, *bad])
    with pytest.raises(TooManyRowsDropped, match="10 of 210 rows were rejected"):
        import_log(schema, tmp_path / "packed")
    report = import_log(schema, tmp_path / "packed", max_dropped=0.1).report
    assert report.rows_kept == 200
    assert {str(k): v for k, v in report.dropped.items()} == {
        reason: list(bad.values()).count(reason) for reason in bad.values()
    }
    assert "log.csv row 201: time = soon" in report.examples["unparsable"]
    assert "log.csv:204: wrong number of cells" in " ".join(report.examples["unparsable"])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({'column = "click"': 'column = "clik"'}, r"line 6: there is no column 'clik'; did you mean 'click'"),
        (
            {"[fields.price]": "[fields.prize]"},
            r"line 1\d: field 'prize': there is no column 'prize'; did you mean 'price'",
        ),
        (
            {'unit = "s"': 'unit = "ms"'},
            r'line 2: the median of .ts. is 1,600,000,\d+, which read as ms .* set unit = "s"',
        ),
        ({'unit = "s"': 'unit = "%Y-%m-%d"'}, r"line 2: 200 of the first 200 values cannot be read"),
        ({'kind = "dense"': 'kind = "dens"'}, r"line 15: kind = 'dens'; did you mean 'dense'"),
        (
            {'kind = "dense"': 'kind = "dense"\ntransfrom = "log1p"'},
            r"line 16: unknown key 'transfrom'; did you mean 'transform'",
        ),
        ({"[fields.price]": '[fields.price]\ncolumn = "item"'}, r"cannot be read, .* as numbers; use kind = \"id\""),
        ({ITEM: f'{ITEM}\ntype = "int"'}, r"line 13: .* as whole numbers; use type = \"text\""),
        ({'column = "click"': 'column = "item"'}, r"line 6: 200 of .* say when the label is positive"),
        ({'fields = ["item"]': 'fields = ["itm"]'}, r"line 18: 'itm' is no declared field; did you mean 'item'"),
        ({'by = "time"': 'by = "time"\ntrain = 0.5'}, r"shares add up to 0.7"),
        (
            {'by = "time"': 'by = "column"\ncolumn = "item"\nparts = {train = ["i0"], test = ["i0"]}'},
            "'i0' stands in two",
        ),
        ({'by = "time"': 'by = "time"\ntest_from = "2020-01-01"'}, r"valid_from and test_from go together"),
        ({'kind = "dense"': 'kind = "ids"'}, r"line 15: 'price' is VARCHAR, no list: say what separates"),
        ({'files = ["log.csv"]': 'files = ["log.csv"]\nwhere = "price >> 3"'}, "cannot read 'price >> 3'|no number"),
    ],
)
def test_mistakes_in_a_schema_are_refused_with_their_line(tmp_path, changes, text):
    schema = csv_log(tmp_path, GOOD, changes=changes)
    with pytest.raises(LogSchemaError, match=text):
        import_log(schema, tmp_path / "packed")
    assert not list(tmp_path.rglob("*.parquet")), "refused before the first pass wrote anything"


def test_a_file_in_two_parts_is_refused(tmp_path):
    changes = {'by = "time"': 'by = "files"\nparts = {train = ["log*"], test = ["*.csv"]}'}
    with pytest.raises(LogSchemaError, match=r"line 21: log.csv is named by the parts train and test"):
        import_log(csv_log(tmp_path, GOOD, changes=changes), tmp_path / "packed")


def test_a_split_without_test_rows_is_refused(tmp_path):
    changes = {'by = "time"': 'by = "time"\nvalid_from = "2001-01-01"\ntest_from = "2099-01-01"'}
    with pytest.raises(ValueError, match="split 'train' has no row|the test part is empty"):
        import_log(csv_log(tmp_path, GOOD, changes=changes), tmp_path / "packed")


def test_requests_share_their_user_fields(tmp_path):
    lines = [f"u{k // 4 % 7},i{k % 5},{1_600_000_000 + k // 4},{k % 2},{k / 4}" for k in range(200)]
    changes = {
        'user = "user"\n': 'user = "user"\nrequest = ["user", "ts"]\n',
        'by = "time"': 'by = "time"\ntrain = 0.6\nvalid = 0.2\ntest = 0.2',
    }
    log = import_log(csv_log(tmp_path, lines, changes=changes), tmp_path / "packed")
    assert log.column("user").shape == (50,) and log.column("item").shape == (200,)
    source = GrainSource(log, requests=50, candidates=4)
    batch = source.batch(0)
    assert batch.valid[:30].all() and not batch.valid[30:].any()
    assert batch.user.ids["user"][:8].tolist() == log.column("user")[:8].tolist()


def test_a_list_of_candidates_in_a_row_is_a_request(tmp_path):
    """Parquet with a list of structs: one row a request, as a server logs what it showed."""
    shown = [[{"item": f"i{(k + j) % 5}", "click": (k + j) // 2 % 2} for j in range(1 + k % 3)] for k in range(90)]
    rows = {"user": [f"u{k % 7}" for k in range(90)], "ts": [1_600_000_000 + k for k in range(90)], "shown": shown}
    pq.write_table(pa.table(rows), tmp_path / "log.parquet")
    text = SCHEMA.replace("log.csv", "log.parquet").replace(
        'user = "user"\n', 'user = "user"\nrequest = ["user", "ts"]\n'
    )
    text = text.replace("[labels.click]", '[log.explode]\ncolumn = "shown"\nnames = ["item", "click"]\n[labels.click]')
    text = text.replace('[fields.price]\nside = "candidate"\nkind = "dense"\n', "")
    (tmp_path / "log.toml").write_text(text)
    log = import_log(tmp_path / "log.toml", tmp_path / "packed")
    assert len(log) == sum(map(len, shown)) and int(log.requests[-1]) + 1 == 90
    items = log.vocabulary("item")[log.column("item") - 2].tolist()
    assert items == [candidate["item"] for row in shown for candidate in row]
    assert log.labels[:, 0].tolist() == [candidate["click"] for row in shown for candidate in row]
    (tmp_path / "log.toml").write_text(text.replace('column = "shown"', 'column = "user"'))
    with pytest.raises(LogSchemaError, match="line 6: 'user' is VARCHAR, no list: say what separates"):
        import_log(tmp_path / "log.toml", tmp_path / "other")


def test_negatives_are_drawn_and_are_no_events(tmp_path):
    lines = [f"u{k % 7},i{k % 5},{1_600_000_000 + k},1,{k % 5}" for k in range(200)]
    negatives = '[negatives]\nwithin = "item"\nper_positive = 3\n[split]'
    log = import_log(csv_log(tmp_path, lines, changes={"[split]": negatives}), tmp_path / "packed")
    assert len(log) == 800 and log.labels.sum() == 200 and log.splits["train"] == (0, 640)
    assert len(log.events("past").times) == 200
    prices, items = log.column("price")[:, 0], log.column("item")
    assert {(int(i), float(p)) for i, p in zip(items, prices, strict=True)} == {
        (int(i), float(p)) for i, p in zip(items[log.labels[:, 0] == 1], prices[log.labels[:, 0] == 1], strict=True)
    }, "a drawn candidate brings its own fields"
    assert GrainSource(log, requests=10, candidates=4).batch(0).labels.sum(axis=(1, 2)).tolist() == [1.0] * 10


def test_embedding_rows_and_width_are_settings_of_a_run(log):
    source = GrainSource(log, requests=64, embedding_width=4, embedding_rows=10)
    tables = source.schema.tables()
    assert all(rows <= 10 and width == 4 for rows, width in tables.values())
    batch, whole = source.batch(0), GrainSource(log, requests=64).batch(0)
    found, ids = batch.candidates.ids["item_id"], whole.candidates.ids["item_id"]
    assert found.max() < 10 and ((found == 1) == (ids == 1)).all()
    for id_ in np.unique(ids):
        assert len(np.unique(found[ids == id_])) == 1, "an id has one row"
    history = batch.user.histories["clicks"]
    assert history.ids["item_id"].max() < 10 and (history.ids["item_id"][:, 0] > 0).sum() == (history.length > 0).sum()


def test_a_domain_and_hashed_ids(tmp_path):
    changes = {ITEM: f"{ITEM}\nhash = 3", "[split]": '[domain]\ncolumn = "item"\n[split]'}
    log = import_log(csv_log(tmp_path, GOOD, changes=changes), tmp_path / "packed")
    assert log.schema.domains == 6 and set(log.domains.tolist()) == set(range(5))
    assert log.schema.tables()["item"][0] == 6 and set(log.column("item").tolist()) <= {2, 3, 4}
    assert GrainSource(log, requests=8).batch(0).user.domain.tolist() == log.domains[:8].tolist()
    json.dumps(log.meta)
