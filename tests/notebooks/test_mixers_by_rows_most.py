"""DCNv2 with 8e6 rows: the note says what the committed runs hold."""

import functools

import numpy as np
import pandas as pd
import pytest
from committed_runs import RUNS, notes

from recscale.scaling.laws import fit
from recscale.scaling.records.number_text import amount
from recscale.sweeps import quickstart
from recscale.sweeps.mixers import mixers_by_rows_most, mixers_by_rows_most_others, mixers_by_rows_most_rates

WORDS = {"rankmixer": "RankMixer", "dlrm_mlp": "DLRM-MLP", "dcnv2": "DCNv2"}
# By rows: the tables that hold the three at the sizes of the quickstart.
TABLES = {
    250_000: ("mixers_by_rows_others",),
    1_250_000: ("quickstart", "mixers_by_size"),
    mixers_by_rows_most.ROWS: ("mixers_by_rows_most", "mixers_by_rows_most_others"),
}


@functools.cache
def own_runs(rows):
    """Runs with so many rows, with the excess over the asymptote and over the floor."""
    table = pd.concat([pd.read_parquet(RUNS / f"{name}.parquet") for name in TABLES[rows]], ignore_index=True)
    arm = table["arm"].fillna(table["architecture"])
    table = table[arm.isin(WORDS) & table["match_id"].isin(quickstart.LADDER)]
    assert table["run_id"].is_unique and (table["status"] == "done").all()
    return table.assign(
        excess=table["logloss"] - table["asymptote"], over_floor=table["logloss"] - table["entropy_floor"]
    )


def dcnv2(rows):
    return own_runs(rows).query("architecture == 'dcnv2'")


def slopes(rows):
    """By architecture: the mean slope of the excess between the first size and the fourth."""
    first, fourth = [*quickstart.LADDER][0], [*quickstart.LADDER][3]
    means = own_runs(rows).groupby(["architecture", "match_id"])[["excess", "dense_params"]].mean()
    found = {}
    for name in WORDS:
        small, large = means.loc[name, first], means.loc[name, fourth]
        ratio = np.log(small / large)
        found[name] = -ratio["excess"] / ratio["dense_params"]
    return found


def slope_lines():
    lines = [
        "| 2.7e3 to 2.4e4 | " + " | ".join(amount(rows) for rows in TABLES) + " |",
        "|---" * (1 + len(TABLES)) + "|",
    ]
    for name, words in WORDS.items():
        lines.append(f"| {words} | " + " | ".join(f"{slopes(rows)[name]:.2f}" for rows in TABLES) + " |")
    return lines


def exponent(runs, over):
    """That of a power law of the size, with its interval, or that it is refused."""
    law = fit(runs, "power", {"N": "dense_params"}, over, bootstrap=200)
    value, ends = law.params["alpha"], law.intervals["alpha"]
    return "refused" if value is None else f"{value:.2f} [{ends[0]:.2f}, {ends[1]:.2f}]"


def lines():
    """By rows: mean excess times 1,000 at every size and its exponent; of the most rows that over the floor too."""
    heads = ["rows", *quickstart.LADDER, "exponent"]
    found = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    cases = [(rows, "excess", amount(rows)) for rows in TABLES]
    cases.append((mixers_by_rows_most.ROWS, "over_floor", f"{amount(mixers_by_rows_most.ROWS)}, over the floor"))
    for rows, over, words in cases:
        runs = dcnv2(rows)
        means = 1e3 * runs.groupby("match_id")[over].mean()
        cells = [f"{means[size]:.3f}" if size in means else "" for size in quickstart.LADDER]
        cells = [words, *cells, exponent(runs, over)]
        found.append(f"| {' | '.join(cells)} |")
    return found


def test_the_rates_follow_the_rule_that_the_sweep_names():
    rates = {rows: dcnv2(rows).groupby("match_id")["lr_dense"].first() for rows in TABLES}
    few, quick, most = rates.values()
    assert (quick[mixers_by_rows_most_others.RATES.keys()] == [*mixers_by_rows_most_others.RATES.values()]).all()
    powers = np.log(few / quick)[[*quickstart.LADDER]] / np.log(1_250_000 / 250_000)
    assert [f"{power:.1f}" for power in powers[:3]] == ["-0.8", "0.9", "1.0"]
    assert powers[3:].between(0.495, 0.525).all()
    planned = {point["note.match_id"]: point["training.lr"] for point in mixers_by_rows_most_others.get_sweep()}
    assert most.to_dict().items() <= planned.items()
    assert not dcnv2(mixers_by_rows_most.ROWS)["lr_bracketed"].any()


def test_what_the_note_says_of_dcnv2_with_most_rows():
    assert "\n".join(slope_lines()) in notes()
    means = own_runs(mixers_by_rows_most.ROWS).groupby(["architecture", "match_id"])[["excess", "over_floor"]].mean()
    excess = means["excess"].unstack()
    first, between, last = [*quickstart.LADDER][:3], [*quickstart.LADDER][3], [*quickstart.LADDER][4:]
    assert (excess.loc["dcnv2", first] > excess.loc[["rankmixer", "dlrm_mlp"], first].max()).all()
    assert excess.loc["rankmixer", between] < excess.loc["dcnv2", between] < excess.loc["dlrm_mlp", between]
    assert (excess.loc["dcnv2", last] < excess.loc[["rankmixer", "dlrm_mlp"], last].min()).all()
    sizes = dcnv2(mixers_by_rows_most.ROWS).groupby("match_id")["dense_params"].first()[[*first, between]]
    steps = -np.diff(np.log(excess.loc["dcnv2", sizes.index])) / np.diff(np.log(sizes))
    assert "DCNv2's three are {:.2f}, {:.2f} and {:.2f}".format(*steps).replace(" 0.", " .") in notes()
    left = means.loc["dcnv2", "over_floor"]
    assert f"{1e3 * left[last[0]]:.3f}" == "0.007" and (left[last[1:]] < 1e-6).all()


def test_the_search_for_rates_says_how_far_the_rule_is_off():
    tried = pd.read_parquet(RUNS / "mixers_by_rows_most_rates.parquet")
    assert len(tried) == len(mixers_by_rows_most_rates.get_sweep()) and (tried["status"] == "done").all()
    planned = {point["note.match_id"]: point["training.lr"] for point in mixers_by_rows_most_others.get_sweep()}
    excess, off = tried["logloss"] - tried["asymptote"], {}
    for size, (_, own) in zip(mixers_by_rows_most_rates.TRIED, tried.groupby("dense_params"), strict=True):
        rates = own["lr_dense"]
        best = rates[excess[own.index].idxmin()]
        ruled = excess[rates[rates == planned[size]].index].iloc[0]
        off[size] = (f"{ruled / excess[own.index].min() - 1:.2f}", bool(rates.min() < best < rates.max()))
    assert off == {"6.4e3": ("0.05", False), "1.1e4": ("0.00", True)}


@pytest.mark.slow
def test_the_note_quotes_the_runs_and_the_exponents():
    assert "\n".join(lines()) in notes()
