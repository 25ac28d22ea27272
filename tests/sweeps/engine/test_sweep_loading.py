"""Sweep files by path and by name, and what is said about broken ones."""

import pytest

from recscale.sweeps.engine.loading import SweepFileError, installed, load

GOOD = """
from ml_collections import ConfigDict
from recscale.sweeps import axis
def get_config(rate=1.0):
    return ConfigDict({"training": {"lr": rate}})
def get_sweep(n=2):
    return axis("training.lr", [float(i) for i in range(n)])
"""


@pytest.fixture
def written(tmp_path):
    def write(text, name="mine.py"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_a_file_by_path_with_and_without_arguments(written):
    loaded = load(written(GOOD))
    assert loaded.name == "mine" and loaded.report() == {}
    assert loaded.config(rate=2.0).training.lr == 2.0
    assert len(loaded.points()) == 2 and len(loaded.points(n=3)) == 3


def test_a_report_is_optional_and_checked(written):
    assert load(written(GOOD + "def get_report():\n    return {'form': 'power'}\n")).report() == {"form": "power"}
    with pytest.raises(SweepFileError, match=r"get_report\(\) returned list"):
        load(written(GOOD + "def get_report():\n    return []\n")).report()


def test_installed_files_are_found_by_name():
    assert {"quickstart", "smoke", "movielens"} <= set(installed())
    assert load("smoke").path == installed()["smoke"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("def get_config():\n    return 1\n", r"defines no get_sweep\(\)"),
        ("x = 1\n", r"defines no get_config\(\) and no get_sweep\(\)"),
        (
            "import nowhere_to_be_found\n",
            "failed to import: ModuleNotFoundError: No module named 'nowhere_to_be_found'",
        ),
        ("def broken(:\n", "failed to import: SyntaxError"),
    ],
)
def test_broken_files_say_what_is_wrong(written, text, message):
    with pytest.raises(SweepFileError, match=message):
        load(written(text))


@pytest.mark.parametrize(
    "body, message",
    [
        ("{'a': 1}", "returned dict, expected a list"),
        ("[]", "returned no points"),
        ("[{'seed': 0}, {1: 2}]", "point 1 of"),
    ],
)
def test_points_must_be_a_list_of_flat_dictionaries(written, body, message):
    loaded = load(written(GOOD.split("def get_sweep")[0] + f"def get_sweep():\n    return {body}\n"))
    with pytest.raises(SweepFileError, match=message):
        loaded.points()


def test_a_missing_file_and_a_misspelt_name():
    with pytest.raises(SweepFileError, match="nearest installed name is 'quickstart'"):
        load("quikstart")
    with pytest.raises(SweepFileError, match="no sweep file sweeps/nothing.py"):
        load("sweeps/nothing.py")
