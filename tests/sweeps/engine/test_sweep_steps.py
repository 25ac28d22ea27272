"""The commands step by step, each with the others replaced: what they are asked, hand on, print and leave behind."""

import json
import types
from pathlib import Path

import click
import pandas as pd
import pytest

from recscale.scaling.report.orderings import Ordering, as_option
from recscale.sweeps.engine import sweep_commands as commands
from recscale.sweeps.engine.executors import Launch, Outcome

ENGINE = "recscale.sweeps.engine"
COMMANDS = (commands.plan, commands.launch, commands.status, commands.cancel, commands.collect, commands.sweep)
NOTHING = commands._Planning(out=None, root=None, assignments=(), extend=False, rates=False)
LOCALLY = commands._Running(None, None, "local", (), False, 0, None)
DONE = Outcome({"done": 2}, False, 0.0, ())


@pytest.fixture
def patch(monkeypatch):
    """Replaces `module.name` of the engine by a function that notes its arguments and returns the next answer given."""

    def replace(name, *answers):
        calls, answers = [], iter(answers)

        def noted(*given, **more):
            calls.append((given, more))
            return next(answers, None)

        monkeypatch.setattr(name if name.startswith("recscale") else f"{ENGINE}.{name}", noted)
        return calls

    return replace


EVERYTHING = """f --out o --data d --set a=1 --set b=2 --extend --rates --workers 1 --memory-gb 2.5 --backend slurm
    --executor-option x=1 --slurm y=2 --backend-option z=3 --wait --gpus-per-run 2 --gpus-per-node 1"""


def test_what_is_asked_reaches_the_sweep(patch):
    asked = patch("sweep_commands._sweep")
    commands.sweep.main(["f"], standalone_mode=False)
    commands.sweep.main([*EVERYTHING.split(), "--no-report", "--json"], standalone_mode=False)
    planning = commands._Planning(Path("o"), "d", ("a=1", "b=2"), True, True)
    running = commands._Running(1, 2.5, "slurm", ("x=1", "y=2", "z=3"), True, 2, 1)
    assert [given for given, _ in asked] == [
        ("f", NOTHING, LOCALLY, False, False),
        ("f", planning, running, True, True),
    ]
    assert commands._Planning(Path("o"), "/d", ("seed=1", "data.root=x"), False, False).free == (
        "data.root=/d",
        "data.root=x",
    )
    for option, least in (("--workers", 1), ("--gpus-per-run", 0), ("--gpus-per-node", 1)):
        commands.sweep.main(["f", option, str(least)], standalone_mode=False)
        with pytest.raises(click.BadParameter):
            commands.sweep.main(["f", option, str(least - 1)], standalone_mode=False)


@pytest.mark.parametrize("command", [*COMMANDS, commands.paper], ids=lambda command: command.name)
def test_every_option_is_explained(command):
    options = {each.name: each for each in command.params if isinstance(each, click.Option)}
    assert all(option.help for option in options.values())
    shown = {name: option.make_metavar(click.Context(command)) for name, option in options.items()}
    assert {shown[name] for name in ("assignments", "options") if name in shown} <= {"KEY=VALUE"}
    if "executor" in options:
        assert shown["executor"] == "NAME" and "[default: local]" in command.get_help(click.Context(command))


