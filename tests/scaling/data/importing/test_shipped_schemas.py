"""Every shipped schema file on 50 made-up rows with the published header."""

import json

import numpy as np
import pytest

from recscale.scaling.data.importing.importer import import_log
from recscale.scaling.data.importing.log_schema import read_log_schema
from recscale.scaling.data.importing.shipped import list_schemas, schema_path
from recscale.scaling.data.stored_log.source import GrainSource

ROWS = 50
CRITEO = [*(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]
KUAIRAND = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
).split(",")
KUAIRAND_USER = [
    "user_id", "user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author", "follow_user_num",
    "follow_user_num_range", "fans_user_num", "fans_user_num_range", "friend_user_num", "friend_user_num_range",
    "register_days", "register_days_range", *(f"onehot_feat{i}" for i in range(18)),
]  # fmt: skip
KUAIRAND_VIDEO = (
    "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,"
    "music_id,music_type,tag"
).split(",")
TAOBAO = (
    "clk,btag_his,cate_his,brand_his,userid,cms_segid,cms_group_id,final_gender_code,age_level,pvalue_level,"
    "shopping_level,occupation,new_user_class_level,adgroup_id,cate_id,campaign_id,customer,brand,price,pid,btag"
).split(",")
KUAIVIDEO = "timestamp,user_id,item_id,is_click,is_like,is_follow,pos_items,neg_items".split(",")
AMAZON = "label,user_id,item_id,cate_id,item_history,cate_history".split(",")
LABELS = {"label", "clk", "is_click", "is_like", "is_follow", "long_view"}


