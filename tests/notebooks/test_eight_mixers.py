"""The study of eight mixers at equal size: the note says what the committed runs hold, with few rows and with more."""

import numpy as np
import pandas as pd
import pytest
from committed_runs import RUNS, notes

from recscale.scaling.report import truth
from recscale.scaling.report.estimands import perfect_learner
from recscale.scaling.report.orderings import Ordering, as_option, judge
from recscale.sweeps.mixers import mixers_by_rows_others, mixers_by_rows_shapes, mixers_by_size_others

ARMS = {
    "rankmixer": "RankMixer",
    "dlrm_mlp": "DLRM-MLP",
    "tokenmixer_large": "TokenMixer-Large",
    "dcnv2": "DCNv2",
    "wukong": "Wukong",
    "wukong_wide": "Wukong, wide",
    "hiformer": "HiFormer",
    "rankmixer_1_2": "RankMixer 1:2",
    "rankmixer_1_4": "RankMixer 1:4",
}
# By rows: the tables that hold the runs, and the sizes where everybody is compared.
TABLES = {
    250_000: (("mixers_by_rows_others",), mixers_by_rows_others.COMPARED),
    1_250_000: (("quickstart", "mixers_by_size", "mixers_by_size_others"), mixers_by_rows_others.COMPARED),
}


def compared(rows):
    """The runs at the compared sizes, five seeds of every arm, with the excess times 1,000."""
    names, sizes = TABLES[rows]
    table = pd.concat([pd.read_parquet(RUNS / f"{name}.parquet") for name in names], ignore_index=True)
    table = table[table["match_id"].isin(sizes)]
    arm = table["arm"] if "arm" in table else table["architecture"]
    table = table.assign(arm=arm.fillna(table["architecture"]), excess=1e3 * (table["logloss"] - table["asymptote"]))
    assert (table.groupby(["arm", "match_id"])["seed"].agg(["nunique", "size"]) == 5).all(axis=None)
    assert table["lr_bracketed"].all() and table["run_id"].is_unique and (table["status"] == "done").all()
    return table


def means(rows):
    return compared(rows).groupby(["arm", "match_id"])["excess"].mean().unstack()


def spread(rows):
    return compared(rows).groupby(["arm", "match_id"])["excess"].std().unstack()


def matrix_lines(rows):
    """By size: mean excess over the asymptote times 1,000 of five seeds, and who is below whom."""
    table = compared(rows)
    lines = ["| size | | excess | " + " | ".join(ARMS.values()) + " |", "|---" * (3 + len(ARMS)) + "|"]
    words = {"held": "yes", "failed": "no", "inside noise": "open", "not judged": "-"}
    for size in TABLES[rows][1]:
        runs = table[table["match_id"] == size]
        excess = runs.groupby("arm")["excess"].mean()
        for arm in (arm for arm in ARMS if arm in excess):
            rivals = [Ordering("", arm, other, None, "", "") for other in excess.index if other != arm]
            found = {one.ordering.worse: words[one.outcome] for one in judge(runs, as_option(rivals))}
            cells = [found.get(other, "") for other in ARMS]
            lines.append(f"| {size} | {ARMS[arm]} | {excess[arm]:.2f} | " + " | ".join(cells) + " |")
    return lines


@pytest.mark.parametrize("rows", TABLES)
def test_the_note_quotes_the_verdicts(rows):
    assert "\n".join(matrix_lines(rows)) in notes()


def test_what_the_note_says_of_experts_and_of_those_that_hardly_start():
    table = pd.read_parquet(RUNS / "mixers_by_rows_others.parquet")
    assert len(table) == len(mixers_by_rows_others.get_sweep())
    excess, late = means(250_000), spread(250_000).loc[["wukong", "hiformer"]]
    assert [round(value, 1) for value in (late.min().min(), late.max().max())] == [1.7, 5.3]
    assert excess.loc["hiformer"].between(22, 26).all() and excess.loc["wukong"].idxmin() == "1.15e5"
    shares = excess.loc[["rankmixer_1_2", "rankmixer_1_4"], "1.15e5"] / excess.loc["rankmixer", "1.15e5"]
    assert shares.round(2).tolist() == [1.37, 1.49]


