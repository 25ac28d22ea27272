"""The ablations of unified models load and plan: one size for all, every point another run."""

from recscale.sweeps.engine.loading import load
from recscale.sweeps.engine.plan import make_plan


def test_ablations_of_unified_models_have_one_size():
    file = load("hyformer_mixformer_ablations")
    points = file.points()
    first = [point for point in points if point["seed"] == 0]
    assert len(points) == 5 * len(first)
    rows = make_plan(file.config(), first, sweep=file.name).rows
    assert len({row["run_id"] for row in rows}) == len(first) > 30
    for row in rows:
        assert abs(row["target_error"]) < 0.03, row["config"]["model"]
    names = [row["config"]["architecture"] for row in rows]
    assert {"hyformer", "mixformer", "ui_mixformer", "ads", "longer+rankmixer", "rankmixer"} <= set(names)
    scorers = {row["config"]["model"]["encoder"]["scorer"] for row in rows if row["config"]["architecture"] == "ads"}
    assert scorers == {"mha", "din", "can"}
