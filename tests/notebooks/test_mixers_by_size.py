"""The study of partners of the quickstart's pair: the note says what the committed runs hold."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from committed_runs import RUNS, notes

from recscale.scaling.laws import compare
from recscale.scaling.laws.comparing.equal_loss import equal_loss
from recscale.scaling.records.number_text import value_text
from recscale.scaling.report.views import make_views
from recscale.sweeps import quickstart
from recscale.sweeps.mixers import mixers_by_rows_others, mixers_by_size, mixers_by_size_seeds

WORDS = {"rankmixer": "RankMixer", "dlrm_mlp": "DLRM-MLP", "dcnv2": "DCNv2", "tokenmixer_large": "TokenMixer-Large"}
# By rows: the tables that hold runs at the sizes of the quickstart.
TABLES = {1_250_000: ("quickstart", "mixers_by_size"), 250_000: ("mixers_by_rows_others",)}


@pytest.fixture(scope="module")
def runs():
    """By rows: every run with the excess over the asymptote; of arms that are an architecture by another name, none.
    All searches for rates began with as many trials; the quickstart's, of which none went on, do not say so."""
    assert {sweep.get_rates()["trials"] for sweep in (mixers_by_size, mixers_by_rows_others)} == {quickstart.TRIALS}
    found = {}
    for rows, names in TABLES.items():
        table = pd.concat([pd.read_parquet(RUNS / f"{name}.parquet") for name in names])
        table = table[table["architecture"].isin(WORDS) & table["arm"].fillna(table["architecture"]).isin(WORDS)]
        assert table["run_id"].is_unique and (table["status"] == "done").all() and table["lr_bracketed"].all()
        assert (table["lr_first_trials"].fillna(table["lr_trials"]) == quickstart.TRIALS).all()
        table = table.assign(excess_logloss=table["logloss"] - table["asymptote"])
        found[rows] = table.reset_index(drop=True)
    return found


@pytest.fixture(scope="module")
def note():
    return notes()


def excess_lines(runs):
    """Mean excess times 1,000 by size."""
    means = 1e3 * runs.groupby(["architecture", "match_id"])["excess_logloss"].mean().unstack()
    sizes = sorted(means, key=float)
    lines = ["| | " + " | ".join(sizes) + " |", "|---" * (1 + len(sizes)) + "|"]
    for name in (name for name in WORDS if name in means.index):
        cells = ["" if pd.isna(value) else f"{value:.2f}" for value in means.loc[name, sizes]]
        lines.append(f"| {WORDS[name]} | {' | '.join(cells)} |")
    return lines


def law_lines(runs):
    """The law of the excess at all sizes but the largest, and what it says of that."""
    (view,) = make_views(runs, form="power", axes=["dense_params"], target="excess_logloss")
    by_name = {series.architecture: series for series in view.series}
    lines = ["| | exponent | largest, predicted x 1,000 | measured | |", "|---|---|---|---|---|"]
    for name in (name for name in WORDS if name in by_name):
        told, exponent = by_name[name].prediction(), by_name[name].exponent()
        ends = told.interval and tuple(1e3 * end for end in told.interval)
        predicted = "refused" if told.predicted is None else value_text(1e3 * told.predicted, ends)
        place = {True: "inside", False: "outside", None: ""}[told.inside]
        cells = [WORDS[name], exponent.text(), predicted, f"{1e3 * told.measured:.3f}", place]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def pair_lines(runs):
    """What a pair needs of each other's parameters for the same loss, how far exponents differ, and paired seeds."""
    seeds = runs.groupby(["architecture", "match_id"])["seed"].nunique().unstack()
    compared = sorted(seeds.columns[(seeds >= 5).all()], key=float)
    heads = ["", "share of the parameters of the second, at the worst, middle and best loss of both", "fewer"]
    heads += ["exponent, less that of the second", "scales better", *compared]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for first, second in combinations([name for name in WORDS if name in seeds.index], 2):
        both = runs[runs["match_id"].isin(seeds.columns[seeds.loc[[first, second]].notna().all()])]
        found = compare(both, first, second, axis="dense_params", target="excess_logloss")
        need = equal_loss(found)
        shares = [told(each.value, each.interval) for each in need.shares]
        (power,) = [each for each in found.differences if each.model == "power"]
        exponent = told(power.difference, power.interval) if power.admissible else "no power law"
        paired = {each.size: [1e3 * end for end in (each.mean, *(each.interval or ()))] for each in found.paired}
        cells = [f"{WORDS[first]}, {WORDS[second]}", ", ".join(shares), need.answer, exponent, found.answer]
        cells += ["{:.2f} [{:.2f}, {:.2f}]".format(*paired[size]) for size in compared]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def told(value, interval):
    return value_text(value, interval and (interval.low, interval.high))


