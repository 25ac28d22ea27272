"""Parts of the loop without training: the clock, when it looks, logs and saves, schedules of groups, what runs cost."""

import dataclasses
import types
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.scaling.training import RunSpec, clock, get_config, loop, passes, run_resources, schedule
from recscale.scaling.training.clock import Clock
from recscale.scaling.training.config import data_section, default_warmup, identities, resolved
from recscale.scaling.training.group import Group
from recscale.scaling.training.intervals import Piece, fetch, stack, summarise, unstack
from recscale.scaling.training.loop import Loop
from recscale.scaling.training.passes import PassesLoop, Tracker
from recscale.scaling.training.schedule import NEVER, GroupSchedule, Segment


@pytest.fixture
def now(monkeypatch):
    """Seconds of the clock, which stands still."""
    made = types.SimpleNamespace(s=100.0)
    monkeypatch.setattr(clock.time, "monotonic", lambda: made.s)
    return made


def test_a_clock_leaves_the_first_interval_and_pauses_out(now):
    one = Clock(100, rows=8, flops_per_row=3.0)
    assert one.tick(5) is None and one.step_s is None and one.input_wait_share is None and one.step_seconds == []
    now.s += 4.0
    one.waited(0.5)
    with one.pause():
        now.s += 50.0
    with one.pause(evaluation=True):
        now.s += 6.0
    one.waited(0.5)
    event = one.tick(13)
    assert event == {"step": 13, "total_steps": 100, "rows_per_s": 16.0, "flops_per_s": 48.0, "eta_s": 43.5}
    assert one.step_s == 0.5 and one.step_seconds == [0.5] and one.input_wait_share == 0.25
    assert one.evaluating_s == 6.0 and one.wall_s == 60.0
    now.s += 2.0
    one.tick(15)
    one.tick(15)  # no step more
    assert one.step_seconds == [0.5, 1.0] and one.step_s == 0.6
    one.resume_from(1000.0)
    assert one.wall_s == 1062.0
    still = Clock(10, 1, 1.0)
    assert still.tick(1) is None and still.tick(3) is None and still.input_wait_share is None  # no time has passed
    fresh = Clock(10, 1, 1.0)
    assert fresh.wall_s == 0.0 and fresh.evaluating_s == 0.0


def group_of(tmp_path, examples=((0, 80), (0, 160), (1, 160)), **training):
    runs = []
    for seed, count in examples:
        config = get_config("dlrm_mlp")
        config.seed, config.training.examples, config.training.warmup_examples = seed, count, 8
        for name, value in training.items():
            config.training[name] = value
        runs.append(RunSpec(config, tmp_path / f"{seed}-{count}"))
    return Group(runs)


def source_of(**facts):
    given = {"requests": 4, "candidates": 2, "batches": None, "total_rows": None, "schema": None, "on_device": False}
    return types.SimpleNamespace(**given | facts)


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    flops = types.SimpleNamespace(train_flops_user=120, train_flops_candidate=60)
    monkeypatch.setattr(schedule.models, "count", lambda *given: flops)


def test_a_group_trains_a_trunk_and_a_branch_for_every_length(tmp_path):
    group = group_of(tmp_path)
    made = GroupSchedule(group, source_of())
    first, second, third = group.runs
    assert made.batch_rows == 8 and made.warmup == 1 and list(made.steps.values()) == [10, 20, 20]
    trunk, short, more, long = made.segments
    assert made.segments == [Segment(0, 8), Segment(8, 10, 10), Segment(8, 16), Segment(16, 20, 20)]
    assert made.total_steps == 8 + 2 + 8 + 4 and made.train_flops_per_row == 120.0
    assert made.members == {
        trunk: [[first, second], [third]], short: [[first], []], more: [[second], [third]], long: [[second], [third]],
    }  # fmt: skip
    assert made.log_every == 1 and [made.examples(run) for run in group.runs] == [80, 160, 160]
    assert GroupSchedule(group_of(tmp_path, log_every_examples=28), source_of()).log_every == 4  # 3.5 batches
    assert GroupSchedule(group_of(tmp_path, ((0, 960),)), source_of()).log_every == 3  # a fortieth of 120 steps
    whole = GroupSchedule(group_of(tmp_path, passes=2), source_of(batches=30))
    assert whole.segments == [Segment(0, 20, 20)]
    assert GroupSchedule(group_of(tmp_path, ((0, 6400), (0, 648))), source_of()).log_every == 2  # of the shortest run
    GroupSchedule(group, source_of(batches=20))
    with pytest.raises(ValueError, match="20 steps, but the data has 19 batches of 8 rows"):
        GroupSchedule(group, source_of(batches=19))


