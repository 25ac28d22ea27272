"""Further figures and the command that draws them: from committed run tables, and from run folders."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from recscale.scaling.records import runs
from recscale.scaling.report import resource_figures, study_figures
from recscale.scaling.report.frame import MARKERS
from recscale.scaling.report.plot_command import plot

COMMITTED = Path(__file__).parents[3] / "notebooks" / "runs"


def call(*arguments):
    result = CliRunner().invoke(plot, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def points(ax):
    return sum(len(line.get_xdata()) for line in ax.get_lines() if line.get_marker() in MARKERS)


def test_usage_stands_beside_what_even_routing_would_show():
    table = pd.read_parquet(COMMITTED / "memory_slots_ladder.parquet")
    figure = study_figures.usage_figure(table, x="memory_slots")
    assert [ax.get_ylabel() for ax in figure.axes] == ["share of slots in use", "divergence from even use (nats)"]
    # Every architecture has its mean at every size, measured and under even routing.
    assert points(figure.axes[0]) == 2 * len(table.groupby(["architecture", "memory_slots"]))
    with pytest.raises(ValueError, match="no run of this table has a memory"):
        study_figures.usage_figure(table.drop(columns="memory_usage"))


def test_recovery_has_a_panel_for_each_kind_of_signal():
    table = pd.read_parquet(COMMITTED / "mixer_ladder.parquet")
    figure = study_figures.recovery_figure(table, x="dense_params")
    assert [ax.get_ylabel() for ax in figure.axes] == ["share of N1 recovered", "share of N2 recovered"]
    with pytest.raises(ValueError, match="only runs on the known-truth log"):
        study_figures.recovery_figure(table[["architecture", "dense_params"]])


def test_the_frontier_holds_the_best_run_of_each_architecture():
    table = pd.read_parquet(COMMITTED / "quickstart.parquet")
    (ax,) = study_figures.frontier_figure(table).axes
    hulls = [line for line in ax.get_lines() if line.get_linestyle() == "-"]
    best = table.groupby("architecture")["logloss"].min()
    assert [hull.get_ydata().min() for hull in hulls] == list(best)
    assert all((np.diff(hull.get_ydata()) < 0).all() for hull in hulls)


def test_isoflop_groups_have_their_minima():
    sizes = np.geomspace(1e4, 1e6, 7)
    rows = [
        {"architecture": "rankmixer", "status": "done", "dense_params": n, "train_flops": c, "flops_target": c,
         "seed": seed, "run_id": f"{c}{n}{seed}",
         "logloss": 0.42 + 0.01 * (1e18 / c) ** 0.3 + 0.004 * np.log(n / (1e5 * (c / 1e18) ** 0.5)) ** 2 + 1e-6 * seed}
        for c in (3e17, 1e18, 3e18) for n in sizes for seed in range(2)
    ]  # fmt: skip
    figure = study_figures.isoflop_figure(pd.DataFrame(rows))
    left, right = figure.axes
    stars = [line for line in right.get_lines() if line.get_marker() == "*"]
    found, wanted = (
        [float(star.get_ydata()[0]) for star in stars],
        [1e5 * (c / 1e18) ** 0.5 for c in (3e17, 1e18, 3e18)],
    )
    assert found == pytest.approx(wanted, rel=0.05)
    assert left.get_xlabel().startswith("dense parameters")


def test_what_quality_costs_is_read_off_measured_cells_and_what_is_absent_is_named(make_runs):
    table = make_runs(diverged=False).assign(device_hours=lambda t: t["dense_params"] / 1e6, energy_kwh=0.0)
    table.loc[table.index[:5], "device_hours"] = np.nan
    figure = resource_figures.resources_figure(table)
    assert [ax.get_xlabel() for ax in figure.axes] == ["training FLOPs (train_flops)", "device hours (device_hours)"]
    words = " ".join(" ".join(text.get_text() for text in figure.texts).split())
    assert f"device hours in 5 of {len(table)} runs, energy (kWh) in {len(table)} of {len(table)} runs" in words
    cells = table.groupby(["architecture", "dense_params"], as_index=False)[["train_flops", "logloss"]].mean()
    own = cells[cells["architecture"] == "rankmixer"]
    kept = resource_figures.pareto_set(own, "train_flops", "logloss")
    beaten = [((own["train_flops"] <= cost) & (own["logloss"] < loss)).any() for cost, loss in
              own[["train_flops", "logloss"]].to_numpy()]  # fmt: skip
    assert set(kept.index) == set(own.index[~np.array(beaten)]) and len(kept) > 3
    assert kept["logloss"].is_monotonic_decreasing

    (ax,) = resource_figures.reach_figure(table, x="train_flops").axes
    level = cells.groupby("architecture")["logloss"].min().max()
    assert [line.get_xdata()[0] for line in ax.get_lines() if line.get_linestyle() == ":"] == [pytest.approx(level)]
    least = resource_figures.least_to_reach(own, "train_flops", "logloss", level)
    assert least == own.loc[own["logloss"] <= level, "train_flops"].min()
    assert resource_figures.least_to_reach(own, "train_flops", "logloss", 0.1) is None
    with pytest.raises(ValueError, match="absent, not zero"):
        resource_figures.resources_figure(table, x="energy_kwh")


@pytest.fixture
def run_folder(tmp_path):
    """A sweep of two runs with metrics; the second reports its experts, [layers, tokens, experts]."""
    for k, name in enumerate(("dcnv2", "rankmixer")):
        folder = tmp_path / "sweep" / "runs" / f"run{k}"
        record = {"run_id": f"run{k}", "status": "done", "config": {"architecture": name}, "work": {"batch_rows": 512}}
        runs.write_record(folder, record)
        for step in range(1, 30):
            row = {"step": step, "examples": 512 * step, "logloss": 0.6 / step**0.1, "rows": 512}
            load = np.full((2, 4, 3), 128.0 * (step > 20)) if k else None
            runs.append_metrics(folder, row | ({} if load is None else {"model_expert_load": load.tolist()}))
    return tmp_path / "sweep"


def test_run_folders_have_learning_curves_and_experts(run_folder):
    (ax,) = study_figures.curves_figure([run_folder]).axes
    assert [len(line.get_xdata()) for line in ax.get_lines()] == [29, 29]
    figure = study_figures.experts_figure([run_folder])
    (image,) = figure.axes[0].get_images()
    assert image.get_array().shape == (2, 12) and image.get_array().max() == 0.25
    with pytest.raises(ValueError, match="reports its experts"):
        study_figures.experts_figure([run_folder / "runs" / "run0"])


def test_the_command_draws_one_figure_of_several_studies(make_runs, run_folder, tmp_path):
    steep = make_runs({"dcnv2": (0.03, 0.6)}, diverged=False)
    steep.to_parquet(tmp_path / "first.parquet")
    (tmp_path / "second").mkdir()
    steep.to_csv(tmp_path / "second" / "other.csv", index=False)
    both = [tmp_path / "first.parquet", tmp_path / "second" / "other.csv"]
    out = call(*both, "--axes", "dense_params", "--bootstrap", 0, "--style", "column", "--save", tmp_path / "both.svg")
    assert f"law  {tmp_path / 'both.svg'}" in out and (tmp_path / "both.svg").read_bytes().count(b"<svg") == 1
    call(run_folder, "--figure", "curves")
    assert (run_folder / "report" / "curves.png").stat().st_size > 1000
    result = CliRunner().invoke(plot, [str(both[0]), "--axes", "dense_params,examples"])
    assert result.exit_code == 2 and "a figure has one axis" in result.output
    table = study_figures.study_table({"a": steep, "b": steep})
    assert set(table["architecture"]) == {"a: dcnv2", "b: dcnv2"} and len(table) == 2 * len(steep)
