"""Published orderings as sweeps: every arm they name is planned, with rates to search around and paired seeds."""

from pathlib import Path

import pandas as pd
import pytest

from recscale.scaling.report.orderings import judge, lines
from recscale.sweeps import rate_search
from recscale.sweeps.engine.combinators import split_notes
from recscale.sweeps.engine.loading import load, papers


@pytest.mark.parametrize("name", papers())
def test_every_arm_of_an_ordering_is_planned(name):
    loaded = load(name)
    orderings, points = loaded.report()["orderings"], loaded.points()
    seeds = {}
    for point in points:
        seeds.setdefault(split_notes(point)[1]["arm"], set()).add(point["seed"])
    assert all(found == set(range(5)) for found in seeds.values())
    built = [ordering for ordering in orderings if not ordering["lacking"]]
    assert {ordering[side] for ordering in built for side in ("better", "worse")} == set(seeds)
    assert len({ordering["id"] for ordering in orderings}) == len(orderings)
    pairs = [(ordering["better"], ordering["worse"]) for ordering in built]
    assert len(set(pairs)) == len(pairs) and not {pair[::-1] for pair in pairs} & set(pairs)
    trials = loaded.rates()["trials"]
    assert trials == 5 and len(rate_search(points, trials=trials)) == trials * len(seeds)


def test_the_note_of_a_paper_says_what_its_table_holds():
    folder = Path(__file__).parents[3] / "notebooks" / "runs"
    note = " ".join((folder / "README.md").read_text().split())
    judged = judge(pd.read_parquet(folder / "paper_rankmixer.parquet"), load("rankmixer").report()["orderings"])
    assert lines(judged)[-1].replace(" published orderings", "") in note.replace("Of 38 published orderings: ", "38: ")
    named = {
        outcome: {(j.ordering.better, j.ordering.worse) for j in judged if j.outcome == outcome}
        for outcome in ("held", "failed")
    }
    held = ("self-attention", "All-Concat", "All-Share", "HiFormer", "DLRM-MLP", "AutoInt", "MoE")
    assert named["held"] == {("rankmixer", arm) for arm in held}
    assert named["failed"] == {("All-Concat", "All-Share"), ("AutoInt", "MoE"), ("top-k 1/8", "small dense")}
    refused = [j for j in judged if j.outcome == "not judged"]
    assert all("best at the lowest or highest tried" in j.why for j in refused)