def test_rows_are_whole_steps_or_all_there_are(tmp_path):
    config = get_config("dlrm_mlp")
    config.training.examples = 81
    assert schedule.run_steps(config, source_of()) == 11 and schedule.run_steps(config, source_of(batches=5)) == 11
    assert schedule.run_examples(config, source_of(batches=11), 11) == 88
    assert schedule.run_examples(config, source_of(batches=12, total_rows=90), 11) == 88
    config.data.passes, config.training.passes = 2, 3
    assert schedule.run_examples(config, source_of(batches=11, total_rows=85), 11) == 255
    config.training.passes = 0
    assert schedule.run_examples(config, source_of(batches=11, total_rows=85), 11) == 170
    config.training.examples = 1
    assert schedule.run_steps(config, source_of(batches=7)) == schedule.run_steps(config, source_of()) == 1
    config.training.examples = 0
    assert schedule.run_steps(config, source_of(batches=7)) == 7
    with pytest.raises(ValueError, match="an endless log needs a positive number"):
        schedule.run_steps(config, source_of())
    most = schedule.ENDLESS_REQUESTS // 4 * 8
    config.training.examples = most
    assert schedule.run_steps(config, source_of()) == most // 8
    config.training.examples = most + 1
    assert schedule.run_steps(config, source_of(batches=1)) == most // 8 + 1  # a log that has an end
    with pytest.raises(ValueError, match=f"train on at most {most:,} rows"):
        schedule.run_steps(config, source_of())


def test_warmup_is_whole_steps_and_a_quarter_at_most():
    config = get_config("dlrm_mlp")

    def steps(rows, batch=8, horizons=(100, 200)):
        config.training.warmup_examples = rows
        return schedule.warmup_steps(config, batch, horizons)

    assert [steps(rows) for rows in (0, 8, 9, 200, None)] == [0, 1, 2, 25, 5]
    with pytest.raises(ValueError, match="more than 25% of a run of 800 rows"):
        steps(201)
    assert steps(8, horizons=(1,)) == 1 and steps(None, 1000, (4_000,)) == 20  # one step is never too much
    assert [default_warmup(rows) for rows in (19, 20, 399_999, 400_000, 10**9)] == [0, 1, 19_999, 20_000, 20_000]
    assert schedule.decay_start(10, "cosine", 0.5, 3) == 3 and schedule.decay_start(2, "cosine", 0.5, 3) == 2
    assert [schedule.decay_start(10, "wsd", share, 3) for share in (0.0, 0.2, 1.0)] == [9, 8, 0]
    assert schedule.program([10], "wsd", 1.0, 0) == [Segment(0, 10, 10)] and Segment(3, 10).steps == 7
    assert schedule.program([1], "wsd", 0.0, 0) == [Segment(0, 1, 1)]
    assert schedule.program([20, 10, 20], "wsd", 0.2, 0) == schedule.program([10, 20], "wsd", 0.2, 0)
    assert [each.stop for each in schedule.program([8, 1], "constant", 0.2, 0)] == [1, 1, 8, 8]
    assert NEVER == np.iinfo(np.int32).max
    with pytest.raises(ValueError, match="at least one step"):
        schedule.program([0, 5], "wsd", 0.2, 0)
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match="a share between 0 and 1"):
            schedule.program([10], "wsd", wrong, 0)


