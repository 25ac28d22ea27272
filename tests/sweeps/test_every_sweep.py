"""Every sweep: no run of it has a setting that planning would refuse, and no axis varies anything but its label."""

import pytest

from recscale import models
from recscale.scaling.data import make_source
from recscale.scaling.training.config import data_section
from recscale.scaling.training.preflight import check_settings
from recscale.sweeps.engine import plan as planning
from recscale.sweeps.engine.combinators import split_notes
from recscale.sweeps.engine.loading import installed, load
from recscale.sweeps.engine.plan import lay, make_plan

# These read a log that has to be on disk.
WITHOUT_A_LOG = {"movielens", "movielens_length", "own_log"}


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
@pytest.mark.parametrize("name", sorted(set(installed()) - WITHOUT_A_LOG))
def test_every_shape_can_be_traced(name):
    loaded = load(name)
    points = loaded.points()
    first = [point for point in points if point.get("seed", points[0].get("seed")) == points[0].get("seed")]
    assert make_plan(loaded.config(), first, sweep=name).rows


# What sets an axis. Sizes may be set by shapes instead.
SETS = {
    "dense_params": "size.dense_params",
    "history_length": "data.history_length",
    "memory_slots": "model.memory_slots",
    "examples": "training.examples",
}
# Its question is what the same parameters buy: slots, or a wider network without any.
SPENT_DIFFERENTLY = {"memory_slots_controls"}


def ladders(loaded, axis):
    """Of every architecture the first and the last point of an axis, all other settings equal."""
    found, key = {}, SETS[axis]
    for point in loaded.points():
        settings, notes = split_notes(point)
        rest = {k: v for k, v in settings.items() if k not in (key, "seed", "training.lr")} | {"arm": notes.get("arm")}
        if key not in settings:  # shapes: what else may differ is what the axis counts
            rest = {k: v for k, v in rest.items() if not k.startswith("model.")}
        found.setdefault(repr(sorted(rest.items(), key=str)), []).append(settings)
    pairs = ((points[0], points[-1]) for points in found.values())
    return {a.get("architecture"): [a, b] for a, b in pairs if a.get(key, 0) != b.get(key, 1)}


def parts(config, schema, axis, first):
    """Parameters of each part; a ladder of slots at those of its first rung, since slots bring their own keys."""
    model = config.model.to_dict()
    if axis == "memory_slots":
        model |= {"memory_slots": first.model.memory_slots}
    found = models.count(config.architecture, schema, model)
    encoder = found.encoder_params or 0
    sizes = {"encoder": encoder, "backbone": found.dense_params - encoder - found.memory_params}
    if axis == "dense_params":  # a share of the size is what stays
        return {"encoder": encoder / found.dense_params, "embedding": found.embedding_params}
    sizes |= {"position": found.position_params, "head": found.head_params, "embedding": found.embedding_params}
    return sizes | {"memory": found.memory_params}


@pytest.mark.parametrize("name", sorted(set(installed()) - WITHOUT_A_LOG - SPENT_DIFFERENTLY))
def test_an_axis_varies_nothing_but_its_label(name, monkeypatch):
    """Encoder, position, backbone and head parameters stay within a tenth along an axis they are not on."""
    monkeypatch.setattr(planning, "check_shape", lambda *shape: None)
    monkeypatch.setattr(planning, "check_holdout", lambda *shape: None)
    monkeypatch.setattr(planning.machine, "core_flops", lambda: 1e10)
    loaded = load(name)
    for axis in loaded.report().get("axes", {}).values():
        for architecture, points in ladders(loaded, axis).items():
            if axis == "dense_params" and "+" not in (architecture or ""):
                continue  # one part, which is the size
            configs = [planning.run_config(row) for row in make_plan(loaded.config(), points, sweep=name).rows]
            assert axis == "history_length" or len({config.data.history_length for config in configs}) == 1
            assert axis == "examples" or len({config.training.examples for config in configs}) == 1
            found = []
            for config in configs:
                sizes = {"requests": config.training.requests, "candidates": config.training.candidates}
                found.append(parts(config, make_source(data_section(config), **sizes).schema, axis, configs[0]))
            for part in found[0]:
                low, high = sorted(each[part] for each in found)
                assert high <= 1.1 * low, (axis, part, found, points)
