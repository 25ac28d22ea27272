"""`recscale design`, with laws replaced: which runs it lists first, and what it says of a plan and of a sweep."""

import types

import numpy as np
import pandas as pd
import pytest

from recscale.scaling.laws.fitting.law_fit import Refused
from recscale.sweeps.engine import design_command as command


class Design:
    """Three candidate runs, the second of which is there already; a run more takes a hundredth off the width."""

    def __init__(self, name, width, worth, counts=(0, 2, 0)):
        self.name, self.width, self.worth, self.counts = name, width, np.array(worth), np.array(counts)
        self.points, self.hours = np.array([[1e3], [1e4], [1e5]]), np.array([0.5, 1.0, 2.0])
        self.between, self.within = 0.0004, 0.0001
        rows = types.SimpleNamespace(columns={"x": "dense_params"})
        self.law = types.SimpleNamespace(rows=rows, form=types.SimpleNamespace(axes=["x"]))

    def widths(self):
        return {"alpha": self.width, "E": 0.5}

    def gains(self, goal):
        return self.worth if goal == "alpha" else self.worth[::-1]

    def with_run(self, run):
        return Design(self.name, self.width - 0.01, self.worth, self.counts + np.eye(3, dtype=int)[run])

    def reaches(self, name, width):
        return name == "alpha" and self.width <= width

    def likely_width(self, name):
        return 1.2 * self.width


@pytest.fixture
def said(monkeypatch):
    """What is printed: lines, and grids as (title, headings, rows)."""
    found = []
    monkeypatch.setattr(command, "say", lambda *lines: found.extend(lines))
    monkeypatch.setattr(command, "show", lambda grid: found.append((grid.title, grid.headings, list(grid.rows))))
    monkeypatch.setattr(command, "differences", lambda designs: {("a", "b"): sum(one.width for one in designs)})
    return found


@pytest.fixture
def designs():
    return [Design("a", 0.1, [1.0, 2.0, 3.0]), Design("b", 0.2, [9.0, 0.5, 2.5], counts=(1, 1, 0))]


def test_widths_of_now(said, designs):
    command._show_now(designs)
    title, headings, rows = said[0]
    assert rows[0] == ("a", "alpha ± 0.1, E ± 0.5", "1 cells, 2 runs", "1 % seeds, 2 % around the law")
    assert rows[1][2] == "2 cells, 2 runs" and len(headings) == len(rows[0])
    assert said[1:] == ["difference of exponents a - b: ± 0.3"]
    said.clear()
    command._show_now([])
    assert [each for each in said if not isinstance(each, str)] == []


def test_the_best_single_runs_come_first_with_what_they_change(said, designs, monkeypatch):
    monkeypatch.setattr(command, "_SHOWN", 2)
    told = command._next(designs, np.inf, None)["next"]  # by all constants: the gains the other way round
    assert [(one["law"], one["worth"], one["point"]["dense_params"]) for one in told] == [
        ("b", 9.0, 1e5),
        ("a", 3.0, 1e3),
    ]
    assert "plan" not in told and said[-1].startswith("--budget CORE_HOURS or --goal")
    assert said[0][0].endswith("by the ln det of the information")
    said.clear()
    planned = types.SimpleNamespace(
        runs=[types.SimpleNamespace(name="a", point={"dense_params": 1e3}, hours=0.5)], hours=0.5, reached=True,
        designs=[designs[0].with_run(0), designs[1]],
    )  # fmt: skip
    asked = []
    monkeypatch.setattr(command, "plan_runs", lambda *given: asked.append(given) or planned)
    goal = ("alpha", 0.15)
    told = command._next(designs, 7.0, goal)
    assert asked == [(designs, 7.0, goal)]
    assert [(one["law"], one["worth"]) for one in told["next"]] == [("b", 9.0), ("a", 3.0)]
    first, second = told["next"]
    assert first["core_hours"] == 0.5 and first["widths"]["alpha"] == pytest.approx(0.19)
    assert first["differences"] == {"a - b": pytest.approx(0.29)} == second["differences"]
    title, headings, rows = said[0]
    assert title.endswith("by the width of alpha") and len(headings) == len(rows[0]) == 5
    assert rows[0] == ("b", "dense_params 1k", "0.5", "alpha ± 0.19, E ± 0.5", "± 0.29")
    assert told["plan"] == {
        "runs": [{"law": "a", "point": {"dense_params": 1e3}, "core_hours": 0.5}], "core_hours": 0.5, "reached": True,
        "widths": {"a": {"alpha": pytest.approx(0.09), "E": 0.5}, "b": {"alpha": 0.2, "E": 0.5}},
    }  # fmt: skip
    title, headings, rows = said[1]
    assert title == "Plan: 1 runs, 0.5 of 7 core-hours" and rows == [("a", "dense_params 1k", "1", "0.5")]
    assert said[2:] == [
        "a with them: alpha ± 0.09, E ± 0.5; alpha ± 0.11 or less in four of five such tables: reaches ± 0.15",
        "b with them: alpha ± 0.2, E ± 0.5; alpha ± 0.24 or less in four of five such tables: does not reach ± 0.15",
    ]
    said.clear()
    assert command._next(designs, 7.0, None)["plan"]["reached"]  # a budget alone plans, too
    command._next(designs, np.inf, goal)
    assert any("0.5 core-hours" in each[0] for each in said if not isinstance(each, str))


