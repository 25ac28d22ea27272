"""The packed folder: round trip, torn and truncated copies, pickling."""

import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from recscale.scaling.data.stored_log.packed import (
    IncompletePackedLog,
    PackedLog,
    is_complete,
    schema_from_dict,
    write_packed,
)
from recscale.scaling.records.sealed import sealed, unsealed


def test_round_trip(made_up_arrays, made_up_log):
    log = PackedLog(made_up_log.folder)
    assert len(log) == 300
    assert log.schema == made_up_arrays.schema == schema_from_dict(made_up_arrays.schema.to_dict())
    assert log.splits == made_up_arrays.splits and log.report == made_up_arrays.report
    for name, column in made_up_arrays.rows.items():
        np.testing.assert_array_equal(log.column(name), column)
        assert log.column(name).dtype == column.dtype
    np.testing.assert_array_equal(log.labels, made_up_arrays.labels)
    np.testing.assert_array_equal(log.label_mask, made_up_arrays.label_mask)
    np.testing.assert_array_equal(log.times, made_up_arrays.times)
    np.testing.assert_array_equal(log.users, made_up_arrays.users)
    np.testing.assert_array_equal(log.vocabulary("item"), made_up_arrays.vocabularies["item"])
    for name, store in made_up_arrays.events.items():
        np.testing.assert_array_equal(log.ends(name), made_up_arrays.ends[name])
        np.testing.assert_array_equal(log.events(name).offsets, store.offsets)
        np.testing.assert_array_equal(log.events(name).times, store.times)
        for field, column in store.columns.items():
            np.testing.assert_array_equal(log.events(name).columns[field], column)


def test_rows_one_at_a_time(made_up_arrays, made_up_log):
    row = made_up_log[17]
    assert row["item"] == made_up_arrays.rows["item"][17]
    assert row["request_time"] == made_up_arrays.times[17]
    user, store = made_up_arrays.users[17], made_up_arrays.events["clicks"]
    before = [
        e for e in range(store.offsets[user], store.offsets[user + 1]) if store.times[e] < made_up_arrays.times[17]
    ]
    np.testing.assert_array_equal(row["clicks"]["item"], store.columns["item"][before])
    assert made_up_log[3]["item"] == made_up_arrays.rows["item"][3]


def test_pickles_as_its_folder(made_up_log):
    made_up_log.column("item")
    text = pickle.dumps(made_up_log)
    assert len(text) < 500, "no array and no handle travels"
    np.testing.assert_array_equal(pickle.loads(text).column("item"), made_up_log.column("item"))


def test_reading_opens_no_file(made_up_log, monkeypatch):
    """Readers run in threads, and opening a column (NumPy parses its header) is not safe there on Python 3.11."""
    log = PackedLog(made_up_log.folder)
    monkeypatch.setattr(np, "load", lambda *args, **kwargs: pytest.fail("a column was opened while reading"))
    assert log[17].keys() >= {"item", "labels", "request_time", "clicks"}
    assert len(log.vocabulary("item")) > 0


def test_a_failure_at_any_file_leaves_nothing(made_up_arrays, tmp_path, monkeypatch):
    """Every file is opened through Path.open; failing at the k-th, for every k, must leave no folder and no scraps."""
    real = Path.open
    wrote = 0

    def opening(limit):
        def count(self, mode="r", *args, **kwargs):
            nonlocal wrote
            if "w" in mode and self.is_relative_to(tmp_path):
                wrote += 1
                if wrote > limit:
                    raise OSError(28, "No space left on device")
            return real(self, mode, *args, **kwargs)

        return count

    folder = tmp_path / "log"
    for limit in range(100):
        wrote = 0
        monkeypatch.setattr(Path, "open", opening(limit))
        try:
            write_packed(made_up_arrays, folder)
            break
        except OSError:
            assert not is_complete(folder)
            assert list(tmp_path.iterdir()) == []
    assert limit > 15 and is_complete(folder)


def test_a_folder_without_meta_is_not_a_log(made_up_log, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(made_up_log.folder, copy)
    (copy / "meta.json").unlink()
    assert not is_complete(copy)
    with pytest.raises(FileNotFoundError, match=r"meta\.json is missing"):
        PackedLog(copy)


def test_a_missing_or_short_column_is_named(made_up_log, tmp_path):
    for path in made_up_log.meta["files"]:
        copy = tmp_path / path.replace("/", "_")
        shutil.copytree(made_up_log.folder, copy)
        whole = (copy / path).read_bytes()
        (copy / path).write_bytes(whole[:-3])
        with pytest.raises(IncompletePackedLog, match=f"expected {len(whole)} bytes, found {len(whole) - 3}"):
            PackedLog(copy)
        (copy / path).unlink()
        with pytest.raises(IncompletePackedLog, match=r"\.(npy|parquet): expected .* found no file"):
            PackedLog(copy)


def test_a_changed_bit_is_named(made_up_log, tmp_path):
    made_up_log.verify()
    for path in ["meta.json", *made_up_log.meta["files"]]:
        copy = tmp_path / path.replace("/", "_")
        shutil.copytree(made_up_log.folder, copy)
        whole = (copy / path).read_bytes()
        # Of the record a digit: it is JSON all the same, of other rows.
        at = whole.rindex(b"300") if path == "meta.json" else len(whole) - 1
        (copy / path).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(IncompletePackedLog, match=f"{re.escape(path)} is not as it was written; delete"):
            PackedLog(copy).verify()


def test_another_converter_version_is_refused_and_replaced(made_up_arrays, made_up_log, tmp_path):
    copy = tmp_path / "log"
    shutil.copytree(made_up_log.folder, copy)
    meta = copy / "meta.json"
    meta.write_text(sealed(unsealed(meta.read_bytes()) | {"converter_version": 0}))
    with pytest.raises(IncompletePackedLog, match="converter version 0"):
        PackedLog(copy)
    assert len(write_packed(made_up_arrays, copy)) == 300


def test_the_first_of_two_writers_wins(made_up_arrays, tmp_path):
    first = write_packed(made_up_arrays, tmp_path / "log")
    stamp = (first.folder / "meta.json").stat().st_mtime_ns
    second = write_packed(made_up_arrays, tmp_path / "log")
    assert (second.folder / "meta.json").stat().st_mtime_ns == stamp
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_an_unwritable_place_is_named(made_up_arrays, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot write the packed log next to"):
        write_packed(made_up_arrays, tmp_path / "file" / "log")
