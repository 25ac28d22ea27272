"""The ladders of interaction backbones: what a fit needs of them, planned without training anything; and whether the
note beside the committed table says what the table holds."""

import numpy as np
import pandas as pd
import pytest
from committed_runs import RUNS, notes

from recscale.sweeps.engine.loading import load
from recscale.sweeps.engine.plan import make_plan

ARCHITECTURES = {
    "mixer_ladder": {"rankmixer", "tokenmixer_large", "dcnv2", "dlrm_mlp"},
    "baseline_ladder": {"wukong", "hiformer", "autoint", "dhen_lite", "mmoe"},
    "variant_ladder": {"rankmixer", "tokenmixer_large", "ug_rankmixer", "ug_tokenmixer_large"},
}


@pytest.mark.parametrize(
    "name", ["mixer_ladder", "baseline_ladder", pytest.param("variant_ladder", marks=pytest.mark.slow)]
)
def test_a_ladder_has_what_a_fit_needs(name):
    loaded = load(name)
    # One seed plans the same shapes as three.
    points = loaded.points()
    plan = make_plan(loaded.config(), [point for point in points if point["seed"] == 0], sweep=name)
    assert not plan.notes
    assert {point["seed"] for point in points} == {0, 1, 2} and len(points) == 3 * len(plan.rows)
    ladders = {}
    for row in plan.rows:
        config, size = row["config"], row["counts"]["dense_params"]
        assert abs(row["target_error"]) < 0.03
        sparse = name == "variant_ladder" and not config["architecture"].startswith("ug_")
        assert (row["counts"]["active_params"] < size) == sparse
        ladders.setdefault(config["architecture"], {}).setdefault(size, []).append(config["training"]["lr"])
    assert set(ladders) == ARCHITECTURES[name]
    trials = {tuple(len(rates) for _, rates in sorted(ladder.items())) for ladder in ladders.values()}
    assert len(trials) == 1 and min(*trials) >= 3  # equal effort for everybody
    for ladder in ladders.values():
        sizes = sorted(ladder)
        # The largest is held out; the others must carry an exponent and a bootstrap.
        assert len(sizes) - 1 >= 6 and np.log10(sizes[-2] / sizes[0]) >= 1.5 and sizes[-1] <= 3e5
        centres = [np.exp(np.mean(np.log(ladder[size]))) for size in sizes]
        assert all(later <= 1.05 * earlier for earlier, later in zip(centres, centres[1:], strict=False))


NOTED = {"rankmixer": "RankMixer", "tokenmixer_large": "TokenMixer-Large", "dlrm_mlp": "DLRM-MLP", "dcnv2": "DCNv2"}


@pytest.fixture(scope="module")
def excess():
    """Architecture -> [sizes, seeds]: excess logloss times 1,000 at the rate that is best in the mean over seeds."""
    table = pd.read_parquet(RUNS / "mixer_ladder.parquet")
    assert len(table) == 300 and (table["status"] == "done").all() and table["lr_bracketed"].all()
    found = {}
    for name, rows in table.groupby("architecture"):
        runs = rows.pivot(index=["params_target", "lr_dense"], columns="seed", values="excess_logloss")
        best = runs.loc[runs.mean(axis=1).groupby("params_target").idxmin()]
        found[name] = 1e3 * best.to_numpy()
    return found


def test_the_note_of_the_mixer_ladder_says_what_its_table_holds(excess):
    text = notes()
    section = text.split("## The mixer ladder")[1].split("\n## ")[0]
    for name, start in NOTED.items():
        (line,) = [line for line in section.splitlines() if line.startswith(f"| {start} ")]
        noted = [float(cell) for cell in line.split("|")[2:-1]]
        np.testing.assert_allclose(noted, excess[name].mean(axis=1), atol=0.0051, err_msg=name)
    spread = {name: runs.std(axis=1, ddof=1) for name, runs in excess.items()}
    assert 0.65 < spread["dcnv2"][0] < 0.75
    rest = np.concatenate([spread["dcnv2"][1:], *(spread[name] for name in NOTED if name != "dcnv2")])
    assert 0.015 < rest.min() and rest.max() < 0.4


def test_the_orderings_the_note_names(excess):
    """By size: 1 where the first has the lower loss in every seed, -1 where the second has, 0 where seeds disagree."""

    def order(first, second):
        below = excess[first] < excess[second]
        return list(below.all(axis=1).astype(int) - (~below).all(axis=1).astype(int))

    assert order("rankmixer", "dlrm_mlp") == [-1, -1, 0, -1, 0, 1, 1]
    assert order("rankmixer", "dcnv2") == [-1, -1, -1, -1, -1, 1, 1]
    assert order("tokenmixer_large", "rankmixer") == [1, 1, 1, 1, 1, 0, 0]
    assert order("dcnv2", "tokenmixer_large") == [1, 1, 1, -1, -1, -1, -1]
    assert order("dcnv2", "dlrm_mlp")[:3] == [1, 1, 1]
    close = excess["dcnv2"][3] - excess["tokenmixer_large"][3]
    assert 0.005 < close.min() and close.max() < 0.265
    falls = {name: excess[name][0] / excess[name][-1] for name in ("rankmixer", "dlrm_mlp")}
    for name, (least, most) in {"rankmixer": (2.25, 2.5), "dlrm_mlp": (1.55, 1.8)}.items():
        assert least < falls[name].min() and falls[name].max() < most
