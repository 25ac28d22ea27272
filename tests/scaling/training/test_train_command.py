"""`recscale train` and the function behind it, each with what it calls replaced: what is handed on and printed."""

import contextlib
import json
import types
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from recscale.scaling import host_memory, processes, training
from recscale.scaling.data import sources
from recscale.scaling.training import RunSpec, get_config, progress, runner
from recscale.scaling.training.train_command import train

RECORD = {"run_id": "abc", "status": "done", "metrics": {"logloss": 0.123456789, "days": [1], "rows": 7}}


@pytest.fixture
def command(monkeypatch):
    """Runs the command; what it did, one by one, is in `command.done`."""
    done, first, record = [], [True], [RECORD]

    def noted(name):
        return lambda *given, **more: done.append((name, *given, *([more] if more else [])))

    for module, name in (
        (host_memory, "restart_with_huge_pages"), (host_memory, "keep_freed_memory"), (processes, "connect"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, noted(name))
    monkeypatch.setattr(processes, "is_first", lambda: first[0])

    @contextlib.contextmanager
    def bar(title):
        done.append(("bar", title))
        yield "the bar"

    def use_log(config, root):
        done.append(("use_log", root))
        config.data.root = root

    def run(config, out, **more):
        done.append(("run", config, out, more))
        return record[0]

    monkeypatch.setattr(progress, "bar", bar)
    monkeypatch.setattr(sources, "use_log", use_log)
    monkeypatch.setattr(training, "train", run)

    def call(*arguments, code=0):
        done.clear()
        said = CliRunner().invoke(train, arguments)
        assert said.exit_code == code, said.output
        return said.output

    return types.SimpleNamespace(call=call, done=done, first=first, record=record)


def test_a_run_is_trained_as_asked(command, tmp_path):
    said = command.call("dlrm_mlp", "--out", "o")
    assert said.splitlines() == [f"{'logloss':28s} 0.123457", f"{'rows':28s} 7", "status done; record in o/run.json"]
    alone = {"coordinator": None, "processes": None, "process_id": None}
    before = [("restart_with_huge_pages",), ("keep_freed_memory",)]
    assert command.done[:4] == [*before, ("connect", alone), ("bar", "dlrm_mlp on known_truth")]
    [(_, config, out, more)] = command.done[4:]
    assert (out, more) == (Path("o"), {"progress": "the bar", "assigned": []})
    assert config.to_dict() == get_config("dlrm_mlp").to_dict()

    said = command.call(
        "dlrm_mlp", "--out", "o", "--set", "seed=3", "--set", " training.lr = 1e-2", "--data", "/log", "--mesh",
        "data=2", "--coordinator", "h:1", "--processes", "2", "--process-id", "1", "--json", "--dataset", "mine",
    )  # fmt: skip
    assert json.loads(said.splitlines()[-1]) == {"run_id": "abc", "status": "done", **RECORD["metrics"]}
    _, _, connected, used, bar, (_, config, _, more) = command.done
    assert connected == ("connect", {"coordinator": "h:1", "processes": 2, "process_id": 1})
    assert (used, bar) == (("use_log", "/log"), ("bar", "dlrm_mlp on mine"))
    assert more["assigned"] == ["seed", "training.lr", "data.root"]
    assert (config.seed, config.training.lr, config.training.mesh) == (3, 1e-2, "data=2")
    assert (config.data.root, config.data.name) == ("/log", "mine")

    command.call("dlrm_mlp", "--out", "o", "--dataset", str(tmp_path))
    assert ("use_log", str(tmp_path)) in command.done and command.done[-1][1].data.name == sources.STORED
    assert ("bar", f"dlrm_mlp on {sources.STORED}") in command.done
    assert command.done[-1][3]["assigned"] == ["data.root"]


def test_a_run_without_metrics_and_one_of_several_processes(command):
    command.record[0] = {"run_id": "abc", "status": "diverged"}
    said = command.call("dlrm_mlp", "--out", "o", "--json").splitlines()
    assert said[0] == "status diverged; record in o/run.json" and len(said) == 2
    assert json.loads(said[1]) == {"run_id": "abc", "status": "diverged"}
    command.first[0] = False
    assert command.call("dlrm_mlp", "--out", "o", "--json") == ""
    assert command.done[-1][3]["progress"] is None and "bar" not in [each[0] for each in command.done]


def test_options_are_explained_and_kept_to_their_limits(command):
    assert all(option.help for option in train.params if isinstance(option, click.Option))
    shown = {each.name: each.make_metavar(click.Context(train)) for each in train.params}
    assert (shown["assignments"], shown["coordinator"]) == ("KEY=VALUE", "HOST:PORT")
    assert "[default: known_truth]" in " ".join(train.get_help(click.Context(train)).split())
    for option, least in (("--processes", 1), ("--process-id", 0)):
        command.call("dlrm_mlp", "--out", "o", option, str(least))
        command.call("dlrm_mlp", "--out", "o", option, str(least - 1), code=2)
        assert not command.done
    command.call("dlrm_mlp", code=2)
    command.call("--out", "o", code=2)


@pytest.fixture
def group(monkeypatch, tmp_path):
    """Trains a group with everything that does work replaced; what happened is in `group.done`."""
    done, state = [], {"finished": [False, False, True], "several": False, "first": True}

    class Ledger:
        def __init__(self, runs):
            self.number = sum(each[0] == "ledger" for each in done)
            done.append(("ledger", len(runs)))

        finished = property(lambda self: state["finished"][self.number])
        records = property(lambda self: [self.number])

    class Trainer:
        def __init__(self, *given):
            done.append((type(self).__name__, *given[2:]))
            self.given = given

        meter = types.SimpleNamespace(running=lambda: noted("meter"))

        def run(self):
            done.append(("run",))
            self.given[3]({"step": 1})

    class OnePass(Trainer):
        pass

    class Passes(Trainer):
        pass

    @contextlib.contextmanager
    def noted(*what):
        done.append(what)
        yield
        done.append(("end", *what))

    monkeypatch.setattr(runner, "Ledger", Ledger)
    monkeypatch.setattr(runner, "Loop", OnePass)
    monkeypatch.setattr(runner, "PassesLoop", Passes)
    monkeypatch.setattr(runner, "several", lambda: state["several"])
    monkeypatch.setattr(runner, "is_first", lambda: state["first"])
    monkeypatch.setattr(runner, "check_settings", lambda config: done.append(("settings", config.seed)))
    monkeypatch.setattr(runner, "check_places", lambda *places: done.append(("places", *places)))
    monkeypatch.setattr(runner, "ending_together", lambda: noted("together"))
    monkeypatch.setattr(runner, "hold", lambda path, wait_s=0.0: noted("lock", path, wait_s))
    monkeypatch.setattr(runner, "wait_for_all", lambda name: done.append(("wait", name)))

    def call(passes=0, **more):
        done.clear()
        runs = []
        for seed in (1, 0):
            config = get_config("dlrm_mlp")
            config.seed, config.training.passes = seed, passes
            runs.append(RunSpec(config, tmp_path / str(1 - seed)))
        return runner.train_group(runs, str(tmp_path), **more)

    return types.SimpleNamespace(call=call, done=done, state=state)


def test_a_group_is_checked_locked_and_trained_in_this_order(group, tmp_path):
    told = []
    assert group.call(progress=told.append, cache_dir=str(tmp_path / "c"), assigned=["seed"]) == [1]
    first, second = (("lock", tmp_path / name / "lock", 1.0) for name in "01")
    assert told == [{"step": 1}]
    assert group.done == [
        ("ledger", 2), ("settings", 1), ("settings", 0),
        ("places", tmp_path / "0" / "model", tmp_path / "1" / "model", tmp_path / "checkpoints", tmp_path / "c"),
        ("together",), first, second, ("ledger", 2),
        ("OnePass", tmp_path, told.append, str(tmp_path / "c"), ["seed"]), ("meter",), ("run",), ("end", "meter"),
        ("wait", "records"), ("end", *second), ("end", *first), ("end", "together"),
    ]  # fmt: skip
    group.call(passes=2)  # without anybody to tell
    kinds = [each[0] for each in group.done]
    assert "Passes" in kinds and "OnePass" not in kinds
    assert group.done[3] == ("places", tmp_path / "0" / "model", tmp_path / "1" / "model", tmp_path / "checkpoints")


def test_what_is_finished_is_not_trained_again(group):
    group.state["finished"] = [True]
    assert group.call() == [0] and group.done == [("ledger", 2)]
    group.state.update(several=True, finished=[True, True])  # where all processes must agree on it
    assert group.call() == [1] and ("run",) not in group.done and ("wait", "records") in group.done
    group.state.update(several=False, finished=[False, True])  # another process was faster
    assert group.call() == [1] and ("run",) not in group.done
    group.state.update(first=False, finished=[False, False, True])
    assert group.call() == [2] and ("run",) in group.done and "lock" not in [each[0] for each in group.done]


def test_one_run_is_a_group_of_its_own(monkeypatch, tmp_path):
    done, config = [], get_config("dlrm_mlp")
    monkeypatch.setattr(runner, "pin_log", lambda config: done.append(config))

    def group(runs, folder, **more):
        done.append((runs, folder, more))
        return ["first", "second"]

    monkeypatch.setattr(runner, "train_group", group)
    assert runner.train(config, str(tmp_path), progress="p", assigned=["seed"]) == "first"
    more = {"progress": "p", "cache_dir": tmp_path / "cache", "assigned": ["seed"]}
    assert done[0] is config and done[1] == ([RunSpec(config, tmp_path)], tmp_path, more)
