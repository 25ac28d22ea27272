"""The orderings PROMO published (arXiv 2412.18082; what is built is a reconstruction), judged by a study of cold items.

On an imported log of ratings, MovieLens-100K for one, by the paper's metrics (`recscale bench cold-start-log`), a
linear sequential tower in place of SASRec; without one by the exact excess loss of items with fewer than 10 positives
(`recscale bench cold-start`). What the studies say: `notebooks/runs/domains.md`.

    recscale paper promo [--data LOG]
"""

from pathlib import Path

import pandas as pd

from recscale.scaling.acceptance import published_orderings
from recscale.scaling.acceptance.cold_start import compare_cold_start
from recscale.scaling.acceptance.cold_start_log import compare_on_log
from recscale.scaling.report.orderings import Ordering


def run_study(table: Path, data: str | None) -> None:
    """Writes the rows of every seed to `table`; data: folder of an imported log."""
    if data is None:
        compare_cold_start(save=table)
    else:
        compare_on_log(data, save=table)


def get_orderings(table: pd.DataFrame) -> tuple[pd.DataFrame, list[Ordering]]:
    """Runs of arms, out of what `run_study` wrote, and the orderings that are judged by them."""
    ranks = "group" in table
    kept = table[table["group"] == "all"] if ranks else table[table["positives"] == "<10"]
    return kept.rename(columns={"method": "arm", "bracketed": "lr_bracketed"}), published_orderings.promo(ranks=ranks)