def test_the_tables_hold_runs_of_the_sweeps(runs, note):
    many, few = runs.values()
    searched = many["lr_trials"].groupby(many["architecture"]).unique()
    assert (searched.drop("tokenmixer_large").map(list) == [[quickstart.TRIALS]] * 3).all()
    searched = many.query("architecture == 'tokenmixer_large'").groupby("match_id")["lr_trials"].unique()
    assert searched.pop("1.1e4") == searched.pop(mixers_by_size.LARGER) == [3]
    assert (searched.map(list) == [[5]] * 6).all()
    for sweep in (mixers_by_size, mixers_by_size_seeds):
        assert (many["sweep"] == sweep.__name__.rsplit(".", 1)[-1]).sum() == len(sweep.get_sweep())
    assert len(few) == sum(point["note.arm"] in WORDS for point in mixers_by_rows_others.get_sweep())
    largest = many[many["match_id"] == "1.15e5"].groupby("architecture")["excess_logloss"].mean()
    assert largest["dcnv2"] < largest["rankmixer"] / 5
    dcnv2 = many[many["architecture"] == "dcnv2"].groupby("dense_params")["excess_logloss"].mean()
    slopes = -np.diff(np.log(dcnv2)) / np.diff(np.log(dcnv2.index))
    assert (slopes[:2] < 0.97).all() and (slopes[2:5] > 1).all()
    own = many[many["architecture"] == "dcnv2"].assign(floor=many["entropy_floor"] - many["asymptote"])
    assert (1e3 * own["floor"]).round(3).unique() == 0.08
    left = 1e3 * (own["excess_logloss"] - own["floor"]).groupby(own["dense_params"]).mean()
    assert "DCNv2 is {}, {} and {} above that".format(*(f"{value:.3f}"[1:] for value in left.iloc[-3:])) in note
    for rows, own in runs.items():
        assert own["examples"].nunique() == 1 and own["examples"].iloc[0] == pytest.approx(rows, rel=1e-3)
        assert "\n".join(excess_lines(own)) in note


@pytest.mark.slow
@pytest.mark.parametrize("rows", TABLES)
def test_the_note_quotes_laws_and_verdicts(runs, note, rows):
    assert "\n".join(law_lines(runs[rows])) in note
    assert "\n".join(pair_lines(runs[rows])) in note


@pytest.mark.slow
def test_tokenmixer_large_is_level_with_the_mlp_with_more_rows(runs, note):
    means = runs[1_250_000].groupby(["match_id", "architecture"])["excess_logloss"].mean().unstack()
    own = means["tokenmixer_large"]
    assert own["1.15e5"] / means["dlrm_mlp"]["1.15e5"] == pytest.approx(1.07, abs=5e-3)
    larger = [own["2.7e5"] / means[name]["2.7e5"] for name in ("dlrm_mlp", "rankmixer")]
    assert [round(100 * share) for share in larger] == [82, 127]
    sizes = runs[1_250_000].query("architecture == 'tokenmixer_large'").groupby("match_id")["dense_params"].first()
    assert np.log10(sizes["8.6e4"] / sizes["2.7e3"]) == pytest.approx(1.495, abs=5e-4)
