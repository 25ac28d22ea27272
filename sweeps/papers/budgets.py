"""The orderings of decision-focused budget papers (DFCL, arXiv 2407.13664; Bi-DFCL, 2510.19517), judged by a study.

`recscale bench budgets` trains every arm on randomised trials of which all counterfactuals are known, at three
curvatures of the truth: at 0 the predictor is well specified, and no gain is to be expected. Regret stands for the
expected outcome. Of arXiv 2302.04477, whose estimator is reconstructed ("nes"), no figure is published. What the study
says: `notebooks/runs/domains.md`.

    recscale paper budgets
"""

import dataclasses
from pathlib import Path

import pandas as pd

from recscale.scaling.acceptance import published_orderings
from recscale.scaling.acceptance.budgets import compare_budgets
from recscale.scaling.report.orderings import Ordering


def run_study(table: Path, data: str | None) -> None:
    """Writes the rows of every seed to `table`.

    Raises:
        ValueError: a log is given; the trials are made up.
    """
    if data is not None:
        raise ValueError("budgets are studied on made-up trials; leave --data out")
    compare_budgets(save=table)


def get_orderings(table: pd.DataFrame) -> tuple[pd.DataFrame, list[Ordering]]:
    """Runs of arms, out of what `run_study` wrote, and the orderings that are judged by them."""
    arms = table["method"] + table["curvature"].map(" at curvature {:g}".format)
    found = []
    for ordering in published_orderings.budgets():
        for curvature in [0.0] if ordering.lacking else table["curvature"].unique():
            at = f" at curvature {curvature:g}" * (not ordering.lacking)
            sides = {"better": ordering.better + at, "worse": ordering.worse + at}
            found.append(dataclasses.replace(ordering, id=ordering.id + at, **sides))
    return table.assign(arm=arms), found
