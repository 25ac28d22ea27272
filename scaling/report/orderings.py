"""Published orderings as data, and what runs of one's own say of each: held, failed, inside noise, or not to be built.

An ordering names two arms of a sweep (the note `arm` of their runs) or a study. Runs that share stream, seed and size
are pairs; of their differences in logloss, or another figure, a mean and its 95 % Student-t interval are taken.

    held            the interval lies on the published side of 0
    failed          it lies on the other side
    inside noise    it contains 0
    not judged      an arm was best at the lowest or highest rate tried, or lacks runs (missing, diverged, few pairs)
    cannot be built something the ordering needs is not in the package; said in words

One of twenty orderings without any difference leaves its interval by chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import stats

from recscale.scaling.records.number_text import value_text

from .wording import architecture_words

Outcome = Literal["held", "failed", "inside noise", "not judged", "cannot be built"]
MIN_PAIRS = 3
_PAIRED_BY = ("data_seed", "seed", "match_id")


@dataclass(frozen=True)
class Ordering:
    """A published ordering.

    id: short name. better, worse: arms. published: the difference as printed, in `unit`, None where only the direction
    is. source: table, figure or section; at: size and data it was published at. lacking: what it needs that is not in
    the package, empty where it can be run. metric: the column that decides: lower is better, or higher where a minus
    stands before its name.
    """

    id: str
    better: str
    worse: str
    published: float | None
    source: str
    at: str
    unit: str = "AUC points x 100"
    lacking: str = ""
    metric: str = "logloss"


@dataclass(frozen=True)
class Judged:
    """An ordering and what was measured. difference: of its metric, above 0 where it held, and its interval; auc: of
    AUC, better minus worse, in points x 100; None where nothing was. why: of a refusal."""

    ordering: Ordering
    outcome: Outcome
    pairs: int = 0
    difference: float | None = None
    interval: tuple[float, float] | None = None
    auc: float | None = None
    why: str = ""


def against_one(
    prefix: str, best: str, worse: Mapping[str, float | None], source: str, at: str, unit: str = "AUC points x 100"
) -> list[Ordering]:
    """One arm above each of several; worse: published loss of each against `best`, above 0."""
    return [Ordering(f"{prefix}.{arm}", best, arm, gap, source, at, unit) for arm, gap in worse.items()]


def in_a_row(
    prefix: str, levels: Mapping[str, float], source: str, at: str, unit: str = "AUC points x 100"
) -> list[Ordering]:
    """Neighbours of a published ranking, best first; levels: what is printed of each, higher is better."""
    arms = list(levels)
    return [
        Ordering(f"{prefix}.{above}>{below}", above, below, round(levels[above] - levels[below], 6), source, at, unit)
        for above, below in zip(arms, arms[1:], strict=False)
    ]


def as_option(orderings: Iterable[Ordering]) -> list[dict[str, Any]]:
    """What a sweep file's `get_report` gives under `orderings`."""
    return [asdict(ordering) for ordering in orderings]


def judge(table: pd.DataFrame, orderings: Sequence[Mapping[str, Any]]) -> list[Judged]:
    """Every ordering, judged by a run table.

    Raises:
        ValueError: the table has no column `arm`.
    """
    if "arm" not in table.columns:
        raise ValueError("the run table has no column `arm`; orderings are judged on sweeps whose points are noted so")
    return [_judged(table, Ordering(**ordering)) for ordering in orderings]