def test_a_plan_is_made_of_what_was_asked(patch, call, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = types.SimpleNamespace(of="file")
    loaded = types.SimpleNamespace(
        name="s", path=Path("s.py"), folder=Path("beside"), config=lambda: config, report=lambda: {"form": "power"}
    )
    patch("loading.load", *[loaded] * 9)
    points_of, beyond = patch("rates.points_of", *["points"] * 9), patch("rates.points_beyond", "further", [])
    checked, rooted = patch("recscale.scaling.training.preflight.check_places"), patch(
        "recscale.scaling.data.sources.use_log"
    )  # fmt: skip
    made = patch("plan.make_plan", *[types.SimpleNamespace(notes=["out of reach"])] * 9)
    written, sweep = patch("plan.write_plan", *[("rows", 2)] * 9), patch("plan.write_sweep")
    patch("plan.read_plan", [{"stage": 0}, {"stage": 3}, {"stage": 1}])

    def asked(**more):
        return commands.dataclasses.replace(NOTHING, **more)

    place = Path("runs/s")
    assert commands._plan("s.py", NOTHING) == (place, "rows", 2)
    assert points_of.pop() == ((loaded, place), {"search": False}) and checked.pop() == ((place, place / "cache"), {})
    rest = {"sweep": "s", "stage": 0, "cache_dir": place / "cache", "folder": Path("beside")}
    assert made.pop() == ((config, "points"), rest | {"assignments": (), "given": ()}) and not rooted
    assert written.pop()[1] == {"extend": False, "arguments": ["s.py"]}
    assert sweep.pop() == ((place, "s", {"form": "power"}, "rows"), {})
    printed = capsys.readouterr()
    assert printed.err == "note: out of reach\n" and printed.out == ""

    out, settings = Path("own"), ("a=1", "b=2")
    commands._plan("s.py", asked(out=out, root="log", assignments=settings, extend=True, rates=True))
    assert points_of.pop() == ((loaded, out), {"search": True}) and rooted == [((config, "log"), {})]
    told = made.pop()[1]
    assert told["assignments"] == settings and told["given"] == ("data.root",) and told["stage"] == 0
    arguments = ["s.py", "--data", str(tmp_path / "log"), "--rates", "--set", "a=1", "--set", "b=2"]
    assert written.pop()[1] == {"extend": True, "arguments": arguments}

    assert commands._plan("s.py", asked(rates=True), beyond_edges=True)[0] == place / "rates"
    assert beyond[0] == ((loaded, place / "rates"), {}) and not points_of
    told = made.pop()
    assert told[0] == (config, "further") and told[1]["stage"] == 4 and written.pop()[1]["extend"] is True
    assert commands._plan("s.py", asked(rates=True), beyond_edges=True) == (place / "rates", [], 0)
    assert not made and not written


def test_a_search_goes_on_until_nothing_is_new(patch, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    loaded = types.SimpleNamespace(name="s", path=Path("s.py"))
    rows = [{"job": str(n), "predicted": {"job_seconds": 10.0 * (n + 1)}} for n in range(3)]
    place = Path("runs/s/rates")
    planned = patch("sweep_commands._plan", (place, rows[:2], 2), (place, rows, 1), (place, rows, 0))
    ran = patch("sweep_commands._run", DONE, DONE)
    commands._search_rates(NOTHING, loaded, LOCALLY, True)
    asked = commands.dataclasses.replace(NOTHING, out=place, rates=True)
    assert planned == [(("s.py", asked), {"beyond_edges": beyond}) for beyond in (False, True, True)]
    assert ran == [((place, LOCALLY, ()), {})] * 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.splitlines() == [
        "rates: 2 runs planned, about 30 core-seconds (estimated)",
        "rates: 1 runs beyond the rates tried planned, about 30 core-seconds (estimated)",
    ]

    own = commands.dataclasses.replace(NOTHING, out=Path("own"))
    for outcome, code, line in (
        (Outcome({"running": 2}, True, 1.0, ()), 130, "stopped: 2 running in 1 s; go on with `recscale launch r`"),
        (Outcome({"queued": 2}, False, 1.0, (), {"a": "7"}), 1, "1 jobs submitted; follow them with"),
    ):
        planned = patch("sweep_commands._plan", (Path("r"), rows, 3), (Path("r"), rows, 0))
        patch("sweep_commands._run", outcome)
        with pytest.raises(SystemExit) as left:
            commands._search_rates(own, loaded, LOCALLY, False)
        assert left.value.code == code and capsys.readouterr().out.startswith(line)
        assert planned[0][0][1].out == Path("own/rates") and len(planned) == 1


def test_a_sweep_finds_its_rates_first_unless_they_alone_are_asked_for(patch, tmp_path, capsys, monkeypatch):
    loaded = types.SimpleNamespace(rates=lambda: {"trials": 3})
    patch("loading.load", loaded, loaded)
    searched, reported = patch("sweep_commands._search_rates"), patch("sweep_commands._report", {"drawn": 1}, {})
    rows = [{"job": "a", "predicted": {"job_seconds": 4.0}}]
    patch("sweep_commands._plan", *[(tmp_path, rows, 1)] * 2)
    patch("sweep_commands._run", DONE, DONE)
    patch("recscale.scaling.records.runs.collect", [0, 0], [0, 0])
    times = iter([100.0, 103.16, 0.0, 0.0])
    monkeypatch.setattr(commands, "time", types.SimpleNamespace(monotonic=lambda: next(times)))
    commands._sweep("s", NOTHING, LOCALLY, False, True)
    assert searched == [((NOTHING, loaded, LOCALLY, True), {})] and reported == [((tmp_path,), {})]
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told == {"out": str(tmp_path), "runs": 2, "statuses": {"done": 2}, "wall_s": 3.2, "report": {"drawn": 1}}
    alone = commands.dataclasses.replace(NOTHING, rates=True)
    commands._sweep("s", alone, LOCALLY, True, False)
    assert len(searched) == len(reported) == 1


def test_the_executor_gets_what_was_asked(patch, capsys, tmp_path):
    carried = patch("submission.carry_out", DONE)
    asked = commands._Running(3, 1.5, "slurm", ("x=1",), True, 2, 8)
    assert commands._run(tmp_path, asked, ("data.root=/x",)) is DONE
    [(given, more)] = carried
    more.pop("told")("2 running")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "2 running\n")
    assert given == (Launch(tmp_path, ("data.root=/x",), ("x=1",), 3, 1.5), "slurm")
    assert more == {"wait": True, "gpus_per_run": 2, "gpus_per_node": 8}


def test_a_planned_folder_is_launched_as_it_is(patch, call, tmp_path, last_json):
    for name in ("plan.jsonl", "sweep.json"):  # one of them may be lost: launching says so
        (tmp_path / name).mkdir(parents=True)
        planned, ran = patch("sweep_commands._plan"), patch("sweep_commands._run", DONE)
        assert last_json(call("launch", tmp_path, "--json"))["statuses"] == {"done": 2}
        assert not planned and ran[0][0][0] == tmp_path
        for fixed in (["--extend"], ["--out", "x"], ["--set", "seed=1"]):
            assert "is planned already" in call("launch", tmp_path, *fixed, code=2).err
        (tmp_path / name).rmdir()


@pytest.mark.parametrize("lost", [0, 5, 6])
def test_collecting_tells_what_is_lost(patch, call, tmp_path, lost):
    runs = [f"run{n}" for n in range(lost + 1)]
    table = pd.DataFrame({"run_id": runs, "status": ["done"] + ["lost"] * lost})
    patch("recscale.scaling.records.runs.collect", table)
    patch("tables.waiting_runs", [])
    activity = patch("recscale.scaling.report.expert_activity.activity", "opened")
    saved = patch("recscale.scaling.report.expert_activity.save", "/experts.parquet")
    experts = ["--experts", "e.parquet"] if lost == 5 else []
    said = call("collect", tmp_path, "--json", *experts, code=1 if lost else 0)
    counts = {"done": 1} | ({"lost": lost} if lost else {})
    lines, path = said.out.splitlines(), str(tmp_path / "runs.parquet")
    assert lines[0] == f"{path}: {lost + 1} runs, {', '.join(f'{n} {name}' for name, n in counts.items())}"
    assert json.loads(lines[-1]) == {"out": str(tmp_path), "table": path, "runs": lost + 1, "statuses": counts}
    if experts:
        assert lines[1] == "/experts.parquet: how often every expert was open"
        assert activity == [(([tmp_path],), {})] and saved == [(("opened", Path("e.parquet")), {})]
    assert len(lines) == 2 + len(experts) // 2 and len(saved) == len(experts) // 2
    names = ", ".join(runs[1:6]) + (", ..." if lost > 5 else "")
    assert not lost or f"{lost} planned runs have no record: {names}; train them with" in said.err


def test_a_paper_is_a_sweep_or_a_study(patch, call, monkeypatch, tmp_path, last_json):
    patch("loading.papers", *[{"swept": Path("swept.py"), "made_up": Path("made_up.py")}] * 9)
    patch("loading.installed", *[{"swept": Path("swept.py")}] * 9)
    swept, judged = patch("sweep_commands._sweep"), patch("sweep_commands._judge", {"of": 1}, {"of": 2})
    assert call("paper").out == "swept\nmade_up\n"
    call("paper", "swept", "--workers", 2, "--json")
    assert swept[0][0] == ("swept", NOTHING, commands.dataclasses.replace(LOCALLY, workers=2), False, True)

    ran = []

    def run_study(table, root):
        ran.append((table, root))
        table.parent.mkdir(parents=True)
        pd.DataFrame({"arm": ["a"]}).to_parquet(table)

    study = types.SimpleNamespace(run_study=run_study, get_orderings=lambda table: (table, []))
    monkeypatch.setattr(commands, "importlib", types.SimpleNamespace(import_module={
        "recscale.sweeps.papers.made_up": study}.get))  # fmt: skip
    monkeypatch.chdir(tmp_path)
    out = Path("runs/made_up")
    assert last_json(call("paper", "made_up", "--data", "/log", "--json")) == {"out": str(out), "report": {"of": 1}}
    call("paper", "made_up")  # its table is there
    assert ran == [(out / "runs.parquet", "/log")] and [given[0] for given, _ in judged] == [out, out]
    for wrong in (["--set", "seed=1"], ["--extend"], ["--rates"]):
        assert "is no sweep" in call("paper", "made_up", *wrong, code=2).err


def test_orderings_are_printed_and_left_in_the_report(patch, tmp_path, capsys):
    def runs(arm, losses):
        return [{"arm": arm, "seed": seed, "logloss": loss, "status": "done"} for seed, loss in enumerate(losses)]

    table = pd.DataFrame(runs("good", [0.1, 0.2, 0.3]) + runs("bad", [0.5, 0.7, 0.6]))
    orderings = as_option([Ordering("x", "good", "bad", 0.1, "t", "1e9"), Ordering("y", "good", "none", None, "t", "")])
    figure = patch("recscale.scaling.report.comparison_figures.orderings_figure", "drawn")
    saved = patch("recscale.scaling.report.frame.save", "/orderings.png")
    told = commands._judge(tmp_path, table, orderings)
    assert [(one["id"], one["outcome"], one["pairs"]) for one in told["orderings"]] == [
        ("x", "held", 3), ("y", "not judged", 0),
    ]  # fmt: skip
    assert told["orderings"][0]["difference"] == pytest.approx(0.4)
    found = pd.read_csv(tmp_path / "report" / "orderings.csv")
    assert found.columns[0] == "id" and list(found["outcome"]) == ["held", "not judged"]
    text = (tmp_path / "report" / "orderings.md").read_text()
    assert len(text.splitlines()) == 4 and text.endswith("|\n")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "" and f"table: {tmp_path / 'report' / 'orderings.csv'}" in lines
    assert lines[-1] == "picture: /orderings.png" and tmp_path.name in figure[0][1]["title"]
    assert saved == [(("drawn", tmp_path / "report" / "orderings.png"), {})]
    commands._judge(tmp_path, table, orderings[1:])  # nothing to draw
    assert "picture" not in capsys.readouterr().out and len(saved) == 1


def test_a_report_has_what_the_sweep_file_asks_for(patch, tmp_path, capsys):
    patch("plan.read_sweep", {"report": {"form": "power"}}, {"report": {"versus": ["a", "b"]}}, {"report": {
        "orderings": ["o"]}}, {})  # fmt: skip
    made = patch("recscale.scaling.report.report.make_report", {"of": 1}, {"of": 2}, {"of": 3})
    printed = patch("recscale.scaling.report.report.print_summary")
    patch("recscale.scaling.laws.tables.read.read", "table", "table")
    judged = patch("recscale.scaling.report.verdict.judge", types.SimpleNamespace(lines=["a wins"]))
    patch("recscale.scaling.report.verdict.verdict_figure", "drawn")
    saved = patch("recscale.scaling.report.frame.save", "/verdict.png")
    ordered = patch("sweep_commands._judge", {"orderings": []})
    assert commands._report(tmp_path) == {"of": 1} and made == [((tmp_path,), {"form": "power"})] and not judged
    assert commands._report(tmp_path) == {"of": 2, "verdict": ["a wins"]} and made[1] == ((tmp_path,), {})
    assert judged == [(("table", "a", "b"), {"out": tmp_path})] and len(printed) == 2
    assert saved == [(("drawn", tmp_path / "report" / "verdict.png"), {})]
    assert capsys.readouterr().out == "picture  /verdict.png\n\na wins\n"
    assert commands._report(tmp_path) == {"orderings": []} and ordered == [((tmp_path, "table", ["o"]), {})]
    assert commands._report(tmp_path) == {"of": 3}


def test_json_holds_whatever_a_report_has(capsys):
    commands._json({"out": Path("a")})
    assert capsys.readouterr().out == '{"out": "a"}\n'
