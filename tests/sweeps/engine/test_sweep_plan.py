"""The plan: what is resolved, what identifies a run, and how a plan may grow."""

import json
import os
import subprocess
import sys

import pytest

from recscale import models
from recscale.scaling.records.overrides import OverrideError
from recscale.scaling.records.planned import labels
from recscale.scaling.records.runs import write_record
from recscale.scaling.records.sealed import sealed
from recscale.scaling.training import get_config, group_id, run_id
from recscale.sweeps import axis, by_dense_params, by_flop_budget, by_train_flops, chain, noted, product, seeds
from recscale.sweeps.engine.plan import PlanError, append_stage, make_plan, read_plan, run_config, write_plan
from recscale.sweeps.engine.tables import plan_table


def base():
    config = get_config("rankmixer", "known_truth")
    config.data.preset = "smoke"
    config.data.holdout_rows = 512
    config.training.requests = 64
    config.training.examples = 1000
    config.training.warmup_examples = 64
    return config


def plan(points, **kwargs):
    return make_plan(base(), points, sweep="test", **kwargs)


def test_a_row_holds_the_resolved_run_its_counts_and_its_price():
    row = plan([{"training.lr": 1e-2}]).rows[0]
    config = run_config(row)
    assert config.training.lr == 1e-2 and row["run_id"] == run_id(config) and row["group_id"] == group_id(config)
    counts = row["counts"]
    assert counts["dense_params"] > 0 and counts["embedding_params"] > 0
    predicted = row["predicted"]
    assert predicted["examples"] == 1024  # whole steps of 64
    assert predicted["train_flops"] == 1024 * counts["train_flops_per_row"]
    assert predicted["peak_memory_bytes"] > 4 * counts["dense_params"] and predicted["job_seconds"] > 0
    assert row["targets"] == {"dense_params": None, "train_flops_per_row": None, "train_flops": None}
    assert json.loads(json.dumps(row)) == row
    assert f"{counts['dense_params']:,}" in plan_table([row | {"job": row["group_id"]}])


def test_an_encoder_grows_with_its_share_of_a_ladder_or_alone_to_equal_flops():
    config = base()
    config.data.preset = "long"
    points = product([{"architecture": "din+rankmixer", "model.backbone.layers": 1}], by_dense_params([1e5, 2e5]))
    shared = make_plan(config, product(points, axis("size.encoder_share", [0.4])), sweep="test").rows
    assert [row["counts"]["encoder_params"] / row["targets"]["dense_params"] for row in shared] == pytest.approx(
        [0.4, 0.4], rel=0.1
    )
    assert all(abs(row["target_error"]) < 0.03 and not row["config"]["size"].get("encoder_share") for row in shared)
    plain = make_plan(config, points, sweep="test").rows
    assert len({row["counts"]["encoder_params"] for row in plain}) == 1
    backbone = {"model.backbone.layers": 1, "model.backbone.width": 32, "model.backbone.hidden": 40}
    names = [{"architecture": f"{name}+rankmixer"} | backbone for name in ("din", "stca")]
    fixed = make_plan(config, product(names, by_train_flops([2e7], size__fixed="backbone")), sweep="test").rows
    assert all(abs(row["target_error"]) < 0.1 for row in fixed)
    assert all(row["config"]["model"]["backbone"]["hidden"] == 40 for row in fixed)
    with pytest.raises(ValueError, match="size.encoder_share and size.fixed split a target"):
        make_plan(config, [{"architecture": "din+rankmixer", "size.encoder_share": 0.4}], sweep="test")


