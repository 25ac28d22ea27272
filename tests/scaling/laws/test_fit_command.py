"""`recscale fit`, the record of a fit, metric maps, and the fitter's benchmark."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from recscale.scaling import cli
from recscale.scaling.bench import laws as bench
from recscale.scaling.laws import fit, record
from recscale.scaling.laws.fit_command import fit as command
from recscale.scaling.laws.fitting.record import table_hash
from recscale.scaling.laws.forms import metric_maps as metrics
from recscale.scaling.records.plain import plain


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep")
    frame = bench.language_like(8, 8)
    frame["run_id"] = [f"run {i}" for i in range(len(frame))]
    frame["status"] = "done"
    frame.loc[5, "status"] = "diverged"
    frame.to_parquet(path / "runs.parquet")
    frame.to_csv(path / "runs.csv", index=False)
    return path


def run(*arguments):
    return CliRunner().invoke(command, [str(a) for a in arguments])


def test_json_is_one_object_on_the_last_line(folder):
    done = run(
        folder / "runs.csv",
        "--form",
        "C",
        "--axes",
        "N=dense_params,D=examples",
        "--target",
        "logloss",
        "--cluster",
        "shape_id",
        "--bootstrap",
        "50",
        "--json",
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.output.strip().splitlines()[-1])
    assert told["form"] == "chinchilla" and told["params"]["alpha"] == pytest.approx(0.35, abs=0.05)
    assert set(told["params"]) == {"E", "A", "alpha", "B", "beta"}
    low, high = told["intervals"]["alpha"]
    assert low < told["params"]["alpha"] < high and told["refusals"] == []
    assert told["excluded"] == [{"row": 5, "run_id": "run 5", "reason": "status diverged"}]
    assert told["record"]["runs"]["diverged"] == 1
    assert told["fitted_to"].startswith("63 rows, 8 values of dense_params from ")


def test_the_excess_over_a_column_is_fitted(tmp_path):
    sizes = np.geomspace(1e3, 1e5, 8)
    runs = pd.DataFrame(
        {"shape_id": sizes.astype(str), "dense_params": sizes, "best": 0.4, "logloss": 0.4 + sizes**-0.5}
    )
    runs.to_csv(tmp_path / "runs.csv", index=False)
    arguments = (tmp_path / "runs.csv", "--form", "power", "--axes", "dense_params", "--bootstrap", "0", "--over")
    told = json.loads(run(*arguments, "best", "--json").output.splitlines()[-1])
    assert told["target"] == "logloss over best" and told["params"]["alpha"] == pytest.approx(0.5)
    assert "no column 'beast' for an excess" in str(run(*arguments, "beast").exception)


def test_a_fit_says_that_it_takes_every_architecture_and_rate(folder, tmp_path):
    frame = pd.read_parquet(folder / "runs.parquet").assign(architecture="a", lr_dense=1e-3)
    frame["shape_id"] = frame["dense_params"].astype(str)
    other = frame.assign(architecture="b", lr_dense=2e-3, run_id=frame["run_id"] + "b")
    pd.concat([frame, other]).to_parquet(tmp_path / "runs.parquet")
    shown = run(tmp_path, "--axes", "dense_params", "--bootstrap", "0").output
    assert "2 architectures as one, up to 2 learning rates a size, good and bad alike" in " ".join(shown.split())


def test_a_sweep_folder_is_a_table_and_the_record_is_written(folder, tmp_path):
    out = tmp_path / "deep" / "record.json"
    done = run(folder, "--bootstrap", "0", "--out", out)
    assert done.exit_code == 0, done.output
    assert "chinchilla on logloss: E =" in done.output and "excluded run 5: status diverged" in done.output
    record = json.loads(out.read_text())
    assert set(record) == {
        "hypothesis",
        "runs",
        "fit",
        "result",
        "validation",
        "ranking",
        "provenance",
        "checklist",
    }
    assert record["provenance"]["settings"]["bootstrap"] == 0


def test_refusals_are_printed_with_the_reason_and_no_number(folder):
    done = run(
        folder / "runs.csv",
        "--axes",
        "N=dense_params,D=examples",
        "--where",
        "examples < 2e9",
        "--bootstrap",
        "0",
    )
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    assert "beta = refused" in text and "refused by span: axis D has" in text
    refused = run(folder / "runs.csv", "--where", "examples < 8.1e8", "--bootstrap", "0", "--json")
    assert refused.exit_code == 3
    told = json.loads(refused.output.splitlines()[-1])
    assert set(told["params"].values()) == {None} and told["objective"] is None
    assert "single value" in " ".join(gate["reason"] for gate in told["refusals"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "loglos"], "did you mean 'logloss'"),
        (["--axes", "N=params"], "no column 'params' for axis x"),
        (["--axes", "N:dense_params"], "no column 'N:dense_params' for axis x"),
        (["--axes", "N=,D=examples"], "neither a list of columns"),
        (["--axes", "dense_params,examples,train_flops"], "has 2 axes, found 3 columns"),
        (["--form", "kapa"], "did you mean 'kappa'"),
        (["--where", "sizes > 3"], "cannot be evaluated"),
        (["--where", "dense_params > 'a'"], "cannot be evaluated"),
        (["--where", "dense_params"], "is not a condition on the rows"),
        (["--bootstrap", "-5"], "bootstrap is -5"),
        (["--huber-delta", "-1"], "huber_delta is -1.0"),
    ],
)
def test_wrong_options_end_with_one_line_that_names_the_mend(folder, capsys, arguments, words):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["fit", str(folder / "runs.csv"), "--bootstrap", "0", *arguments])
    told = capsys.readouterr().err
    assert stopped.value.code == 1 and words in told and told.startswith("Error: ") and told.count("\n") == 1


def test_exit_codes_say_what_came_of_it(folder, capsys):
    outcomes = {
        0: ["--where", "dense_params > 0"],
        1: ["--target", "loglos"],
        2: ["--bootstrap", "many"],
        3: ["--form", "power_offset", "--axes", "examples", "--where", "examples < 2e9"],
    }
    for code, arguments in outcomes.items():
        with pytest.raises(SystemExit) as stopped:
            cli.main(["fit", str(folder / "runs.csv"), "--bootstrap", "0", *arguments])
        assert stopped.value.code == code, capsys.readouterr().out
    assert "Exit codes: 0 something was fitted" in " ".join(run("--help").output.split())
    assert "3 every number was refused" in " ".join(CliRunner().invoke(cli.cli, ["--help"]).output.split())


def numbers_in(told):
    """Every number of nested plain data."""
    if isinstance(told, dict | list):
        for value in told.values() if isinstance(told, dict) else told:
            yield from numbers_in(value)
    elif isinstance(told, int | float) and not isinstance(told, bool):
        yield float(told)


@pytest.mark.parametrize("refused", ["beta", "E"])
def test_no_refused_parameter_is_in_any_output(folder, tmp_path, refused):
    frame = pd.read_parquet(folder / "runs.parquet")
    if refused == "beta":  # too little data varies
        frame = frame[frame["examples"] < 2e9]
    else:  # there is no floor
        noise = np.exp(3e-3 * np.random.default_rng(4).standard_normal(len(frame)))
        frame["logloss"] = (1.7 * frame["dense_params"] ** -0.3 + 2.3 * frame["examples"] ** -0.2) * noise
    frame.to_parquet(tmp_path / "runs.parquet")
    law = fit(frame, "chinchilla", bootstrap=60)
    assert law.params[refused] is None and law.solution is not None
    hidden = []
    for place, name in enumerate(law.form.names):
        if law.params[name] is None:
            phi = float(law.solution.phi[place])
            hidden += [phi, float(np.exp(phi)), law.solution_params()[name]]
    told = run(tmp_path, "--bootstrap", "60", "--json").output.splitlines()[-1]
    told = json.loads(told)
    # The fit with E = 0 goes by that name: it is another fit, whose exponents come close to the refused ones.
    told["record"]["result"].pop("no_floor_fit")
    seen = np.array(list(numbers_in(told)))
    shown = run(tmp_path, "--bootstrap", "60").output
    for value in hidden:
        assert not np.isclose(seen, value, rtol=1e-4, atol=0).any() and f"{value:.4g}" not in shown


def test_columns_in_order_are_axes_too(folder):
    named = ["--axes", "N=dense_params,D=examples"], ["--axes", "dense_params,examples"]
    first, second = (run(folder / "runs.csv", "--bootstrap", "0", "--json", *axes).output for axes in named)
    assert json.loads(first.splitlines()[-1])["params"] == json.loads(second.splitlines()[-1])["params"]


def test_missing_table_and_list_of_forms(tmp_path):
    with pytest.raises(ValueError, match="no such table: .*none.csv"):
        command.main([str(tmp_path / "none.csv")], standalone_mode=False)
    listed = run("--forms").output
    assert "kappa_sum / KSUM" in listed and "kaplan_offset / K+E" in listed and "limits:" in listed


def test_rolling_scores_reach_the_output(folder):
    done = run(folder, "--form", "power_offset", "--axes", "examples", "--bootstrap", "0", "--rolling", "--json")
    told = json.loads(done.output.strip().splitlines()[-1])
    ranked = {row["form"] for row in told["validation"]["rolling_origin"]["ranking"]}
    assert {"power", "power_offset", "last_value", "log_linear_baseline"} <= ranked
    assert told["record"]["validation"]["ladder_ends"]["largest"]["rows"] > 0
    assert "validation" not in told["record"]["checklist"]["missing"]
    shown = run(folder, "--form", "power_offset", "--axes", "examples", "--bootstrap", "0", "--rolling").output
    assert "Held-out error of ln y, cuts along examples" in shown


def test_record_lists_what_is_missing_and_what_columns_and_notes_supply():
    frame = bench.language_like(8, 8).assign(optimizer="adamw", schedule="wsd", batch_rows=1024, seed=0)
    law = fit(frame, "chinchilla", bootstrap=50, profile=False, notes={"size_counts": "dense, head left out"})
    told = record(law)
    missing = told["checklist"]["missing"]
    assert "runs.lr_rule" in missing and "validation" in missing and not told["checklist"]["complete"]
    assert not {"runs.optimizer", "runs.schedule", "runs.batch", "hypothesis.size_counts"} & set(missing)
    assert told["runs"]["optimizer"] == ["adamw"] and told["hypothesis"]["size_counts"] == "dense, head left out"
    assert told["fit"]["delta_over_sigma"] == pytest.approx(1e-3 / told["fit"]["residual_scale"])
    criteria = told["fit"]["information_criteria"]
    assert criteria["bic"] - criteria["aicc"] == pytest.approx(6 * np.log(64) - 12 * 64 / 57)
    assert told["fit"]["starts"] == 8 and told["fit"]["solver"].startswith("recscale")
    correlation = np.array(told["result"]["correlation"]["matrix"])
    assert correlation.shape == (5, 5) and np.allclose(np.diag(correlation), 1)
    assert json.loads(json.dumps(told)) == told
    assert len(told["result"]["residuals"]) == 64


def test_plain_data_has_no_infinities_and_hashes_follow_the_rows():
    assert plain({"a": np.inf, "b": [np.float64(2), np.nan], "c": (np.int64(3), True), 4: None}) == {
        "a": None,
        "b": [2.0, None],
        "c": [3, True],
        "4": None,
    }
    frame = pd.DataFrame({"x": [1.0, 2.0]})
    assert table_hash(frame) == table_hash(frame.copy()) != table_hash(frame.assign(x=[1.0, 2.5]))


def test_metric_maps():
    auc = np.array([0.5, 0.6, 0.75, 0.9])
    np.testing.assert_allclose(metrics.t_to_auc(metrics.auc_to_t(auc)), auc, atol=1e-12)
    assert metrics.auc_to_t(0.5) == 0.0 and metrics.auc_to_t(0.75) == pytest.approx(0.909872, abs=1e-6)
    assert metrics.absolute_auc(0.01, 0.7, "ratio") == pytest.approx(0.707)
    assert metrics.absolute_auc(0.01, 0.7, "excess_ratio") == pytest.approx(0.702)
    assert metrics.absolute_auc(0.01, 0.7, "points") == pytest.approx(0.71)
    for call in (
        lambda: metrics.auc_to_t(0.4),
        lambda: metrics.absolute_auc(0.01, 0.7, "relative"),
        lambda: metrics.absolute_auc(0.01, 0.4, "ratio"),
    ):
        with pytest.raises(ValueError, match="must"):
            call()


@pytest.mark.slow
def test_benchmark_reports_times_versions_and_recovered_constants():
    told = bench.run(repeats=1)
    assert told["accuracy"]["parameters_relative_error"] < 1e-9 and told["accuracy"]["convergence_share"] == 1.0
    assert {"jax", "numpy", "scipy", "pandas", "python"} <= set(told["versions"])
    assert all(
        entry["seconds"] > 0 and entry["cpu_seconds"] > 0 and entry["target_s"] > 0 for entry in told["times"].values()
    )
    assert told["peak_memory_bytes"] > 0 and json.dumps(told)
