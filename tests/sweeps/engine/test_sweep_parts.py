"""Small parts of sweeps by themselves: jobs, the machine, sweep files and what lies beside them, plans that differ."""

import sys
import types
from pathlib import Path

import pytest

from recscale import sweeps
from recscale.sweeps.engine import brought, combinators, loading, machine
from recscale.sweeps.engine import job as jobs
from recscale.sweeps.engine import plan as planning
from recscale.sweeps.engine.combinators import searched_name
from recscale.sweeps.engine.job import Job
from recscale.sweeps.engine.plan_difference import difference


def row(run, job="j", **predicted):
    training = {"mesh": predicted.pop("mesh")} if "mesh" in predicted else {}
    config = {"architecture": "din", "training": training}
    return {
        "run_id": run, "job": job, "config": config, "counts": {"dense_params": 1234},
        "predicted": {"peak_memory_bytes": 1, "job_seconds": 1.0} | predicted,
    }  # fmt: skip


def test_a_job_needs_what_its_largest_run_needs(tmp_path):
    one = Job("j", [
        row("a", mesh="data=2", peak_memory_bytes=5, checkpoint_bytes=7, job_seconds=1.0),
        row("b", mesh="", peak_memory_bytes=9, job_seconds=2.0),
    ])  # fmt: skip
    assert (one.memory_bytes, one.checkpoint_bytes, one.seconds, one.attempts) == (9, 7, 2.0, 0)
    assert one.label == "din 1,234" and one.mesh == "data=2" and Job("k", one.rows[1:]).checkpoint_bytes == 0
    assert Job("k", [row("a")]).mesh == "" and one.log(tmp_path) == tmp_path / "groups" / "j" / "log.txt"
    assert jobs.job_lease(tmp_path, "j") == tmp_path / "groups" / "j" / "lock"


def test_checkpoints_that_are_still_to_be_written_must_fit(tmp_path, monkeypatch):
    asked = []

    def usage(path):
        asked.append(path)
        return types.SimpleNamespace(free=12)

    monkeypatch.setattr(jobs.shutil, "disk_usage", usage)
    three = [Job(name, [row(name, name, checkpoint_bytes=6)]) for name in "abc"]
    out = tmp_path / "not" / "there"
    jobs.check_disk(out, three[:2])
    with pytest.raises(ValueError, match="checkpoints of this sweep take about 18 B, and 12 B are free"):
        jobs.check_disk(out, three)
    assert asked == [tmp_path] * 2
    (out / "groups" / "c" / "checkpoints").mkdir(parents=True)
    jobs.check_disk(out, three)


def test_the_state_of_a_job_is_that_of_its_runs_and_its_lease(tmp_path, monkeypatch):
    rows = [row(f"{name}{n}", name) for name in "abcdef" for n in (1, 2)]
    recorded = dict(a1="done", a2="diverged", b1="done", b2="running", c1="failed", c2="running", d1="running")
    recorded |= dict(e1="done", e2="failed", f1="failed")
    checked = []
    monkeypatch.setattr(jobs, "read_plan", lambda out: rows)
    monkeypatch.setattr(jobs, "is_held", lambda lease: lease.parent.name == "b")
    monkeypatch.setattr(jobs, "check_metrics", lambda folder, record: checked.append((folder.name, record["status"])))
    monkeypatch.setattr(jobs, "read_record", lambda folder: {"status": recorded[folder.name]} if folder.name
                        in recorded else None)  # fmt: skip
    found = jobs.job_statuses(tmp_path, ["f", "a", "b", "c", "d"])
    assert found == {"f": "failed", "a": "done", "b": "running", "c": "failed", "d": "requeued"}
    assert ("b2", "running") in checked and len(checked) == 8
    assert jobs.job_statuses(tmp_path, ["e"]) == {"e": "failed"}
    recorded.clear()
    assert jobs.job_statuses(tmp_path, ["a"]) == {"a": "queued"}
    assert jobs.run_statuses(tmp_path, rows[:2]) == {"a1": "planned", "a2": "planned"}
    assert list(jobs.count(["b", "a", "b"]).items()) == [("a", 1), ("b", 2)]


def test_accelerators_as_the_environment_says(monkeypatch):
    plugins = {"jax_cuda13_plugin"}
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: name in plugins or None)
    monkeypatch.setattr(machine, "has_tpu", lambda: False)
    monkeypatch.setattr(machine.glob, "glob", lambda pattern: ["/dev/nvidia0", "/dev/nvidia1"])
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    both = [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    assert machine.accelerators() == both
    for told, found in (("cpu", []), ("cpu,cuda", []), ("cuda,cpu", both)):
        monkeypatch.setenv("JAX_PLATFORMS", told)
        assert machine.accelerators() == found
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 7,")
    assert machine.accelerators() == [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "7"}]
    plugins.clear()
    assert machine.accelerators() == []
    monkeypatch.setattr(machine, "has_tpu", lambda: True)
    assert machine.accelerators() == [{}]


