"""Which runs of two architectures belong together: matched shapes, shared data streams, paired seeds.

Two architectures are *matched* when every cluster (shape) of one has exactly one partner with the same
planned budget (or another named column) and, where recorded, the same data seeds. Then one resampled index
serves both, and differences per seed cancel the noise they share.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import special

MATCH_COLUMNS = ("flops_target", "match_id")


@dataclass(frozen=True)
class Matching:
    """Cluster codes [n]; whether a code names one shape of both architectures, and why or why not."""

    codes: np.ndarray
    matched: bool
    column: str | None
    reason: str


@dataclass(frozen=True)
class PairedSize:
    """Differences y_a - y_b over runs that share their seeds at one matched size.

    `interval` is the 95% Student-t interval of the mean difference; None with one pair. sd_difference is the
    noise of the comparison; sd_a and sd_b, the noise of either metric, are beside it.
    """

    size: str
    pairs: int
    mean: float
    sd_difference: float | None
    sd_a: float | None
    sd_b: float | None
    interval: tuple[float, float] | None


def match_clusters(
    frame: pd.DataFrame, is_a: np.ndarray, labels: np.ndarray, axis: str, column: str | None = None
) -> Matching:
    """Pair the clusters of two architectures; rows `frame` [n], `is_a` [n], cluster `labels` [n].

    `column` names what partners have in common; by default the planned budget, else the axis itself. Raises
    KeyError if it is missing.
    """
    if column is not None and column not in frame.columns:
        raise KeyError(f"no column {column!r} to match runs by; columns: {list(frame.columns)}")
    candidates = [column] if column else [c for c in (*MATCH_COLUMNS, axis) if c in frame.columns]
    reasons = []
    for name in candidates:
        keys, reason = _keys(frame, is_a, labels, name)
        if keys is not None:
            reason = _stream_mismatch(frame, is_a, keys)
            if not reason:
                order = {key: code for code, key in enumerate(sorted(set(keys)))}
                codes = np.array([order[key] for key in keys])
                return Matching(codes, True, name, f"every shape has one partner with the same {name}")
        reasons.append(f"{name}: {reason}")
    own = [f"{'a' if first else 'b'} {label}" for first, label in zip(is_a, labels, strict=True)]
    codes, _ = pd.factorize(pd.Series(own), sort=True)
    return Matching(np.asarray(codes), False, None, "; ".join(reasons) or "no column to match by")


def paired_seeds(
    frame: pd.DataFrame, is_a: np.ndarray, matching: Matching, target: str
) -> tuple[list[PairedSize], str]:
    """Per matched size, the differences between runs with the same data seed, and how runs were paired.

    The list is empty, with the reason as text, when shapes are not matched or data seeds are not recorded.
    """
    if not matching.matched:
        return [], f"shapes are not matched ({matching.reason})"
    if "data_seed" not in frame.columns or frame["data_seed"].isna().any():
        return [], "data_seed is not recorded, so no two runs are known to have read the same stream"
    values = pd.DataFrame(
        {
            "code": matching.codes,
            "a": is_a,
            "y": frame[target].to_numpy(float),
            "size": frame[matching.column].to_numpy(),
        }
    )
    for keys in (["data_seed", "seed"], ["data_seed"]):
        if not set(keys) <= set(frame.columns):
            continue
        for key in keys:
            values[key] = frame[key].to_numpy()
        per_run = values.groupby(["code", "size", *keys, "a"])["y"].mean().unstack("a")
        pairs = per_run.dropna() if {True, False} <= set(per_run.columns) else per_run.iloc[:0]
        if len(pairs):
            sizes = [_paired_size(_label(size), group) for (_, size), group in pairs.groupby(level=["code", "size"])]
            return sizes, f"paired by {' and '.join(keys)}"
    return [], "no data seed was run by both architectures"


def most_pairs(sizes: list[PairedSize]) -> int:
    """The largest number of paired seeds at one size; 0 without any."""
    return max((size.pairs for size in sizes), default=0)


def _keys(frame: pd.DataFrame, is_a: np.ndarray, labels: np.ndarray, column: str) -> tuple[list[tuple] | None, str]:
    """A key per row that names its cluster in both architectures, or None with the reason."""
    if frame[column].isna().any():
        return None, "missing in some rows"
    by_side = []
    for side in (is_a, ~is_a):
        values = frame.loc[side, column].groupby(labels[side]).agg(lambda v: tuple(sorted(set(v))))
        if values.duplicated().any():
            return None, "several shapes of one architecture share the same values"
        by_side.append(values)
    if set(by_side[0]) != set(by_side[1]):
        missing = len(set(by_side[0]) ^ set(by_side[1]))
        return None, f"{missing} shapes have no partner with the same value"
    keys = [by_side[0 if first else 1][label] for first, label in zip(is_a, labels, strict=True)]
    return keys, ""


def _stream_mismatch(frame: pd.DataFrame, is_a: np.ndarray, keys: list[tuple]) -> str:
    if "data_seed" not in frame.columns:
        return ""
    seeds = frame.groupby([pd.Series(keys, index=frame.index, dtype=object), pd.Series(is_a, index=frame.index)])[
        "data_seed"
    ].agg(lambda v: tuple(sorted(set(v.dropna()))))
    wide = seeds.unstack()
    different = int((wide[True] != wide[False]).sum())
    return f"data seeds differ at {different} of {len(wide)} sizes" if different else ""


def _label(size: object) -> str:
    return f"{size:.4g}" if isinstance(size, float) else str(size)


def _paired_size(size: str, group: pd.DataFrame) -> PairedSize:
    difference = (group[True] - group[False]).to_numpy()
    count, mean = len(difference), float(difference.mean())
    if count < 2:
        return PairedSize(size, count, mean, None, None, None, None)
    sd = float(difference.std(ddof=1))
    half = float(special.stdtrit(count - 1, 0.975)) * sd / np.sqrt(count)
    return PairedSize(
        size,
        count,
        mean,
        sd,
        float(group[True].std(ddof=1)),
        float(group[False].std(ddof=1)),
        (mean - half, mean + half),
    )
