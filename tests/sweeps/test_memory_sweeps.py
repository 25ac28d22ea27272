"""The sweep files of the memory family load and plan: what they hold fixed, and what they vary."""

import itertools

import jax
import pytest
from flax import nnx

from recscale.models.inputs.examples import random_inputs
from recscale.scaling.counting.abstract import abstract_model
from recscale.scaling.data.known_truth import make_schema, preset
from recscale.sweeps.loading import load
from recscale.sweeps.plan import make_plan


def planned(name):
    """Rows of the first seed; every point has five."""
    file = load(name)
    points = file.points()
    assert {point["seed"] for point in points} == set(range(5))
    rows = make_plan(file.config(), [point for point in points if point["seed"] == 0], sweep=name).rows
    assert len({row["run_id"] for row in rows}) == len(rows) == len(points) // 5
    return rows


def test_the_anti_collapse_study_is_every_combination_of_three_switches():
    rows = planned("memory_anti_collapse")
    arms = [
        (c["model"]["query_norm"], c["model"]["key_norm"], c["training"]["warmup_examples"], c["model"]["theta"])
        for c in (row["config"] for row in rows)
    ]
    cube = {(n, n, w, t) for n, w, t in itertools.product(("layer", "none"), (50_000, 0), ("right_dxd", "none"))}
    assert set(arms) == cube | {("layer", "layer", 50_000, "left_nxn")}
    assert sum(row["config"]["model"]["freeze_base_keys"] for row in rows) == 1 and len(rows) == 10
    assert len({row["counts"]["memory_params"] for row in rows}) == 1

    # What the study reads is among the scalars that a step logs.
    config = load("memory_anti_collapse").config()
    schema = make_schema(preset("memory", **config.data.overrides.to_dict()))
    graph, state = nnx.split(abstract_model("msn", schema, config.model))
    inputs = random_inputs(schema, 2, 1)
    stats = jax.eval_shape(lambda s, i: nnx.merge(graph, s)(i).stats, state, inputs)
    for name in ("usage", "usage_null", "kl", "kl_null", "top1_weight", "gate_saturated"):
        assert stats[f"layer1/memory/{name}"].shape == ()


def test_ablations_have_equal_active_parameters():
    rows = planned("memory_ablations")
    msn = [row for row in rows if row["config"]["architecture"] == "msn"]
    base, first = msn[0]["counts"]["active_params"], 128
    own = [row for row in msn if row["config"]["model"]["hidden"] == first]
    assert own[0] is msn[0]
    fixed = [row for row in own if row["counts"]["active_params"] != base]
    assert [row["config"]["model"]["memory_count"] for row in fixed] == [1, 4]
    for row in rows:
        if row not in fixed:
            assert row["counts"]["active_params"] == pytest.approx(base, rel=0.03 if row not in msn else 0.01)
    assert {row["config"]["model"].get("module") for row in msn} == {"ffn", "gated_ffn", "smoe", "msn_ffn", "msn_smoe"}
    assert {row["config"]["architecture"] for row in rows} == {"msn", "wukong", "dlrm_mlp"}
    tokens = [row for row in msn if row["config"]["model"]["values_per_token"]]
    assert tokens[0]["counts"]["memory_params"] == 8 * msn[0]["counts"]["memory_params"]


def test_the_slots_ladder_has_three_arms_and_one_code_for_a_pair():
    file = load("memory_slots_ladder")
    points = file.points()
    rows = make_plan(file.config(), [point for point in points if point["seed"] == 0], sweep="memory_slots_ladder").rows
    assert {point["seed"] for point in points} == {0, 1, 2} and len(points) == 3 * len(rows) == 135
    slots = [n * n for n in (16, 23, 32, 45, 64, 91, 128, 181, 256)]
    checked = [n * n for n in (16, 64, 181, 256)]  # at four rates, the others at three
    for name, topk, expected in (
        ("pkm", 8, 3 * slots + checked),
        ("pkm_random", 8, slots[::2]),
        ("pkm_hashed", 1, slots),
    ):
        arm = [row for row in rows if row["config"]["architecture"] == name]
        assert sorted(row["counts"]["memory_slots"] for row in arm) == sorted(expected)
        assert {row["config"]["model"]["memory_topk"] for row in arm} == {topk}
        # Everything but values and sub-keys: too little to hold pairs.
        for row in arm:
            keys = 0 if name != "pkm" else 2 * 8 * row["counts"]["memory_slots"] ** 0.5
            assert row["counts"]["active_params"] - keys < 1_000
    schema = make_schema(preset("memory", **file.config().data.overrides.to_dict()))
    assert [field.name for field in schema.fields] == ["pair"] and not schema.sequences
    assert file.config().training.embedding_lr == 0.0
