"""Tables of other trackers: names and words that are mapped, those that are left, and the log format of W&B."""

import struct
from types import SimpleNamespace

import pandas as pd
import pytest

from recscale.scaling.laws.tables import adapters


def written(*records):
    """A .wandb file: a header of seven bytes, then LevelDB's log of records in blocks of 32 KiB."""
    content = b":W&B\x00\x00\x00"
    for record in records:
        rest, first = record, True
        while rest or first:
            left = 32768 - len(content) % 32768
            if left < 7:
                content += bytes(left)
                continue
            part, rest = rest[: left - 7], rest[left - 7 :]
            kind = {(True, False): 1, (True, True): 2, (False, True): 3, (False, False): 4}[first, bool(rest)]
            content += bytes(4) + struct.pack("<HB", len(part), kind) + part
            first = False
    return content


def item(key, value, nested=()):
    return SimpleNamespace(key=key, nested_key=nested, value_json=value)


def test_records_of_a_log_may_span_blocks_and_be_torn(tmp_path):
    path = tmp_path / "run.wandb"
    # The second leaves six bytes of the first block, the fourth exactly seven of the third, the last is in three parts.
    start = 7 + 7 + 5
    records = [b"small", b"b" * (32768 - start - 7 - 6), b"c" * 40_000]
    used = len(written(*records))
    records += [b"d" * (32768 - used % 32768 - 7 - 7), b"e" * 70_000, b"f"]
    content = written(*records)
    assert list(adapters._wandb_blocks(content, path)) == records
    assert list(adapters._wandb_blocks(content[:-1], path)) == records[:-1]
    assert list(adapters._wandb_blocks(content + bytes(7), path)) == records
    assert list(adapters._wandb_blocks(content + bytes(3), path)) == records
    assert list(adapters._wandb_blocks(written(), path)) == []
    with pytest.raises(ValueError, match="does not begin with ':W&B'"):
        list(adapters._wandb_blocks(b"RIFF" + content[4:], path))
    items = [item("lr", "0.1"), item("_step", "1"), item("", "8", ["model", "width"])]
    assert adapters._wandb_items(items) == {"lr": 0.1, "model.width": 8}


def test_names_lose_a_prefix_where_none_is_in_the_way():
    frame = pd.DataFrame([[1, 2, 3, 4, 5]], columns=["config.lr", "params/width", "summary.loss", "loss", "model.lr"])
    table, told = adapters.from_export(frame)
    assert list(table.columns) == ["lr", "width", "summary.loss", "loss", "model.lr"]
    assert told == ["columns without their prefix: config.lr as lr, params/width as width"]
    both = pd.DataFrame([[1, 2]], columns=["config.lr", "summary.lr"])
    assert (
        list(adapters.from_export(both)[0].columns) == ["config.lr", "summary.lr"]
        and adapters.from_export(both)[1] == []
    )


def test_states_become_a_status_in_our_words():
    frame = pd.DataFrame({"State": ["Finished", " KILLED ", "odd", None, "queued", "preempted"], "ID": list("abcdef")})
    table, told = adapters.from_export(frame)
    assert table["status"].tolist()[:3] == ["done", "failed", "odd"] and table["status"].tolist()[4:] == [
        "planned",
        "running",
    ]
    assert pd.isna(table["status"][3]) and table["run_id"].tolist() == list("abcdef")
    words = "Finished as done (1),  KILLED  as failed (1), queued as planned (1), preempted as running (1)"
    assert told == [f"State as status: {words}", "ID as run_id"]
    ours = pd.DataFrame({"status": ["done", "failed", None], "Name": list("abc")})
    table, told = adapters.from_export(ours)
    assert told == [] and table is ours  # a name is a run's only beside a state of another tracker
    mixed, told = adapters.from_export(pd.DataFrame({"status": ["done", "FINISHED"]}))
    assert mixed["status"].tolist() == ["done", "done"] and len(told) == 1
    places = pd.DataFrame({"state": ["Ohio", "Iowa"]})
    assert adapters.from_export(places)[0] is places and adapters.from_export(places)[1] == []
    gaps = pd.DataFrame({"State": ["finished", "failed"], "ID": ["a", None], "Name": ["p", "q"]})
    assert adapters.from_export(gaps)[0]["run_id"].tolist() == ["p", "q"]
    own = pd.DataFrame({"State": ["finished", "failed"], "run_id": ["a", "b"], "Name": ["p", "q"]})
    assert adapters.from_export(own)[0]["run_id"].tolist() == ["a", "b"]


def test_offline_runs_are_put_together_from_their_records(tmp_path, monkeypatch):
    """The records are laid out: settings, results of which the last count, and how the run ended."""

    def record(kind, **fields):
        return SimpleNamespace(WhichOneof=lambda _: kind, **fields)

    config = SimpleNamespace(update=[item("model", '{"width": 8}')])
    known = [
        record("run", run=SimpleNamespace(run_id="r1", display_name="first", config=config)),
        record("config", config=SimpleNamespace(update=[item("lr", "0.1")])),
        record("history", history=SimpleNamespace(item=[item("loss", "0.5"), item("auc", "0.6")])),
        record("summary", summary=SimpleNamespace(update=[item("loss", "0.4")])),
        record("other"),
    ]
    proto = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    for code, state in ((0, "finished"), (2, "failed"), (None, "crashed")):
        records = [*known, *([] if code is None else [record("exit", exit=SimpleNamespace(exit_code=code))])]
        monkeypatch.setattr(adapters, "_wandb_blocks", lambda *_, r=records: iter(range(len(r))))
        monkeypatch.setattr(proto, "Record", SimpleNamespace(FromString=lambda k, r=records: r[k]))
        (tmp_path / "run.wandb").write_bytes(b"")
        assert adapters._wandb_run(tmp_path / "run.wandb") == {
            "model.width": 8, "lr": 0.1, "State": state, "run_id": "r1", "Name": "first", "loss": 0.4, "auc": 0.6,
        }  # fmt: skip


def test_an_unknown_folder_names_what_it_holds(tmp_path):
    for k in range(10):
        (tmp_path / f"{9 - k}.txt").touch()
    with pytest.raises(ValueError, match=r"\(found 0.txt, 1.txt, 2.txt, 3.txt, 4.txt, 5.txt, 6.txt, 7.txt\)"):
        adapters.from_folder(tmp_path)
