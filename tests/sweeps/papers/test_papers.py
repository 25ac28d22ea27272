"""Published orderings as sweeps: every arm they name is planned, with rates to search around and paired seeds."""

import pytest

from recscale.sweeps import rate_search
from recscale.sweeps.engine.combinators import split_notes
from recscale.sweeps.engine.loading import load, papers


@pytest.mark.parametrize("name", papers())
def test_every_arm_of_an_ordering_is_planned(name):
    loaded = load(name)
    orderings, points = loaded.report()["orderings"], loaded.points()
    seeds = {}
    for point in points:
        seeds.setdefault(split_notes(point)[1]["arm"], set()).add(point["seed"])
    assert all(found == set(range(5)) for found in seeds.values())
    built = [ordering for ordering in orderings if not ordering["lacking"]]
    assert {ordering[side] for ordering in built for side in ("better", "worse")} == set(seeds)
    assert len({ordering["id"] for ordering in orderings}) == len(orderings)
    pairs = [(ordering["better"], ordering["worse"]) for ordering in built]
    assert len(set(pairs)) == len(pairs) and not {pair[::-1] for pair in pairs} & set(pairs)
    trials = loaded.rates()["trials"]
    assert trials == 5 and len(rate_search(points, trials=trials)) == trials * len(seeds)
