"""The sweep files of the memory family load and plan: what they hold fixed, and what they vary."""

import itertools

import jax
import numpy as np
import pandas as pd
import pytest
from committed_runs import RUNS, notes
from flax import nnx
from scipy.stats import binom, poisson

from recscale.models.inputs.examples import random_inputs
from recscale.scaling.counting.abstract import abstract_model
from recscale.scaling.data.known_truth import make_schema, preset
from recscale.scaling.data.known_truth.laws import predict
from recscale.scaling.data.known_truth.world import build_world
from recscale.sweeps.engine.loading import load
from recscale.sweeps.engine.plan import make_plan


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


def test_hash_tables_stand_beside_memories_in_one_world():
    study, searched = load("memory_slots_hashed"), load("memory_slots_hashed_rates")
    assert searched.config().data.log_seed != study.config().data.log_seed
    points = study.points()
    for arm in {point["note.arm"] for point in points if point["model.memory_slots"] == 2**16}:
        own = [p["seed"] for p in points if p["note.arm"] == arm and p["model.memory_slots"] == 2**16]
        assert sorted(own) == list(range(5))
    small = [point for point in points if point["seed"] == 0 and point["model.memory_slots"] == 2**12]
    small = [point for point in small if point["note.arm"] in ("hash table, K = 1, Adam", "hash table, K = 8, Adam")]
    rows = make_plan(study.config(), small, sweep="memory_slots_hashed").rows
    assert [row["config"]["architecture"] for row in rows] == ["hash_table", "hash_table_8"]
    for row in rows:  # no query, no keys: all but the rows is the network around the memory
        assert row["counts"]["active_params"] < 1_000 and row["counts"]["memory_params"] == 16 * 2**12


def noted(start):
    """Figures of the line of the run tables' note that begins so, one per size, nothing where none was run."""
    (line,) = [line for line in notes().splitlines() if line.startswith(f"| {start}")]
    return np.asarray([float(cell) if cell.strip() else np.nan for cell in line.split("|")[2:-1]])


def test_the_note_of_the_slots_ladder_says_what_its_table_holds():
    table = pd.read_parquet(RUNS / "memory_slots_ladder.parquet")
    slots = sorted(table["memory_slots"].unique())
    assert len(table) == 135 and (table["status"] == "done").all()

    def best(name, column):
        rows = table[table["architecture"] == name]
        by_rate = rows.groupby(["memory_slots", "lr_dense"])[["logloss", "memory_usage"]].mean().reset_index()
        kept = by_rate.loc[by_rate.groupby("memory_slots")["logloss"].idxmin()].set_index("memory_slots")
        return kept[column].reindex(slots).to_numpy()

    for start, name, column, digits in (
        ("`pkm`,", "pkm", "logloss", 4),
        ("`pkm_random`", "pkm_random", "logloss", 4),
        ("`pkm_hashed`", "pkm_hashed", "logloss", 4),
        ("share of slots in use, `pkm`", "pkm", "memory_usage", 2),
        ("the same, `pkm_hashed`", "pkm_hashed", "memory_usage", 2),
    ):
        np.testing.assert_allclose(noted(start), best(name, column), atol=0.51 * 10.0**-digits, err_msg=start)

    asymptote = table["asymptote"].iloc[0]
    config = preset("memory", **load("memory_slots_ladder").config().data.overrides.to_dict())
    constants = {"asymptote": asymptote, "v": 0.105}
    store = predict(build_world(config), pairs=np.asarray(slots), constants=constants, exact=True)
    np.testing.assert_allclose(noted("a perfect store"), store, atol=5.1e-5)
    slopes = -np.diff(np.log(best("pkm", "logloss") - asymptote)) / np.diff(np.log(slots))
    assert slopes[:-1].round(2).min() == 0.13 and slopes[:-1].max() < 0.195 and round(slopes[-1], 2) == 0.10


