"""The sweep files of the domain family load and plan, and hold the number of parameters fixed."""

import pytest

from recscale.sweeps.engine.loading import load
from recscale.sweeps.engine.plan import make_plan


def planned(name, keep=lambda point: True):
    file = load(name)
    points = [point for point in file.points() if point["seed"] == 0 and point["training.lr"] == 3e-3 and keep(point)]
    rows = make_plan(file.config(), points, sweep=name).rows
    assert len({row["run_id"] for row in rows}) == len(points)
    assert {point["seed"] for point in file.points()} == set(range(5))
    assert len({point["training.lr"] for point in file.points()}) == 3
    for row in rows:
        assert abs(row["target_error"]) < 0.03, row["config"]["model"]
    return rows


def test_every_head_stands_at_every_shared_fraction():
    rows = planned("mdl_shared_fraction", lambda point: point["data.overrides.domain_shared"] in (0.0, 1.0))
    found = {(r["config"]["architecture"], r["config"]["model"].get("head"),
              r["config"]["data"]["overrides"]["domain_shared"]) for r in rows}  # fmt: skip
    heads = [("mdl", None), *(("domain_heads", head) for head in ("shared", "private", "mmoe"))]
    assert found == {(*head, rho) for head in heads for rho in (0.0, 1.0)}


@pytest.mark.slow
def test_ablations_have_one_size():
    rows = planned("mdl_ablations")
    assert len(rows) == 11 and all(row["config"]["data"]["overrides"]["domains"] == 3 for row in rows)


@pytest.mark.slow
def test_content_is_compared_at_one_size_with_and_without():
    rows = planned("lemur_ablations")
    names = [row["config"]["architecture"] for row in rows]
    assert names.count("lemur") == 14 and names.count("sum_pooling+rankmixer") == 1
    assert (
        len({row["config"]["model"]["content_width"] for row in rows if "content_width" in row["config"]["model"]}) == 1
    )
