"""The sizing solver: targets met, nearest shapes named, closed forms checked, no memory used."""

import dataclasses
import resource

import pytest
from ml_collections import ConfigDict

from recscale import models
from recscale.models.inputs import reference_schema
from recscale.scaling.counting import sizing
from recscale.scaling.counting.sizing import size, size_ladder

SCHEMA = reference_schema()
BACKBONES = models.list_models("backbone")

# Targets below the smallest model of a kind that keeps its default memory, whose keys and queries are a fixed part of
# it: the nearest is given, and said to be no more than that.
OUT_OF_REACH = {("pkm", 1e4), ("memory_plus", 1e4), ("memory_plus", 2e5)}


def check_target(result, name, target):
    missed = (name, target) in OUT_OF_REACH
    assert result.reachable != missed
    assert (abs(result.relative_error) > 0.03) == missed


@pytest.mark.parametrize("target", [1e4, 1e5, 1e6, 1e7, 1e8, 1e9])
@pytest.mark.parametrize("name", BACKBONES)
def test_dense_params_within_three_percent_over_five_decades(name, target):
    result = size(name, SCHEMA, dense_params=target)
    check_target(result, name, target)
    assert result.achieved == result.count.dense_params == models.count(name, SCHEMA, result.config).dense_params
    assert result.relative_error == pytest.approx(result.achieved / target - 1.0)


@pytest.mark.parametrize("target", [2e5, 1e7, 1e9])
@pytest.mark.parametrize("name", BACKBONES)
def test_training_flops_per_row(name, target):
    result = size(name, SCHEMA, train_flops=target)
    check_target(result, name, target)
    assert result.achieved == models.count(name, SCHEMA, result.config).train_flops_per_row


def settings(value):
    """Numbers of a configuration by their place in it."""
    if isinstance(value, dict):
        return {f"{key}.{rest}": inner for key, item in value.items() for rest, inner in settings(item).items()}
    if isinstance(value, tuple | list):
        return settings(dict(enumerate(value)))
    return {"": value} if isinstance(value, int) else {}


LADDER = (2e4, 4e4, 8e4, 1.6e5, 3.2e5, 6.4e5)


@pytest.mark.parametrize("quantity, factor", [("dense_params", 1), ("train_flops", 6)])
@pytest.mark.parametrize("name", ["rankmixer", "tokenmixer_large", "hiformer", "wukong", "dlrm_mlp"])
def test_no_setting_falls_up_a_ladder(name, quantity, factor):
    results, rising = size_ladder(name, SCHEMA, quantity, [factor * target for target in LADDER[::-1]])
    assert rising and list(results) == [factor * target for target in LADDER]
    assert all(result.reachable for result in results.values())
    shapes = [settings(result.overrides) for result in results.values()]
    for small, large in zip(shapes, shapes[1:], strict=False):
        assert all(large[key] >= value for key, value in small.items())


def test_a_ladder_of_one_size_is_that_size():
    alone, rising = size_ladder("rankmixer", SCHEMA, "dense_params", [1e5])
    assert rising and alone[1e5].overrides == size("rankmixer", SCHEMA, dense_params=1e5).overrides
    with pytest.raises(ValueError, match="expected a positive number"):
        size_ladder("rankmixer", SCHEMA, "dense_params", [1e5, -1])


def test_training_flops_of_a_run():
    per_row, run = size("rankmixer", SCHEMA, train_flops=1e7), size("rankmixer", SCHEMA, train_flops=1e13, examples=1e6)
    assert per_row.config.to_dict() == run.config.to_dict()
    assert run.achieved == 1_000_000 * per_row.achieved and run.target == 1e13


def test_impossible_target_gives_the_nearest_shape_and_says_so():
    """512 inputs times any width exceed 1,000 parameters."""
    result = size("rankmixer", SCHEMA, dense_params=1000)
    assert not result.reachable and result.relative_error > 0.03
    smaller = size("rankmixer", SCHEMA, dense_params=1500)
    assert result.achieved <= smaller.achieved * 1.02


def test_fifteen_billion_parameters_need_no_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = size("rankmixer", SCHEMA, dense_params=15e9)
    grown_bytes = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert result.reachable and result.config.width % 128 == 0 and result.config.hidden % 64 == 0
    assert grown_bytes < result.achieved / 100


def test_result_is_a_complete_config_of_the_architecture():
    result = size("rankmixer", SCHEMA, dense_params=1e5, config={"layers": 3, "activation": "relu"})
    assert isinstance(result.config, ConfigDict)
    assert set(result.config) == set(models.get_config("rankmixer"))
    assert result.config.layers == 3 and result.config.activation == "relu"
    changed = {k for k, v in result.config.items() if v != models.get_config("rankmixer")[k]}
    assert changed <= {*result.overrides, "layers", "activation"}
    again = size("rankmixer", SCHEMA, dense_params=1e5, config=models.get_config("rankmixer"))
    assert again.config.layers == 2


def test_the_first_proposal_within_tolerance_wins(monkeypatch):
    """Proposals come friendliest first; a nearer but less friendly one must not displace it."""
    proposals = [{"tokens": 8, "width": 32, "hidden": hidden} for hidden in (300, 82, 80, 81)]
    monkeypatch.setattr(sizing.models, "size_space", lambda *_: iter(proposals), raising=False)
    target = models.count("rankmixer", SCHEMA, proposals[2]).dense_params
    assert size("rankmixer", SCHEMA, dense_params=target).overrides["hidden"] == 82
    assert size("rankmixer", SCHEMA, dense_params=target, tolerance=1e-6).overrides["hidden"] == 80


def test_nearest_wins_where_nothing_is_within_tolerance(monkeypatch):
    proposals = [{"tokens": 8, "width": 32, "hidden": hidden} for hidden in (300, 60, 120)]
    monkeypatch.setattr(sizing.models, "size_space", lambda *_: iter(proposals), raising=False)
    target = models.count("rankmixer", SCHEMA, {**proposals[0], "hidden": 70}).dense_params
    result = size("rankmixer", SCHEMA, dense_params=target)
    assert result.overrides["hidden"] == 60 and not result.reachable


def test_wrong_closed_form_is_refused(monkeypatch):
    right = models.count

    def wrong(*args):
        count = right(*args)
        return dataclasses.replace(count, dense_params=count.dense_params + 1)

    monkeypatch.setattr(sizing.models, "count", wrong, raising=False)
    with pytest.raises(ValueError, match=r"closed form says .*difference -1"):
        size("rankmixer", SCHEMA, dense_params=1e5)


@pytest.mark.parametrize(
    "targets, message",
    [
        ({}, "exactly one target"),
        ({"dense_params": 1e5, "train_flops": 1e6}, "exactly one target"),
        ({"dense_params": 1e5, "examples": 1e6}, "examples belong to"),
        ({"dense_params": -1.0}, "positive"),
        ({"train_flops": float("nan")}, "positive"),
        ({"train_flops": 1e9, "examples": 0}, "positive"),
    ],
)
def test_senseless_targets_are_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        size("rankmixer", SCHEMA, **targets)


def test_unknown_model_names_the_nearest():
    with pytest.raises(ValueError, match="rankmixer"):
        size("rankmixr", SCHEMA, dense_params=1e5)
