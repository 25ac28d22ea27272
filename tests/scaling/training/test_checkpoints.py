"""Checkpoints that are not what was written are never read: the next older one is, or none."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from recscale.scaling.records.sealed import sealed, unsealed
from recscale.scaling.training.checkpoints import Checkpoints

STATE = {"w": jnp.arange(50_000.0), "s": jnp.int32(1)}


def position(step):
    return {"segment": 0, "step": step, "signature": "x", "wall_s": 1.0, "interval": {"loss": np.arange(step)}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(folder)
    for step in (1, 2, 3):
        state = {"w": STATE["w"] + step, "s": jnp.int32(step)}
        checkpoints.save(step, position(step), state, STATE if step == 3 else None)
    checkpoints.close()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def test_the_newest_two_are_kept_and_the_newest_is_read(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]
    checkpoints = Checkpoints(folder)
    found = checkpoints.restore(STATE)
    assert found.position["step"] == 3 and checkpoints.discarded == []
    np.testing.assert_array_equal(found.state["w"], STATE["w"] + 3)
    np.testing.assert_array_equal(found.trunk["w"], STATE["w"])
    np.testing.assert_array_equal(found.position["interval"]["loss"], [0, 1, 2])
    assert Checkpoints(folder.parent / "none").restore(STATE) is None


def flip(content):
    return content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]


DAMAGES = {
    "deleted": None,
    "emptied": lambda content: b"",
    "cut in half": lambda content: content[: len(content) // 2],
    "one bit flipped": flip,
    "garbage appended": lambda content: content + b"\x00\xffgarbage",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_to_any_file_of_the_newest_gives_the_older(folder, damage):
    files = sorted(path for path in (folder / "3").rglob("*") if path.is_file())
    assert len(files) > 5
    for path in files:
        copy = shutil.copytree(folder, folder.parent / "copy")
        target = copy / path.relative_to(folder)
        if DAMAGES[damage] is None:
            target.unlink()
        elif not target.read_bytes() and damage != "garbage appended":
            shutil.rmtree(copy)
            continue
        else:
            target.write_bytes(DAMAGES[damage](target.read_bytes()))
        checkpoints = Checkpoints(copy)
        found = checkpoints.restore(STATE)
        assert found.position["step"] == 2 and found.trunk is None, path
        np.testing.assert_array_equal(found.state["w"], STATE["w"] + 2)
        [discarded] = checkpoints.discarded
        assert discarded["checkpoint"] == 3 and (target.name in discarded["reason"])
        checkpoints.drop_discarded()
        assert sorted(each.name for each in copy.iterdir()) == ["2"]
        shutil.rmtree(copy)


def test_nothing_whole_means_the_beginning(folder):
    for path in folder.glob("*/manifest.json"):
        path.write_text("{}")
    checkpoints = Checkpoints(folder)
    assert checkpoints.restore(STATE) is None
    assert [each["checkpoint"] for each in checkpoints.discarded] == [3, 2] and len(list(folder.iterdir())) == 2
    checkpoints.drop_discarded()
    assert not list(folder.iterdir())
    checkpoints.save(3, position(3), STATE, None)
    assert checkpoints.restore(STATE).position["step"] == 3


def test_a_position_that_does_not_fit_is_passed_over_and_a_refusal_deletes_nothing(folder):
    checkpoints = Checkpoints(folder)

    def refuse(position):
        raise ValueError("another run's")

    with pytest.raises(ValueError, match="another run's"):
        checkpoints.restore(STATE, refuse)
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]
    found = checkpoints.restore(STATE, lambda position: "too far" if position["step"] > 2 else None)
    assert found.position["step"] == 2 and checkpoints.discarded == [{"checkpoint": 3, "reason": "too far"}]


def test_arrays_of_another_program_are_named(folder):
    with pytest.raises(ValueError, match=r"array \"\['w'\]\" is float32\[50000\] there, float32\[4\] here"):
        Checkpoints(folder).restore({"w": jnp.zeros(4), "s": jnp.int32(1)})


def test_a_checkpoint_of_another_format_is_not_read(folder):
    for path in folder.glob("*/manifest.json"):
        path.write_text(sealed(unsealed(path.read_bytes()) | {"format": 0}))
    checkpoints = Checkpoints(folder)
    assert checkpoints.restore(STATE) is None
    assert "its format is 0" in checkpoints.discarded[0]["reason"]
