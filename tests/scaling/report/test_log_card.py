"""The card of an imported log: figures equal to a slow count, a planted leak is named, and both ways to read it."""

import html

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from recscale.scaling.data.data_command import data
from recscale.scaling.data.importing.importer import import_log
from recscale.scaling.data.made_up_shop import write_shop
from recscale.scaling.data.stored_log.describe import describe_log
from recscale.scaling.data.stored_log.references import IDS, TWO_FEATURES

ROWS, USERS = 1_500, 30


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """A shop whose price was written after the click: a leak, with a few rows that cannot be used."""
    folder = tmp_path_factory.mktemp("shop")
    schema = write_shop(folder, ROWS, users=USERS)
    table = pq.read_table(folder / "log.parquet").to_pandas()
    table["price"] = table["price"] + 1000.0 * table["is_click"]
    table.loc[:4, "price"] = np.inf
    table.to_parquet(folder / "log.parquet")
    return import_log(schema, folder / "packed")


@pytest.fixture(scope="module")
def card(log):
    return describe_log(log)


def test_figures_equal_a_slow_count(log, card):
    table = pq.read_table(log.folder.parent / "log.parquet").to_pandas().iloc[log.origins].reset_index(drop=True)
    assert card["rows"] == ROWS - 5 and card["users"] == table["user_id"].nunique() == USERS
    assert card["report"]["dropped"] == {"not_finite": 5}
    start, end = log.splits["test"]
    test = table.iloc[start:end]
    assert card["labels"]["click"]["base_rate"]["test"] == pytest.approx(test["is_click"].mean())
    assert card["labels"]["buy"]["observed_share"] == pytest.approx(table["is_click"].mean())
    rate = test["is_click"].mean()
    assert card["labels"]["click"]["entropy"] == pytest.approx(-rate * np.log(rate) - (1 - rate) * np.log(1 - rate))
    fields = {field["name"]: field for field in card["fields"]}
    train = table.iloc[slice(*log.splits["train"])]
    assert fields["city"]["top_share"] == pytest.approx(train["city"].value_counts(normalize=True).iloc[0])
    unseen = ~test["item_id"].isin(pd.Series(log.vocabulary("item_id")))
    assert fields["item_id"]["unknown"]["test"] == pytest.approx(unseen.mean())
    first = table.sort_values("ts").groupby("user_id").cumcount() == 0
    clicks = card["histories"]["clicks"]
    assert clicks["empty_share"] >= first.mean() and clicks["future_events"] == 0


def test_a_leak_is_on_top(card):
    assert card["leaks"][0]["input"] == "price" and card["leaks"][0]["auc"] > 0.99
    assert all(row["auc"] < 0.95 for row in card["leaks"] if row["input"] not in ("price",))


def test_limits_and_references_are_said(card):
    limits = "\n".join(card["limits"])
    for words in ("carry no exponent", "test users with one class", "no length axis", "one candidate a request"):
        assert words in limits
    assert {IDS, TWO_FEATURES} == set(card["references"])


def test_terminal_and_page_say_the_same(log, tmp_path):
    done = CliRunner().invoke(data, ["card", str(log.folder), "--page", str(tmp_path / "card.html"), "--json"])
    assert done.exit_code == 0, done.output
    page = html.unescape((tmp_path / "card.html").read_text())
    for words in ("LEAK?", "not_finite", "What the log cannot support", TWO_FEATURES):
        assert words in page and words in " ".join(done.output.split())
    assert "<script" not in page and "http" not in page, "one page that needs no network"
