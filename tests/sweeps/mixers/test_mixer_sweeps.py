"""The sweep files of the mixer family load and plan, and hold the number of parameters fixed."""

import pytest

from recscale.sweeps.engine.loading import load
from recscale.sweeps.engine.plan import make_plan


def planned(name, keep=lambda point: True):
    file = load(name)
    points = [point for point in file.points() if point["seed"] == 0 and keep(point)]
    rows = make_plan(file.config(), points, sweep=name).rows
    assert len({row["run_id"] for row in rows}) == len(points)
    assert {point["seed"] for point in file.points()} == set(range(5))
    return rows


def test_growth_changes_depth_width_and_tokens_at_one_size():
    rows = planned("mixer_growth")
    for row in rows:
        assert row["counts"]["dense_params"] == pytest.approx(2.4e5, rel=0.03), row["config"]["model"]
    shapes = [(row["config"]["architecture"], row["config"]["model"]) for row in rows]
    assert {m["layers"] for name, m in shapes if name == "tokenmixer_large"} == {2, 4, 8, 16}
    own = [m for name, m in shapes if name == "rankmixer"]
    assert {m["layers"] for m in own} == {1, 2, 4, 8} and {m["width"] for m in own} == {16, 32, 64, 128}
    assert {m["tokens"] for m in own} == {2, 4, 8}


@pytest.mark.parametrize("architecture", ["rankmixer", pytest.param("tokenmixer_large", marks=pytest.mark.slow)])
def test_ablations_have_one_size(architecture):
    rows = planned("mixer_ablations", lambda point: point["architecture"] == architecture)
    assert len(rows) > 20
    small = [row for row in rows if row["targets"]["dense_params"] < 1e5]
    assert len(small) == (architecture == "rankmixer")
    for row in rows:
        # Widths of eight experts come in steps of eight.
        tolerance = 0.06 if row["config"]["model"]["experts"] else 0.03
        assert abs(row["target_error"]) < tolerance, row["config"]["model"]
        experts = row["config"]["model"]["experts"] is not None
        assert (row["counts"]["active_params"] < row["counts"]["dense_params"]) == experts