def test_a_rate_of_no_warmup_is_whole_at_once():
    found = schedule.rate_factor(jnp.arange(3), jnp.int32(NEVER), jnp.int32(1), 0, "linear")
    np.testing.assert_array_equal(found, 1.0)
    assert schedule.rate_factor(jnp.int32(7), jnp.int32(7), jnp.int32(0), 1, "linear") == 0.0
    assert schedule.rate_factor(jnp.int32(0), jnp.int32(NEVER), jnp.int32(1), 1, "cosine") == 1.0


def test_identities_of_the_defaults_are_those_of_earlier_records():
    """A default that changes would give every run another id."""
    ids = ("run_id", "group_id", "shape_id", "trunk_id")
    found = identities(get_config("dlrm_mlp"))
    assert found == dict(zip(ids, ("f2b29058e399", "28072453ccdf", "2201232f9eaf", "68026176734f"), strict=True))
    found = identities(get_config("dlrm_mlp", "stored"))
    assert found == dict(zip(ids, ("074106068fb4", "7b0380e1510c", "2201232f9eaf", "c336b6416a7d"), strict=True))
    config = get_config("dlrm_mlp")
    tracking = {"wandb": "off", "project": "recscale", "watts_per_device": 0.0, "usd_per_device_hour": 0.0}
    assert config.tracking.to_dict() == tracking | {"grid_kg_per_kwh": 0.0}
    training = config.training
    assert (training.checkpoint_every_s, training.keep_model, training.mesh, training.remat) == (30.0, True, "", "none")
    assert (training.passes, training.patience, training.suffix_alpha, training.suffix_beta) == (0, 2, 0.0, 0.0)
    assert (training.accumulate, training.embedding_l2) == (1, 0.0) and set(config.size.to_dict().values()) == {None}
    assert (config.data.root, config.data.history_length, config.data.embedding_width) == ("", 0, 0)
    assert config.data.embedding_rows == 0


FREE = {
    "tracking.wandb": "offline", "training.checkpoint_every_s": 1.0, "training.keep_model": False,
    "training.mesh": "data=2", "training.remat": "dots", "data.root": "/x", "training.patience": 7,
    "training.suffix_beta": 0.5, "size.encoder_share": 0.5, "size.fixed": "backbone",
}  # fmt: skip
OWN = {
    "seed": 1, "training.lr": 0.1, "training.examples": 7_000_000, "training.accumulate": 2, "training.passes": 3,
    "training.embedding_l2": 0.1, "training.suffix_alpha": 0.5, "training.schedule": "cosine", "model.widths": (3,),
    "model.hidden_dropout": 0.5, "data.embedding_width": 8, "data.embedding_rows": 9, "data.history_length": 4,
}  # fmt: skip


def test_settings_that_decide_a_result_and_those_that_do_not():
    def ids(key=None, value=None, base="dlrm_mlp"):
        config = get_config(base)
        if key is not None:
            config.update_from_flattened_dict({key: value})
        return identities(config)

    plain = ids()
    for key, value in FREE.items():
        assert ids(key, value) == plain, key
    of_shape = ("model.widths", "model.hidden_dropout", "data.embedding_width", "data.embedding_rows")
    for key, value in OWN.items():
        found = ids(key, value)
        assert found["run_id"] != plain["run_id"], key
        assert (found["group_id"] == plain["group_id"]) == (key in ("seed", "training.lr", "training.examples"))
        assert (found["trunk_id"] == plain["trunk_id"]) == (key == "training.examples"), key
        assert (found["shape_id"] != plain["shape_id"]) == (key in (*of_shape, "data.history_length")), key
    config = get_config("dlrm_mlp")
    before = resolved(config)
    assert before["training"]["warmup_examples"] == 20_000 and before["training"]["data_parallel"] is False
    assert "suffix_alpha" not in before["training"] and "passes" not in before["training"]
    config.training.examples = 0
    assert resolved(config)["training"]["warmup_examples"] is None
    config.training.passes = 4
    kept = resolved(config)["training"]
    assert (kept["passes"], kept["patience"]) == (4, 2)
    assert data_section(config)["passes"] == 5 and data_section(get_config("dlrm_mlp"))["passes"] == 1
    config.training.passes = 10
    assert data_section(config)["passes"] == 12


