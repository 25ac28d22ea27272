"""Run tables as people have them: types, delimiters, formats, and what other trackers of experiments write."""

from __future__ import annotations

import gzip
import json
import shutil

import numpy as np
import pandas as pd
import pyarrow
import pytest

from recscale.scaling.laws import fit
from recscale.scaling.laws.tables import columns
from recscale.scaling.laws.tables.read import notes, read
from recscale.scaling.records.runs import TABLE, collect, run_row, write_record


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_every_column_of_our_run_tables_is_declared():
    declared = {*columns.TEXT, *columns.FLAGS, *columns.NUMBERS}
    assert len(declared) == len(columns.TEXT) + len(columns.FLAGS) + len(columns.NUMBERS)
    assert set(run_row({"status": "planned"})) <= declared


def test_ids_names_and_dates_stay_what_they_are(tmp_path):
    text = (
        "run_id,shape_id,dataset,updated_at,block,tag,logloss,decayed,lr_bracketed\n"
        "001,0,NA,1700000000,007,NA,.5,True,\n"
        "002,00,EU,1700000001,07,x,.4,false,true\n"
    )
    table = read(write(tmp_path, "runs.csv", text))
    assert list(table.run_id) == ["001", "002"] and list(table.shape_id) == ["0", "00"]
    assert list(table.dataset) == ["NA", "EU"] and list(table.tag) == ["NA", "x"] and list(table.block) == ["007", "07"]
    assert list(table.updated_at) == [1700000000, 1700000001] and table.updated_at.dtype == int
    assert table.decayed.dtype == bool and list(table.decayed) == [True, False]
    assert pd.isna(table.lr_bracketed[0]) and table.lr_bracketed[1]
    same = read(write(tmp_path, "runs.json", table.to_json(orient="records")))
    assert list(same.shape_id) == ["0", "00"] and list(same.updated_at) == list(table.updated_at)


def test_numbers_are_read_only_where_all_are(tmp_path):
    text = "a,b,c,d,seed\n1,1e3,1,,3\nNA,-.5,x,,4\n2,inf,3,,null\n"
    table = read(write(tmp_path, "runs.csv", text))
    assert np.array_equal(table.a, [1, np.nan, 2], equal_nan=True) and list(table.b) == [1000, -0.5, np.inf]
    assert list(table.c) == ["1", "x", "3"] and table.d.isna().all()
    assert np.array_equal(table.seed, [3, 4, np.nan], equal_nan=True)


@pytest.mark.parametrize(
    ("cells", "words", "option"),
    [
        (('"1,234"', '"12,345,678"'), "thousands separators ('1,234')", {"thousands": ","}),
        (("'1 234", "56"), None, {}),
        (("1 234", "56"), "thousands separators ('1 234')", {"thousands": " "}),
        (('"0,433"', '"0,4"'), "decimal commas ('0,433')", {"decimal": ","}),
    ],
)
@pytest.mark.parametrize("column", ["dense_params", "width"])
def test_other_notations_of_numbers_are_refused_with_a_mend_that_works(tmp_path, cells, words, option, column):
    text = f"run_id,{column},logloss\na,{cells[0]},.5\nb,{cells[1]},.4\n"
    path = write(tmp_path, "runs.csv", text)
    if words is None:  # a text, and no number in any notation: named row by row when it is fitted
        assert list(read(path)[column]) == list(cells)
        return
    with pytest.raises(ValueError, match="write them plainly") as told:
        fit(read(path), "power", {"x": column}, bootstrap=0)
    assert words in str(told.value) and repr(column) in str(told.value)
    (name, mark), *_ = option.items()
    assert f"pandas.read_csv(FILE, sep=None, engine='python', {name}={mark!r})" in str(told.value)
    pd.read_csv(path, sep=None, engine="python", **option).to_csv(path, index=False)
    assert read(path)[column].dtype.kind in "if"


