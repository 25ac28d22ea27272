"""What comes from elsewhere: executors by address, helpers beside a sweep file, sweeps that are modules."""

import json
import sys

import pytest

from recscale.scaling.cli import main
from recscale.scaling.records.runs import read_record
from recscale.sweeps.engine import brought
from recscale.sweeps.engine.executors import EXECUTORS, Launch, executor_class
from recscale.sweeps.engine.launch import launch
from recscale.sweeps.engine.loading import load
from recscale.sweeps.engine.plan import make_plan, read_plan, write_plan

SWEEP = """
from {helper} import LAYERS
from recscale.scaling.training import get_config as base_config
from recscale.sweeps import axis
def get_config():
    config = base_config("rankmixer", "known_truth")
    config.data.preset = "smoke"
    config.data.holdout_rows = 512
    config.training.requests = 64
    config.training.examples = 640
    return config
def get_sweep():
    return axis("model.layers", LAYERS)
"""

EXECUTOR = """
from recscale.scaling.records.runs import write_record
from recscale.sweeps.engine.executors import Executor
class Immediate(Executor):
    def submit(self, jobs, resources):
        for job in jobs:
            for row in job.rows:
                record = {"status": "done", "reasons": [*self.launch.options]}
                write_record(self.launch.out / "runs" / row["run_id"], record)
        return [job.id for job in jobs]
"""


def call(capsys, *arguments, code=0):
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert left.value.code == code, printed
    return printed


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder whose helper and executor have names of this test alone; what it makes importable goes afterwards."""
    path, before = tmp_path / "my sweeps", set(sys.modules)
    path.mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path])
    (path / "sizes_of_outside.py").write_text("LAYERS = [1, 2]\n")
    (path / "widths v2.py").write_text(SWEEP.format(helper="sizes_of_outside"))
    yield path
    for name in set(sys.modules) - before:
        if "outside_test" in name or name in ("sizes_of_outside", "executor_of_outside"):
            del sys.modules[name]


def test_an_executor_by_address_runs_a_sweep(capsys, folder, tmp_path):
    (folder / "executor_of_outside.py").write_text(EXECUTOR)
    sys.path.insert(0, str(folder))
    options = ["--backend", "executor_of_outside:Immediate", "--backend-option", "queue=night", "--json"]
    out = tmp_path / "out"
    printed = call(capsys, "launch", folder / "widths v2.py", "--out", out, *options)
    assert json.loads(printed.out.splitlines()[-1])["statuses"] == {"done": 2}
    assert "queue=night" in call(capsys, "status", out).out
    printed = call(capsys, "sweep", folder / "widths v2.py", "--out", out, "--no-report", *options)
    assert json.loads(printed.out.splitlines()[-1])["statuses"] == {"done": 2}


def test_a_misspelt_executor_is_answered_before_anything_is_planned(capsys, folder, tmp_path):
    printed = call(capsys, "launch", folder / "widths v2.py", "--out", tmp_path / "out", "--backend", "slrum", code=2)
    assert "there is no executor 'slrum'; did you mean 'slurm'?" in printed.err and not (tmp_path / "out").exists()
    assert all(callable(executor_class(name)) for name in EXECUTORS)
    with pytest.raises(ValueError, match="takes no options, found a=1"):
        executor_class("local")(Launch(tmp_path, options=("a=1",)))


def test_a_helper_beside_the_sweep_file_is_imported(folder):
    loaded = load(folder / "widths v2.py")
    assert loaded.points() == [{"model.layers": 1}, {"model.layers": 2}] and loaded.folder == folder
    assert load("smoke").folder is None


def test_a_sweep_may_be_a_module_of_an_installed_package(folder):
    package = folder / "outside_test_lab"
    package.mkdir()
    (package / "__init__.py").write_text("LAYERS = [3]\n")
    (package / "depths.py").write_text(SWEEP.format(helper="outside_test_lab"))
    sys.path.insert(0, str(folder))
    loaded = load("outside_test_lab.depths")
    assert loaded.name == "depths" and loaded.path == package / "depths.py" and loaded.folder is None
    assert loaded.points() == [{"model.layers": 3}]


def test_the_plan_notes_what_is_not_of_recscale_and_nothing_else(folder, monkeypatch):
    loaded = load(folder / "widths v2.py")
    plain = make_plan(loaded.config(), loaded.points(), sweep="s", folder=folder).rows
    assert all("brought" not in row for row in plain)

    origin = {"name": "sizes_of_outside:X", "address": "sizes_of_outside:X", "distribution": "", "version": ""}
    monkeypatch.setattr(brought, "_origin", lambda kind, name: origin if kind == "model" else None)
    rows = make_plan(loaded.config(), loaded.points(), sweep="s", folder=folder).rows
    assert [row["run_id"] for row in rows] == [row["run_id"] for row in plain]
    noted = [{"kind": "model", **origin, "folder": str(folder)}]
    assert all(row["brought"] == noted for row in rows)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(folder)])
    brought.make_importable(rows)
    assert sys.path[0] == str(folder)


BESIDE = """
from recscale.scaling.data import make_source
LAYERS = [1]
def small_log(asked):
    return make_source(
        {"name": "known_truth", "preset": "smoke", "holdout_rows": 512},
        requests=asked.requests,
        candidates=asked.candidates,
    )
"""


@pytest.mark.slow
def test_workers_train_on_a_data_set_that_lies_beside_the_sweep_file(folder, tmp_path):
    (folder / "sizes_of_outside.py").write_text(BESIDE)
    loaded = load(folder / "widths v2.py")
    config = loaded.config()
    config.data.name = "sizes_of_outside:small_log"
    write_plan(tmp_path, make_plan(config, loaded.points(), sweep="s", folder=loaded.folder))
    (row,) = read_plan(tmp_path)
    name, unknown = "sizes_of_outside:small_log", {"distribution": "", "version": ""}
    noted = {"kind": "data set", "name": name, "address": name, **unknown, "folder": str(folder)}
    assert row["brought"] == [noted]
    assert launch(tmp_path, workers=1).statuses == {"done": 1}
    assert read_record(tmp_path / "runs" / row["run_id"])["metrics"]["logloss"] < 1