def test_an_interval_is_the_mean_over_its_rows():
    step = {"rows": np.array([[3.0], [1.0]]), "loss": np.array([1.0, 2.0]), "rate": np.array([0.1, 0.2])}
    step |= {"stats": {"load": np.array([[1.0, 3.0], [5.0, 7.0]])}}
    step |= {name: np.array([[[0.5]], [[0.25]]][i]) * np.ones((2, 1)) for i, name in enumerate(("logloss", "label"))}
    step["prediction"] = np.array([[0.5], [0.125]])
    other = jax.tree.map(lambda values: 2 * values, step) | {"rows": step["rows"], "label": step["label"]}
    found = fetch([Piece([step], 1), Piece(jax.tree.map(lambda v: np.stack([v, 0 * v]), other), 1)])
    assert found["loss"].tolist() == [[1.0, 2.0], [2.0, 4.0]]
    told = summarise(found)
    np.testing.assert_allclose(told["logloss"], [0.75, 0.75])
    np.testing.assert_allclose(told["calibration"], [3.0, 0.75])
    entropy = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    np.testing.assert_allclose(told["ne"], 0.75 / entropy)
    assert told["rows"].tolist() == [6.0, 2.0] and told["rate"].tolist() == [0.2, 0.4]
    assert told["loss"].tolist() == [1.5, 3.0] and told["model_load"].tolist() == [[1.5, 4.5], [7.5, 10.5]]
    assert "task_logloss" not in told and all(value.dtype == np.float64 for value in told.values())
    two = {name: np.concatenate([found[name]] * 2, axis=-1) if name in ("rows", "logloss", "label", "prediction")
           else found[name] for name in found}  # fmt: skip
    assert summarise(two)["task_logloss"].shape == (2, 2)
    none = summarise(found | {"rows": 0 * found["rows"]})
    assert none["rows"].tolist() == [0.0, 0.0] and np.isfinite(none["logloss"]).all()
    assert stack([]) == {} and unstack({}) == []
    stored = stack([Piece([step], 1), Piece([other], 1)])
    [piece] = unstack(stored)
    assert piece.steps == 2 and set(stored) == {*step, "stats/load"} - {"stats"}
    jax.tree.map(np.testing.assert_array_equal, fetch([piece]), found)


def bare(kind=Loop, **parts):
    made = object.__new__(kind)
    vars(made).update(parts)
    return made


def test_the_loop_looks_at_the_clock_in_time_for_a_checkpoint(now):
    training = types.SimpleNamespace(checkpoint_every_s=30.0)
    made = bare(config=types.SimpleNamespace(training=training), clock=types.SimpleNamespace(step_s=None), saved=90.0)
    assert made._steps_until_due() == 32
    made.clock.step_s = 0.3
    assert made._steps_until_due() == 66  # 20 s are left
    now.s = 130.0
    assert made._steps_until_due() == 1
    training.checkpoint_every_s = 0
    assert made._steps_until_due() == NEVER
    made.schedule = types.SimpleNamespace(segments=[Segment(0, 8), Segment(8, 10, 10), Segment(8, 16)])
    assert [made._done(*place) for place in ((0, 3), (1, 9), (2, 12))] == [3, 9, 14]


def test_a_state_is_pointed_at_a_segment():
    @dataclasses.dataclass
    class State:
        step: jax.Array
        decay_from: jax.Array | None = None
        decay_steps: jax.Array | None = None

    state = State(jnp.int32(5))
    for segment, pair in ((Segment(0, 8), (NEVER, 1)), (Segment(8, 10, 10), (8, 2)), (Segment(9, 9, 9), (9, 1))):
        found = bare()._enter(state, segment)
        assert (int(found.decay_from), int(found.decay_steps)) == pair and found.step is state.step


