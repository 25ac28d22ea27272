"""A loop's whole course with what it calls replaced: what it checks first, restores, trains, saves and finishes."""

import contextlib
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.scaling.training import get_config, loop
from recscale.scaling.training.intervals import Piece
from recscale.scaling.training.loop import Loop
from recscale.scaling.training.schedule import Segment


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    step: jax.Array
    alive: jax.Array


def bare(**parts):
    made = object.__new__(Loop)
    vars(made).update(parts)
    return made


PROGRAM = [Segment(0, 8), Segment(8, 10, 10), Segment(8, 16), Segment(16, 20, 20)]


def course(segments=PROGRAM, restored=None, trunk=None, alive=lambda step: [True, False]):
    """What the loop does, one by one; a state is told by the steps it was trained."""
    done = []
    made = bare(schedule=types.SimpleNamespace(segments=segments))
    made.trainer = types.SimpleNamespace(mesh="mesh")
    made.ledger = types.SimpleNamespace(begin=lambda schedule, mesh: done.append(("begin", schedule.segments, mesh)))
    made.checkpoints = types.SimpleNamespace(close=lambda: done.append(("close",)))
    position = restored or {"segment": 0, "step": 0}
    state = State(jnp.int32(position["step"]), jnp.array([True]))
    waiting = None if trunk is None else State(jnp.int32(trunk), jnp.array([True]))
    made._restore = lambda: (position, state, waiting, ["begun"])
    made._enter = lambda state, segment: done.append(("enter", segment)) or state

    def told(state):
        return None if state is None else int(state.step)

    @jax.transfer_guard("allow")
    def segment(index, segment, start, state, trunk, interval):
        done.append(("train", index, start, told(state), told(trunk), interval))
        assert trunk is None or trunk.step is not state.step  # the next step takes the state's own arrays
        return State(state.step + segment.stop - start, jnp.array(alive(segment.stop)))

    made._segment = segment
    made._save = lambda index, step, state, trunk, interval: done.append(
        ("save", index, step, told(state), trunk, interval)
    )
    made._finish = lambda segment, state: done.append(("finish", segment, told(state)))
    made.run()
    assert done[0] == ("begin", segments, "mesh") and (done[-1] == ("close",))
    return done[1:-1]


def test_branches_leave_a_trunk_that_goes_on():
    trunk, short, more, long = PROGRAM
    assert course() == [
        ("enter", trunk), ("train", 0, 0, 0, None, ["begun"]), ("enter", short), ("train", 1, 8, 8, 8, []),
        ("finish", short, 10), ("save", 2, 8, 8, None, []), ("enter", more), ("train", 2, 8, 8, None, []),
        ("enter", long), ("train", 3, 16, 16, None, []), ("finish", long, 20),
    ]  # fmt: skip
    assert course([Segment(0, 9, 9)]) == [
        ("enter", Segment(0, 9, 9)), ("train", 0, 0, 0, None, ["begun"]), ("finish", Segment(0, 9, 9), 9),
    ]  # fmt: skip


def test_branches_may_leave_from_the_same_step():
    first, second = Segment(0, 4, 4), Segment(0, 9, 9)
    assert course([first, second]) == [
        ("enter", first), ("train", 0, 0, 0, 0, ["begun"]), ("finish", first, 4), ("save", 1, 0, 0, None, []),
        ("enter", second), ("train", 1, 0, 0, None, []), ("finish", second, 9),
    ]  # fmt: skip


def test_a_loop_goes_on_inside_a_branch_or_a_trunk():
    _, short, more, long = PROGRAM
    after = [("enter", long), ("train", 3, 16, 16, None, []), ("finish", long, 20)]
    assert course(restored={"segment": 1, "step": 9}, trunk=8) == [
        ("enter", short), ("train", 1, 9, 9, 8, ["begun"]), ("finish", short, 10), ("save", 2, 8, 8, None, []),
        ("enter", more), ("train", 2, 8, 8, None, []), *after,
    ]  # fmt: skip
    assert course(restored={"segment": 2, "step": 11}) == [
        ("enter", more), ("train", 2, 11, 11, None, ["begun"]), *after,
    ]  # fmt: skip


def test_a_trunk_that_no_replica_survives_ends_every_branch_behind_it():
    trunk, short, more, long = PROGRAM
    dead = course(alive=lambda step: [False, False])
    assert dead[2:] == [("finish", short, 8), ("finish", long, 8)]
    later = course(alive=lambda step: [step < 16])
    assert later[-3:] == [("enter", more), ("train", 2, 8, 8, None, []), ("finish", long, 16)]
    branch = course(alive=lambda step: [step != 10])  # what breaks in a branch leaves the trunk alone
    assert branch == course()


