"""The groups of equal compute of the study over sizes and rows: the note says what the committed runs hold."""

import pandas as pd
import pytest
from committed_runs import RUNS, notes

from recscale.scaling.laws import fit
from recscale.scaling.laws.isoflop.allocation import per_unit_of, splits
from recscale.scaling.laws.isoflop.approaches import approaches
from recscale.scaling.laws.isoflop.frontier import isoflop
from recscale.scaling.records.number_text import amount
from recscale.sweeps import quickstart
from recscale.sweeps.mixers import mixers_by_rows_isoflop, mixers_by_rows_isoflop_largest

WORDS = {"rankmixer": "RankMixer", "dlrm_mlp": "DLRM-MLP"}


@pytest.fixture(scope="module")
def groups():
    table = pd.read_parquet(RUNS / "mixers_by_rows_isoflop.parquet")
    return table.assign(excess=table["logloss"] - table["asymptote"])


@pytest.fixture(scope="module")
def joint():
    """By architecture: the joint law of the excess of all runs that are in no group."""
    return {name: joint_law(name) for name in WORDS}


def joint_law(name):
    tables = [pd.read_parquet(RUNS / f"mixers_by_rows{which}.parquet") for which in ("",)]
    runs = pd.concat(tables, ignore_index=True).query("architecture == @name")
    runs = runs.assign(excess=runs["logloss"] - runs["asymptote"])
    axes = {"N": "dense_params", "D": "examples"}
    return fit(runs, "kappa", axes, "excess", bootstrap=300, fixed={"E": 0.0})


def interval(value, ends):
    if value is None:
        return "refused"
    return f"{value:.2f}" if ends is None else f"{value:.2f} [{ends[0]:.2f}, {ends[1]:.2f}]"


def group_lines(groups, joint):
    """Excess times 1,000 by budget and size, the best size by a parabola, and that of the joint law."""
    sizes = list(quickstart.LADDER)
    headings = ["FLOPs", "", *sizes, "best, parabola", "joint law"]
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for name, words in WORDS.items():
        own = groups[groups["architecture"] == name]
        found = {group.budget: group for group in isoflop(own, target="excess").groups}
        means = 1e3 * own.groupby(["flops_target", "match_id"])["excess"].mean().unstack()
        law = splits(joint[name], list(found), per_unit_of(joint[name])[0])
        for (budget, group), best in zip(found.items(), law, strict=True):
            cells = ["" if pd.isna(value) else f"{value:.2f}" for value in means.reindex(columns=sizes).loc[budget]]
            minimum = "none" if group.parabola is None else amount(group.parabola.size)
            lines.append("| " + " | ".join([amount(budget), words, *cells, minimum, amount(best["N"])]) + " |")
    return lines


def approach_lines(groups, joint):
    """Exponent a of the best size in compute, as the groups say by each approach, and the joint law of the rest."""
    found = {name: approaches(groups[groups["architecture"] == name])[0] for name in WORDS}
    headings = [one.name for one in found["rankmixer"]] + ["joint law of the excess"]
    lines = ["| | " + " | ".join(headings) + " |", "|---" * (1 + len(headings)) + "|"]
    for name, words in WORDS.items():
        cells = [interval(one.a, one.interval) for one in found[name]]
        cells.append(interval(joint[name].derived.get("a"), joint[name].intervals.get("a")))
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    return lines


def test_the_table_holds_the_runs_of_both_files(groups):
    assert (groups["status"] == "done").all() and groups["run_id"].is_unique
    assert (groups["train_flops"] / groups["flops_target"] - 1).abs().max() < 0.01
    for sweep, searched in ((mixers_by_rows_isoflop, True), (mixers_by_rows_isoflop_largest, False)):
        own = groups[groups["sweep"] == sweep.__name__.rsplit(".", 1)[-1]]
        assert len(own) == len(sweep.get_sweep()) and (own["lr_bracketed"] == searched).all()
    per_row = groups.groupby(["architecture", "match_id"])["train_flops_per_row"].unique()
    for name, sizes in mixers_by_rows_isoflop.PER_ROW.items():
        assert {size: [count] for size, count in sizes.items()} == {size: list(per_row[name, size]) for size in sizes}


@pytest.mark.slow
def test_the_note_quotes_the_groups(groups, joint):
    note = notes()
    assert "\n".join(group_lines(groups, joint)) in note
    assert "\n".join(approach_lines(groups, joint)) in note


@pytest.mark.slow
def test_what_the_note_says_of_the_groups(groups, joint):
    found = {name: isoflop(groups[groups["architecture"] == name]) for name in WORDS}
    mixer, mlp = ([group.parabola.size for group in found[name].groups] for name in WORDS)
    assert [f"{a / b:.2f}" for a, b in zip(mixer, mlp, strict=True)] == ["0.82", "0.68", "0.54", "0.52"]
    means = groups.groupby(["architecture", "flops_target", "match_id"])["excess"].mean()
    best = means.groupby(level=[0, 1]).min().unstack(0)
    assert [f"{share:.2f}" for share in best["rankmixer"] / best["dlrm_mlp"]] == ["0.72", "0.68", "0.81", "0.69"]
    for name in WORDS:
        law = splits(joint[name], [group.budget for group in found[name].groups], per_unit_of(joint[name])[0])
        shares = [group.parabola.size / one["N"] for group, one in zip(found[name].groups, law, strict=True)]
        assert 0.81 < min(shares) and max(shares) < 1.02
    assert found["rankmixer"].parabola.interval[1] < found["dlrm_mlp"].parabola.interval[0]
    assert found["rankmixer"].akima.interval[1] > found["dlrm_mlp"].akima.interval[0]


def test_how_far_the_rule_is_from_the_best_rate(groups):
    """Over the searched shapes: the best rate over that by rule, and the excess at the rule's over the lowest."""
    tried = pd.read_parquet(RUNS / "mixers_by_rows_isoflop_rates.parquet")
    assert (tried["status"] == "done").all()
    sizes = groups.groupby(["architecture", "dense_params"])["match_id"].first()
    factors, costs = [], []
    for (name, budget, params), trials in tried.groupby(["architecture", "flops_target", "dense_params"]):
        size, first, last = sizes[name, params], *mixers_by_rows_isoflop.GROUPS[budget][:2]
        points = [one for one in mixers_by_rows_isoflop.group(budget, first, last) if one["architecture"] == name]
        (rule,) = [one["training.lr"] for one in points if one["note.match_id"] == size]
        excess = trials.set_index("lr_dense")["logloss"] - trials["asymptote"].iloc[0]
        factors.append(excess.idxmin() / rule)
        costs.append(excess[rule] / excess.min() - 1)
        assert trials["lr_bracketed"].all()
    away = sorted(round(max(factor, 1 / factor)) for factor in factors)
    assert (len(away), away.count(1), away.count(2), away.count(4)) == (34, 23, 10, 1)
    assert [f"{cost:.2f}" for cost in sorted(costs)[-2:]] == ["0.08", "0.34"]
