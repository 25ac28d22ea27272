"""The sweep file of UG-Sep loads and plans: every ratio, every variant, one size, the same tokens for all."""

import pytest

from recscale.sweeps.engine.loading import load
from recscale.sweeps.engine.plan import make_plan


@pytest.mark.parametrize("backbone", ["rankmixer", pytest.param("tokenmixer_large", marks=pytest.mark.slow)])
def test_variants_differ_in_nothing_but_what_is_cut(backbone):
    file = load("ug_separation")
    points = [p for p in file.points() if p["seed"] == 0 and p["architecture"].endswith(backbone)]
    assert {p["seed"] for p in file.points()} == set(range(5))
    rows = make_plan(file.config(), points, sweep="ug_separation").rows
    assert len({row["run_id"] for row in rows}) == len(points) == 12
    variants = set()
    for row in rows:
        name, model = row["config"]["architecture"], row["config"]["model"]
        assert abs(row["target_error"]) < 0.03, model
        assert (model["tokens"], model["cut_align"]) == (12, "exact") and model["width"] % 12 == 0
        variants.add((name, model["user_tokens"], model.get("compensation"), model.get("user_to_candidate")))
    expected = {(backbone, user, None, None) for user in (4, 6, 9)}
    for user in (4, 6, 9):
        for compensation, across in (("none", True), ("per_token", True), ("none", False)):
            expected.add((f"ug_{backbone}", user, compensation, across))
    assert variants == expected