def test_a_long_plan_is_cut_and_a_goal_out_of_reach_gets_advice(said, designs, monkeypatch):
    planned = types.SimpleNamespace(runs=[1] * 4, hours=3.0, reached=False, designs=[
        designs[0].with_run(0).with_run(2).with_run(2).with_run(2), designs[1]])  # fmt: skip
    for most, shown in ((2, 2), (1, 2)):
        monkeypatch.setattr(command, "_LONGEST_LIST", most)
        said.clear()
        command._show_plan(planned, designs, np.inf, ("alpha", 0.01))
        title, _, rows = said[0]
        assert title == "Plan: 4 runs, 3 core-hours" and len(rows) == shown
        assert rows[0] == ("a", "dense_params 1k", "1", "0.5")
    assert rows[1][1].startswith("and 1 more") and "not with 4 seeds a cell" in said[-1]
    for reached, budget in ((False, 9.0), (None, np.inf), (True, np.inf)):
        planned.reached = reached
        command._show_plan(planned, designs, budget, None)
        assert said[-1] == "b with them: alpha ± 0.2, E ± 0.5"


def test_every_law_is_designed_or_refused(monkeypatch):
    made, table = [], pd.DataFrame({"architecture": ["b", "a", "c"], "examples": 1})

    def fit(group, form, axes, **options):
        [name] = group["architecture"].unique() if len(group) == 1 else ["runs"]
        assert (form, options) == ("power", {"target": None, "bootstrap": 0})

        def solved():
            if name == "c":
                raise Refused("too narrow")

        frame = types.SimpleNamespace(frame=group, columns={"x": "dense_params"})
        return types.SimpleNamespace(name=name, solved=solved, rows=frame)

    monkeypatch.setattr(command, "fit", fit)
    monkeypatch.setattr(command, "parse_axes", lambda axes: axes)
    monkeypatch.setattr(command, "measured_cost", lambda rows, columns, **prices: (columns, prices))
    monkeypatch.setattr(command, "designed", lambda *given: made.append(given) or given[0])
    options = {"target": None, "bootstrap": 0}
    found, refused = command._designs(table, "architecture", "power", "N", (9.0, 2.0), {"speed": 1.0}, options)
    assert found == ["a", "b"] and list(refused) == ["c"] and "too narrow" in refused["c"]
    assert made[0][2:] == ((["dense_params"], {"speed": 1.0}), 9.0, 2.0) and made[0][1].name == "a"
    found, _ = command._designs(table, "arm", "power", "N", (9.0, 2.0), {}, options)
    assert found == ["runs"]
    command._check_goal("alpha", [Design("a", 1.0, [1.0])])
    with pytest.raises(ValueError, match="the law of a has no 'beta' to narrow; it has alpha, E"):
        command._check_goal("beta", [Design("a", 1.0, [1.0])])


def test_a_planned_sweep_borrows_the_laws_of_its_architectures(tmp_path, monkeypatch, designs):
    runs = pd.DataFrame({"architecture": ["b", "c", "b"], "dense_params": [10, 20, 30]})
    monkeypatch.setattr("recscale.sweeps.engine.plan.read_plan", lambda folder: "rows")
    monkeypatch.setattr("recscale.sweeps.engine.tables.planned_table", lambda rows: runs)
    monkeypatch.setattr(command, "planned", lambda law, points, name: (law.name, points.tolist(), name))
    with pytest.raises(ValueError, match="holds no plan; make one with `recscale plan FILE --out"):
        command._planned(tmp_path, designs, "architecture")
    (tmp_path / "plan.jsonl").touch()
    assert command._planned(tmp_path, designs, "architecture") == [
        ("b", [[10.0], [30.0]], "b"), ("a", [[20.0]], "c"),
    ]  # fmt: skip
    assert command._planned(tmp_path, [], "architecture") == []
