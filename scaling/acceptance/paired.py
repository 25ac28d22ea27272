"""Arms of a study beside one of them, paired by seed: what is saved, its interval, and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from recscale.scaling.records.files import write_atomically
from recscale.scaling.report.orderings import half_width


def paired_differences(
    runs: pd.DataFrame, value: str, baseline: str, about: Sequence[str], *, higher_is_better: bool = False
) -> pd.DataFrame:
    """A row for every method of every case: means over seeds, and what it saves on the baseline.

    Args:
        runs: a row for each seed, `method` and case; lower is better in the column `value`, unless higher is.
        about: columns that tell cases apart.

    Columns of the result besides the means: saved, the mean over seeds of the baseline's `value` less the method's (the
    other way round where higher is better); low, high, its 95 % Student-t interval; verdict: "confirmed" where the
    interval lies above 0, "refuted" where it lies below, otherwise "not resolved"; empty for the baseline.

    Raises:
        ValueError: fewer than two seeds, which have no interval.
    """
    require_pairs(runs["seed"].nunique())
    rows = []
    for case, group in runs.groupby([*about], sort=False):
        wide = group.pivot(index="seed", columns="method", values=value)
        means = group.drop(columns=[*about, "seed"]).groupby("method", sort=False).mean()
        for method, found in means.iterrows():
            saved = (1 - 2 * higher_is_better) * (wide[baseline] - wide[method]).to_numpy(float)
            half = half_width(saved)
            low, high = float(saved.mean()) - half, float(saved.mean()) + half
            verdict = "confirmed" if low > 0 else "refuted" if high < 0 else "not resolved"
            row = dict(zip(about, case, strict=True)) | {"method": method} | found.to_dict()
            row |= {"saved": float(saved.mean()), "low": low, "high": high}
            rows.append(row | {"verdict": "" if method == baseline else verdict})
    return pd.DataFrame(rows)


def require_pairs(seeds: int) -> None:
    """Raises ValueError for fewer than two seeds."""
    if seeds < 2:
        raise ValueError(f"seeds is {seeds}; a paired difference needs 2 or more for its interval")


def study(
    about: Mapping[str, Any],
    runs: pd.DataFrame,
    summarise: Callable[[pd.DataFrame], pd.DataFrame],
    save: str | Path | None,
) -> dict[str, Any]:
    """What a benchmark returns of a study: its sizes and the rows of its summary. save: a file for its runs."""
    if save is not None:
        write_atomically(save, runs.to_parquet(index=False))
    return {**about, "rows": summarise(runs).to_dict("records")}
