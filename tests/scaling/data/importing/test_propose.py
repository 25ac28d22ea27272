"""Proposed schema files: what is guessed of a shop, of RecBole's headers and of FuxiCTR's configuration."""

import tomllib

import duckdb
import pytest
from click.testing import CliRunner

from recscale.scaling.data.data_command import data
from recscale.scaling.data.importing.importer import import_log
from recscale.scaling.data.importing.propose import propose_schema
from recscale.scaling.data.made_up_shop import write_shop


def proposed(path, name="proposed.toml"):
    schema = path.with_name(name)
    schema.write_text(propose_schema([path]))
    return schema, tomllib.loads(schema.read_text())


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_a_proposal_can_be_imported_as_it_stands(tmp_path, form):
    write_shop(tmp_path, 2_000, form=form)
    schema, plain = proposed(tmp_path / f"log.{form}")
    assert plain["user"] == "user_id" and plain["time"] == {"column": "ts", "unit": "ms"}
    assert set(plain["labels"]) == {"is_click", "is_buy"}
    kinds = {name: field["kind"] for name, field in plain["fields"].items()}
    assert kinds == {
        "user_id": "id", "age": "dense", "city": "id", "item_id": "id", "category": "id", "price": "dense",
        "tags": "ids", "position": "id",
    }  # fmt: skip
    assert plain["fields"]["age"]["missing"] == "indicator" and plain["fields"]["user_id"]["side"] == "user"
    assert set(plain["histories"]) == {"history", "viewed"} and plain["histories"]["viewed"]["fields"] == ["item_id"]
    log = import_log(schema, tmp_path / "packed")
    assert len(log) == 2_000 and (log.ends("viewed") > 0).any()


def test_an_example_is_the_first_value_whatever_thread_reads_it(tmp_path):
    path = tmp_path / "log.parquet"
    values = "CASE WHEN i > 2 THEN 'value ' || i END AS word, i AS user_id"
    duckdb.sql(f"COPY (SELECT {values} FROM range(150_000) t(i)) TO '{path}' (ROW_GROUP_SIZE 10_000)")
    assert "for example 'value 3'" in propose_schema([path])


def test_atomic_files_say_their_types(write_recbole, tmp_path):
    folder = write_recbole(tmp_path / "ml")
    schema, plain = proposed(folder / "ml-100k.inter")
    assert plain["user"] == "user_id:token" and plain["time"] == {"column": "timestamp:float", "unit": "s"}
    assert set(plain["joins"]) == {"users", "items"} and plain["labels"]["like"]["positive"] == ">= 4"
    assert plain["fields"]["class"] == {
        "column": "class:token_seq", "side": "candidate", "kind": "ids", "separator": " ",
    }  # fmt: skip
    assert plain["fields"]["age"]["side"] == "user" and "rating" not in plain["fields"]
    log = import_log(schema, tmp_path / "packed", max_dropped=0.2)
    assert len(log) == 46 and log.schema.sequences[0].name == "history"


def test_atomic_files_without_labels_get_negatives(tmp_path):
    lines = ["user_id:token\titem_id:token\ttimestamp:float\temb:float_seq"]
    lines += [f"{k % 5}\t{k % 7}\t{1_600_000_000 + k}\t0.5 {k}" for k in range(100)]
    (tmp_path / "x.inter").write_text("\n".join(lines) + "\n")
    schema, plain = proposed(tmp_path / "x.inter")
    assert plain["negatives"] == {"within": "item_id", "per_positive": 4} and plain["fields"]["emb"]["size"] == 2
    log = import_log(schema, tmp_path / "packed")
    assert len(log) == 500 and log.labels.sum() == 100


FUXICTR = """\
shop_x1:
    data_root: ../data
    data_format: csv
    train_data: ../data/shop_x1/train.csv
    valid_data: ../data/shop_x1/valid.csv
    test_data: ../data/shop_x1/test.csv
    min_categr_count: 2
    feature_cols:
        - {name: [user_id, item_id], active: True, dtype: str, type: categorical}
        - {name: price, active: True, dtype: float, type: numeric}
        - {name: clicks, active: True, dtype: str, type: sequence, splitter: ^, max_len: 5, share_embedding: item_id}
        - {name: noise, active: False, dtype: str, type: categorical}
    label_col: {name: clk, dtype: float}
"""


def test_a_fuxictr_folder(tmp_path):
    (tmp_path / "dataset_config.yaml").write_text(FUXICTR)
    for part, rows in (("train", 80), ("valid", 20), ("test", 20)):
        lines = ["user_id,item_id,price,clicks,noise,clk"]
        lines += [f"u{k % 5},i{k % 4},{k}.5,i1^i{k % 4},x,{k // 2 % 2}" for k in range(rows)]
        (tmp_path / f"{part}.csv").write_text("\n".join(lines) + "\n")
    schema, plain = proposed(tmp_path / "dataset_config.yaml")
    assert set(plain["fields"]) == {"user_id", "item_id", "price"} and plain["fields"]["item_id"]["min_count"] == 2
    log = import_log(schema, tmp_path / "packed")
    assert log.splits == {"train": (0, 80), "valid": (80, 100), "test": (100, 120)}
    assert log.schema.sequences[0].length == 5 and log.ends("clicks").max() > 0


def test_what_cannot_be_proposed_is_said(tmp_path):
    (tmp_path / "x.inter").write_text("user,item\n1,2\n")
    (tmp_path / "x.yaml").write_text("a: 1\n")
    (tmp_path / "x.bin").write_text("1")
    for name, words in (
        ("x.inter", "has no type"),
        ("x.yaml", "no data set with feature_cols"),
        ("x.bin", "set format"),
    ):
        done = CliRunner().invoke(data, ["schema", str(tmp_path / name)])
        assert done.exit_code == 1 and words in done.output and "Traceback" not in done.output
    done = CliRunner().invoke(data, ["schema", str(tmp_path / "none.csv")])
    assert done.exit_code == 1 and "there is no file" in done.output
