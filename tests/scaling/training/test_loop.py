"""The loop: records, branches equal to runs of their own, replicas, divergence, resume after an interruption."""

import dataclasses
import json
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from shared_trainers import shared_trainers

from recscale.scaling.records import runs as records
from recscale.scaling.training import RunSpec, get_config, loop, train, train_group
from recscale.scaling.training.schedule import NEVER, Segment
from recscale.scaling.training.step import TrainState

STEPS = 24
EXAMPLES = 64 * STEPS


def make_config(architecture="rankmixer", **settings):
    config = get_config(architecture, "known_truth")
    config.data.preset = "smoke"
    config.data.holdout_rows = 512
    config.model.tokens, config.model.width, config.model.hidden, config.model.layers = 4, 16, 32, 1
    config.training.requests = 64
    config.training.examples = EXAMPLES
    config.training.warmup_examples = 64 * 6
    config.training.checkpoint_every_s = 0.0
    with config.unlocked():
        for key, value in settings.items():
            section, _, name = key.rpartition("__")
            setattr(config[section] if section else config, name, value)
    return config


def losses(record: dict) -> dict:
    return {k: v for k, v in record["metrics"].items() if "logloss" in k}


class Interrupted(Exception):
    pass


def interrupt_after(events: int):
    seen = 0

    def progress(event):
        nonlocal seen
        seen += 1
        if seen >= events:
            raise Interrupted

    return progress


@pytest.fixture(scope="module", autouse=True)
def trainers():
    with shared_trainers() as made:
        yield made


@pytest.fixture(scope="module")
def plain(tmp_path_factory, trainers):
    folder = tmp_path_factory.mktemp("plain")
    return folder, train(make_config(), folder)


def test_one_compilation_serves_the_first_step_the_trunk_and_the_decay(plain, trainers):
    assert next(iter(trainers.values()))._steps._cache_size() == 1


def test_what_a_step_holds_is_looked_up_and_not_compiled_again(plain, trainers, caplog):
    trainer = next(iter(trainers.values()))
    vars(trainer).pop("compiled")
    with jax.log_compiles():
        assert trainer.compiled is not None
    assert "XLA compilation" not in caplog.text


def test_record_holds_what_a_table_needs(plain):
    folder, record = plain
    assert record["status"] == "done"
    assert record["work"]["examples"] == EXAMPLES
    assert record["work"]["train_flops"] == record["counts"]["train_flops_per_row"] * EXAMPLES
    assert 0 < record["metrics"]["excess_logloss"] < 0.2
    assert record["metrics"]["logloss"] == pytest.approx(
        record["metrics"]["entropy_floor"] + record["metrics"]["excess_logloss"], abs=1e-9
    )
    used = record["resources"]
    assert used["train_flops"] == {"value": record["work"]["train_flops"], "unit": "FLOP", "source": "counted"}
    assert used["wall_seconds"]["source"] == used["peak_host_bytes"]["source"] == "measured"
    absent = ("peak_device_bytes", "energy_kwh", "cost_usd", "mfu", "input_wait_share")  # a CPU, and nobody said
    assert {used[name]["source"] for name in absent} == {"absent"} and used["communication_bytes"]["value"] == 0
    assert used["activation_bytes"]["source"] == "counted" and used["activation_bytes"]["value"] > 0
    row = records.run_row(record)
    for column in ("run_id", "shape_id", "architecture", "dense_params", "train_flops", "examples", "logloss", "auc"):
        assert row[column] is not None, column
    lines = records.read_metrics(folder)
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    assert lines[-1]["examples"] == EXAMPLES
    json.dumps(record, allow_nan=False)


def test_learning_beats_the_first_interval(plain):
    lines = records.read_metrics(plain[0])
    assert lines[-1]["logloss"] < lines[0]["logloss"]


def test_done_run_is_left_alone(plain):
    folder, record = plain
    before = (folder / "run.json").stat().st_mtime_ns
    again = train(make_config(), folder)
    assert again == record and (folder / "run.json").stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "router, name, shape", [("relu", "active_ratio_by_token", (1, 4)), ("topk", "expert_load", (1, 4, 4))]
)
def test_statistics_of_every_expert_reach_the_metrics(tmp_path, router, name, shape):
    sizes = dict(training__examples=64 * 20, training__warmup_examples=64)
    config = make_config(model__experts=4, model__router=router, **sizes)
    assert train(config, tmp_path)["status"] == "done"
    for line in records.read_metrics(tmp_path):
        found = np.asarray(line[f"model_{name}"])
        assert found.shape == shape and np.isfinite(found).all() and found.any()