def _judged(table: pd.DataFrame, ordering: Ordering) -> Judged:
    if ordering.lacking:
        return Judged(ordering, "cannot be built", why=ordering.lacking)
    sides = [table[table["arm"] == arm] for arm in (ordering.better, ordering.worse)]
    why = next((text for rows, arm in zip(sides, (ordering.better, ordering.worse), strict=True)
                if (text := _unfit(rows, arm))), "")  # fmt: skip
    if why:
        return Judged(ordering, "not judged", why=why)
    paired = [name for name in _PAIRED_BY if name in table]
    better, worse = (rows.set_index([name for name in paired if rows[name].notna().all()]) for rows in sides)
    if better.index.names != worse.index.names:
        return Judged(ordering, "not judged", why="one arm has sizes that match, the other none")
    shared = better.index.intersection(worse.index)
    if len(shared) < MIN_PAIRS:
        return Judged(ordering, "not judged", len(shared), why=f"{len(shared)} paired seeds, {MIN_PAIRS} are needed")
    column = ordering.metric.removeprefix("-")
    difference = (worse.loc[shared, column] - better.loc[shared, column]).to_numpy(float)
    if column != ordering.metric:
        difference = -difference
    auc = None
    if "auc" in table:
        auc = 100 * float((better.loc[shared, "auc"] - worse.loc[shared, "auc"]).astype(float).mean())
    mean, half = float(difference.mean()), half_width(difference)
    outcome: Outcome = "inside noise" if abs(mean) <= half else "held" if mean > 0 else "failed"
    return Judged(ordering, outcome, len(shared), mean, (mean - half, mean + half), auc)


def _unfit(rows: pd.DataFrame, arm: str) -> str:
    """Why an arm's runs judge nothing; empty where they do. Runs of a study may have no status, being finished, and
    no rate that was searched."""
    if not len(rows):
        return f"no run of {arm}"
    unfinished = rows[rows["status"] != "done"] if "status" in rows else rows.iloc[:0]
    if len(unfinished):
        return f"{len(unfinished)} of {len(rows)} runs of {arm} {unfinished['status'].iloc[0]}"
    if "lr_bracketed" in rows and not rows["lr_bracketed"].fillna(False).astype(bool).all():
        return f"the rate of {arm} was best at the lowest or highest tried"
    return ""


def half_width(values: np.ndarray) -> float:
    """Of the 95 % Student-t interval of the mean."""
    return float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))


def orderings_table(judged: Sequence[Judged]) -> pd.DataFrame:
    """One row an ordering: what was published, what was measured, what came of it."""
    rows = [
        asdict(found.ordering)
        | {"outcome": found.outcome, "pairs": found.pairs, "difference": found.difference}
        | dict(zip(("low", "high"), found.interval or (None, None), strict=True))
        | {"auc_difference": found.auc, "why": found.why}
        for found in judged
    ]
    return pd.DataFrame(rows)


def lines(judged: Sequence[Judged]) -> list[str]:
    """What a terminal shows: a line an ordering, then how many came out how."""
    wide = max(len(words(found.ordering)) for found in judged)
    counts: dict[str, int] = {}
    shown = []
    for found in judged:
        counts[found.outcome] = counts.get(found.outcome, 0) + 1
        shown.append(f"{words(found.ordering):{wide}}  {_published(found.ordering):>9} | {_ours(found)}")
    head = f"{'ordering':{wide}}  published | ours: x 1,000, 95 % of paired seeds (AUC x 100)"
    tally = ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
    return [head, *shown, f"{len(judged)} published orderings: {tally}"]


def markdown(judged: Sequence[Judged]) -> list[str]:
    """The same as a table for a note."""
    rows = [f"| {words(found.ordering)} | {_published(found.ordering)} | {_ours(found)} |" for found in judged]
    return ["| ordering | published | ours |", "|---|---|---|", *rows]


def words(ordering: Ordering) -> str:
    """An ordering as a line of text."""
    where = "" if ordering.metric == "logloss" else f" ({ordering.metric.removeprefix('-')})"
    return f"{architecture_words(ordering.better)} above {architecture_words(ordering.worse)}{where}"


def _published(ordering: Ordering) -> str:
    return "direction" if ordering.published is None else f"{ordering.published:+.3g}"


def _ours(found: Judged) -> str:
    if found.difference is None or found.interval is None:
        return f"{found.outcome}: {found.why}"
    low, high = found.interval
    auc = "" if found.auc is None else f" ({found.auc:+.2f})"
    return f"{value_text(1e3 * found.difference, (1e3 * low, 1e3 * high))}{auc}, {found.outcome}"
