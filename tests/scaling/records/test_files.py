"""Files are replaced whole or not at all."""

import os

import pytest

from recscale.scaling.records.files import replacing, write_atomically


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "new" / "folder" / "a.json"
    write_atomically(path, "old")
    write_atomically(path, b"\xff")
    assert path.read_bytes() == b"\xff"
    assert os.listdir(path.parent) == ["a.json"]


def test_an_error_while_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, "né")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text("utf-8") == "né"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_pipe_is_written_to(tmp_path):
    write_atomically("/dev/null", "gone")
    assert not os.path.isfile("/dev/null")
