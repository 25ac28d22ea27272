"""Damage and death change no figure: the harness of `recscale bench reliability`, its quickest cells at every run."""

import functools
import random

import pytest
from shared_trainers import shared_trainers

from recscale.scaling import host_memory
from recscale.scaling.acceptance import reliability


@pytest.fixture(autouse=True, scope="module")
def _same_process():
    """`recscale train` would start Python anew for huge pages, and with it the tests; nor is memory kept in theirs. And
    what is done again is not compiled again."""
    with shared_trainers(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
        patch.setattr(host_memory, "keep_freed_memory", lambda: False)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return functools.cache(lambda name: reliability.run_scene(folder, name))


QUICK = [
    ("finished", "run.json", "one bit flipped"),
    ("finished", "metrics.jsonl", "deleted"),
    ("finished", "manifest.json", "one bit flipped"),
]


@pytest.mark.parametrize("name, part, how", QUICK)
def test_a_damaged_file_changes_no_figure(runs, name, part, how):
    [file] = {file for file, _ in runs(name).cells() if part in file.parts}
    assert runs(name).outcome(file, how) in reliability.PASSED


@pytest.mark.slow
@pytest.mark.parametrize("how", reliability.DAMAGES)
@pytest.mark.parametrize("name", reliability.RUN_FILES)
def test_no_damage_to_any_file_of_a_run_changes_a_figure(runs, name, how):
    files = [file for file, damage in runs(name).cells() if damage == how]
    found = {str(file): runs(name).outcome(file, how) for file in files}
    assert len(found) >= 3 and set(found.values()) <= set(reliability.PASSED), found


@pytest.mark.slow
def test_no_damage_to_any_file_of_a_sweep_changes_a_figure(tmp_path):
    rows = reliability.matrix([reliability.sweep_scene(tmp_path)])
    assert len(rows) == 25 and {row["outcome"] for row in rows} <= set(reliability.PASSED), rows
    reliability.show(rows)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_figure(tmp_path):
    file, whole, killed = reliability.write_sweep_file(tmp_path, 38_400), tmp_path / "whole", tmp_path / "killed"
    reliability.finish(file, whole)
    found, hit = reliability.kill_and_finish(file, killed, 20, random.Random(0))
    assert hit and found == reliability.figures(whole)


def test_the_harness_tells_another_figure(runs, monkeypatch):
    """A cell is no fault only because nothing compares."""
    scene = runs("finished")
    wrong = reliability.dataclasses.replace(scene, figures={})
    [file] = {file for file, _ in wrong.cells() if "run.json" in file.parts}
    assert wrong.outcome(file, "deleted") == "ANOTHER FIGURE"
