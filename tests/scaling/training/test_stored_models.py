"""Checkpoints and models on disk with the writer of arrays replaced: what is written, in which order, and read back."""

import dataclasses
import json
import shutil
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recscale.models.inputs import Field, Schema, Task
from recscale.scaling.records.runs import write_record
from recscale.scaling.records.sealed import sealed, unsealed
from recscale.scaling.training import RunSpec, checkpoints, get_config, model_files, resolved, run_id
from recscale.scaling.training.checkpoints import Checkpoints

STATE = {"w": jnp.arange(3.0), "n": {"s": jnp.int32(1)}}


@pytest.fixture
def done():
    return []


@pytest.fixture
def writer(monkeypatch, done):
    """Checkpoints below a folder whose arrays are kept in memory."""
    stored = {}

    class Arrays:
        def save(self, folder, args):
            assert folder.name == "arrays" and folder.parent.is_dir()
            done.append(("arrays", folder.parent.name, sorted(path.name for path in folder.parent.iterdir())))
            folder.mkdir()
            for name in ("b", "a"):
                (folder / name).write_text(name)
            stored[folder] = args.item

        def restore(self, folder, args):
            done.append(("read", args.item))
            return stored[folder]

        def close(self):
            done.append(("close",))

    monkeypatch.setattr(checkpoints.ocp, "Checkpointer", lambda handler: Arrays())
    monkeypatch.setattr(checkpoints, "wait_for_all", lambda name: done.append(("wait", name)))
    return Checkpoints


def test_a_checkpoint_is_whole_before_older_ones_go(writer, done, tmp_path, monkeypatch):
    made = writer(tmp_path / "a" / "b")
    assert writer(tmp_path / "a" / "b").folder == made.folder == tmp_path / "a" / "b"
    position = {"step": 5, "interval": {"loss": np.arange(2)}}
    made.save(0, position, STATE, None)
    assert done == [("wait", "checkpoint 0 begins"), ("arrays", "0", []), ("wait", "checkpoint 0 is whole")]
    folder = made.folder / "0"
    assert sorted(path.name for path in folder.iterdir()) == ["arrays", "interval.npz", "manifest.json"]
    manifest = unsealed((folder / "manifest.json").read_bytes())
    assert (manifest["format"], manifest["position"]) == (2, {"step": 5})  # format 2 is what earlier versions wrote
    assert manifest["arrays"] == {"state": {"['w']": "float32[3]", "['n']['s']": "int32[]"}}
    assert list(manifest["files"]) == ["arrays/a", "arrays/b", "interval.npz"]
    assert (folder / "manifest.json").read_text().splitlines()[1].startswith(' "')
    found = made.restore(STATE)
    assert found.position["interval"].pop("loss").tolist() == [0, 1] and found.trunk is None
    assert found.position == {"step": 5, "interval": {}} and found.state["n"]["s"] == 1
    [(_, wanted)] = [each for each in done if each[0] == "read"]
    assert list(wanted) == ["state"] and wanted["state"]["['w']"].sharding == STATE["w"].sharding

    order = []
    real = checkpoints.write_atomically
    monkeypatch.setattr(
        checkpoints, "write_atomically", lambda path, text: order.append(made.ticks()) or real(path, text)
    )
    for tick in (2, 10, 11):
        made.save(tick, {}, STATE, STATE)
    assert order == [[2, 0], [10, 2, 0], [11, 10, 2]] and made.ticks() == [11, 10]
    (made.folder / "11" / "rest").touch()
    made.save(11, {}, STATE, STATE)  # in place of what is left of an earlier one
    assert not (made.folder / "11" / "rest").exists() and made.restore(STATE).trunk["w"].tolist() == [0, 1, 2]
    made.close()
    assert done[-1] == ("close",)


def test_what_is_left_of_a_deleted_checkpoint_is_none(writer, tmp_path, monkeypatch):
    made = writer(tmp_path)
    made.save(3, {}, STATE, None)
    removed = []
    monkeypatch.setattr(
        checkpoints.shutil, "rmtree", lambda folder: removed.append(list(folder.rglob("manifest.json")))
    )
    checkpoints._remove(tmp_path / "3")
    checkpoints._remove(tmp_path / "3")
    checkpoints._remove(tmp_path / "nothing")
    assert removed == [[], []]
    assert made.restore(STATE) is None
    assert made.discarded == [{"checkpoint": 3, "reason": "no manifest.json: saving it was cut short"}]


