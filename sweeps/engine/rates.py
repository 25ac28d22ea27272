"""Rates found before a sweep: its points at the rate that was best on another stream of the log, recorded as such."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from recscale.scaling.records.advice import advised
from recscale.scaling.records.runs import FINISHED, has_records, run_table

from .combinators import Sweep, noted, rate_search, searched_name
from .loading import SweepFile

# The folder of the search inside that of the sweep: a plan, runs and a run table of its own.
FOLDER = "rates"


def points_of(loaded: SweepFile, out: Path, *, search: bool) -> Sweep:
    """The points of a sweep file; of one that searches for rates those of the search, or the sweep's at what it found.

    Args:
        out: the folder of the sweep; its search is in `out/rates`.
        search: whether the search itself is asked for.

    Raises:
        ValueError: the search is not finished, or asked of a file that has none.
    """
    options = loaded.rates()
    if options is None:
        if search:
            raise ValueError(f"{loaded.path} asks for no search for rates: it has no get_rates()")
        return loaded.points()
    if search:
        return rate_search(loaded.points(), **options)
    folder = out / FOLDER
    table = run_table(folder) if has_records(folder) else None
    if table is None or not table["status"].isin(FINISHED).all():
        command = advised("recscale", "sweep", loaded.path, "--out", out)
        raise ValueError(
            f"{loaded.path} trains at rates that are not found yet: {command} finds them first, in {folder}"
        )
    return at_found_rates(loaded.points(), table)


def at_found_rates(points: Sequence[Mapping[str, Any]], table: pd.DataFrame) -> Sweep:
    """Every point at its best rate, with notes that say how it was found.

    Args:
        table: run table of `rate_search(points)`. Best is the lowest logloss; a diverged rate is never best.

    Raises:
        ValueError: a point of which no trial was finished, named by its settings.
    """
    trials = dict(list(table.groupby("match_id")))
    found: Sweep = []
    for point in points:
        tried = trials.get(searched_name(point), table.iloc[:0])
        loss = tried["logloss"].where(tried["status"] == "done").astype(float)
        if not loss.notna().any():
            raise ValueError(f"no rate of the search was trained to its end for {dict(point)}; give it another centre")
        rates = tried["lr_dense"].to_numpy(float)
        best = float(rates[loss.fillna(math.inf).argmin()])
        notes = {
            "lr_rule": "best on another stream",
            "lr_trials": len(tried),
            "lr_bracketed": bool(rates.min() < best < rates.max()),
        }
        found += noted([dict(point) | {"training.lr": best}], **notes)
    return found