def cell(column, k):
    if column in LABELS:
        return str((k * 7 // 3) % 2)
    if column in ("time_ms",):
        return str(1_649_400_000_000 + k * 50_000_000)
    if column in ("timestamp",):
        return str(1_000_000_000 + k * 1000)
    if column == "rating":
        return ("5", "3.5", "2", "4")[k % 4] if k % 3 else "4.5"
    if column.endswith(("_his", "_history", "_items")):
        return "^".join(str(j % 5) for j in range(k % 4))
    if column == "tag":
        return '"1,2"' if k % 2 else "3"
    if column == "title":
        return f"Film {k} (19{50 + k % 40})"
    if column == "genres":
        return "Drama|War" if k % 2 else "Comedy"
    if column[0] == "C" and column[1:].isdigit():
        return f"{k % 6}.0"
    return str(k % 7 if column not in ("user_id", "userid", "userId") else k % 4)


def table(folder, name, columns, separator=",", header=True, rows=range(ROWS)):
    lines = [separator.join(columns)] if header else []
    lines += [separator.join(cell(column, k) for column in columns) for k in rows]
    (folder / name).write_text("\n".join(lines) + "\n")


def write(name, folder):
    if name in ("criteo-kaggle", "criteo-terabyte"):
        files = ["train.txt"] if name == "criteo-kaggle" else ["day_0", "day_21", "day_22", "day_23"]
        for file in files:
            table(folder, file, ["label", *CRITEO], "\t", header=False)
    elif name == "criteo-x1":
        for file in ("train.csv", "valid.csv", "test.csv"):
            table(folder, file, ["label", *CRITEO])
    elif name == "mind":
        for part in ("train", "dev"):
            (folder / part).mkdir()
            shown = [" ".join(f"N{(k + j) % 9}-{(k + j) // 2 % 2}" for j in range(3)) for k in range(ROWS)]
            seen = [" ".join(f"N{j}" for j in range(k % 4)) for k in range(ROWS)]
            at = [f"11/{11 + (part == 'dev')}/2019 {1 + k % 12}:05:{k:02d} {'AP'[k % 2]}M" for k in range(ROWS)]
            lines = [f"{k}\tU{k % 7}\t{at[k]}\t{seen[k]}\t{shown[k]}" for k in range(ROWS)]
            (folder / part / "behaviors.tsv").write_text("\n".join(lines) + "\n")
            news = range(6) if part == "train" else range(3, 9)
            lines = [f'N{k}\tsports\tgolf{k % 2}\tA "title"\ttext\thttp://example.org\t[]\t[]' for k in news]
            (folder / part / "news.tsv").write_text("\n".join(lines) + "\n")
    elif name == "aliccp":
        for part in ("train", "test"):
            features = [f"205\x02{k % 9}\x031.0\x01206\x02{k % 3}\x031.0\x01301\x021\x031.0" for k in range(ROWS)]
            lines = [f"{k},{k // 2 % 2},{k // 4 % 2},c{k % 5},3,{features[k]}" for k in range(ROWS)]
            (folder / f"sample_skeleton_{part}.csv").write_text("\n".join(lines) + "\n")
            lines = [f"c{k},3,101\x02{k}\x031.0\x01109_14\x027\x031.5\x01109_14\x028\x030.5" for k in range(5)]
            (folder / f"common_features_{part}.csv").write_text("\n".join(lines) + "\n")
    elif name == "amazon-reviews":
        lines = [
            json.dumps({"reviewerID": f"A{k % 4}", "asin": f"B{k // 4}", "overall": 1.0 + k % 5, "reviewText": "x",
                        "unixReviewTime": 1_300_000_000 + k})
            for k in range(ROWS)
        ]  # fmt: skip
        (folder / "reviews_Electronics_5.json").write_text("\n".join(lines) + "\n")
    elif name.startswith("kuairand"):
        version = name.partition("-")[2]
        table(folder, f"log_standard_4_08_to_4_21_{version}.csv", KUAIRAND, rows=range(25))
        table(folder, f"log_standard_4_22_to_5_08_{version}.csv", KUAIRAND, rows=range(25, ROWS))
        table(folder, f"user_features_{version}.csv", KUAIRAND_USER, rows=range(4))
        table(folder, f"video_features_basic_{version}.csv", KUAIRAND_VIDEO, rows=range(7))
    elif name.startswith("movielens"):
        dat = name == "movielens-1m"
        separator, ending = ("::", "dat") if dat else (",", "csv")
        user, item = ("user_id", "movie_id") if dat else ("userId", "movieId")
        lines = [] if dat else [",".join((user, item, "rating", "timestamp"))]
        lines += [
            separator.join((str(k % 4), str(k // 4), cell("rating", k), cell("timestamp", k))) for k in range(ROWS)
        ]
        (folder / f"ratings.{ending}").write_text("\n".join(lines) + "\n")
        lines = [] if dat else [",".join((item, "title", "genres"))]
        lines += [separator.join((str(k), cell("title", k), cell("genres", k))) for k in range(13)]
        (folder / f"movies.{ending}").write_text("\n".join(lines) + "\n")
        table(
            folder,
            "users.dat",
            ["user_id", "gender", "age", "occupation", "zip_code"],
            "::",
            header=False,
            rows=range(4),
        )
    else:
        columns = {"taobaoad-x1": TAOBAO, "amazon-electronics-x1": AMAZON, "kuaivideo-x1": KUAIVIDEO}[name]
        table(folder, "train.csv", columns)
        table(folder, "test.csv", columns, rows=range(ROWS, 2 * ROWS))


NAMES = [name for name in list_schemas() if not name.startswith("movielens-100k")]  # those have tests of their own


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_schema_reads_the_published_header(name, tmp_path):
    write(name, tmp_path)
    log = import_log(schema_path(name), tmp_path / "packed", folder=tmp_path)
    schema = read_log_schema(schema_path(name))
    assert log.name == name and log.report.rows_kept == log.report.rows_read >= ROWS
    assert [task.name for task in log.schema.tasks] == [label.name for label in schema.labels]
    assert [f.name for f in log.schema.fields] == [f.name for f in schema.fields if f.side != "event"]
    batch = GrainSource(log, requests=4).batch(0)
    assert batch.valid.any() and np.isfinite(batch.labels).all()
    for sequence in log.schema.sequences:
        assert log.ends(sequence.name).max() > 0, "somebody has a history"


def test_impressions_become_candidates_of_one_request(tmp_path):
    write("mind", tmp_path)
    log = import_log(schema_path("mind"), tmp_path / "packed", folder=tmp_path)
    assert len(log) == 2 * ROWS * 3 and log.requests is not None and int(log.requests[-1]) + 1 == 2 * ROWS
    assert sorted(log.vocabulary("news").tolist()) == [f"N{k}" for k in range(9)]
    assert log.splits["test"] == (3 * ROWS, 6 * ROWS) and log.labels.mean() == pytest.approx(0.5, abs=0.1)
    known = log.column("category") > 1  # news of both files are joined
    assert known.all()


def test_names_are_found_and_the_nearest_is_named():
    assert {"criteo-kaggle", "kuairand-1k", "movielens-20m", "taobaoad-x1"} <= set(NAMES)
    with pytest.raises(FileNotFoundError, match="there is no schema file criteo-kagle; did you mean 'criteo-kaggle'"):
        schema_path("criteo-kagle")