def test_results_do_not_depend_on_how_steps_are_divided(tmp_path):
    """A log that is recorded: logged every 2 steps or every 7, the model is the same to the last bit."""

    def trained(every):
        settings = dict(data__preset="dense", data__overrides={"quanta": 24, "code_bits": 3})
        config = make_config(**settings, training__log_every_examples=every * 64, training__checkpoint_every_s=1e9)
        return train(config, tmp_path / str(every))

    first, second = trained(2), trained(7)
    assert losses(first)["excess_logloss"] == losses(second)["excess_logloss"]
    logged = [{line["step"]: line for line in records.read_metrics(tmp_path / str(every))} for every in (2, 7)]
    common = sorted(logged[0].keys() & logged[1].keys())
    assert common == [14, 19, STEPS] and [logged[0][s]["rate"] for s in common] == [
        logged[1][s]["rate"] for s in common
    ]


@pytest.mark.parametrize(
    "events", [pytest.param(2, marks=pytest.mark.slow), 6, pytest.param(11, marks=pytest.mark.slow)]
)
def test_interrupted_run_ends_bit_identical(plain, tmp_path, events):
    folder, record = plain
    with pytest.raises(Interrupted):
        train(make_config(), tmp_path, progress=interrupt_after(events))
    assert records.read_record(tmp_path)["status"] == "running"
    with open(tmp_path / "metrics.jsonl", "a") as handle:  # the write a kill tore apart
        handle.write('{"step": 9')
    resumed = train(make_config(), tmp_path)
    assert losses(resumed) == losses(record) and resumed["restored_from"] > 0 and resumed["discarded"] == []
    assert (tmp_path / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mdl", "domain_heads"])
def test_interrupted_run_of_several_domains_ends_bit_identical(tmp_path, name):
    config = make_config(name, data__overrides=ConfigDict(dict(domains=3, tasks=2)))
    whole = train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "resumed", progress=interrupt_after(6))
    resumed = train(config, tmp_path / "resumed")
    assert losses(resumed) == losses(whole) and resumed["restored_from"] > 0
    both = [(tmp_path / folder / "metrics.jsonl").read_bytes() for folder in ("whole", "resumed")]
    assert both[0] == both[1]


def two_horizons(folder, **settings):
    settings = dict(training__log_every_examples=4 * 64) | settings
    configs = [make_config(training__examples=n, **settings) for n in (EXAMPLES, 2 * EXAMPLES)]
    return [RunSpec(config, folder / str(config.training.examples)) for config in configs]


def test_branch_equals_a_run_of_its_own_and_survives_interruption(plain, tmp_path):
    specs = two_horizons(tmp_path)
    with pytest.raises(Interrupted):
        train_group(specs, tmp_path / "group", progress=interrupt_after(6))  # inside the first branch
    short, long = train_group(specs, tmp_path / "group")
    alone = make_config(training__log_every_examples=4 * 64)
    own = train(alone, tmp_path / "alone")
    assert losses(short) == losses(own)
    assert (tmp_path / str(EXAMPLES) / "metrics.jsonl").read_bytes() == (tmp_path / "alone/metrics.jsonl").read_bytes()
    assert long["metrics"]["excess_logloss"] != short["metrics"]["excess_logloss"]
    assert short["trunk_id"] == long["trunk_id"]
    phases = [line["phase"] for line in records.read_metrics(tmp_path / str(2 * EXAMPLES))]
    assert phases == sorted(phases, key=["trunk", "decay"].index)


@pytest.mark.parametrize(
    ("segment", "decay"),
    [(Segment(0, 18), (NEVER, 1)), (Segment(18, 24, 24), (18, 6)), (Segment(24, 24, 24), (24, 1))],
)
def test_a_branch_decays_over_all_of_its_steps(segment, decay):
    nothing = dict.fromkeys((field.name for field in dataclasses.fields(TrainState)), None)
    state = TrainState(**nothing | {"step": jnp.zeros((), jnp.int32)})
    entered = loop.Loop._enter(cast(loop.Loop, None), state, segment)
    assert (int(entered.decay_from), int(entered.decay_steps)) == decay


def test_interruption_right_after_the_checkpoint_that_follows_a_branch(tmp_path, monkeypatch):
    """The branch is finished and the trunk stands where it left: what the branch wrote is not beyond the checkpoint."""
    whole, killed = (two_horizons(tmp_path / n, training__checkpoint_every_s=1e9) for n in ("whole", "killed"))
    train_group(whole, tmp_path / "whole/group")
    save = loop.Checkpoints.save

    def save_and_die(self, tick, position, state, trunk):
        save(self, tick, position, state, trunk)
        if position["segment"] == 2:
            raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(loop.Checkpoints, "save", save_and_die)
        train_group(killed, tmp_path / "killed/group")
    assert [(records.read_record(spec.run_dir) or {})["status"] for spec in killed] == ["done", "running"]
    train_group(killed, tmp_path / "killed/group")
    for one, other in zip(whole, killed, strict=True):
        assert (one.run_dir / "metrics.jsonl").read_bytes() == (other.run_dir / "metrics.jsonl").read_bytes()
        assert losses(records.read_record(one.run_dir)) == losses(records.read_record(other.run_dir))