def test_what_two_million_rows_tell_of_the_pairs_of_the_slots_ladder():
    """The excess, over the entropy floor, of the posterior mean of the most frequent pairs a store holds."""
    config = preset("memory", **load("memory_slots_ladder").config().data.overrides.to_dict())
    per_rank, m = 4 * config.clusters, config.c_m**0.5
    right = 1 / (1 + np.exp(-m))

    def excess(looks):
        agree = np.arange(looks + 1)
        believed = 1 / (1 + np.exp(-m * (2 * agree - looks)))
        p = believed * right + (1 - believed) * (1 - right)
        divergence = right * np.log(right / p) + (1 - right) * np.log((1 - right) / (1 - p))
        return float(binom.pmf(agree, looks, right) @ divergence)

    looks = np.arange(60)
    after = np.asarray([excess(n) for n in looks])
    ranks = np.arange(1, config.pair_items + 1)
    share = config.missed_mass(ranks - 1) - config.missed_mass(ranks)

    def missed(slots, rows):
        each = poisson.pmf(looks, (rows * share / per_rank)[:, None]) @ after
        return np.where(ranks <= slots // per_rank, each, after[0]) @ share

    found = [missed(2**16, 2e6), missed(2**16, 1.6e7), missed(2**8, 2e6)]
    np.testing.assert_allclose(found, [0.0148, 0.0093, 0.1451], atol=6e-5)  # the sweep's own figures


def first_seed(name):
    file = load(name)
    points = file.points()
    rows = make_plan(file.config(), [point for point in points if point["seed"] == 0], sweep=name).rows
    return rows, len(points) // len(rows)


def test_slots_are_crossed_with_data_and_with_reads():
    rows, repeats = first_seed("memory_slots_by_data")
    assert repeats == 3 and len(rows) == 2 * 5 * 4
    cells = {(row["counts"]["memory_slots"], row["config"]["training"]["examples"]) for row in rows}
    assert len(cells) == 20 and {M for M, _ in cells} == {2**8, 2**10, 2**12, 2**14, 2**16}
    assert len({row["trunk_id"] for row in rows}) == 2 * 5  # the horizons are branches of one run

    rows, repeats = first_seed("memory_slots_by_reads")
    models = [row["config"]["model"] for row in rows]
    assert repeats == 3 and {model["memory_topk"] * model["memory_heads"] for model in models} == {8, 32, 128}
    assert {model["memory_slots"] for model in models} == {1024, 2025, 4096, 16_384, 65_536}
    assert len(rows) == 2 * 4 * 5


def test_controls_of_the_slots_ladder_have_as_many_parameters():
    rows, repeats = first_seed("memory_slots_controls")
    models = [row["config"]["model"] for row in rows]
    assert repeats == 3 and len(rows) == 15
    learned = [r for r, m in zip(rows, models, strict=True) if m["memory_count"] and not m["values_frozen"]]
    frozen = [r for r, m in zip(rows, models, strict=True) if m["values_frozen"]]
    wide = [r for r, m in zip(rows, models, strict=True) if not m["memory_count"]]
    for ours, other in zip(learned, wide, strict=True):
        # One hidden unit of width 16 has 33 parameters.
        assert abs(ours["counts"]["dense_params"] - other["counts"]["dense_params"]) <= 33 / 2
        assert not other["counts"]["memory_slots"]
    for ours, other in zip(learned, frozen, strict=True):
        assert other["counts"]["memory_params"] == 0 < ours["counts"]["memory_params"]


def test_slots_of_msn_at_fixed_width_and_at_equal_active_parameters():
    rows, repeats = first_seed("memory_slots_msn")
    assert repeats == 5 and 7 < len(rows) < 14
    fixed = [row for row in rows if row["config"]["model"]["hidden"] == 128]
    assert [row["config"]["model"]["memory_slots"] for row in fixed] == [n * n for n in (16, 23, 32, 45, 64, 91, 128)]
    narrowed = {row["config"]["model"]["memory_slots"]: row for row in rows if row not in fixed}
    assert 128 * 128 in narrowed and 16 * 16 not in narrowed
    equal = [narrowed.get(row["config"]["model"]["memory_slots"], row) for row in fixed]
    active = [row["counts"]["active_params"] for row in equal]
    assert max(active) <= min(active) * 1.01 < fixed[-1]["counts"]["active_params"]


def test_slots_of_lmn_reach_a_million():
    rows, repeats = first_seed("lmn_slots_ladder")
    models = [row["config"]["model"] for row in rows]
    assert repeats == 3 and len(rows) == 22 and max(row["counts"]["memory_slots"] for row in rows) == 2**20
    assert {model["memory_topk"] for model in models} == {8, 16, 32}
    assert [model["memory_weight"] for model in models].count(0.0) == 1
