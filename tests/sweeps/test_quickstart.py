"""The quickstart: matched ladders, rates from its own search, and whether README says what the committed table says."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from committed_runs import RUNS, notes

from recscale.scaling import cli
from recscale.scaling.laws.planning.foresee import foreseen
from recscale.scaling.report.verdict import judge
from recscale.scaling.report.views import AXES
from recscale.sweeps import quickstart, quickstart_rates
from recscale.sweeps.engine.plan import make_plan
from recscale.sweeps.engine.tables import planned_table

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def plan():
    return make_plan(quickstart.get_config(), quickstart.get_sweep(), sweep="quickstart").rows


@pytest.fixture(scope="module")
def searched():
    return pd.read_parquet(RUNS / "quickstart_rates.parquet")


def test_two_ladders_of_the_same_sizes_on_the_same_rows(plan):
    sizes = {name: {} for name in quickstart.RATES}
    for row in plan:
        sizes[row["config"]["architecture"]][row["notes"]["match_id"]] = row["counts"]["dense_params"]
    mixer, mlp = (list(sizes[name].values()) for name in ("rankmixer", "dlrm_mlp"))
    np.testing.assert_allclose(mixer, mlp, rtol=0.025)
    assert len(mixer) == 7 and np.log10(mixer[-2] / mixer[0]) >= 1.5  # fitted; the largest is held out
    assert np.log10(mlp[-2] / mlp[0]) >= 1.5
    seeds = [count for *_, count in quickstart.LADDER.values()]
    assert sum(count >= 5 for count in seeds) >= 3 and seeds[-1] >= 5
    assert {row["predicted"]["examples"] for row in plan} == {plan[0]["predicted"]["examples"]}


def test_rates_are_the_best_of_the_search_on_rows_of_its_own(plan, searched):
    streams = {row["config"]["data"]["log_seed"] for row in plan}
    assert not streams & set(searched["data_seed"]) and len(quickstart_rates.get_sweep()) == len(searched)
    assert (searched["lr_trials"] == quickstart.TRIALS).all() and (searched["status"] == "done").all()
    best = searched.loc[searched.groupby(["architecture", "dense_params"])["logloss"].idxmin()]
    found = {(row.architecture, row.dense_params): (row.lr_dense, bool(row.lr_bracketed)) for row in best.itertuples()}
    for row in plan:
        key = row["config"]["architecture"], row["counts"]["dense_params"]
        assert found[key] == (row["config"]["training"]["lr"], row["notes"]["lr_bracketed"])


def test_no_gate_is_foreseen_to_close(plan):
    assert foreseen(planned_table(plan), AXES) == []


@pytest.fixture(scope="module")
def verdict():
    return judge(pd.read_parquet(RUNS / "quickstart.parquet"), "rankmixer", "dlrm_mlp")


def test_the_readme_says_what_the_committed_table_says(verdict):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for line in verdict.lines:
        assert line in text, line


def test_the_note_says_what_the_committed_tables_say(verdict):
    section = notes().split("## The quickstart")[1].split("## ")[0]
    note = " ".join(section.split())
    shares = [share.value for share in verdict.share.shares]
    assert f"needs {shares[0]:.2f}, {shares[1]:.2f} and {shares[2]:.2f} of".replace("0.", ".") in note
    assert all(share.interval.high < 1 for share in verdict.share.shares)
    more = judge(pd.read_parquet(RUNS / "quickstart_more_rows.parquet"), "rankmixer", "dlrm_mlp").known[0]
    exponent, forecast = more.exponent(), more.prediction()
    low, high = exponent.interval
    assert f"N^-{exponent.value:.2f} [{low:.2f}, {high:.2f}]".replace("0.", ".") in note
    below = 1 - forecast.measured / forecast.interval[0]
    assert f"({1e4 * forecast.measured:.1f}e-4) lay {100 * below:.0f} % below" in note


@pytest.mark.parametrize("world", [0, *(pytest.param(world, marks=pytest.mark.slow) for world in (1, 2))])
def test_the_note_says_what_came_of_worlds_that_nothing_was_tuned_on(world):
    section = notes().split("## The quickstart")[1].split("## ")[0]
    groups = list(pd.read_parquet(RUNS / "quickstart_worlds.parquet").groupby("preset_changes"))
    assert len(groups) == 3
    name, runs = groups[world]
    found = judge(runs, "rankmixer", "dlrm_mlp")
    assert "\n".join([name, found.lines[0], found.lines[-1]]) in section


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3])
def test_worlds_that_nothing_was_tuned_on(world, tmp_path):
    """About four minutes on two cores each: a granted exponent to .10, a forecast to 12 % that holds, and a verdict."""
    arguments = ["quickstart", "--out", str(tmp_path), "--set", f"data.overrides.world_seed={world}", "--json"]
    done = CliRunner().invoke(cli.cli, ["sweep", *arguments])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output.splitlines()[-1])["report"]
    law = found["architectures"]["rankmixer"]
    low, high = law["exponent"]["interval"]
    assert high - low <= 0.2
    forecast = law["held_out"]
    low, high = forecast["interval"]
    assert forecast["inside_interval"] and high - low <= 0.24 * forecast["predicted"]
    assert any(answer in found["verdict"][-1] for answer in ("? yes", "? no"))