def test_a_core_is_measured_on_one_thread(monkeypatch):
    asked, done = [], types.SimpleNamespace(returncode=0, stdout="2.5e9\n", stderr="")

    def run(command, **options):
        asked.append((command, options))
        return done

    monkeypatch.setattr(machine.subprocess, "run", run)
    monkeypatch.setenv("OTHER", "kept")
    assert machine.core_flops() == 2.5e9
    command, options = asked[0]
    environment = options.pop("env")
    assert command[:2] == [sys.executable, "-c"] and environment["OTHER"] == "kept"
    assert environment["OMP_NUM_THREADS"] == "1"
    assert options == {"capture_output": True, "text": True, "check": False}
    done.returncode, done.stderr = 3, "no numpy\n"
    with pytest.raises(RuntimeError, match="ended with code 3: no numpy"):
        machine.core_flops()


GOOD = "def get_config():\n    return 1\n\n\ndef get_sweep():\n    return [{}]\n"


def test_what_a_name_of_a_sweep_can_be(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "a.py").write_text(GOOD)
    for _ in range(2):
        loaded = loading.load(folder / "a.py")
    assert sys.path[0] == str(folder) and sys.path.count(str(folder)) == 1
    assert loaded.folder == folder and loaded.points() == [{}] and loaded.rates() is None and loaded.report() == {}
    (folder / "a.txt").write_text(GOOD)
    with pytest.raises(loading.SweepFileError, match="is not a Python file"):
        loading.load(folder / "a.txt")
    for name in ("nothing.py", "a/b"):
        with pytest.raises(loading.SweepFileError, match=f"no sweep file {name} "):
            loading.load(name)
    for name in ("json", "nowhere.at_all", ".."):  # modules are named with a dot
        with pytest.raises(loading.SweepFileError, match="nearest installed name is"):
            loading.load(name)
    with pytest.raises(loading.SweepFileError, match="json.decoder|decoder.py defines no"):
        loading.load("json.decoder")
    path, names = list(sys.path), set(sys.modules)
    (folder / "broken.py").write_text("1 / 0\n")
    with pytest.raises(loading.SweepFileError, match="ZeroDivisionError"):
        loading.load(folder / "broken.py")
    assert sys.path == path and set(sys.modules) == names
    for found in (loading.installed(), loading.papers()):
        assert list(found.values()) == sorted(found.values())
    assert "plan" not in loading.installed() and "__init__" not in loading.papers()


def test_what_lies_beside_a_sweep_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    package, spread = tmp_path / "beside_package", tmp_path / "beside_spread"
    for folder in (package, spread):
        folder.mkdir()
    (package / "__init__.py").touch()
    (tmp_path / "beside_module.py").touch()
    for name in ("beside_package", "beside_module", "beside_spread"):
        assert brought._lies_in(name, tmp_path)
        assert not brought._lies_in(name, tmp_path.parent)
    assert not any(brought._lies_in(name, tmp_path) for name in ("json", "sys", "not_to_be_found"))


def test_things_of_elsewhere_are_noted_with_their_folder(tmp_path, monkeypatch):
    foreign = {"shop": "lab.logs:shop", "recall": "metrics_of_mine:recall", "mine": "mine.deep:Model"}
    monkeypatch.setattr(brought, "_origin", lambda kind, name: {"address": foreign[name]} if name in foreign else None)
    monkeypatch.setattr(brought, "_lies_in", lambda top, folder: top == "mine" and folder == tmp_path)
    data = types.SimpleNamespace(name="shop", get=lambda key, default: ("auc", "recall"))
    config = types.SimpleNamespace(architecture="mine+din", data=data)
    kinds = [("model", "mine"), ("data set", "shop"), ("metric", "recall")]
    noted = [{"kind": kind, "address": foreign[name]} for kind, name in kinds]
    assert brought.brought(config, None) == noted
    noted[0]["folder"] = str(tmp_path)
    assert brought.brought(config, tmp_path) == noted
    monkeypatch.setattr(sys, "path", ["/there"])
    brought.make_importable([{"brought": [*noted, {"folder": "/there"}, {"folder": "/more"}]}, {}])
    assert sys.path == ["/more", str(tmp_path), "/there"]