@pytest.fixture
def segment_of(now, monkeypatch):
    """Runs a segment of 10 steps, logged every 4, with what was agreed before and after every stretch of it."""

    def run(untils, dues, alive=lambda step: True):
        done, untils, dues = [], iter(untils), iter(dues)
        training = types.SimpleNamespace(checkpoint_every_s=5.0)
        made = bare(
            config=types.SimpleNamespace(training=training), source=types.SimpleNamespace(on_device=True), saved=95.0,
            schedule=types.SimpleNamespace(log_every=4, segments=[Segment(0, 10, 10)]), progress=done.append,
            clock=types.SimpleNamespace(tick=lambda step: ("tick", step) if step != 4 else None),
        )  # fmt: skip
        made._steps_until_due = lambda: next(untils)
        monkeypatch.setattr(loop.jax, "block_until_ready", lambda step: done.append("wait"))

        def agreed(value):
            assert value is not True  # so long after the last checkpoint the next one is not yet due
            return (next(dues),) if value is False else (value,)

        monkeypatch.setattr(loop, "agreed", agreed)

        def steps(state, count, batches):
            assert batches is None
            done.append(("steps", count))
            return types.SimpleNamespace(step=jnp.int32(0)), count

        def log(segment, step, interval):
            done.append(("log", step, sum(interval)))
            return alive(step)

        made._steps, made._log = steps, log
        made._save = lambda index, step, state, trunk, interval: done.append(
            ("save", index, step, trunk, sum(interval))
        )
        made._segment(0, Segment(0, 10, 10), 0, types.SimpleNamespace(), "trunk", [])
        return done

    return run


def test_intervals_are_logged_while_the_next_one_runs(segment_of):
    assert segment_of([NEVER] * 3, [False] * 3) == [
        ("steps", 4), ("steps", 4), ("log", 4, 4), ("tick", 8), ("steps", 2), ("log", 8, 4), ("log", 10, 2),
        ("tick", 10),
    ]  # fmt: skip


def test_a_checkpoint_that_is_due_waits_for_its_interval_or_cuts_it(segment_of):
    assert segment_of([NEVER] * 3, [True] * 3) == [
        ("steps", 4), ("log", 4, 4), ("save", 0, 4, "trunk", 0), ("steps", 4), ("log", 8, 4),
        ("save", 0, 8, "trunk", 0), ("tick", 8), ("steps", 2), ("log", 10, 2), ("tick", 10),
    ]  # fmt: skip
    assert segment_of([3, NEVER, 9.5, NEVER], [True, False, False, False]) == [
        ("steps", 3), "wait", ("save", 0, 3, "trunk", 3), ("steps", 1), ("steps", 4), ("log", 4, 4), ("tick", 8),
        ("steps", 2), ("log", 8, 4), ("log", 10, 2), ("tick", 10),
    ]  # fmt: skip


def test_a_segment_ends_when_no_replica_is_left(segment_of):
    assert segment_of([NEVER] * 3, [False] * 3, lambda step: step < 4) == [("steps", 4), ("steps", 4), ("log", 4, 4)]
    assert segment_of([NEVER] * 3, [True] * 3, lambda step: step < 4) == [("steps", 4), ("log", 4, 4)]


def test_an_interval_is_logged_with_its_rows_and_its_phase():
    made, rows = bare(schedule=types.SimpleNamespace(batch_rows=8)), []
    made.ledger = types.SimpleNamespace(append=lambda segment, row, told: rows.append((segment, row, told["rows"])))
    step = {name: np.ones((2, 1)) for name in ("rows", "logloss", "prediction", "label")}
    step |= {"loss": np.ones(2), "rate": np.ones(2), "stats": {}}
    for segment, phase, alive in ((Segment(0, 9), "trunk", [False, True]), (Segment(8, 9, 9), "decay", [False, False])):
        pieces = [Piece([step | {"alive": np.array([True, True])}, step | {"alive": np.array(alive)}], 2)]
        assert made._log(segment, 9, pieces) is any(alive)
        (found, row, counted), rows[:] = rows[0], []
        assert found is segment and row == {"step": 9, "examples": 72, "phase": phase} and counted.tolist() == [2, 2]