def test_a_loop_begins_or_goes_on_where_a_checkpoint_stands():
    done, restored = [], [None]
    made = bare(
        trainer=types.SimpleNamespace(fresh_state=lambda: "fresh"), _unfit="unfit",
        checkpoints=types.SimpleNamespace(
            restore=lambda *given: done.append(given) or restored[0], discarded=["damaged"],
            drop_discarded=lambda: done.append("drop"),
        ),
        ledger=types.SimpleNamespace(rewind=lambda *given: done.append(given)),
        clock=types.SimpleNamespace(resume_from=lambda seconds: done.append(("clock", seconds))),
        meter=types.SimpleNamespace(resume_from=lambda kwh: done.append(("meter", kwh))),
    )  # fmt: skip
    assert made._restore() == ({"segment": 0, "step": 0}, "fresh", None, [])
    assert done == [("fresh", "unfit"), (None, ["damaged"]), "drop"]
    position = {"segment": 1, "step": 9, "wall_s": 5.0, "energy_kwh": 0.5, "interval": {}}
    restored[0], done[:] = types.SimpleNamespace(position=position, state="stored", trunk="waiting"), []
    assert made._restore() == (position, "stored", "waiting", [])
    assert done == [("fresh", "unfit"), (position, ["damaged"]), "drop", ("clock", 5.0), ("meter", 0.5)]
    del position["energy_kwh"]  # of an earlier version
    made._restore()
    assert done[-1] == ("meter", None)


def test_a_checkpoint_of_other_runs_or_data_is_refused():
    made = bare(
        group=types.SimpleNamespace(signature="s"), checkpoints=types.SimpleNamespace(folder="/c"),
        ledger=types.SimpleNamespace(data="d", unfit=lambda position: ("asked", position)),
    )  # fmt: skip
    fits = {"signature": "s", "data": "d"}
    assert made._unfit(fits) == ("asked", fits)
    with pytest.raises(ValueError, match="/c belong to another set of runs"):
        made._unfit(fits | {"signature": "t"})
    with pytest.raises(ValueError, match="/c were made on other data"):
        made._unfit(fits | {"data": "e"})


def test_a_checkpoint_says_where_the_program_stands(monkeypatch):
    done = []

    @contextlib.contextmanager
    def pause(evaluation=False):
        done.append(("pause", evaluation))
        yield
        done.append("on")

    made = bare(
        group=types.SimpleNamespace(signature="s"), saved=0.0, meter=types.SimpleNamespace(kwh=0.5),
        ledger=types.SimpleNamespace(data="d", marks=lambda: {"run": 1}),
        clock=types.SimpleNamespace(wall_s=7.0, pause=pause), schedule=types.SimpleNamespace(segments=PROGRAM),
        checkpoints=types.SimpleNamespace(save=lambda *given: done.append(given)),
        _position=lambda: {"passes": 3},
    )  # fmt: skip
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: 99.0))
    made._save(2, 11, "state", "trunk", [Piece([{"loss": np.ones(1), "stats": {}}], 1)])
    paused, (tick, position, state, trunk), over = done
    assert (paused, over, tick, state, trunk, made.saved) == (("pause", False), "on", 13, "state", "trunk", 99.0)
    assert position.pop("interval")["loss"].tolist() == [[1.0]]
    assert position == {"segment": 2, "step": 11, "signature": "s", "data": "d", "metrics": {"run": 1}, "wall_s": 7.0,
                        "energy_kwh": 0.5, "passes": 3}  # fmt: skip
    assert Loop._position(made) == {}


