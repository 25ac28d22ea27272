"""Core-seconds of a small sweep by part: how turns become figures; one real turn is slow."""

import json
from pathlib import Path

import pytest

from recscale.scaling.bench import sweep, sweep_turn


def fake(step):
    shape = {"generation": 1.0, "compile": 5.0, "step": step, "holdout": 0.5, "bookkeeping": 1.0}
    return {name: dict(shape) for name in sweep_turn.SHAPES}


def test_trees_take_turns_and_are_compared_round_by_round(monkeypatch, tmp_path):
    (tmp_path / ".paths" / "recscale" / "scaling").mkdir(parents=True)
    asked = []

    def turn(rows, packages):
        asked.append(packages)
        return fake(2.0 if packages is None else 8.0)

    monkeypatch.setattr(sweep, "_turn", turn)
    found = sweep.measure_sweep(rounds=2, rows=1000, against=tmp_path)
    assert asked == [None, tmp_path / ".paths"] * 2
    seeds = sweep_turn.SHAPES["smallest"][2]
    assert found["shapes"]["smallest"]["rows_per_core_s"] == 1000 * seeds / 4.0
    assert found["ratio"]["largest"] == {"median": 2.5, "rounds": [2.5, 2.5]}
    assert set(sweep.measure_sweep(rounds=1, rows=10)) == {"rows", "rounds", "shapes"}


def test_a_folder_that_is_no_checkout_is_named(tmp_path):
    with pytest.raises(ValueError, match="no checkout of this project"):
        sweep.measure_sweep(against=tmp_path)


def test_time_inside_a_part_is_not_counted_twice():
    watch = sweep_turn.Stopwatch()
    with watch.part("holdout"), watch.part("generation"):
        sum(range(200_000))
    seconds = watch.take()
    assert seconds["generation"] > seconds["holdout"] >= 0 and set(seconds) == {"rest", "holdout", "generation"}


@pytest.mark.slow
def test_a_turn_finds_every_part_of_this_tree():
    found = sweep._turn(8192, None)
    assert json.loads(json.dumps(found)) == found and set(found) == set(sweep_turn.SHAPES)
    assert all(set(parts) == set(sweep.PARTS) and min(parts.values()) > 0 for parts in found.values())
    assert Path(sweep_turn.__file__).name == "sweep_turn.py"