def test_waits_are_counted_where_the_device_had_nothing_to_do(now):
    waited, ready = [], iter([True, False])
    made = bare(clock=types.SimpleNamespace(waited=waited.append))
    made.trainer = types.SimpleNamespace(
        put=lambda batch: batch + 100, step=lambda state, batch: (state, {"batch": batch})
    )

    def batches():
        for number in range(9):
            now.s += 2.0
            yield number

    state = types.SimpleNamespace(step=types.SimpleNamespace(is_ready=lambda: next(ready)))
    assert made._steps(state, 2, batches()) == (state, Piece([{"batch": 100}, {"batch": 101}], 2)) and waited == [2.0]
    made.trainer.steps = lambda *given: (state, given)
    made.schedule, made.record = types.SimpleNamespace(log_every=4), "record"
    assert made._steps(state, 3, None)[1] == Piece((state, 3, 4, "record"), 3)


def test_passes_stop_after_patience_or_the_most():
    tracker = Tracker(patience=2, most=5, share=0.5)
    assert not tracker.should_decay and not tracker.over
    decisions = []
    for loss in (0.5, 0.4, 0.41, 0.42):
        tracker.losses.append([loss, 0.3])
        decisions.append(tracker.should_decay)
    assert decisions == [False, False, False, True] and tracker.done == 4 and tracker.best.tolist() == [1, 0]
    tracker.decay = 4
    assert not tracker.should_decay and not tracker.over and tracker.decay_length == 1  # half of two
    tracker.losses.append([0.1, 0.1])
    assert tracker.over and tracker.decay_length == 1
    longer = Tracker(1, 9, 0.5, [[0.5], [0.4], [0.3], [0.31], [0.2]], decay=4)
    assert longer.decay_length == 2 and not longer.over  # of three passes, rounded up
    assert Tracker(1, 9, 0.0, [[0.5], [0.6]], decay=2).decay_length == 1
    assert Tracker(9, 2, 0.5, [[0.5], [0.4]]).should_decay and not Tracker(9, 3, 0.5, [[0.5], [0.4]]).should_decay


def test_what_a_finite_log_records_of_its_passes():
    done = []
    made = bare(PassesLoop, source=types.SimpleNamespace(total_rows=100))
    made.schedule = types.SimpleNamespace(train_flops_per_row=3.0)
    made._finish = lambda whole, best, work, final: done.append((whole, best, work, final))
    # replica 0 was best in the second pass; 1 in the second pass of the decay, which left from the third pass (of 1)
    made.tracker = Tracker(1, 9, 0.5, [[0.5, 0.5], [0.1, 0.4], [0.2, 0.3], [0.3, 0.31], [0.3, 0.2], [0.3, 0.1]], 4)
    made._finish_passes("whole", "last", "best", 7)
    [(whole, best, work, final)] = done
    assert (whole, best, final) == ("whole", "best", "last")
    assert [(each["examples"], each["steps"], each["epochs"], each["train_flops"]) for each in work] == [
        (200, 14, 2.0, 600.0), (500, 35, 5.0, 1500.0),
    ]  # fmt: skip
    assert [each["valid_losses"] for each in work] == [
        [0.5, 0.1, 0.2, 0.3, 0.3, 0.3], [0.5, 0.4, 0.3, 0.31, 0.2, 0.1],
    ]  # fmt: skip
    assert Counter((each["passes_tried"], each["unique_examples"]) for each in work) == {(6, 100): 2}
    made.tracker = Tracker(1, 9, 0.5, [[0.5], [0.1]])
    made._finish_passes("whole", "last", "best", 7)
    assert done[1][2][0]["examples"] == 200
    assert made._position() == {"passes": {"losses": [[0.5], [0.1]], "decay": None}}