def test_a_checkpoint_inside_a_logging_interval_carries_its_metrics(tmp_path, monkeypatch):
    config = make_config(training__log_every_examples=64 * 8, training__checkpoint_every_s=1e-9)
    whole = train(config, tmp_path / "whole")
    save = loop.Checkpoints.save

    def save_and_die(self, tick, position, state, trunk):
        save(self, tick, position, state, trunk)
        if position["step"] == 18:
            raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(loop.Checkpoints, "save", save_and_die)
        train(config, tmp_path / "killed")
    resumed = train(config, tmp_path / "killed")
    assert resumed["restored_from"] == 18 and losses(resumed) == losses(whole)
    lines = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "killed")]
    assert lines[0] == lines[1] and len(lines[0].splitlines()) == 4


def test_a_checkpoint_behind_a_run_without_a_result_is_passed_over(tmp_path):
    """What a message about a damaged record advises: it is deleted, and the run trained again."""
    specs = two_horizons(tmp_path)
    short, long = train_group(specs, tmp_path / "group")
    before = [(spec.run_dir / "metrics.jsonl").read_bytes() for spec in specs]
    (specs[0].run_dir / "run.json").unlink()
    again, same = train_group(specs, tmp_path / "group")
    assert losses(again) == losses(short) and same == long and again["status"] == "done"
    assert "behind the end of run" in again["discarded"][0]["reason"]
    assert [(spec.run_dir / "metrics.jsonl").read_bytes() for spec in specs] == before


def test_a_program_without_a_living_replica_stops(tmp_path, monkeypatch):
    """A rate that overflows the weights: the replica is lost within a few steps, and nothing trains on."""
    specs = two_horizons(tmp_path, training__lr=1e38)

    def killed(self, run, *rest):
        raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(loop.Ledger, "finish", killed)
        train_group(specs, tmp_path / "group")
    before = [(spec.run_dir / "metrics.jsonl").read_bytes() for spec in specs]
    assert [record["status"] for record in train_group(specs, tmp_path / "group")] == ["diverged"] * 2
    assert [(spec.run_dir / "metrics.jsonl").read_bytes() for spec in specs] == before
    lines = records.read_metrics(specs[1].run_dir)
    assert 1 <= len(lines) < 6 and lines[-1]["logloss"] is None
    assert "not finite at step" in records.read_record(specs[1].run_dir)["reasons"][0]


def test_replicas_equal_single_runs_and_one_may_diverge(plain, tmp_path):
    cases = {"a": (0, 3e-3), "b": (1, 3e-3), "nan": (0, 1e38)}
    specs = [
        RunSpec(make_config(seed=seed, training__lr=rate, training__checkpoint_every_s=1e9), tmp_path / name)
        for name, (seed, rate) in cases.items()
    ]
    first, second, broken = train_group(specs, tmp_path / "group")
    assert first["metrics"]["logloss"] == pytest.approx(plain[1]["metrics"]["logloss"], abs=1e-5)
    assert second["status"] == "done" and second["metrics"]["logloss"] != first["metrics"]["logloss"]
    assert broken["status"] == "diverged" and "not finite at step" in broken["reasons"][0]
    seen = int(broken["reasons"][0].split()[-1]) + 1
    assert broken["work"]["examples_seen"] == 64 * seen < first["work"]["examples_seen"] == EXAMPLES
    assert broken["metrics"]["logloss"] is None
    table_row = records.run_row(broken)
    assert table_row["status"] == "diverged" and table_row["logloss"] is None


def test_members_of_a_group_must_differ_only_in_replica_keys(tmp_path):
    specs = [RunSpec(make_config(), tmp_path / "a"), RunSpec(make_config(training__requests=32), tmp_path / "b")]
    with pytest.raises(ValueError, match="differ only in seed, training.lr and training.examples"):
        train_group(specs, tmp_path / "group")
    with pytest.raises(ValueError, match="every run once; given twice"):
        train_group([specs[0], RunSpec(make_config(), tmp_path / "c")], tmp_path / "group")


def test_checkpoint_of_another_set_of_runs_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        train(make_config(), tmp_path, progress=interrupt_after(5))
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match="another set of runs"):
        train(make_config(seed=7), tmp_path)


def test_collect_makes_one_table(plain, tmp_path):
    target = tmp_path / "runs" / plain[1]["run_id"]
    records.write_record(target, plain[1])
    broken = {**plain[1], "run_id": "zzz", "status": "diverged", "metrics": {"logloss": None}}
    records.write_record(tmp_path / "runs" / "zzz", broken)
    table = records.collect(tmp_path)
    assert list(table.status) == ["done", "diverged"] and (tmp_path / "runs.parquet").exists()
    assert np.isnan(table.logloss[1]) and table.logloss[0] == plain[1]["metrics"]["logloss"]


def test_only_the_last_line_of_the_metrics_may_be_torn(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [line["step"] for line in records.read_metrics(tmp_path)] == [1, 2]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2 is not JSON"):
        records.read_metrics(tmp_path)


def test_torn_record_is_named(tmp_path):
    (tmp_path / "run.json").write_text('{"status": "do')
    with pytest.raises(ValueError, match="run.json is not valid JSON"):
        records.read_record(tmp_path)
