"""Every sweep of the package: no run of it has a setting that planning would refuse."""

import pytest

from recscale.scaling.training.preflight import check_settings
from recscale.sweeps.engine.combinators import split_notes
from recscale.sweeps.engine.loading import installed, load
from recscale.sweeps.engine.plan import lay, make_plan


@pytest.mark.parametrize("name", sorted(installed()))
def test_no_setting_is_out_of_its_range(name):
    loaded = load(name)
    base = loaded.config()
    for point in loaded.points()[::7]:
        settings, _ = split_notes(point)
        config = lay(base, settings)
        config.size.update({target: None for target in config.size})  # what the planner turns into a shape
        check_settings(config)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(installed()) - {"movielens", "own_log"}))
def test_every_shape_can_be_traced(name):
    """`movielens` and `own_log` need a log on disk."""
    loaded = load(name)
    points = loaded.points()
    first = [point for point in points if point.get("seed", points[0].get("seed")) == points[0].get("seed")]
    assert make_plan(loaded.config(), first, sweep=name).rows
