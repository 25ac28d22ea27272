"""Notes of the committed studies of cold items and budgets quote the rows that are committed beside them."""

import pandas as pd
from committed_runs import RUNS, notes

from recscale.scaling.acceptance import budgets, cold_start, cold_start_log
from recscale.scaling.report.orderings import as_option, judge
from recscale.sweeps.papers import promo


def saved(row, digits=2):
    """x 1,000, with its interval; bold where the interval excludes 0."""
    mean, low, high = (f"{1e3 * row[name]:.{digits}f}" for name in ("saved", "low", "high"))
    text = f"{mean} [{low}, {high}]"
    return text if row["low"] <= 0 <= row["high"] else f"**{text}**"


def cold_start_table():
    found = cold_start.summarise(pd.read_parquet(RUNS / "cold_start.parquet")).set_index(["positives", "method"])
    arms = [arm for arm in cold_start.ARMS if arm != "frozen"]
    lines = ["| positives | rows | excess of the base | bound | " + " | ".join(f"`{arm}`" for arm in arms) + " |"]
    lines.append("|---" * (4 + len(arms)) + "|")
    for positives in found.index.unique(0):
        base = found.loc[(positives, "frozen")]
        cells = [positives, f"{base['share_of_rows']:.2f}", f"{1e3 * base['excess']:.2f}", f"{1e3 * base['bound']:.2f}"]
        cells += [saved(found.loc[(positives, arm)]) for arm in arms]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def ranks_table():
    found = cold_start_log.summarise(pd.read_parquet(RUNS / "cold_start_movielens.parquet"))
    arms = [arm for arm in cold_start.ARMS if arm != "frozen"]
    lines = ["| items left out | users | metric | base | " + " | ".join(f"`{arm}`" for arm in arms) + " |"]
    lines.append("|---" * (4 + len(arms)) + "|")
    found = found[found["metric"].isin(["HR@10", "all HR@10"])]
    for (group, metric), rows in found.groupby(["group", "metric"], sort=False):
        rows = rows.set_index("method")
        base = rows.loc["frozen"]
        cells = [group, f"{base['users']:.0f}", metric, f"{1e3 * base['value']:.1f}"]
        lines.append("| " + " | ".join([*cells, *(saved(rows.loc[arm], 1) for arm in arms)]) + " |")
    return lines


def budgets_table():
    found = budgets.summarise(pd.read_parquet(RUNS / "budgets.parquet"))
    methods = [method for method in budgets.METHODS if method != "two_stage"]
    lines = ["| curvature | hidden | regret, two stages | " + " | ".join(f"`{method}`" for method in methods) + " |"]
    lines.append("|---" * (3 + len(methods)) + "|")
    for (curvature, hidden), rows in found.groupby(["curvature", "hidden"], sort=False):
        rows = rows.set_index("method")
        base = rows.loc["two_stage"]
        cells = [f"{curvature:g}", f"{hidden}", f"{1e3 * base['regret']:.2f} ({100 * base['lost_share']:.1f} %)"]
        lines.append("| " + " | ".join([*cells, *(saved(rows.loc[method]) for method in methods)]) + " |")
    return lines


def test_notes_quote_the_committed_rows():
    text = notes()
    assert "\n".join(cold_start_table()) in text
    assert "\n".join(ranks_table()) in text
    assert "\n".join(budgets_table()) in text


MOVIELENS = {"dcnv2": "DCNv2", "dlrm_mlp": "DLRM", "rankmixer": "RankMixer", "din+dlrm_mlp": "DIN in front of DLRM"}


def test_readme_quotes_the_committed_runs_on_movielens():
    """Means over three seeds of the test rows, with the deviation of a seed."""
    runs = pd.read_parquet(RUNS / "movielens.parquet")
    found = runs.groupby("architecture")[["logloss", "auc", "gauc"]].agg(["mean", "std"])
    assert (runs["status"] == "done").all() and (runs.groupby("architecture")["seed"].nunique() == 3).all()
    lines = []
    for name, words in MOVIELENS.items():
        cells = [f"{found.loc[name, (m, 'mean')]:.4f} ± {found.loc[name, (m, 'std')]:.4f}".replace("0.", ".")
                 for m in ("logloss", "auc", "gauc")]  # fmt: skip
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    assert "\n".join(lines) in (RUNS.parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_note_on_movielens_says_what_is_held_and_by_how_much():
    text = " ".join(notes().split())
    runs, orderings = promo.get_orderings(pd.read_parquet(RUNS / "cold_start_movielens.parquet"))
    found = {one.ordering.id: one for one in judge(runs, as_option(orderings)) if one.outcome == "held"}
    assert set(found) == {f"base.{metric}" for metric in cold_start_log.METRICS}
    base = runs[runs["arm"] == "frozen"].mean(numeric_only=True)
    for metric in cold_start_log.METRICS:
        gain = 100 * found[f"base.{metric}"].difference / base[metric]
        assert f"{metric} +{gain:.1f} % (" in text and f"{found[f'base.{metric}'].ordering.published})" in text