def test_every_kind_of_thing_is_looked_up_among_its_own(monkeypatch):
    asked = []
    monkeypatch.setattr(brought.names, "origin", lambda group, name, known: asked.append((group, name, set(known))))
    brought._origin.cache_clear()
    for kind in ("model", "data set", "metric"):
        brought._origin(kind, "x-of-this-test")
    brought._origin.cache_clear()
    groups = [group for group, *_ in asked]
    assert groups == [brought.registry.GROUP, brought.sources.GROUP, brought.metrics.GROUP]
    model, source, metric = (known for *_, known in asked)
    assert set(brought.registry.MODELS) <= model and set(brought.registry.list_presets()) <= model
    assert source == set(brought.sources.DATA_SETS) and metric == set(brought.metrics.METRICS)


def test_ladders_of_tables_and_points_of_equal_settings():
    assert sweeps.by_embedding_rows([8]) == [{"data.embedding_rows": 8}]
    assert sweeps.by_embedding_width([4], seed=1) == [{"data.embedding_width": 4, "seed": 1}]
    assert sweeps.by_memory_slots([64]) == [{"model.memory_slots": 64}] and sweeps.seeds(1) == [{"seed": 0}]
    a = {"model.widths": (8, 4), "training.lr": 1e-3, "seed": 3, "data.log_seed": 1, "note.arm": "x"}
    name = searched_name(a)
    assert name == searched_name(dict(reversed(a.items())) | {"seed": 4, "note.arm": "y", "data.log_seed": 2})
    assert len(name) == 12 and name != searched_name(a | {"training.lr": 1e-2})
    assert searched_name({"path": Path("a")}) == searched_name({"path": Path("a")})
    assert combinators.split_notes(a) == ({k: v for k, v in a.items() if k != "note.arm"}, {"arm": "x"})
    found = [point["training.lr"] for point in sweeps.rate_search([{"training.lr": 0.1}])]
    assert found == [0.05, 0.1, 0.2] and sweeps.rate_search([{"training.lr": 0.1}])[0]["data.log_seed"] == 1
    assert [p["training.lr"] for p in sweeps.rate_search([{"training.lr": 1.0}], trials=5, factor=10.0)] == [
        0.01, 0.1, 1.0, 10.0, 100.0,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="3 to 5 trials"):
        sweeps.rate_search([{"training.lr": 0.1}], trials=6, factor=0.5)
    with pytest.raises(ValueError, match="one length"):
        sweeps.zip(sweeps.seeds(1), sweeps.seeds(2), sweeps.seeds(1))
    assert sweeps.zip() == [] and sweeps.zip(sweeps.seeds(2)) == sweeps.seeds(2)


def test_plans_differ_in_runs_and_settings():
    def plan(*values, **more):
        return [{"run_id": f"{n}", "config": {"a": {"b": n}, "free": n % 2} | more} for n in values]

    assert difference(plan(1, 2), plan(2, 3), but_for=("free",)) == (
        "1 of its 2 runs are not in this sweep, 1 of this sweep's 2 are new; a.b 1, 2 there, 2, 3 here"
    )
    assert difference(plan(1), plan(1), but_for=()) == (
        "0 of its 1 runs are not in this sweep, 0 of this sweep's 1 are new"
    )
    text = difference(plan(1, 2, 3, 4), plan(1, 2, 3, 4, 5, x=7))
    assert text.endswith("new; a.b 1, 2, 3, 4 there, 1, 2, 3, 4, ... here; x absent there, 7 here")
    many = [dict.fromkeys("uvwxyz"[:count], 1) for count in (5, 6)]
    listed = [difference(plan(1), plan(1, **each)) for each in many]
    assert listed[0].endswith("y absent there, 1 here") and listed[1] == listed[0] + "; ..."


def test_settings_that_change_no_result():
    assert planning.is_free(" training.remat =full=x") and not planning.is_free("training.lr=data.root")
    assert planning._job_name("g", taken := {"g", "g-2", "h"}) == "g-3" and "g-3" in taken
    assert planning._job_name("h", set()) == "h" and planning._job_name("h", {"h"}) == "h-2"
    assert planning._tuples({"a": [1, [2]], "b": "x"}) == {"a": (1, (2,)), "b": "x"}
    counts = types.SimpleNamespace(dense_params=110, train_flops_per_row=80.0)
    assert planning._target_error({"dense_params": 100.0}, counts) == pytest.approx(0.1)
    assert planning._target_error({"train_flops": 100.0, "budget_flops": 1.0}, counts) == pytest.approx(-0.2)
    assert planning._target_error({"budget_flops": 1.0}, counts) is None
    assert planning._given({"dense_params": 1e5, "budget_flops": None, "train_flops": 3.0}) == (
        "dense_params=100000, train_flops=3"
    )