@pytest.fixture
def finished(monkeypatch):
    """Finishes the branch at step 10 of three replicas with one run each; returns what was done."""

    def finish(failed, logits, on_device=True, step_s=0.5, keep=True, first=True, metrics=(), **more):
        done, config = [], get_config("dlrm_mlp")
        config.training.keep_model = keep
        config.tracking.watts_per_device = 3.0
        if metrics:
            with config.unlocked():
                config.data.metrics = metrics

        @contextlib.contextmanager
        def pause(evaluation=False):
            done.append(("pause", evaluation))
            yield

        def usage(counts, **given):
            done.append(("usage", counts, given))
            return [{"used": replica} for replica in range(3)]

        def resources(*given, **named):
            done.append(("resources", given[1], named))
            return {"mfu": {"value": 0.25}}

        trainer = types.SimpleNamespace(
            settled=lambda state: dataclasses.replace(state, step=jnp.int32(1)), kernels={"k": {}},
            holdout_logits=lambda state: np.asarray(logits) * int(state.step), memory_sub_keys=6,
            holdout_slot_counts=lambda state: ("counts", int(state.step)),
        )  # fmt: skip
        segment = Segment(8, 10, 10)
        made = bare(
            config=config, trainer=trainer, group=types.SimpleNamespace(replicas=[0, 1, 2]),
            meter=types.SimpleNamespace(kwh=9.0),
            clock=types.SimpleNamespace(pause=pause, step_s=step_s, wall_s=70.0, input_wait_share=0.125),
            source=types.SimpleNamespace(
                on_device=on_device, evaluate=lambda logits, **given: {"sum": float(logits.sum()), **given}
            ),
            schedule=types.SimpleNamespace(batch_rows=8, counts="model", members={segment: [["a"], ["b"], ["c", "d"]]}),
            ledger=types.SimpleNamespace(finish=lambda *given: done.append(("finish", *given))),
        )  # fmt: skip
        monkeypatch.setattr(loop, "holdout_usage", usage)
        monkeypatch.setattr(loop, "run_resources", resources)
        monkeypatch.setattr(loop, "is_first", lambda: first)
        monkeypatch.setattr(
            loop, "save_model", lambda run, name, state, replica: done.append(("model", run, name, state, replica))
        )

        @jax.tree_util.register_dataclass
        @dataclasses.dataclass
        class Ended:
            step: jax.Array
            failed_at: jax.Array

        with jax.transfer_guard("disallow"):
            made._finish(segment, Ended(None, jax.device_put(np.int32(failed))), **more)
        return done

    return finish


def test_every_run_of_a_branch_is_evaluated_and_left_with_its_model(finished):
    done = finished([-1, -1, -1], [[1.0], [2.0], [4.0]])
    assert done[0] == ("pause", True) and done[1] == ("usage", ("counts", 1), {
        "replicas": 3, "batch_rows": 8, "trained_rows": 80, "sub_keys": 6})  # fmt: skip
    _, state, named = done[2]
    assert int(state.step) == 1 and named.pop("stated")["watts_per_device"] == 3.0
    assert named == {"steps": 10, "energy_kwh": 9.0}
    models = [each[1:3] + each[4:] for each in done if each[0] == "model"]
    assert models == [("a", "final", 0), ("b", "final", 1), ("c", "final", 2), ("d", "final", 2)]
    assert all(each[3] is state for each in done if each[0] == "model")
    ends = [each[1:] for each in done if each[0] == "finish"]
    assert [(run, metrics, at, work) for run, metrics, _, _, _, at, work in ends] == [
        ("a", {"sum": 1.0, "used": 0}, -1, None), ("b", {"sum": 2.0, "used": 1}, -1, None),
        ("c", {"sum": 4.0, "used": 2}, -1, None), ("d", {"sum": 4.0, "used": 2}, -1, None),
    ]  # fmt: skip
    cost = {"wall_s": 70.0, "step_ms": 500.0, "rows_per_s": 16.0, "replicas": 3, "mfu": 0.25, "input_wait_share": None}
    assert all(end[2:5] == (cost, {"mfu": {"value": 0.25}}, {"k": {}}) for end in ends)
    cost = finished([-1] * 3, [[1.0]] * 3, on_device=False, step_s=None)[-1][3]
    assert (cost["step_ms"], cost["rows_per_s"], cost["input_wait_share"]) == (None, None, 0.125)
    assert finished([-1] * 3, [[1.0]] * 3, metrics=("auc", "mine"))[-1][2]["metrics"] == ("auc", "mine")


def test_a_run_that_broke_has_neither_metrics_nor_a_model(finished):
    done = finished([0, -1, -1], [[1.0, np.nan], [1.0, np.nan], [2.0, 2.0]])
    assert [(each[1], each[2], each[6]) for each in done if each[0] == "finish"] == [
        ("a", None, 0), ("b", None, 10), ("c", {"sum": 4.0, "used": 2}, -1), ("d", {"sum": 4.0, "used": 2}, -1),
    ]  # fmt: skip
    assert [each[1] for each in done if each[0] == "model"] == ["c", "d"]
    assert [each[6] for each in finished([7, 8, 9], [[np.nan]] * 3) if each[0] == "finish"] == [7, 8, 9, 9]
    done = finished([-1] * 3, [[1.0]] * 3, keep=False, first=False)
    assert "model" not in [each[0] for each in done] and {each[2] is None for each in done[3:]} == {True}