def test_arrays_that_are_on_one_side_only_are_named(writer, tmp_path):
    made = writer(tmp_path)
    made.save(3, {}, STATE, None)
    with pytest.raises(ValueError, match=r"array \"\['more'\]\" is absent there, float32\[3\] here"):
        made.restore(STATE | {"more": STATE["w"]})
    with pytest.raises(ValueError, match=r"array \"\['n'\]\['s'\]\" is int32\[\] there, absent here") as told:
        made.restore({"w": jnp.zeros(4)})
    assert f"rm -r {tmp_path}" in str(told.value)


def test_why_a_checkpoint_is_not_read(writer, tmp_path):
    made = writer(tmp_path)
    made.save(3, {"step": 3}, STATE, None)
    whole = made.verified(3)
    assert whole[1] is None and whole[0]["position"] == {"step": 3}
    folder, manifest = tmp_path / "3", tmp_path / "3" / "manifest.json"

    def reason():
        found, why = made.verified(3)
        assert found is None
        return why

    text = manifest.read_text()
    for damaged in (text[:-9], sealed({"a": 1})):
        manifest.write_text(damaged)
        assert reason() == "manifest.json is damaged"
    manifest.write_text(sealed(whole[0] | {"format": 3}))
    assert reason() == "its format is 3, this version's 2"
    manifest.write_text(text)
    (folder / "arrays" / "a").write_text("other")
    assert reason() == "arrays/a is not as it was written"
    (folder / "arrays" / "a").unlink()
    assert reason() == "arrays/a is missing"


def test_one_process_decides_and_writes(writer, done, tmp_path, monkeypatch):
    writer(tmp_path / "c").save(1, {}, STATE, None)
    monkeypatch.setattr(checkpoints, "is_first", lambda: False)
    other = writer(tmp_path / "not")
    assert not other.folder.exists()
    (tmp_path / "not" / "4").mkdir(parents=True)
    (tmp_path / "not" / "4" / "kept").touch()
    other.save(4, {}, STATE, None)
    assert sorted(path.name for path in (tmp_path / "not" / "4").iterdir()) == ["arrays", "kept"]
    asked = []
    monkeypatch.setattr(checkpoints, "agreed", lambda tick: asked.append(tick) or (1.0,))
    assert writer(tmp_path / "c").restore(STATE).state["w"].tolist() == [0, 1, 2] and asked == [0]


@dataclasses.dataclass
class State:
    step: object
    params: dict
    other: dict
    values: dict
    tables: dict
    moments: str = "left out"


def state(scale=1):
    return State(np.int32(7), *({name: scale * np.arange(3.0)[:, None]} for name in "povt"))


def test_one_replica_is_left_in_place_of_what_was_there(writer, done, tmp_path, monkeypatch):
    run = RunSpec(get_config("dlrm_mlp"), tmp_path)
    saved = []
    monkeypatch.setattr(Checkpoints, "save", lambda self, *given: saved.append((self.folder, *given)))
    folder = tmp_path / "model" / "final"
    model_files.save_model(run, "final", state(), 1)  # nothing is there yet
    (folder / "old").touch()
    model_files.save_model(run, "final", state(), 1)
    (_, *_), (place, tick, position, arrays, trunk) = saved
    assert (place, tick, trunk) == (folder, 7, None) and not list(folder.iterdir())
    assert position == {"segment": 0, "step": 7, "run_id": run_id(run.config)}
    assert {part: next(iter(value.values())).tolist() for part, value in arrays.items()} == dict.fromkeys(
        ("params", "other", "values", "tables"), [[1.0]]
    )
    assert done == [("close",)] * 2
    (folder / "old").touch()
    monkeypatch.setattr(model_files, "is_first", lambda: False)
    model_files.save_model(run, "final", state(), 1)
    assert (folder / "old").exists()


