"""Compute-optimal allocation by three approaches, and the commands that print it."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from recscale.scaling.laws.isoflop.approaches import approaches
from recscale.scaling.laws.isoflop.isoflop_command import isoflop
from recscale.scaling.laws.isoflop.optimum_command import optimum

ALPHA, BETA = 0.35, 0.37
A = BETA / (ALPHA + BETA)


def surface(n, d):
    return 1.8 + 480 * n**-ALPHA + 2100 * d**-BETA


@pytest.fixture(scope="module")
def table():
    """Nine budgets of eleven sizes two seeds each around the optimum, so that every size is run at many budgets."""
    generator = np.random.default_rng(0)
    rows = []
    grid = np.geomspace(3e7, 3e10, 19)
    for budget in np.geomspace(1e18, 1e21, 9):
        best = (ALPHA * 480 / (BETA * 2100)) ** (1 / (ALPHA + BETA)) * (budget / 6) ** A
        for n in grid[np.argsort(np.abs(np.log(grid / best)))[:11]]:
            for seed in (0, 1):
                d = budget / (6 * n)
                loss = surface(n, d) * np.exp(1e-4 * generator.standard_normal())
                rows.append({"shape_id": f"{n:.3g}", "seed": seed, "dense_params": n, "examples": d, "logloss": loss})
                rows[-1] |= {"train_flops": budget, "flops_target": budget}
    return pd.DataFrame(rows)


def test_three_approaches_agree_with_the_surface(table):
    found, groups, remarks = approaches(table, bootstrap=100)
    assert not remarks and len(groups.groups) == 9
    by_name = {f.name: f for f in found}
    assert list(by_name) == ["1 envelope", "2 isoFLOP, parabola", "2 isoFLOP, Akima", "3 parametric"]
    for name, tolerance in (("1 envelope", 0.05), ("2 isoFLOP, Akima", 0.02), ("3 parametric", 0.02)):
        assert by_name[name].a == pytest.approx(A, abs=tolerance), by_name[name]
        assert by_name[name].b == pytest.approx(1 - by_name[name].a)
        low, high = by_name[name].interval
        assert low < by_name[name].a < high


def test_budgets_whose_best_size_is_at_an_edge_are_no_evidence(table):
    edge = table[table.dense_params < 3e8]
    found, _, _ = approaches(edge, bootstrap=0)
    refused = {f.name: f.refused for f in found}
    assert "fewer than 3 groups" in refused["2 isoFLOP, Akima"] or "sizes, at least 5" in refused["2 isoFLOP, Akima"]
    few, groups, _ = approaches(table.drop(columns="flops_target"), bootstrap=0)
    assert groups is None and "no column 'flops_target'" in few[1].refused
    uneven = table.assign(train_flops=table.train_flops * (1 + 1e8 / table.dense_params))
    found, _, remarks = approaches(uneven, bootstrap=0)
    assert "b does not follow from a" in remarks[0] and all(f.b is None for f in found)


def test_the_command_prints_one_table(table, tmp_path):
    table.to_parquet(tmp_path / "runs.parquet")
    done = CliRunner().invoke(isoflop, [str(tmp_path), "--bootstrap", "50", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output.splitlines()[-1])
    assert [f["name"][0] for f in told["approaches"]] == ["1", "2", "2", "3"] and len(told["isoflop"]["groups"]) == 9
    both = pd.concat([table.assign(architecture="a"), table.assign(architecture="b", logloss=table.logloss * 2)])
    both.to_parquet(tmp_path / "runs.parquet")
    one = CliRunner().invoke(isoflop, [str(tmp_path), "--bootstrap", "50", "--json", "--where", "architecture == 'a'"])
    assert json.loads(one.output.splitlines()[-1]) == told and "mix runs" not in one.output
    mixed = CliRunner().invoke(isoflop, [str(tmp_path), "--bootstrap", "0"])
    assert "mix runs of a, b; keep one of them" in " ".join(mixed.output.split())
    table[table.dense_params < 1e8].drop(columns="flops_target").to_parquet(tmp_path / "runs.parquet")
    refused = CliRunner().invoke(isoflop, [str(tmp_path), "--bootstrap", "0"])
    assert refused.exit_code == 3 and "refused" in refused.output


def test_a_budget_is_split_with_intervals_and_refused_far_out(table, tmp_path):
    table.to_parquet(tmp_path / "runs.parquet")
    done = CliRunner().invoke(
        optimum, [str(tmp_path), "--budget", "3e21", "--budget", "1e27", "--bootstrap", "100", "--json"]
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.output.splitlines()[-1])
    near, far = told["splits"]
    best = (ALPHA * 480 / (BETA * 2100)) ** (1 / (ALPHA + BETA)) * (3e21 / 6) ** A
    assert near["N"] == pytest.approx(best, rel=0.1) and near["N"] * near["D"] * 6 == pytest.approx(3e21)
    assert near["N_interval"][0] < near["N"] < near["N_interval"][1]
    assert far["metric"] is None and "N" not in far and "range" in far["refused"]
    assert told["per_unit"] == pytest.approx(6) and told["exponents"]["a"] + told["exponents"]["b"] == pytest.approx(1)
    table[table.dense_params < 1e8].to_parquet(tmp_path / "runs.parquet")
    refused = CliRunner().invoke(optimum, [str(tmp_path), "--budget", "3e21", "--bootstrap", "0"])
    assert refused.exit_code == 3 and "fit is refused: dof" in refused.output