def test_hiformer_ends_where_two_or_three_products_are_known():
    runs = compared(250_000)
    inputs = 248
    known = 1e3 * perfect_learner(truth.find(runs).log, "dense_params", (inputs + 2) * np.array([2.0, 3.0]))
    assert known.round(2).tolist() == [26.13, 19.75]
    ends = runs.loc[runs["arm"] == "hiformer", "excess"].to_numpy()
    assert len(ends) == 15 and (np.abs(ends[:, None] - known).min(axis=1) < 0.7).sum() == 12


def test_what_the_note_says_of_other_shapes():
    """Excess times 1,000 at the best rate of every shape; the last one's is the lowest tried."""
    table = pd.read_parquet(RUNS / "mixers_by_rows_shapes.parquet").fillna({"model.norm_place": ""})
    assert len(table) == len(mixers_by_rows_shapes.get_sweep())
    best = table.loc[table.groupby("match_id")["logloss"].idxmin()]
    shape = ["architecture", "model.norm_place", "model.layers", "model.width"]
    told = (1e3 * (best["logloss"] - best["asymptote"])).round(2).set_axis(pd.MultiIndex.from_frame(best[shape]))
    expected = {
        ("wukong", "", 1, 16): 9.80,
        ("wukong", "", 1, 32): 6.76,
        ("wukong", "", 1, 64): 5.51,
        ("hiformer", "post", 1, 13): 20.38,
        ("hiformer", "post", 1, 32): 20.37,
        ("hiformer", "post", 2, 16): 20.83,
        ("hiformer", "pre", 1, 13): 20.30,
        ("hiformer", "pre", 1, 32): 20.26,
        ("tokenmixer_large", "", 1, 24): 7.37,
        ("tokenmixer_large", "", 1, 32): 7.11,
    }
    assert told.to_dict() == expected
    (edge,) = best.loc[~best["lr_bracketed"].astype(bool)].to_dict("records")
    assert (edge["model.norm_place"], edge["model.width"]) == ("pre", 32)


def test_what_the_note_says_of_more_rows():
    few, many = means(250_000), means(1_250_000)
    assert len(pd.read_parquet(RUNS / "mixers_by_size_others.parquet")) == len(mixers_by_size_others.get_sweep())
    experts = ["rankmixer_1_2", "rankmixer_1_4"]
    shares = [(table.loc[experts, "2.4e4"] / table.loc["rankmixer", "2.4e4"]).round(2) for table in (few, many)]
    assert [share.tolist() for share in shares] == [[1.24, 1.26], [1.58, 1.57]]
    shares = [table.loc["rankmixer_1_2", "1.15e5"] / table.loc["rankmixer", "1.15e5"] for table in (many, few)]
    assert [round(share, 2) for share in shares] == [1.68, 1.37]
    late = compared(1_250_000).query("arm == 'hiformer' and match_id == '1.15e5'")
    assert late["excess"].agg(["min", "max"]).round(2).tolist() == [4.39, 5.25] and len(late) == 5
    before = compared(250_000).query("arm == 'hiformer' and match_id == '1.15e5'")
    assert before["lr_dense"].iloc[0] / late["lr_dense"].iloc[0] == 4 and many["1.15e5"].idxmax() == "hiformer"
    wide = many.loc["wukong_wide"].round(2)
    others = many.loc[["rankmixer", "dlrm_mlp", "tokenmixer_large", "dcnv2", "rankmixer_1_2"], "1.15e5"]
    assert (wide["2.4e4"], wide["1.15e5"]) == (1.85, 1.88) and (others < wide["1.15e5"]).all()
    points = {(point["note.arm"], point["note.match_id"]): point for point in mixers_by_size_others.get_sweep()}
    sizes = [points["wukong_wide", size] for size in ("2.4e4", "1.15e5")]
    shapes = [[point[f"model.{name}"] for name in ("fm_tokens", "rank", "hidden")] for point in sizes]
    assert shapes == [[4, 4, 21], [8, 8, 167]]
