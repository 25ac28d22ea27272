"""What the notes say of the studies of domains and content is what their committed tables say."""

from collections import Counter

import pandas as pd
import pytest
from committed_runs import RUNS, notes

from recscale.scaling.report.orderings import judge
from recscale.sweeps.domains import bank_forecasts, lemur_cold_items, mdl_shared_fraction

FILES = (bank_forecasts, lemur_cold_items, mdl_shared_fraction)
STUDIES = {file.__name__.rpartition(".")[2]: file for file in FILES}


@pytest.mark.parametrize("name", STUDIES)
def test_notes_count_the_verdicts_of_the_committed_table(name):
    table = pd.read_parquet(RUNS / f"{name}.parquet")
    assert (table["status"] == "done").all() and (table.groupby("arm")["seed"].nunique() == 5).all()
    counts = Counter(found.outcome for found in judge(table, STUDIES[name].get_report()["orderings"]))
    said = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("held", "failed", "inside noise"))
    text = notes()
    assert f"`{name}`: {said}" in " ".join(text.split())
    assert sum(counts[outcome] for outcome in ("held", "failed", "inside noise")) == counts.total()
