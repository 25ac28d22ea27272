"""The wandb mirror: it gets every metrics line, and no failure of it, absence included, touches a run."""

import sys
import time
import types

import pytest

from recscale.scaling.training.wandb_mirror import WandbMirror


class FakeRun:
    def __init__(self):
        self.rows, self.summary, self.finished = [], {}, 0

    def log(self, row, step):
        if step == 13:
            raise RuntimeError("disk full")
        self.rows.append((step, row))

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package: the arguments of `init`, and the run it gives."""
    fake = types.SimpleNamespace(run=FakeRun(), asked=None, Settings=dict)

    def init(**options):
        fake.asked = options
        return fake.run

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def mirror(folder, mode="offline"):
    return WandbMirror(mode, "laws", "abc", folder, {"seed": 1})


def test_lines_and_final_figures_arrive_under_the_run_s_own_id(wandb, tmp_path):
    one = mirror(tmp_path)
    one.log({"step": 2, "logloss": 0.5})
    one.log({"step": 4, "logloss": 0.4})
    one.finish({"logloss": 0.3})
    one.log({"step": 6, "logloss": 0.2})  # after the end nothing is sent
    assert wandb.run.rows == [(2, {"step": 2, "logloss": 0.5}), (4, {"step": 4, "logloss": 0.4})]
    assert wandb.run.summary == {"logloss": 0.3} and wandb.run.finished == 1
    asked = wandb.asked
    assert (asked["id"], asked["project"], asked["mode"], asked["config"]) == ("abc", "laws", "offline", {"seed": 1})
    assert asked["dir"] == str(tmp_path) and asked["resume"] == "allow"


def test_off_does_not_even_import_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    one = mirror(tmp_path, "off")
    one.log({"step": 1})
    one.finish({})


def test_a_failure_ends_the_mirror_and_nothing_else(wandb, tmp_path, caplog):
    one = mirror(tmp_path)
    one.log({"step": 13})
    one.log({"step": 14})
    one.finish({"logloss": 0.3})
    assert wandb.run.rows == [] and wandb.run.finished == 0 and "disk full" in caplog.text


def test_its_absence_is_a_warning(monkeypatch, tmp_path, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    one = mirror(tmp_path)
    one.log({"step": 1})
    one.finish({})
    assert "mirror of run abc is off" in caplog.text


def test_an_unknown_mode_is_named(tmp_path):
    with pytest.raises(ValueError, match="tracking.wandb is 'on', expected one of off, offline, online"):
        mirror(tmp_path, "on")


@pytest.mark.slow
def test_offline_runs_of_the_real_package_stay_on_this_machine(monkeypatch, tmp_path, caplog, capfd):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    for _ in range(2):  # a run that was stopped goes on
        one = mirror(tmp_path)
        one.log({"step": 2, "logloss": 0.5})
        one.finish({"logloss": 0.3})
        time.sleep(1.0)  # folders are named by the second
    assert not caplog.records and capfd.readouterr() == ("", "")
    assert len(list(tmp_path.glob("wandb/offline-run-*-abc/run-abc.wandb"))) == 2
