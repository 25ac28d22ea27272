"""The sweep files of the sequence family load and plan: what they hold fixed, and what they vary."""

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
from committed_runs import RUNS, notes

from recscale import models
from recscale.scaling.data import make_source
from recscale.scaling.data.known_truth import build_world, preset
from recscale.scaling.data.known_truth.card import card
from recscale.scaling.data.known_truth.laws import predict
from recscale.sweeps import axis, by_history_length, product
from recscale.sweeps.engine.loading import load
from recscale.sweeps.engine.plan import make_plan
from recscale.sweeps.sequences import longer_start, tournament, tournament_categories


def planned(name, keep=lambda point: True):
    file = load(name)
    points = [point for point in file.points() if point.get("seed", 0) == 0 and keep(point)]
    return make_plan(file.config(), points, sweep=name).rows


def test_the_length_ladder_varies_length_alone():
    rows = planned("length_ladder")
    assert {row["config"]["architecture"] for row in rows} == {
        "longer+rankmixer",
        "din+rankmixer",
        "hyformer",
        "mixformer",
    }
    lengths = sorted({row["config"]["data"]["history_length"] for row in rows})
    assert lengths == [16, 32, 64, 128, 256, 512]
    by_model = {}
    for row in rows:
        key = row["config"]["architecture"], row["config"]["training"]["lr"]
        by_model.setdefault(key, []).append(row)
    assert len(by_model) == 4  # one rate each
    for name, own in by_model.items():
        assert [row["config"]["data"]["history_length"] for row in own] == lengths
        sizes = {row["counts"]["dense_params"] for row in own}
        assert len(sizes) == 1 and 3.9e4 < sizes.pop() < 4.1e4, name
        flops = [row["predicted"]["train_flops"] for row in own]
        assert flops == sorted(flops) and len(set(flops)) == 6
    assert len({point["seed"] for point in load("length_ladder").points()}) == 3


def test_co_scaling_crosses_sizes_and_lengths():
    rows = planned("co_scaling")
    for name in ("longer+rankmixer", "mixformer"):
        own = [row for row in rows if row["config"]["architecture"] == name]
        sizes = {row["targets"]["dense_params"] for row in own}
        assert len(own) == len(sizes) * len({row["config"]["data"]["history_length"] for row in own}) == 12
        assert all(abs(row["target_error"]) < 0.1 for row in own)
    assert len({point["seed"] for point in load("co_scaling").points()}) == 3


def test_arms_of_longers_start_change_what_they_name_before_one_backbone():
    file, length = load("longer_start"), by_history_length([128])
    rows = make_plan(file.config(), product(longer_start.arms([*longer_start.ARMS]), length), sweep="t").rows
    assert len({row["counts"]["dense_params"] - row["counts"]["encoder_params"] for row in rows}) == 1
    first = rows[0]["config"]["model"]["encoder"]
    for row in rows:
        changed = {key for key, value in row["config"]["model"]["encoder"].items() if value != first[key]}
        assert changed == set(longer_start.ARMS[row["notes"]["arm"]])
    points = file.points()
    assert len({point["seed"] for point in points}) == 5 and len({point["training.lr"] for point in points}) == 3


def tournament_rows(protocol):
    points = [point for name in tournament.NAMES for point in tournament.model(protocol, name)]
    return make_plan(load("tournament").config(), product(points, by_history_length([128])), sweep="t").rows


def test_the_tournaments_encoders_have_one_backbone_and_equal_flops():
    rows = tournament_rows("equal FLOPs")
    cost = [row["predicted"]["train_flops"] for row in rows]
    assert len(rows) == 8 and max(cost) < 1.3 * min(cost)
    backbones = [row["config"]["model"]["backbone"] for row in rows if "backbone" in row["config"]["model"]]
    assert len(backbones) == 6 and all(backbone == backbones[0] for backbone in backbones)


def test_the_encoders_have_equal_flops_in_a_world_with_categories_too():
    rows = planned("tournament_categories")
    cost = [row["predicted"]["train_flops"] for row in rows]
    assert len(rows) == len(tournament_categories.NAMES) and max(cost) < 1.3 * min(cost)
    assert len({str(row["config"]["model"]["backbone"]) for row in rows}) == 1
    assert all(row["config"]["data"]["overrides"]["match_groups"] == 2 for row in rows)


@pytest.mark.slow
def test_the_tournaments_models_are_of_one_size_whatever_the_share():
    rows = tournament_rows("equal total")
    assert len(rows) == 24 and all(abs(row["target_error"]) < 0.04 for row in rows)


def test_every_ablation_is_a_model():
    """Shapes only: each point's config is resolved and counted, and no two points are the same run."""
    file = load("sequence_ablations")
    points = [point for point in file.points() if point["seed"] == 0]
    rows = make_plan(file.config(), points, sweep="sequence_ablations").rows
    assert len({row["run_id"] for row in rows}) == len(points) > 25
    for row in rows:
        assert abs(row["target_error"]) < 0.03, row["config"]["model"]


@pytest.mark.parametrize("length", [8, 20])
def test_history_length_reaches_the_model(length):
    """`by_history_length` cuts the log's histories: schema, batches and the encoder's own sizes agree."""
    config = load("smoke").config()
    config.architecture = "longer+rankmixer"
    with config.unlocked():
        config.model = models.get_config("longer+rankmixer")
    rows = make_plan(config, product(by_history_length([length]), axis("seed", [0])), sweep="t").rows
    source = make_source(
        {"name": "known_truth", "preset": "smoke", "history_length": length, "holdout_rows": 8}, requests=4
    )
    (sequence,) = source.schema.sequences
    assert sequence.length == length
    batch = next(iter(source.holdout()))
    assert batch.user.histories[sequence.name].ids["item"].shape == (4, length)
    assert rows[0]["counts"] == dataclasses.asdict(models.count("longer+rankmixer", source.schema)) | rows[0]["counts"]


NOTED = {
    "din+rankmixer": "DIN + RankMixer",
    "hyformer": "HyFormer",
    "mixformer": "MixFormer",
    "longer+rankmixer": "LONGER + RankMixer",
}


def test_the_note_of_the_length_ladder_says_what_its_table_holds():
    table = pd.read_parquet(RUNS / "length_ladder.parquet")
    text = notes()
    section = text[text.index("## The length ladder") : text.index("## LONGER's start")]

    def noted(start):
        (line,) = [line for line in section.splitlines() if line.startswith(f"| {start} ")]
        return line.split("|")[2:-1]

    lengths = [int(cell) for cell in noted("events")]
    assert lengths == sorted(table["history_length"].unique()) and (table["status"] == "done").all()
    for name, start in NOTED.items():
        own = table[table["architecture"] == name].groupby("history_length")["logloss"]
        assert (own.count() == 3).all()
        means, spreads = zip(*(re.fullmatch(r" (\S+) \((\S+)\) ", cell).groups() for cell in noted(start)), strict=True)
        np.testing.assert_allclose(np.asarray(means, float), own.mean(), atol=5.1e-5, err_msg=name)
        np.testing.assert_allclose(np.asarray(spreads, float), own.std(), atol=5.1e-5, err_msg=name)
    file = load("length_ladder")
    world = build_world(preset("long", **file.config().data.overrides.to_dict()))
    constants = card(world) | {"asymptote": table["asymptote"].iloc[0]}
    best = predict(world, history_length=np.asarray(lengths), constants=constants, exact=True)
    np.testing.assert_allclose([float(cell) for cell in noted("best possible (exact)")], best, atol=1.5e-4)
