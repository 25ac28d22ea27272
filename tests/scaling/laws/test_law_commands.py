"""Commands on run tables: how far choices matter, what small runs decide, what papers print."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from recscale.scaling.laws import fit
from recscale.scaling.laws.comparing.decisions_command import decisions
from recscale.scaling.laws.judgement.specification_command import specification
from recscale.scaling.laws.published.beside import beside
from recscale.scaling.laws.published.catalogue import OverlayRefused
from recscale.scaling.laws.published.published_command import published


def run(command, *arguments):
    done = CliRunner().invoke(command, [str(a) for a in arguments])
    told = json.loads(done.output.splitlines()[-1]) if "--json" in arguments and done.exit_code in (0, 3) else None
    return done, told


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Two architectures of one floor, at 8 sizes and 2 seeds each."""
    generator, rows = np.random.default_rng(0), []
    for name, scale in (("a", 0.05), ("b", 0.06)):
        for size in np.geomspace(1e4, 1e7, 8):
            for seed in (0, 1):
                y = (0.4 + scale * (size / 1e4) ** -0.5) * np.exp(1e-5 * generator.standard_normal())
                rows.append({"architecture": name, "shape_id": f"{name}{size:.0f}", "seed": seed, "data_seed": 0,
                             "dense_params": size, "train_flops": 6e6 * size, "flops_target": 6e6 * size, "logloss": y,
                             "status": "done"})  # fmt: skip
    path = tmp_path_factory.mktemp("law") / "runs.parquet"
    pd.DataFrame(rows).to_parquet(path)
    return path


def test_specifications_vary_what_is_not_frozen(table, tmp_path):
    own = tmp_path / "a.parquet"
    pd.read_parquet(table)[lambda t: t.architecture == "a"].to_parquet(own)
    done, told = run(specification, own, "--axes", "dense_params", "--freeze", "size", "--freeze", "form", "--json")
    assert done.exit_code == 0, done.output
    assert told["median"] == pytest.approx(0.5, abs=0.01) and told["low_5"] <= told["headline"] <= told["high_95"]
    assert {row["huber_delta"] for row in told["rows"]} >= {1e-3} and {row["form"] for row in told["rows"]} == {
        "power_offset"
    }
    assert "Median by choice" in done.output and "drop smallest size" in done.output
    forecast = ["--quantity", "forecast", "--at", "x=2e7", "--limit", "5", "--json"]
    done, told = run(specification, own, "--axes", "dense_params", *forecast)
    assert told["median"] == pytest.approx(0.4 + 0.05 * 2000**-0.5, rel=1e-3) and told["count"] == 5
    with pytest.raises(ValueError, match="needs `at`"):
        specification.main([str(own), "--axes", "dense_params", "--quantity", "forecast"], standalone_mode=False)


def test_decisions_of_small_runs_are_counted(table):
    done, told = run(decisions, table, "--json")
    assert done.exit_code == 0, done.output
    scales = [entry for entry in told["accuracies"] if entry["kind"] == "scale"]
    assert len(scales) == 7 and all(entry["right"] == entry["pairs"] == 1 for entry in scales)
    assert "ranking at scale" in told["verdict"]


def test_published_laws_are_listed_shown_and_beside_a_fit(tmp_path):
    done, told = run(published, "--json")
    assert {"wukong_task1", "chinchilla_epoch"} <= {law["id"] for law in told["laws"]}
    done, told = run(published, "chinchilla_epoch", "--json")
    assert told["parameters"]["alpha"] == 0.3478 and "equation" in done.output
    done, told = run(published, "--collection", "mixers", "--where", "paper == 'RankMixer'", "--json")
    assert told["cells"] and {cell["paper"] for cell in told["cells"]} == {"RankMixer"}
    n, d = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e8, 1e10, 8), np.geomspace(1e9, 1e11, 8)))
    noise = np.exp(1e-4 * np.random.default_rng(0).standard_normal(len(n)))
    frame = pd.DataFrame({"size": n, "tokens": d, "loss": (1.8 + 482 * n**-0.35 + 2085 * d**-0.366) * noise})
    frame.assign(shape_id=[f"{x:.3g}" for x in n]).to_csv(tmp_path / "lm.csv", index=False)
    axes = ["--axes", "N=size,D=tokens", "--bootstrap", "100", "--json"]
    same = ["--metric", "token_cross_entropy", "--convention", "params", "--convention", "tokens"]
    done, told = run(published, "chinchilla_epoch", tmp_path / "lm.csv", *axes, *same)
    assert done.exit_code == 0, done.output
    alpha, beta = told["beside"]
    assert alpha["name"] == "alpha" and alpha["published_interval"][0] < 0.35 < alpha["published_interval"][1]
    assert "the fitted one inside the published one's interval" in alpha["verdict"]
    known = ["--fix", "E=1.9", "--bound", "alpha=0,1", "--prior", "beta=normal,.366,.01"]
    done, told = run(published, "chinchilla_epoch", tmp_path / "lm.csv", *axes, *same, *known)
    assert "given: E fixed at 1.9" in done.output and "given: beta normal prior 0.366, sd 0.01" in done.output
    assert told["beside"][0]["fitted"] != alpha["fitted"]
    done, told = run(published, "chinchilla_epoch", tmp_path / "lm.csv", *axes)
    assert done.exit_code == 3 and "metric: published" in told["refused"] and "convention" in told["refused"]


def test_a_gain_is_put_beside_nothing(table):
    frame = pd.read_parquet(table)[lambda t: t.architecture == "a"]
    law = fit(frame, "power", {"x": "dense_params"}, bootstrap=0, profile=False)
    with pytest.raises(OverlayRefused, match="never compared"):
        beside("unimixer_unimixer", law, metric="auc_gain", axes=["dense_params"], convention="million_params_assumed")
