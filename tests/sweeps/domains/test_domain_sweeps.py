"""The sweep files of the domain family load and plan, and hold the number of parameters fixed."""

import pytest

from recscale.scaling.report.orderings import Ordering
from recscale.sweeps.engine.loading import load
from recscale.sweeps.engine.plan import make_plan


def planned(name, keep=lambda point: True):
    """Planned runs of seed 0; every other seed has the same points, and an ordering is of two arms."""
    file = load(name)
    points = [point for point in file.points() if point["seed"] == 0 and keep(point)]
    rows = make_plan(file.config(), points, sweep=name).rows
    assert len({row["run_id"] for row in rows}) == len(points)
    assert len([point for point in file.points() if keep(point)]) == 5 * len(points)
    for ordering in file.report().get("orderings", ()):
        arms = {point["note.arm"] for point in file.points()}
        assert {Ordering(**ordering).better, Ordering(**ordering).worse} <= arms
    for row in rows:
        assert abs(row.get("target_error") or 0.0) < 0.03, row["config"]["model"]
    return rows


def test_every_head_stands_at_every_shared_fraction():
    rows = planned("mdl_shared_fraction", lambda point: point["data.overrides.domain_shared"] in (0.0, 1.0))
    found = {(r["config"]["architecture"], r["config"]["model"].get("head"),
              r["config"]["data"]["overrides"]["domain_shared"]) for r in rows}  # fmt: skip
    heads = [("mdl", None), *(("domain_heads", head) for head in ("shared", "private", "mmoe"))]
    assert found == {(*head, rho) for head in heads for rho in (0.0, 1.0)}


def test_the_bank_is_all_that_differs_between_predictors():
    rows = planned("bank_forecasts")
    assert [row["config"]["model"]["predictor"] for row in rows] == ["none", "linear", "lstm", "ema", "none"]
    assert {row["config"]["training"]["schedule"] for row in rows} == {"constant"}


@pytest.mark.slow
def test_content_stands_beside_none_at_one_size():
    rows = planned("lemur_cold_items")
    assert [row["config"]["architecture"] for row in rows] == ["lemur", "lemur", "sum_pooling+rankmixer"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "variants"), [("mdl_ablations", 11), ("lemur_ablations", 15)])
def test_ablations_have_one_size(name, variants):
    rate = load(name).points()[0]["training.lr"]
    rows = planned(name, lambda point: point["training.lr"] == rate)
    assert len(rows) == variants
    assert len({row["config"]["model"].get("content_width") for row in rows}) <= 2
