"""All sizes of RankMixer and the MLP with 1.25e6 rows: the note says what the committed runs hold."""

import numpy as np
import pandas as pd
import pytest
from committed_runs import RUNS, notes

from recscale.scaling.records.number_text import value_text
from recscale.scaling.report.views import make_views
from recscale.sweeps.mixers import mixers_by_rows_beyond

WORDS = {"rankmixer": "RankMixer", "dlrm_mlp": "DLRM-MLP"}
TABLES = ("quickstart", "mixers_by_size", "mixers_by_rows_beyond")


@pytest.fixture(scope="module")
def runs():
    table = pd.concat([pd.read_parquet(RUNS / f"{name}.parquet") for name in TABLES], ignore_index=True)
    table = table[table["architecture"].isin(WORDS)]
    assert table["run_id"].is_unique and (table["status"] == "done").all() and table["lr_bracketed"].all()
    return table.assign(excess_logloss=table["logloss"] - table["asymptote"])


def alike(runs):
    """Runs of one family of shapes: without the RankMixer of four tokens."""
    return runs[(runs["architecture"] != "rankmixer") | (runs["match_id"] != mixers_by_rows_beyond.SMALLER)]


def excess_lines(runs):
    """Mean excess times 1,000 by size."""
    means = 1e3 * runs.groupby(["architecture", "match_id"])["excess_logloss"].mean().unstack()
    sizes = sorted(means, key=float)
    lines = ["| | " + " | ".join(sizes) + " |", "|---" * (1 + len(sizes)) + "|"]
    for name, words in WORDS.items():
        cells = ["" if np.isnan(value) else f"{value:.2f}" for value in means.loc[name, sizes]]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return lines


def law_lines(runs):
    """The law of the excess at all sizes but the largest, and what it says of that."""
    (view,) = make_views(alike(runs), form="power", axes=["dense_params"], target="excess_logloss")
    by_name = {series.architecture: series for series in view.series}
    lines = ["| | sizes | exponent | largest, predicted x 1,000 | measured | |", "|---|---|---|---|---|---|"]
    for name, words in WORDS.items():
        told, exponent = by_name[name].prediction(), by_name[name].exponent()
        ends = told.interval and tuple(1e3 * end for end in told.interval)
        predicted = "refused" if told.predicted is None else value_text(1e3 * told.predicted, ends)
        place = {True: "inside", False: "outside", None: ""}[told.inside]
        sizes = alike(runs).query("architecture == @name")["match_id"].nunique()
        cells = [words, f"{sizes}", exponent.text(), predicted, f"{1e3 * told.measured:.3f}", place]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def test_the_note_quotes_the_sizes_and_their_law(runs):
    note = notes()
    assert "\n".join(excess_lines(runs)) in note
    assert "\n".join(law_lines(runs)) in note


def test_what_the_note_says_of_the_largest(runs):
    own = alike(runs)
    for name, decades in {"rankmixer": "2.6", "dlrm_mlp": "2.7"}.items():
        sizes = own[own["architecture"] == name]["dense_params"]
        assert f"{np.log10(sizes.max() / sizes.min()):.1f}" == decades
    without = own[own["match_id"] != mixers_by_rows_beyond.LARGEST]
    (view,) = make_views(without, form="power", axes=["dense_params"], target="excess_logloss")
    off = {one.architecture: one.prediction() for one in view.series}
    missed = {name: [told.measured / end - 1 for end in told.interval] for name, told in off.items()}
    assert f"{missed['rankmixer'][0]:.2f}" == "-0.02" and f"{missed['dlrm_mlp'][1]:.2f}" == "0.03"
    means = runs.groupby(["architecture", "match_id"])["excess_logloss"].mean().unstack()
    assert (means.loc["rankmixer"] < means.loc["dlrm_mlp"])[means.loc["dlrm_mlp"].notna()].all()
    last = own[own["architecture"] == "rankmixer"].groupby("dense_params")["excess_logloss"].mean().iloc[-2:]
    assert f"{-np.diff(np.log(last))[0] / np.diff(np.log(last.index))[0]:.2f}" == "0.36"
    small = runs[(runs["architecture"] == "rankmixer") & (runs["match_id"] == mixers_by_rows_beyond.SMALLER)]
    assert (small["dense_params"] == 1365).all()
    # The committed table has every run of the sweep.
    assert (runs["sweep"] == "mixers_by_rows_beyond").sum() == len(mixers_by_rows_beyond.get_sweep())
