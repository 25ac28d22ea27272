"""Next runs: expected widths are those that fits then have, and the plan knows what a law needs."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from recscale.scaling.laws import Refused, fit
from recscale.scaling.laws.planning.design import designed, differences, measured_cost, plan, planned
from recscale.scaling.laws.planning.foresee import foreseen
from recscale.sweeps.engine.design_command import design as command

SIZES = np.geomspace(1e3, 1e6, 8)


def runs(seed=0, sizes=SIZES, seeds=2, between=3e-4, within=3e-4, name="a", alpha=0.5):
    """y = .4 + .05 (x / 1e4)^-alpha times exp(shape + seed noise); a row takes 1e-6 + 1e-11 x seconds."""
    generator = np.random.default_rng(seed)
    rows = []
    for size in sizes:
        shape = between * generator.standard_normal()
        for k in range(seeds):
            y = (0.4 + 0.05 * (size / 1e4) ** -alpha) * np.exp(shape + within * generator.standard_normal())
            cost = {"examples": 1e6, "rows_per_s": 1 / (1e-6 + 1e-11 * size)}
            rows.append(
                {"architecture": name, "shape_id": f"{name}{size:.0f}", "seed": k, "dense_params": size, "logloss": y}
                | cost
            )
    return pd.DataFrame(rows)


def design_of(table, most_hours=1e3, form="power_offset", beyond=100.0):
    law = fit(table, form, {"x": "dense_params"}, bootstrap=0, profile=False, huber_delta=np.inf)
    return designed("a", law, measured_cost(table, ["dense_params"]), most_hours, beyond)


def test_cost_is_read_from_measured_speed():
    cost = measured_cost(runs(), ["dense_params"])
    assert cost.hours({"dense_params": 1e7}) == pytest.approx(1e6 * (1e-6 + 1e-11 * 1e7) / 3600, rel=1e-6)
    along = measured_cost(runs(), ["dense_params", "examples"])
    assert along.hours({"dense_params": 1e5, "examples": 2e6}) == pytest.approx(2e6 * 2e-6 / 3600, rel=1e-6)
    wall = runs().assign(wall_s=lambda t: t.examples / t.rows_per_s).drop(columns="rows_per_s")
    assert measured_cost(wall, ["dense_params"]).hours({"dense_params": 1e7}) == pytest.approx(
        cost.hours({"dense_params": 1e7})
    )
    with pytest.raises(ValueError, match="neither rows_per_s nor wall_s"):
        measured_cost(wall.drop(columns="wall_s"), ["dense_params"])


def test_expected_widths_are_those_of_repeated_studies():
    """The half-width of alpha over t is the scatter of alpha over fresh tables."""
    tables = [runs(seed) for seed in range(30)]
    designs = [design_of(table) for table in tables]
    found = np.array([d.law.solution_params()["alpha"] for d in designs])
    expected = np.median([d.widths()["alpha"] for d in designs]) / 2.571  # t of 8 - 3 cells
    assert expected == pytest.approx(found.std(), rel=0.4)


def test_most_tables_state_an_interval_as_narrow_as_was_likely():
    one = design_of(runs())
    stated = []
    for seed in range(100, 112):
        law = fit(runs(seed, between=one.between**0.5, within=one.within**0.5), "power_offset", {"x": "dense_params"},
                  bootstrap=0)  # fmt: skip
        stated.append(np.ptp(law.profiles["alpha"].interval) / 2)
    assert one.likely_width("alpha") > 1.1 * one.widths()["alpha"]
    assert 0.5 <= np.mean(np.array(stated) <= one.likely_width("alpha")) < 1
    assert design_of(runs(), beyond=1.0).points.max() == pytest.approx(1e6)


def test_a_run_changes_the_widths_as_its_gain_says():
    one = design_of(runs())
    worth, before = one.gains("alpha"), one.widths()["alpha"]
    for run in (int(np.argmax(worth)), 0, len(worth) - 1):
        assert 2 * np.log(before / one.with_run(run).widths()["alpha"]) == pytest.approx(worth[run], abs=1e-6)
    # Range beats seeds: the best single run lies beyond the largest, and no further seed is worth as much.
    best = int(np.argmax(worth))
    assert one.points[best, 0] > SIZES[-1] and worth[best] > 3 * worth[one.counts > 0].max()
    assert one.gains().argmax() == best
    full = one
    for _ in range(2):
        full = full.with_run(0)
    assert full.counts[0] == 4 and full.gains()[0] == 0


def test_a_plan_reaches_its_goal_or_spends_its_budget():
    one = design_of(runs())
    goal = ("alpha", 0.7 * one.widths()["alpha"])
    reached = plan([one], np.inf, goal)
    assert reached.reached and reached.designs[0].likely_width("alpha") <= goal[1]
    assert reached.hours == pytest.approx(sum(r.hours for r in reached.runs)) and len(reached.runs) < 60
    short = plan([one], reached.hours / 3, goal)
    assert short.reached is False and short.hours <= reached.hours / 3
    spent = plan([one, design_of(runs(1))], 0.01)
    assert spent.reached is None and 0 < spent.hours <= 0.01


def test_architectures_add_up_and_planned_runs_borrow_a_law():
    a, b = design_of(runs()), design_of(runs(1))
    (width,) = differences([a, b]).values()
    assert width == pytest.approx(np.hypot(a.widths()["alpha"], b.widths()["alpha"]))
    wide = planned(a, np.repeat(np.geomspace(1e3, 1e7, 12), 3)[:, None], "wide")
    assert wide.name == "wide" and wide.widths()["alpha"] < 0.8 * a.widths()["alpha"]


def test_what_cannot_be_designed_says_why():
    with pytest.raises(Refused, match="dof"):
        design_of(runs(sizes=SIZES[:2], seeds=1))
    rising = runs().assign(logloss=lambda t: 0.4 + 0.01 * np.log10(t.dense_params))
    with pytest.raises(ValueError, match="run a wider range|refused"):
        design_of(rising)


def test_the_command_names_next_runs_and_exits_by_what_came_of_it(tmp_path):
    table = pd.concat([runs(), runs(1, name="b", alpha=0.4)])
    table.to_parquet(tmp_path / "runs.parquet")
    arguments = [str(tmp_path), "--axes", "dense_params", "--goal", "alpha=0.004", "--beyond", "100", "--json"]
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 0, done.output
    told = json.loads(done.output.splitlines()[-1])
    assert set(told["now"]) == {"a", "b"} and list(told["differences"]) == ["a - b"]
    assert told["plan"]["reached"] and all(width["alpha"] <= 0.004 for width in told["plan"]["widths"].values())
    assert told["next"][0]["point"]["dense_params"] > 1e6 and "tables: reaches ± 0.004" in " ".join(done.output.split())
    table.assign(floor=0.4).to_parquet(tmp_path / "runs.parquet")
    excess = CliRunner().invoke(command, [*arguments, "--over", "floor", "--form", "power"])
    assert excess.exit_code == 0, excess.output
    assert "E" in told["now"]["a"] and set(json.loads(excess.output.splitlines()[-1])["now"]["a"]) == {"alpha"}
    table[table.dense_params < 2e3].to_parquet(tmp_path / "runs.parquet")
    refused = CliRunner().invoke(command, arguments)
    assert refused.exit_code == 3 and "a: no design" in refused.output
    wrong = CliRunner().invoke(command, [str(tmp_path), "--goal", "alpha"])
    assert wrong.exit_code == 2 and "such as alpha=.02" in wrong.output


def test_gates_that_a_plan_cannot_pass_are_foreseen():
    planned_runs = pd.DataFrame(
        {"architecture": "a", "shape_id": list("vwxyz"), "seed": 0, "lr_dense": 1e-3, "examples": 1e6,
         "dense_params": np.geomspace(1e4, 8e4, 5), "trunk_id": list("vwxyz")}
    )  # fmt: skip
    told = " | ".join(foreseen(planned_runs, ["dense_params", "examples", "memory_slots"]))
    assert (
        "a along dense_params: exponent and floor will be refused (span: axis x has 5 distinct values over 0.90" in told
    )
    assert "the whole fit will be refused (dof: 5 rows" in told and "bootstrap intervals will be refused" in told
    assert "trend, not law" in told and "seed noise will stay unknown" in told and "examples" not in told
    good = pd.concat([planned_runs.assign(seed=s, lr_dense=r) for s in (0, 1) for r in (1e-3, 2e-3, 4e-3)])
    good = pd.concat([good, good.assign(dense_params=good.dense_params * 100, shape_id=good.shape_id + "2")])
    assert foreseen(good, ["dense_params"]) == []
    # A sweep at one rate a size may note that its rates were found elsewhere, and whether between others.
    one_rate = good[good.lr_dense == 2e-3]
    assert foreseen(one_rate.assign(lr_bracketed=True), ["dense_params"]) == []
    for noted in (one_rate, one_rate.assign(lr_bracketed=False), one_rate.assign(lr_bracketed=None)):
        assert len(told := foreseen(noted, ["dense_params"])) == 1 and "(tuning: " in told[0]


def test_clusters_rates_and_seeds_are_foreseen_where_they_lack():
    examples = np.geomspace(1e4, 1e6, 8)
    trunks = pd.DataFrame(
        [("b", "s", f"t{k}", k % 2, 1e-3, True, x, 1e5) for k in range(6) for x in examples],
        columns=[
            "architecture",
            "shape_id",
            "trunk_id",
            "seed",
            "lr_dense",
            "lr_bracketed",
            "examples",
            "dense_params",
        ],
    )
    # Along examples the trunks are resampled, otherwise the shapes: here a single one.
    assert foreseen(trunks, ["examples", "dense_params"]) == []
    told = foreseen(trunks.drop(columns="trunk_id"), ["examples"])
    assert ["whole fit" in line for line in told] == [True, False] and "(dof: " in told[0] and "(clusters: " in told[1]
    two = trunks.assign(dense_params=np.where(trunks.index < 24, 1e5, 2e5))
    assert ["(span: " in line for line in foreseen(two, ["dense_params"])] == [True, False, False]
    others = pd.concat([trunks, trunks.assign(architecture="a", seed=0)])
    assert foreseen(others, ["examples"]) == ["a: seed noise will stay unknown (one seed a size)"]
    one_seed = pd.concat([trunks, trunks.assign(shape_id="r", seed=0)])
    assert foreseen(one_seed, ["examples"]) == []  # one size with two seeds tells the noise
    for rates, lacking in (([1e-3, 2e-3, 4e-3], False), ([1e-3, 2e-3, 1e-3], True)):
        tuned = one_seed.assign(lr_dense=np.tile(rates, 32))
        part = tuned.assign(lr_bracketed=False) if not lacking else tuned
        assert [("tuning" in line) for line in foreseen(part, ["examples"])] == [True] * lacking
    mixed = one_seed.assign(lr_bracketed=one_seed.shape_id == "s")
    assert len(foreseen(mixed, ["examples"])) == 1  # a single size that is not bracketed is enough


def test_an_axis_with_a_zero_is_foreseen_and_divides_by_nothing():
    planned_runs = pd.DataFrame(
        {"architecture": "a", "shape_id": list("uvwxyz"), "seed": 0, "lr_dense": 1e-3,
         "memory_slots": [0, 64, 256, 1024, 4096, 16384]}
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = foreseen(planned_runs, ["memory_slots"])
    assert "the whole fit will be refused (values: 1 runs have memory_slots 0)" in told[0]