def test_a_budget_buys_requests_with_all_their_candidates():
    """The user side is paid once per request: 4 candidates a request make a row cheaper."""
    made = {}
    for candidates in (1, 4):
        config = base()
        config.training.candidates, config.training.requests = candidates, 64 // candidates
        (made[candidates],) = make_plan(config, by_flop_budget([1e9]), sweep="test").rows
        counts, examples = made[candidates]["counts"], made[candidates]["predicted"]["examples"]
        per_row = counts["train_flops_user"] / candidates + counts["train_flops_candidate"]
        asked = made[candidates]["config"]["training"]["examples"]
        assert asked == round(1e9 / per_row) and examples == -(-asked // 64) * 64
        assert made[candidates]["predicted"]["train_flops"] == pytest.approx(per_row * examples)


def test_seeds_rates_and_budgets_share_a_group_and_trunks_share_all_but_the_budget():
    points = product(axis("training.examples", [1024, 2048]), axis("training.lr", [1e-3, 1e-2]), seeds(2))
    rows = plan(points).rows
    assert len({row["run_id"] for row in rows}) == 8
    assert len({row["group_id"] for row in rows}) == 1 and len({row["shape_id"] for row in rows}) == 1
    assert len({row["trunk_id"] for row in rows}) == 4
    job = rows[0]["predicted"]["job_seconds"]
    assert sum(row["predicted"]["seconds"] for row in rows) == pytest.approx(job, rel=0.05)
    cosine = plan(product(axis("training.examples", [1024, 2048]), [{"training.schedule": "cosine"}])).rows
    assert len({row["trunk_id"] for row in cosine}) == 2


def test_lengths_without_a_trunk_in_common_are_jobs_apart(tmp_path):
    lengths, rates = axis("training.examples", [1024, 2048]), axis("training.lr", [2e-3, 1e-3])
    both = product(lengths, rates, seeds(2))  # every rate at both lengths: each trunk has two branches
    own = product([a | b for a, b in zip(lengths, rates, strict=True)], seeds(2))
    rows = {name: write_plan(tmp_path / name, plan(points))[0] for name, points in (("both", both), ("own", own))}
    assert len({row["job"] for row in rows["both"]}) == 1 and len({row["group_id"] for row in rows["own"]}) == 1
    jobs = {}
    for row in rows["own"]:
        jobs.setdefault(row["job"], []).append(row["predicted"]["examples"])
    assert list(jobs.values()) == [[1024, 1024], [2048, 2048]]  # seeds stay together
    assert write_plan(tmp_path / "own", plan(own)) == (rows["own"], 0)


def test_a_target_becomes_a_shape_and_stays_beside_the_run():
    rows = plan(by_dense_params([3e4, 1e5])).rows
    for row, target in zip(rows, [3e4, 1e5], strict=True):
        assert row["targets"]["dense_params"] == target
        assert row["target_error"] == pytest.approx(row["counts"]["dense_params"] / target - 1)
        assert set(row["config"]["size"].values()) == {None}
    assert rows[0]["shape_id"] != rows[1]["shape_id"] and rows[0]["group_id"] != rows[1]["group_id"]
    # the same shape written by hand is the same run
    by_hand = [{f"model.{key}": value for key, value in rows[0]["config"]["model"].items()}]
    assert plan(by_hand).rows[0]["run_id"] == rows[0]["run_id"]


def test_flop_targets_per_row_and_for_the_whole_run():
    row = plan(by_train_flops([3e5])).rows[0]
    assert row["targets"]["train_flops_per_row"] == 3e5 and row["targets"]["train_flops"] == 3e5 * 1024
    assert row["target_error"] == pytest.approx(row["counts"]["train_flops_per_row"] / 3e5 - 1)
    rows = plan(product(by_flop_budget([1e9]), by_dense_params([3e4, 1e5]))).rows
    for row in rows:
        step = 64 * row["counts"]["train_flops_per_row"]
        assert row["targets"]["train_flops"] == 1e9
        assert 0 <= row["predicted"]["train_flops"] - 1e9 < step + row["counts"]["train_flops_per_row"]
    with pytest.raises(ValueError, match="point 0 .*both set"):
        plan(product(by_train_flops([1e6]), by_dense_params([1e4])))


def test_the_same_run_is_planned_once():
    assert len(plan(chain(seeds(2), seeds(3))).rows) == 3
    near = plan(by_dense_params([1e5, 1e5 + 1]))
    assert len(near.rows) == 1 and "reaches the same run" in near.notes[0]


def test_an_architecture_brings_its_own_model_section():
    rows = plan(axis("architecture", ["rankmixer", "dlrm_mlp"])).rows
    assert set(rows[1]["config"]["model"]) == set(models.get_config("dlrm_mlp"))
    with pytest.raises(OverrideError, match=r"point 1 .*unknown configuration key 'model.tokens' .*dlrm_mlp"):
        plan(product(axis("architecture", ["rankmixer", "dlrm_mlp"]), [{"model.tokens": 8}]))
    with pytest.raises(OverrideError, match="there is no model 'rankmixr'.*rankmixer"):
        plan([{"architecture": "rankmixr"}])


def test_assignments_have_the_last_word():
    rows = plan(seeds(3), assignments=["seed=7", "training.lr=1e-4"]).rows
    assert [(row["config"]["seed"], row["config"]["training"]["lr"]) for row in rows] == [(7, 1e-4)]
    with pytest.raises(OverrideError, match="nearest key is 'training.lr'"):
        plan(seeds(1), assignments=["training.lrr=1"])


def test_what_the_data_set_refuses_names_the_point():
    with pytest.raises(ValueError, match=r"point 0 of sweep 'test'.*unknown data set 'known_lies'"):
        plan([{"data.name": "known_lies"}])


PRINT_IDS = """
import json, sys
sys.path.insert(0, sys.argv[1])
from test_sweep_plan import plan
from recscale.sweeps import axis, by_dense_params, product
rows = plan(product(axis("architecture", ["rankmixer", "dlrm_mlp"]), by_dense_params([3e4]))).rows
print(json.dumps([[row[key] for key in ("run_id", "group_id", "shape_id", "trunk_id")] for row in rows]))
"""


def test_ids_are_the_same_in_every_process():
    printed = [
        subprocess.run(
            [sys.executable, "-c", PRINT_IDS, os.path.dirname(__file__)],
            env=os.environ | {"PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert printed[0] == printed[1] and len(set(sum(json.loads(printed[0]), []))) == 8


def test_planning_again_changes_nothing(tmp_path):
    rows, new = write_plan(tmp_path, plan(seeds(2)))
    before = (tmp_path / "plan.jsonl").read_bytes()
    assert new == 2 and [row["run_id"] for row in read_plan(tmp_path)] == [row["run_id"] for row in rows]
    assert write_plan(tmp_path, plan(seeds(2)))[1] == 0
    assert (tmp_path / "plan.jsonl").read_bytes() == before


def test_a_different_sweep_is_refused_with_what_differs_unless_extended(tmp_path):
    write_plan(tmp_path, plan(seeds(2)))
    first = read_plan(tmp_path)
    with pytest.raises(PlanError, match=r"2 of its 2 runs .* 2 of this sweep's 2 .*training.lr 0.003 there, 0.01 here"):
        write_plan(tmp_path, plan(product(seeds(2), [{"training.lr": 1e-2}])))
    with pytest.raises(PlanError, match="0 of its 2 runs are not in this sweep, 1 of this sweep's 3 are new; seed"):
        write_plan(tmp_path, plan(seeds(3)))
    with pytest.raises(PlanError, match="1 of its 2 runs are not in this sweep, 0 of"):
        write_plan(tmp_path, plan(seeds(1)))
    assert read_plan(tmp_path) == first

    rows, new = write_plan(tmp_path, plan(seeds(3)), extend=True)
    assert new == 1 and rows[:2] == first  # append-only
    # a third seed is another program: a job, and so checkpoints, of its own
    assert rows[2]["group_id"] == rows[0]["group_id"] and rows[2]["job"] == f"{rows[0]['job']}-2"
    # both sweeps are now what the plan was made of
    assert write_plan(tmp_path, plan(seeds(3)))[1] == 0
    assert write_plan(tmp_path, plan(seeds(2)))[1] == 0


def test_a_stage_is_derived_from_finished_runs_only(tmp_path):
    rows, _ = write_plan(tmp_path, plan(seeds(2)))
    runs = [row["run_id"] for row in rows]
    write_record(tmp_path / "runs" / runs[0], {"status": "done"})
    with pytest.raises(PlanError, match=f"run {runs[1]} is planned"):
        append_stage(tmp_path, [{"training.lr": 1e-2}], derived_from=runs)
    assert append_stage(tmp_path, [{"training.lr": 1e-2}], derived_from=runs[:1]) == 1
    assert append_stage(tmp_path, [{"training.lr": 1e-2}], derived_from=runs[:1]) == 0
    assert [row["stage"] for row in read_plan(tmp_path)] == [0, 0, 1]
    assert write_plan(tmp_path, plan(seeds(2)))[1] == 0  # the sweep itself is still the same


def test_a_planned_run_cannot_be_changed_behind_its_id():
    row = json.loads(json.dumps(plan(seeds(1)).rows[0]))
    assert run_config(row, ["data.root=/elsewhere"]).data.root == "/elsewhere"
    with pytest.raises(OverrideError, match="'training.lr' changes the runs"):
        run_config(row, ["training.lr=1.0"])
    row["config"]["training"]["lr"] = 1.0
    with pytest.raises(PlanError, match="now hashes to"):
        run_config(row)


def test_a_broken_or_missing_plan_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="plan a sweep first"):
        read_plan(tmp_path)
    (tmp_path / "plan.jsonl").write_text(sealed({"run_id": "1"}) + '{"run_')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_plan(tmp_path)


def test_notes_are_recorded_beside_the_run_and_change_nothing_in_it():
    noted_row, row = plan(noted([{}], match_id="small", lr_bracketed=True)).rows[0], plan([{}]).rows[0]
    assert noted_row["run_id"] == row["run_id"] and "notes" not in row
    assert labels(noted_row | {"job": "j"})["notes"] == {"match_id": "small", "lr_bracketed": True}