@pytest.fixture
def restored(writer, tmp_path, monkeypatch):
    """Writes a run's record and restores its model; what was asked for is in `restored.asked`."""
    asked = []

    class Source:
        def verify(self):
            asked.append("verified")

    trainer = types.SimpleNamespace(state_shapes=lambda: state())

    def make(*given, **more):
        asked.append((given, more))
        return trainer

    def make_source(section, **more):
        asked.append((section["root"], more))
        return Source()

    monkeypatch.setattr(model_files, "make_source", make_source)
    monkeypatch.setattr(model_files, "Verifiable", Source)
    monkeypatch.setattr(model_files, "make_trainer", make)
    monkeypatch.setattr(
        Checkpoints, "restore", lambda self, like, unfit: asked.append((self.folder, like, unfit)) or found[0]
    )
    found = [types.SimpleNamespace(state={"params": "p", "tables": "t"})]

    def write(status="done", passes=0, name=None, **more):
        config = get_config("dlrm_mlp")
        config.training.requests, config.training.candidates, config.training.passes = 4, 2, passes
        config.seed, config.training.lr, config.model.widths = 3, 0.5, (7, 5)
        record = {"run_id": run_id(config), "status": status, "config": json.loads(json.dumps(resolved(config)))}
        write_record(tmp_path, record | more)
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        if name:
            (tmp_path / "model" / name).mkdir(parents=True)
        return record

    def call(root=None):
        asked.clear()
        return model_files.restore_model(str(tmp_path), root)

    return types.SimpleNamespace(write=write, call=call, asked=asked, found=found, trainer=trainer)


def test_a_model_is_read_by_the_trainer_of_its_record(restored, done, tmp_path):
    record = restored.write(name="final", data={"folder": "/trained/on"})
    trainer, found, source = restored.call()
    assert done == [("close",)] and trainer is restored.trainer
    assert (found.params, found.tables, found.moments) == ("p", "t", "left out")
    (root, sizes), verified, ((config, given, replicas), more), (folder, like, unfit) = restored.asked
    assert (root, sizes, verified) == ("/trained/on", {"requests": 4, "candidates": 2}, "verified")
    assert given is source and replicas == [(3, 0.5)] and more == {"warmup": 0}
    assert config.model.widths == (7, 5) and (config.seed, config.training.requests) == (3, 4)
    assert folder == tmp_path / "model" / "final" and list(like) == ["params", "other", "values", "tables"]
    assert unfit({"run_id": record["run_id"]}) is None and unfit({}) == unfit({"run_id": "x"}) == "it is another run's"
    restored.call("/moved")
    assert restored.asked[0][0] == "/moved"
    restored.write(name="best", passes=2)
    restored.call()
    assert restored.asked[0][0] == "" and restored.asked[-1][0] == tmp_path / "model" / "best"


def test_a_model_that_is_not_there_is_told_with_what_to_do(restored, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        restored.call()
    for status, told in (
        ("done", "rm .*run.json"),
        ("diverged", "leaves no model"),
        ("running", "train it to its end"),
    ):
        for passes, other in ((0, "best"), (2, "final")):
            restored.write(status, passes, name=other)
            with pytest.raises(FileNotFoundError, match=f"the run is {status}: .*{told}"):
                restored.call()
    restored.write(name="final")
    restored.found[0] = None
    with pytest.raises(ValueError, match="is not the model of run .*: it is empty; .*rm .*run.json"):
        restored.call()


def test_reasons_for_which_a_model_is_not_read_are_told(restored, monkeypatch):
    restored.write(name="final")
    monkeypatch.setattr(Checkpoints, "restore", lambda self, *given: self.discarded.extend(
        [{"reason": "cut short"}, {"reason": "damaged"}]))  # fmt: skip
    with pytest.raises(ValueError, match=": cut short; damaged; to have it made anew"):
        restored.call()


def test_a_restored_state_becomes_modules(monkeypatch):
    schema = Schema((Field("item", "candidate", 2, vocabulary=3),), tasks=(Task("click"),))
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    trainer = types.SimpleNamespace(model_state=lambda state: nnx.split(model))
    [(name, (rows, width))] = schema.tables().items()
    table = np.arange(2.0 * rows * width).reshape(2, rows, width)
    stored = types.SimpleNamespace(tables={name: table})
    found = model_files.loaded(trainer, stored, types.SimpleNamespace(schema=schema))
    np.testing.assert_array_equal(found.tables.tables[name][...], table[0])
    np.testing.assert_array_equal(found.model.kernel[...], model.kernel[...])
    assert found.schema is schema
    monkeypatch.setattr(model_files, "restore_model", lambda *given: given)
    monkeypatch.setattr(model_files, "loaded", lambda *given: given)
    assert model_files.load(Path("r"), "root") == (Path("r"), "root") and model_files.load("r") == ("r", None)
    assert model_files._tuples({"a": [1, [2, 3]], "b": {"c": []}, "d": "x"}) == {
        "a": (1, (2, 3)), "b": {"c": ()}, "d": "x",
    }  # fmt: skip
