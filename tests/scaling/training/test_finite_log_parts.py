"""Parts without training: the best state of every replica, scores of a file, what a step sends, and the meter."""

import dataclasses
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

from recscale.scaling.training import config, get_config, passes, predicting, run_resources
from recscale.scaling.training.model_files import run_config
from recscale.scaling.training.passes import PassesLoop, Tracker


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    step: jax.Array
    decay_from: jax.Array
    alive: jax.Array
    params: dict


def state(step):
    whole = jnp.arange(6.0).reshape(3, 2) + 100 * step
    return State(jnp.int32(step), jnp.int32(step), jnp.array([True] * 3), {"w": whole, "b": whole[:, 0]})


def test_every_replica_keeps_the_state_of_its_best_pass(monkeypatch):
    made, asked, paused = object.__new__(PassesLoop), [], []
    losses = iter([[0.5, 0.5, 0.5], [0.4, 0.6, np.inf], [0.45, 0.5, 0.1]])

    class pause:
        def __init__(self, **given):
            paused.append(given)

        def __enter__(self):
            pass

        def __exit__(self, *error):
            pass

    made.clock = types.SimpleNamespace(pause=pause)
    made.group = types.SimpleNamespace(replicas=["a", "b", "c"])
    made.trainer = types.SimpleNamespace(holdout_logits=lambda state: np.array(next(losses)))
    made._loss = float
    made.tracker = Tracker(2, 9, 0.5)
    monkeypatch.setattr(passes, "agreed", lambda *values: asked.append(values) or values)
    first, second, third = (state(step) for step in (1, 2, 3))
    best = made._validate(first, None)
    assert best.params["w"] is not first.params["w"] and best.params["w"].tolist() == first.params["w"].tolist()
    for newer, steps in ((second, [2, 1, 1]), (third, [2, 1, 3])):
        best = made._validate(newer, best)
        assert (best.params["b"] // 100).tolist() == steps and (best.params["w"][:, 1] // 100).tolist() == steps
        assert int(best.step) == int(best.decay_from) == int(newer.step) and best.step is not newer.step
    assert made.tracker.losses == [list(values) for values in asked] and len(asked) == len(paused) == 3
    assert made.tracker.best.tolist() == [1, 0, 2] and paused == [{}] * 3


def test_a_decay_is_as_long_as_the_replica_that_improved_longest_asks():
    losses = [[0.5, 0.1], [0.4, 0.2], [0.3, 0.3]]
    assert Tracker(1, 9, 0.5, losses, decay=3).decay_length == 2
    assert not Tracker(1, 9, 0.5, losses).should_decay and Tracker(1, 9, 0.5, [*losses, [0.4, 0.4]]).should_decay


def test_a_log_of_unknown_length_has_no_rows():
    made, done = object.__new__(PassesLoop), []
    made.source, made.tracker = types.SimpleNamespace(total_rows=None), Tracker(1, 9, 0.5, [[0.5]])
    made.schedule = types.SimpleNamespace(train_flops_per_row=3.0)
    made._finish = lambda whole, best, work, final: done.extend(work)
    made._finish_passes("whole", "last", "best", 7)
    assert (done[0]["examples"], done[0]["unique_examples"], done[0]["steps"]) == (0, 0, 7)


class Source:
    schema = types.SimpleNamespace(tasks=[types.SimpleNamespace(name=name) for name in ("click", "buy")])
    log = "the log"

    def facts(self):
        return {"name": "made up"}

    def batches_of(self, log):
        for rows in ([3, 0], [1]):
            valid = np.array([[True] * len(rows) + [False] * (2 - len(rows))])
            yield types.SimpleNamespace(valid=valid, first=rows[0]), np.array(rows)


def test_rows_of_a_file_are_scored_in_its_own_order(monkeypatch, tmp_path):
    places, asked = [], []

    class Log:
        origins = np.array([7, 5, 9, (3 << 40) + 2])  # of the third file row 2

    def encode(log, file, work):
        assert isinstance(work, Path) and work.is_dir()
        places.append(work)
        (work / "packed").mkdir()
        (work / "packed" / "rows").touch()
        asked.append((log, file))
        return Log(), types.SimpleNamespace(summary=lambda: "1 left out")

    def logits(state, batch):
        assert state == "state"
        return np.array([[[batch.first, 0.0], [batch.first + 0.5, -1.0]]])[None]

    trainer, source = types.SimpleNamespace(batch_logits=logits), Source()
    monkeypatch.setattr(predicting, "restore_model", lambda *given: asked.append(given) or (trainer, "state", source))
    monkeypatch.setattr(predicting, "encode_rows", encode)
    monkeypatch.setattr(predicting, "PackedLog", Log)
    out = tmp_path / "out.parquet"
    with pytest.raises(ValueError, match="was trained on made up; only models of imported logs"):
        predicting.predict_file(tmp_path, tmp_path / "rows", out, "/log")
    assert asked == [(tmp_path, "/log")] and not out.exists()
    monkeypatch.setattr(predicting, "GrainSource", Source)
    assert predicting.predict_file(tmp_path, tmp_path / "rows", out) == (3, "1 left out")
    assert asked[1:] == [(tmp_path, None), ("the log", tmp_path / "rows")] and not places[0].exists()
    found = pq.read_table(out).to_pydict()
    assert found["row"] == [2, 5, 7] and found["click_logit"] == [3.0, 1.0, 3.5]
    assert found["buy_logit"] == [0.0, 0.0, -1.0]
    np.testing.assert_allclose(found["buy_probability"], 1 / (1 + np.exp([0.0, 0.0, 1.0])))
    np.testing.assert_allclose(found["click_probability"], 1 / (1 + np.exp([-3.0, -1.0, -3.5])))
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]


