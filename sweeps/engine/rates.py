"""Rates found before a sweep: its points at the rate that was best on another stream of the log, recorded as such."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from recscale.scaling.records.advice import advised
from recscale.scaling.records.runs import FINISHED, has_records, run_table

from .combinators import RATE_FACTOR, RATE_TRIALS, Sweep, noted, rate_search, rounded_rate, searched_name
from .loading import SweepFile

# The folder of the search inside that of the sweep: a plan, runs and a run table of its own.
FOLDER = "rates"

# Where the best rate is the lowest or highest tried, a better one may lie beyond: the search goes on there, so many
# rates at a time, and so many in all.
_AT_ONCE, _BEYOND = 2, 4


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
    table = _finished(folder)
    if table is None:
        command = advised("recscale", "sweep", loaded.path, "--out", out)
        raise ValueError(
            f"{loaded.path} trains at rates that are not found yet: {command} finds them first, in {folder}"
        )
    return at_found_rates(loaded.points(), table, **options)


def points_beyond(loaded: SweepFile, folder: Path) -> Sweep:
    """Further trials of the finished search in `folder`; empty while it is not finished, and in the end."""
    table, options = _finished(folder), loaded.rates()
    if table is None or options is None:
        return []
    return beyond_edges(rate_search(loaded.points(), **options), table, **options)


def beyond_edges(searched: Sweep, table: pd.DataFrame, *, factor: float = RATE_FACTOR, **_: Any) -> Sweep:
    """Trials beyond the lowest or highest rate of every shape that was best there, at most four a shape in all.

    Args:
        searched: points of `rate_search`, `factor` apart.
        table: run table of these and of what this function gave before.
    """
    firsts: dict[str, Sweep] = {}
    for trial in searched:
        firsts.setdefault(trial["note.match_id"], []).append(trial)
    trials = dict(list(table.groupby("match_id")))
    found: Sweep = []
    for name, first in firsts.items():
        rates, best = _best(trials.get(name, table.iloc[:0]))
        if best is None or rates.min() < best < rates.max() or len(rates) >= len(first) + _BEYOND:
            continue
        step = factor if best == rates.max() else 1 / factor
        found += [first[0] | {"training.lr": rounded_rate(best * step**n)} for n in range(1, _AT_ONCE + 1)]
    return found


def _finished(folder: Path) -> pd.DataFrame | None:
    """The run table of a search; None while a run of it has no result."""
    table = run_table(folder) if has_records(folder) else None
    return table if table is not None and table["status"].isin(FINISHED).all() else None


def _best(tried: pd.DataFrame) -> tuple[pd.Series, float | None]:
    """The rates that a shape was tried at, and which was best: lowest logloss, never diverged. None where all were."""
    loss = tried["logloss"].where(tried["status"] == "done").astype(float)
    rates = tried["lr_dense"].astype(float)
    return rates, float(rates.to_numpy()[loss.fillna(math.inf).argmin()]) if loss.notna().any() else None


def at_found_rates(
    points: Sequence[Mapping[str, Any]], table: pd.DataFrame, *, trials: int = RATE_TRIALS, **_: Any
) -> Sweep:
    """Every point at its best rate, with notes that say how it was found.

    Args:
        table: run table of `rate_search(points)` and what followed it. Best is the lowest logloss; a diverged rate is
            never best.
        trials: of a shape in `rate_search(points)`, alike for all; `table` has more where the search went on.

    Raises:
        ValueError: a point of which no trial was finished, named by its settings.
    """
    tried = dict(list(table.groupby("match_id")))
    found: Sweep = []
    for point in points:
        rates, best = _best(tried.get(searched_name(point), table.iloc[:0]))
        if best is None:
            raise ValueError(f"no rate of the search was trained to its end for {dict(point)}; give it another centre")
        notes = {
            "lr_rule": "best on another stream",
            "lr_trials": len(rates),
            "lr_first_trials": trials,
            "lr_bracketed": bool(rates.min() < best < rates.max()),
        }
        found += noted([dict(point) | {"training.lr": best}], **notes)
    return found