@pytest.mark.parametrize(("mark", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars")])
def test_delimiters_are_found_and_named(tmp_path, mark, name):
    text = '\ufeffrun_id,note,logloss\r\na,"x,y",.5\r\nb,z,.4\r\n'
    path = write(tmp_path, "runs.csv", text.replace(",", mark))
    table = read(path)
    assert list(table.columns) == ["run_id", "note", "logloss"] and list(table.logloss) == [0.5, 0.4]
    assert table.note[0] == f"x{mark}y" and notes(table) == (f"columns are separated by {name}",)


def test_every_format_gives_the_same_table(tmp_path):
    frame = pd.DataFrame(
        {"run_id": ["a", "b"], "shape_id": ["0", "00"], "dense_params": [10, 20], "logloss": [0.5, 0.25]}
    )
    text, lines = frame.to_csv(index=False), frame.to_json(orient="records", lines=True)
    written = {
        "r.csv": text, "r.tsv": frame.to_csv(index=False, sep="\t"), "r.jsonl": lines, "r.ndjson": lines,
        "r.json": frame.to_json(orient="records"), "columns.json": frame.to_json(),
        "split.json": frame.to_json(orient="split"), "table.json": frame.to_json(orient="table", index=False),
    }  # fmt: skip
    for name, content in written.items():
        write(tmp_path, name, content)
    (tmp_path / "r.csv.gz").write_bytes(gzip.compress(text.encode()))
    for name, codec in (("r.jsonl.zst", "zstd"), ("r.csv.bz2", "bz2")):
        with pyarrow.CompressedOutputStream(str(tmp_path / name), codec) as out:
            out.write((lines if "json" in name else text).encode())
    frame.to_parquet(tmp_path / "r.parquet")
    frame.to_feather(tmp_path / "r.feather")
    paths = [path for path in tmp_path.iterdir() if path.is_file()]
    assert len(paths) == 13
    for path in paths:
        pd.testing.assert_frame_equal(read(path).reset_index(drop=True), frame, obj=path.name)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("r.csv", "", "names no columns"),
        ("r.csv", "a,a\n1,2\n", "two columns are called 'a'"),
        ("r.csv", "a,b\n1,2\n1,2,3\n", "row 2 has 3 values for 2 columns"),
        ("r.json", "{", "cannot be read as json"),
        ("r.jsonl", "[1]\n", "no list of runs"),
        ("r.parquet", "text", "cannot be read as parquet"),
        ("r.csv.gz", "text", "cannot be read as csv"),
        ("r.xlsx", "", "unknown table format '.xlsx'"),
        ("runs", "", "unknown table format ''"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, text, words):
    with pytest.raises(ValueError, match=name) as told:
        read(write(tmp_path, name, text))
    assert words in str(told.value)


def test_a_saved_index_is_named_and_left_out(tmp_path):
    frame = pd.DataFrame({"run_id": ["a", "b"], "logloss": [0.5, 0.4]})
    frame.to_csv(tmp_path / "r.csv")
    table = read(tmp_path / "r.csv")
    assert list(table.columns) == ["run_id", "logloss"] and "'', is a saved index" in notes(table)[0]
    pd.read_csv(tmp_path / "r.csv").to_csv(tmp_path / "r.csv", index=False)
    assert "'Unnamed: 0', is a saved index" in notes(read(tmp_path / "r.csv"))[0]
    frame.set_index("run_id").rename_axis(None).to_csv(tmp_path / "r.csv")  # an index that says something
    assert list(read(tmp_path / "r.csv")["index"]) == ["a", "b"]


def test_an_export_of_wandb_says_what_became_of_runs(tmp_path):
    states = ["finished"] * 8 + ["failed", "crashed", "killed", "running"]
    frame = pd.DataFrame({"Name": [f"run-{i}" for i in range(12)], "State": states, "config.lr": 0.1})
    frame["config/dense_params"] = [10.0 ** (3 + i / 3) for i in range(12)]
    frame["summary.logloss"] = 0.4 + frame["config/dense_params"] ** -0.3
    frame.to_csv(tmp_path / "wandb.csv")
    table = read(tmp_path / "wandb.csv")
    words = "finished as done (8), failed as failed (1), crashed as failed (1), killed as failed (1)"
    assert notes(table)[2:] == (f"State as status: {words}, running as running (1)", "Name as run_id")
    law = fit(table, "power", bootstrap=0)
    assert len(law.rows.y) == 8 and set(notes(table)) <= set(law.warnings)
    assert [e.reason for e in law.rows.exclusions] == ["status failed"] * 3 + ["status running"]
    failed = fit(table.assign(status="failed"), "power", bootstrap=0)
    assert failed.refused and not failed.granted and "status failed (12)" in failed.refusals[0].reason


def test_mlflow_and_our_own_words_for_a_run(tmp_path):
    text = (
        "run_id,status,metrics.logloss,params.dense_params,tags.mlflow.user\na,FINISHED,.5,10,me\nb,KILLED,.4,20,me\n"
    )
    table = read(write(tmp_path, "runs.csv", text))
    assert (
        list(table.status) == ["done", "failed"]
        and list(table.logloss) == [0.5, 0.4]
        and table.dense_params.sum() == 30
    )
    assert "status as status: FINISHED as done (1), KILLED as failed (1)" in notes(table)
    own = read(write(tmp_path, "own.csv", "run_id,status,state,model.lr\na,done,Ohio,1\nb,planned,Iowa,2\n"))
    assert not notes(own) and list(own.status) == ["done", "planned"] and "model.lr" in own


def test_offline_runs_of_wandb_are_read_from_their_files(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_SILENT"):
        monkeypatch.setenv(name, "offline" if name == "WANDB_MODE" else "true")
    with wandb.init(dir=tmp_path, config={"model": {"width": 8}, "lr": 0.1}, name="first") as run:
        for step in range(3):
            run.log({"logloss": 0.5 - 0.1 * step})
    wandb.teardown()  # its own process writes the file, and has by then
    path = next(tmp_path.rglob("*.wandb"))
    table = read(tmp_path)
    row = table.iloc[0]
    assert (row["model.width"], row["lr"], row["status"], row["run_id"]) == (8, 0.1, "done", run.id)
    assert row["logloss"] == pytest.approx(0.3) and "1 runs of W&B from 1 files" in notes(table)[0]
    path.write_bytes(path.read_bytes()[:-40])  # as a killed run leaves it
    assert list(read(tmp_path).status) == ["failed"]


def test_scalars_of_tensorboard_are_rows_of_runs(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    for run, last in (("small", 0.5), ("large", 0.4)):
        writer = EventFileWriter(str(tmp_path / run))
        for step, value in enumerate((1.0, last)):
            summary = Summary(value=[Summary.Value(tag="val/logloss", simple_value=value)])
            writer.add_event(Event(step=step, summary=summary))
        writer.close()
    table = read(tmp_path).set_index("run_id")
    assert table.loc["small", "val/logloss"] == 0.5 and table.loc["large", "val/logloss"] == pytest.approx(0.4)
    assert list(table.step) == [1, 1]


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no runs.parquet and no runs of W&B or TensorBoard \(found nothing\)"):
        read(tmp_path)


def test_notes_are_no_obstacle_to_writing(tmp_path):
    table = read(write(tmp_path, "r.csv", "run_id;logloss\na;.5\n"))
    table.to_parquet(tmp_path / "r.parquet")
    assert json.loads(json.dumps(notes(table))) and len(read(tmp_path / "r.parquet")) == 1


def test_of_a_sweeps_folder_the_records_are_read_and_a_damaged_table_alone_is_refused(tmp_path):
    """What `collect` wrote before more runs were trained, or what became of it since, is no source of numbers."""
    for name, loss in [("aaa", 0.5), ("bbb", 0.25)]:
        record = {"run_id": name, "status": "done", "config": {}, "metrics": {"logloss": loss}}
        write_record(tmp_path / "runs" / name, record)
        if name == "aaa":
            collect(tmp_path)
    assert list(read(tmp_path).logloss) == [0.5, 0.25] and len(read(tmp_path / TABLE)) == 1
    whole = collect(tmp_path)
    content = (tmp_path / TABLE).read_bytes()
    at = content.index(np.float64(0.25).tobytes())
    (tmp_path / TABLE).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    assert list(read(tmp_path).logloss) == list(whole.logloss)
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(ValueError, match="runs.parquet cannot be read as parquet: .*CRC"):
        read(tmp_path)