def test_what_a_step_sends_is_predicted_of_a_split_program(monkeypatch):
    slots = {"a": {"sum": np.zeros(8), "moment": np.zeros((8, 2)), "more": np.zeros((8, 3))}, "b": {}}
    touched = {
        name: types.SimpleNamespace(positions={"x": np.zeros(n), "y": np.zeros((2, n))}, rows=np.zeros(5 * n))
        for name, n in (("a", 2), ("b", 4))
    }
    asked = []
    monkeypatch.setattr(run_resources, "abstract_batch", lambda *given: asked.append(given) or "batch")
    monkeypatch.setattr(run_resources, "find_touched", lambda schema, batch: asked.append((schema, batch)))
    monkeypatch.setattr(run_resources.jax, "eval_shape", lambda function, batch: function(batch) or touched)
    monkeypatch.setattr(run_resources, "predicted_bytes", lambda *given: asked.append(given) or {"all": 1.0})
    source = types.SimpleNamespace(schema="schema", requests=6, candidates=2)
    trainer = types.SimpleNamespace(mesh="mesh", source=source, expert_places="places")
    state = types.SimpleNamespace(values={}, tables={"a": "A", "b": "B"}, slots=slots, params="params")
    assert run_resources.predicted_communication(trainer, state) == {"all": 1.0}
    params, mesh, rows, (first, second), places = asked.pop()
    assert asked == [("schema", 6, 2), ("schema", "batch")]
    assert (params, mesh, rows, places) == ("params", "mesh", 12, "places")
    assert (first.ids, first.touched, first.table) == (6, 10, "A") and [slot.shape for slot in first.slots] == [
        (8, 2), (8, 3),
    ]  # fmt: skip
    assert (second.ids, second.touched, second.table, second.slots) == (12, 20, "B", [])
    state.values = {"v": 1}
    assert run_resources.predicted_communication(trainer, state) is None
    state.values, trainer.mesh = {}, None
    assert run_resources.predicted_communication(trainer, state) is None


def test_power_is_measured_where_there_is_a_graphics_processor(monkeypatch):
    monkeypatch.setattr(run_resources.resources, "nvidia_watts", lambda: "watts")
    monkeypatch.setattr(run_resources.resources, "Meter", lambda watts: ("meter", watts))
    for backend, watts in (("cpu", None), ("tpu", None), ("gpu", "watts")):
        monkeypatch.setattr(run_resources.jax, "default_backend", lambda backend=backend: backend)
        assert run_resources.meter() == ("meter", watts)


def test_settings_of_models_that_came_later_name_no_run_where_they_are_off():
    off = {"hidden_dropout": 0.0, "batch_norm": False, "output_norm": False, "inner_init": 1.0}
    on = {"hidden_dropout": 0.5, "batch_norm": True, "output_norm": True, "inner_init": 0.5}
    for settings, left in ((off, {}), (on, on)):
        model = {"width": 8, **settings, "encoder": {"width": 9, **settings, "inside": dict(settings)}}
        config._drop_unset(model)
        assert model == {"width": 8, **left, "encoder": {"width": 9, **left, "inside": left}}


def test_names_of_a_run_are_hashes_of_what_decides_it():
    made = get_config("dlrm_mlp")
    found = config.identities(made)
    assert [len(value) for value in found.values()] == [12] * 4
    names = {"run_id": config.run_id, "group_id": config.group_id, "shape_id": config.shape_id}
    for name, of in (names | {"trunk_id": config.trunk_id}).items():
        assert of(made) == found[name], name
    with pytest.raises(TypeError, match="plain values only"):
        config.config_hash({"a": object()})
    config.require_word("a.b", "x", ("x", "y"))
    with pytest.raises(ValueError, match="a.b is 'z', expected one of x, y"):
        config.require_word("a.b", "z", ("x", "y"))


def test_the_models_of_a_record_are_todays_but_for_what_it_says():
    """Records of earlier versions lack settings that came later, and keep those that were left."""
    made = get_config("dlrm_mlp")
    made.training.lr, made.seed, made.data.holdout_rows = 0.5, 7, 99
    plain = config.resolved(made)
    assert "mesh" not in plain["training"] and plain["training"]["data_parallel"] is False
    found = run_config({"config": plain})
    assert (found.seed, found.training.lr, found.data.holdout_rows, found.training.mesh) == (7, 0.5, 99, "")
    assert found.model == made.model and config.run_id(found) == config.run_id(made)
