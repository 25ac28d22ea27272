"""The study of partners of the quickstart's pair: the note says what the committed runs hold."""

from itertools import combinations
from pathlib import Path

import pandas as pd
import pytest

from recscale.scaling.laws import compare
from recscale.scaling.laws.comparing.equal_loss import equal_loss
from recscale.scaling.records.number_text import value_text
from recscale.scaling.report.views import make_views
from recscale.sweeps import quickstart
from recscale.sweeps.mixers import mixers_by_size

RUNS = Path(__file__).parents[2] / "notebooks" / "runs"
WORDS = {"rankmixer": "RankMixer", "dlrm_mlp": "DLRM-MLP", "dcnv2": "DCNv2"}
COMPARED = [size for size, (*_, count) in quickstart.LADDER.items() if count >= 5]


@pytest.fixture(scope="module")
def runs():
    """The quickstart's two and their partners, with the excess over the asymptote."""
    table = pd.concat([pd.read_parquet(RUNS / f"{name}.parquet") for name in ("quickstart", "mixers_by_size")])
    return table.assign(excess_logloss=table["logloss"] - table["asymptote"]).reset_index(drop=True)


@pytest.fixture(scope="module")
def note():
    return (RUNS / "README.md").read_text(encoding="utf-8")


def excess_lines(runs):
    """Mean excess times 1,000 by size."""
    means = 1e3 * runs.groupby(["architecture", "match_id"])["excess_logloss"].mean()
    lines = ["| | " + " | ".join(quickstart.LADDER) + " |", "|---" * (1 + len(quickstart.LADDER)) + "|"]
    for name, words in WORDS.items():
        lines.append(f"| {words} | " + " | ".join(f"{means[name, size]:.2f}" for size in quickstart.LADDER) + " |")
    return lines


def law_lines(runs):
    """The law of the excess at all sizes but the largest, and what it says of that."""
    (view,) = make_views(runs, form="power", axes=["dense_params"], target="excess_logloss")
    by_name = {series.architecture: series for series in view.series}
    lines = ["| | exponent | largest, predicted x 1,000 | measured | |", "|---|---|---|---|---|"]
    for name, words in WORDS.items():
        told = by_name[name].prediction()
        ends = told.interval and tuple(1e3 * end for end in told.interval)
        predicted = "refused" if told.predicted is None else value_text(1e3 * told.predicted, ends)
        place = {True: "inside", False: "outside", None: ""}[told.inside]
        cells = [words, by_name[name].exponent().text(), predicted, f"{1e3 * told.measured:.3f}", place]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def pair_lines(runs):
    """What a pair needs of each other's parameters for the same loss, how far exponents differ, and paired seeds."""
    heads = ["", "share of the parameters of the second, at the worst, middle and best loss of both", "fewer"]
    heads += ["exponent, less that of the second", "scales better", *COMPARED]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for first, second in combinations(WORDS, 2):
        found = compare(runs, first, second, axis="dense_params", target="excess_logloss")
        need = equal_loss(found)
        shares = [
            value_text(each.value, each.interval and (each.interval.low, each.interval.high)) for each in need.shares
        ]
        (power,) = [each for each in found.differences if each.model == "power"]
        exponent = value_text(power.difference, (power.interval.low, power.interval.high))
        paired = {each.size: [1e3 * end for end in (each.mean, *each.interval)] for each in found.paired}
        cells = [f"{WORDS[first]}, {WORDS[second]}", ", ".join(shares), need.answer, exponent, found.answer]
        cells += ["{:.2f} [{:.2f}, {:.2f}]".format(*paired[size]) for size in COMPARED]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def test_the_table_holds_runs_of_the_sweep(runs, note):
    own = runs[runs["sweep"] == "mixers_by_size"]
    planned = [point for point in mixers_by_size.get_sweep() if point["architecture"] == "dcnv2"]
    planned = [point for point in planned if point["note.match_id"] in quickstart.LADDER]
    assert len(own) == len(planned) and (own["status"] == "done").all()
    assert runs["lr_bracketed"].all() and (runs["lr_trials"] == quickstart.TRIALS).all()
    assert runs["run_id"].is_unique and runs["examples"].nunique() == 1
    assert "\n".join(excess_lines(runs)) in note
    largest = runs[runs["match_id"] == COMPARED[-1]].groupby("architecture")["excess_logloss"].mean()
    assert largest["dcnv2"] < largest["rankmixer"] / 5


@pytest.mark.slow
def test_the_note_quotes_laws_and_verdicts(runs, note):
    assert "\n".join(law_lines(runs)) in note
    assert "\n".join(pair_lines(runs)) in note
