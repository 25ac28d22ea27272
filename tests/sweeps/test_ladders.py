"""The ladders of interaction backbones: what a fit needs of them, planned without training anything."""

import numpy as np
import pytest

from recscale.sweeps.loading import load
from recscale.sweeps.plan import make_plan

ARCHITECTURES = {
    "mixer_ladder": {"rankmixer", "tokenmixer_large", "dcnv2", "dlrm_mlp"},
    "baseline_ladder": {"wukong", "hiformer", "autoint", "dhen_lite", "mmoe"},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_ladder_has_what_a_fit_needs(name):
    loaded = load(name)
    # One seed plans the same shapes as three.
    points = loaded.points()
    plan = make_plan(loaded.config(), [point for point in points if point["seed"] == 0], sweep=name)
    assert not plan.notes
    assert {point["seed"] for point in points} == {0, 1, 2} and len(points) == 3 * len(plan.rows)
    ladders = {}
    for row in plan.rows:
        config, size = row["config"], row["counts"]["dense_params"]
        assert abs(row["target_error"]) < 0.03
        ladders.setdefault(config["architecture"], {}).setdefault(size, []).append(config["training"]["lr"])
    assert set(ladders) == ARCHITECTURES[name]
    trials = {tuple(len(rates) for _, rates in sorted(ladder.items())) for ladder in ladders.values()}
    assert len(trials) == 1 and min(*trials) >= 3  # equal effort for everybody
    for ladder in ladders.values():
        sizes = sorted(ladder)
        # The largest is held out; the others must carry an exponent and a bootstrap.
        assert len(sizes) - 1 >= 6 and np.log10(sizes[-2] / sizes[0]) >= 1.5 and sizes[-1] <= 3e5
        centres = [np.exp(np.mean(np.log(ladder[size]))) for size in sizes]
        assert all(later <= 1.05 * earlier for earlier, later in zip(centres, centres[1:], strict=False))