def test_the_best_state_and_the_last_one_are_left_where_they_differ(finished):
    work = [{"steps": 1}, {"steps": 2}, {"steps": 3}]
    done = finished([-1] * 3, [[1.0]] * 3, work=work, final="last")
    assert [each[7] for each in done if each[0] == "finish"] == [work[0], work[1], work[2], work[2]]
    models = [(each[1], each[2], each[3] == "last") for each in done if each[0] == "model"]
    assert models == [(run, name, name == "final") for run in "abcd" for name in ("final", "best")]


@pytest.fixture
def built(monkeypatch):
    """Makes a loop with everything it is made of replaced; `built.done` is what was asked for, in order."""
    done = []
    says = {"mesh": None, "hosts": 1, "steps": {"a": 5, "b": 5}}

    def noted(name, answer=None):
        return lambda *given, **more: done.append((name, given, more)) or answer

    class Source:
        on_device, requests, candidates = True, 4, 2

        def verify(self):
            done.append(("verify",))

        def record(self, steps):
            return ("record", steps)

        def facts(self):
            return {}

    source = Source()
    schedule = types.SimpleNamespace(counts="counts", steps=says["steps"], warmup=3, batch_rows=8, total_steps=20,
                                     train_flops_per_row=2.0)  # fmt: skip
    trainer = types.SimpleNamespace(state_shapes=lambda: "shapes")
    monkeypatch.setattr(loop.parallel, "run_mesh", lambda *given: done.append(("mesh", given, {})) or says["mesh"])
    monkeypatch.setattr(loop.parallel, "own_share", lambda *given: (0, says["hosts"]))
    monkeypatch.setattr(loop, "GroupSchedule", lambda group, source: schedule)
    monkeypatch.setattr(loop, "Verifiable", Source)
    monkeypatch.setattr(loop, "Recordable", Source)
    for name, answer in (
        ("make_source", source), ("without_effect", {"a": "why"}), ("refuse_without_effect", None),
        ("check_holdout", None), ("check_shape", None), ("make_trainer", trainer), ("state_bytes", 100),
        ("batch_bytes", 60), ("check_room", None),
        ("Checkpoints", "checkpoints"), ("Clock", "clock"), ("meter", "meter"),
    ):  # fmt: skip
        monkeypatch.setattr(loop, name, noted(name, answer))

    def make(tmp_path):
        done.clear()
        config = get_config("dlrm_mlp")
        config.training.requests, config.training.candidates = 4, 2
        group = types.SimpleNamespace(config=config, replicas=["r", "s", "t"])
        made = Loop(group, "ledger", tmp_path, print, "/cache", ["seed"])
        return made, {each[0]: each[1:] for each in done}

    return types.SimpleNamespace(make=make, says=says, schedule=schedule, source=source, done=done)


def test_a_loop_is_made_of_what_passes_its_checks(built, tmp_path):
    made, asked = built.make(tmp_path)
    assert [each[0] for each in built.done] == [
        "mesh", "make_source", "without_effect", "refuse_without_effect", "check_holdout", "verify", "check_shape",
        "make_trainer", "state_bytes", "batch_bytes", "check_room", "Checkpoints", "Clock", "meter",
    ]  # fmt: skip
    config, source = made.config, built.source
    assert asked["make_source"][1] == {"cache_dir": "/cache", "requests": 4, "candidates": 2, "host": 0, "hosts": 1}
    assert asked["without_effect"][0] == (config, source, "counts", ["seed"])
    assert asked["refuse_without_effect"][0] == ({"a": "why"},)
    assert asked["check_holdout"][0] == asked["check_shape"][0] == (config, source)
    assert asked["make_trainer"][0] == (config, source, ["r", "s", "t"], 3, None)
    assert asked["check_room"][0] == (100, tmp_path, 60) and asked["Clock"][0] == (20, 24, 2.0)
    assert asked["Checkpoints"][0] == (tmp_path / "checkpoints",) and made.record == ("record", 5)
    assert (made.progress, made.ledger, made.meter, made.clock) == (print, "ledger", "meter", "clock")


def test_a_waiting_trunk_and_the_parts_of_hosts_are_counted(built, tmp_path, monkeypatch):
    built.schedule.steps = {"a": 5, "b": 9, "c": 9}
    built.says.update(hosts=3)
    made, asked = built.make(tmp_path)
    assert asked["check_room"][0] == (200, tmp_path, 20) and made.record == ("record", 9)
    built.says["mesh"] = "mesh"
    made, asked = built.make(tmp_path)
    assert made.record is None and asked["state_bytes"][0] == ("shapes", "mesh")
    built.says["mesh"] = None
    for name in ("Recordable", "Verifiable"):
        monkeypatch.setattr(loop, name, type(None))
    made, asked = built.make(tmp_path)
    assert made.record is None and "verify" not in asked
