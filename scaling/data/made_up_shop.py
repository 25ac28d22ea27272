"""A made-up log of a shop, for trying an import: impressions, clicks, purchases, lists viewed before, a table of carts.

Nothing in it was measured; clicks follow hidden tastes of users and items, so that a model has something to learn.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

_START_MS = 1_700_000_000_000
_DAYS = 30
_TASTES = 4
_SEPARATORS = {"tags": "|", "viewed": ","}

SCHEMA = """\
user = "user_id"
time = {{column = "ts", unit = "ms"}}

[log]
files = ["{files}"]
name = "shop"

[labels.click]
column = "is_click"

[labels.buy]
column = "is_buy"
mask = "is_click == 1"

[fields.user_id]
side = "user"
kind = "id"

[fields.age]
side = "user"
kind = "dense"
transform = "standard"
missing = "indicator"

[fields.city]
side = "user"
kind = "id"

[fields.item_id]
side = "candidate"
kind = "id"
min_count = 2

[fields.category]
side = "candidate"
kind = "id"

[fields.price]
side = "candidate"
kind = "dense"
transform = "log1p"

[fields.tags]
side = "candidate"
kind = "ids"
{tags}max_length = 4

[fields.position]
side = "cross"
kind = "dense"
transform = "quantile:8"

[histories.clicks]
from = "log"
where = "is_click == 1"
fields = ["item_id", "category"]
length = 32

[histories.carts]
from = "carts.parquet"
fields = ["item_id"]
length = 16

[histories.viewed]
column = "viewed"
{viewed}fields = ["item_id"]
length = 8

[split]
by = "time"
train = 0.8
valid = 0.1
test = 0.1
"""


def write_shop(folder: Path, rows: int = 200_000, *, form: str = "parquet", seed: int = 0, users: int = 0) -> Path:
    """Writes `log.parquet` (or .csv), `carts.parquet` and `shop.toml` into `folder`; returns the schema file.

    Twelve columns: user_id, age, city, item_id, category, price, tags, position, viewed, ts, is_click, is_buy. Tags and
    viewed are lists in Parquet and texts in CSV, with | and commas between. users: how many; 0 for a sixtieth of the
    rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    users = users or max(rows // 60, 10)
    items = max(users // 3, 20)
    taste, kind = rng.normal(size=(users, _TASTES)), rng.normal(size=(items, _TASTES))
    appeal, liking = rng.normal(0, 0.7, items), rng.normal(0, 0.5, users)
    category = rng.integers(0, 20, items)
    price = np.round(np.exp(rng.normal(3, 1, items)), 2)
    labels = np.array([f"tag{k}" for k in range(30)])
    tags = [labels[rng.choice(30, rng.integers(1, 5), replace=False)].tolist() for _ in range(items)]

    user = rng.integers(0, users, rows)
    item = np.minimum(rng.zipf(1.3, rows) - 1, items - 1)
    item = np.where(rng.random(rows) < 0.5, item, rng.integers(0, items, rows))
    time = np.sort(rng.integers(0, _DAYS * 86_400_000, rows)) + _START_MS
    position = rng.integers(1, 21, rows)
    logit = -2.2 + 0.6 * np.einsum("rk,rk->r", taste[user], kind[item]) + appeal[item] + liking[user] - 0.04 * position
    click = rng.random(rows) < 1 / (1 + np.exp(-logit))
    buy = click & (rng.random(rows) < 1 / (1 + np.exp(2.0 - 0.5 * logit)))
    ages = rng.integers(18, 80, users).astype(float)
    ages[rng.random(users) < 0.1] = np.nan
    seen = rng.integers(0, items, (rows, 3))
    lists = {
        "tags": [tags[k] for k in item.tolist()],
        "viewed": [[f"i{k}" for k in row[: n % 4]] for row, n in zip(seen.tolist(), user.tolist(), strict=True)],
    }
    if form == "csv":
        lists = {name: [_SEPARATORS[name].join(value) for value in values] for name, values in lists.items()}
    table = pa.table(
        {
            "user_id": pa.array(user),
            "age": pa.array(ages[user], from_pandas=True),
            "city": pa.array(np.array([f"city{k}" for k in range(40)])[user % 40]),
            "item_id": pa.array([f"i{k}" for k in item.tolist()]),
            "category": pa.array(category[item]),
            "price": pa.array(price[item]),
            "tags": pa.array(lists["tags"]),
            "position": pa.array(position),
            "viewed": pa.array(lists["viewed"]),
            "ts": pa.array(time),
            "is_click": pa.array(click.astype(np.int8)),
            "is_buy": pa.array(buy.astype(np.int8)),
        }
    )
    if form == "csv":
        pyarrow.csv.write_csv(table, folder / "log.csv")
    else:
        pq.write_table(table, folder / "log.parquet", row_group_size=50_000)
    put = rng.random(rows) < 0.1
    carts = {"user_id": user[put], "item_id": [f"i{k}" for k in item[put].tolist()], "ts": time[put] + 60_000}
    pq.write_table(pa.table(carts), folder / "carts.parquet")
    schema = folder / "shop.toml"
    separators = {name: f'separator = "{mark}"\n' if form == "csv" else "" for name, mark in _SEPARATORS.items()}
    schema.write_text(SCHEMA.format(files=f"log.{form}", **separators), encoding="utf-8")
    return schema