def test_a_loss_that_is_not_finite_is_the_worst():
    made = bare(PassesLoop, source=types.SimpleNamespace(evaluate=lambda logits: {"valid_logloss": np.float32(0.5)}))
    assert made._loss(np.array([1.0, np.inf])) == np.inf and made._loss(np.array([1.0])) == 0.5
    assert passes.Tracker(1, 1, 0.5).losses == []


def test_resources_of_runs_trained_together(monkeypatch):
    def numbers(count):
        return jnp.zeros(count, jnp.float32)

    trainer = types.SimpleNamespace(
        seeds=[0, 1], mesh=None, compiled=None, communication={"all-reduce": 5}, source=source_of()
    )
    state = types.SimpleNamespace(
        tables={"a": numbers(10)}, values={"v": numbers(4)}, other={"o": numbers(6)},
        moments={"m": numbers(8)}, slots={"s": numbers(2)}, value_slots={"t": numbers(2)},
    )  # fmt: skip
    counts = types.SimpleNamespace(
        train_flops_user=120, train_flops_candidate=60, forward_flops_user=40, forward_flops_candidate=20,
        dense_params=5, active_params=4, embedding_params=10, memory_params=3,
    )  # fmt: skip
    timed = types.SimpleNamespace(step_s=0.5, wall_s=100.0, evaluating_s=7.0, input_wait_share=0.25, step_seconds=[0.5])
    chip = types.SimpleNamespace(bf16_flops=9600.0)
    monkeypatch.setattr(run_resources.targets, "current", lambda: chip)
    stated = {"usd_per_device_hour": 36.0, "watts_per_device": 100.0}

    def of(**changed):
        values = {"source": source_of()} | changed
        kwh = values.pop("kwh", 3.0)
        found = run_resources.run_resources(
            trainer,
            state,
            counts,
            values["source"],
            values.get("clock", timed),
            steps=10,
            stated=stated,
            energy_kwh=kwh,
        )
        return {name: figure["value"] for name, figure in found.items()}

    found = of()
    expected = {
        "forward_flops_per_row": 40.0, "train_flops_per_row": 120.0, "train_flops": 9600.0, "wall_seconds": 100.0,
        "train_seconds": 5.0, "eval_seconds": 7.0, "device_hours": 50 / 3600, "step_ms_p50": 500.0,
        "rows_per_second": 16.0, "input_wait_share": 0.25, "peak_flops_used": 4800.0, "dense_params": 5,
        "active_params": 4, "embedding_params": 10, "memory_params": 3, "table_bytes": 28, "bank_bytes": 12,
        "optimizer_bytes": 24, "optimizer_bytes_per_device": 24, "activation_bytes": None, "energy_kwh": 1.5,
        "cost_usd": 0.5, "usd_per_million_rows": 6250.0, "communication_bytes": 50,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert of(source=source_of(on_device=True))["input_wait_share"] is None
    assert of(kwh=None)["energy_kwh"] == pytest.approx(50 / 3600 * 0.1)
    untimed = of(clock=types.SimpleNamespace(**vars(timed) | {"step_s": None, "step_seconds": []}))
    assert untimed["rows_per_second"] is None and untimed["train_seconds"] is None
    trainer.mesh, trainer.compiled = types.SimpleNamespace(size=4), "program"
    monkeypatch.setattr(run_resources, "compiled_cost", lambda made: types.SimpleNamespace(temporary_bytes=len(made)))
    split = of()
    assert (split["peak_flops_used"], split["activation_bytes"]) == (4 * 4800.0, 7)
    assert split["device_hours"] == pytest.approx(4 * 50 / 3600) and split["cost_usd"] == pytest.approx(2.0)
    assert run_resources.stated_figures({"watts_per_device": None, "grid_kg_per_kwh": "0.5"}) == {
        "watts_per_device": 0.0, "usd_per_device_hour": 0.0, "grid_kg_per_kwh": 0.5,
    }  # fmt: skip
