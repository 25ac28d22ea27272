"""Does a difference of exponents survive? Held-out largest size, and refits under other defensible choices.

For a pair of architectures: predict the order at each one's largest value of the axis from the rest; refit
the difference of exponents under other axes, Huber widths, rows and floors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd

from recscale.scaling.laws.fitting.problem import residual_scale

from .pair_models import PairData, PairFit, fit_pair
from .pairing import PairedSize

_OUTLIER_MADS = 5.0
_AGREEMENT = 0.95  # share of specifications whose difference has the sign of the headline
_SIZE_COLUMNS = ("dense_params", "active_params", "train_flops")


def held_out_order(data: PairData, model: str, paired: list[PairedSize], delta: float) -> tuple[bool | None, str]:
    """Fit without each architecture's largest value of the axis and predict the order there."""
    top = np.where(data.is_a, data.x[data.is_a].max(), data.x[~data.is_a].max())
    held = data.x >= top * (1 - 1e-9)
    keep = data.subset(~held)
    if keep.fewest_values < 3:
        return None, "too few values of the axis below the largest"
    fit = fit_pair(keep, model, delta=delta)
    u = np.log(data.x[held]) - keep.centre
    predicted = fit.predict(u, data.is_a[held])
    gaps = []
    for y in (predicted, data.y[held]):
        gaps.append(float(y[data.is_a[held]].mean() - y[~data.is_a[held]].mean()))
    noise = [p.sd_difference / np.sqrt(p.pairs) for p in paired if p.sd_difference]
    close = bool(noise) and abs(gaps[1]) < 2 * float(np.median(noise))
    right = np.sign(gaps[0]) == np.sign(gaps[1])
    detail = f"gap predicted by {model} {gaps[0]:+.3g}, measured {gaps[1]:+.3g}"
    return bool(right or close), detail + (" (within two paired standard errors of 0)" if close else "")


def difference_specifications(frame: pd.DataFrame, data: PairData, headline: float, delta: float) -> dict:
    """The difference of exponents refitted under other axes, Huber widths, rows and floors: count, quantiles,
    agreement.
    """
    values = []
    sigma = _residual_scale(fit_pair(data, "own", delta=delta))
    axes = {"axis": data.x}
    for column in _SIZE_COLUMNS:
        if column in frame.columns and frame[column].notna().all() and (frame[column] > 0).all():
            axes[column] = frame[column].to_numpy(float)
    distinct = {x.tobytes(): x for x in axes.values()}
    for x in distinct.values():
        moved = replace(data, x=x)
        if moved.fewest_values < 4:
            continue
        for rows, width in product(_row_choices(moved, delta), (sigma / 3, delta, 1e6)):
            values += [
                float(fit_pair(rows, model, delta=width).exponent_difference()) for model in ("exponents", "own")
            ]
    low, median, high = np.quantile(values, [0.05, 0.5, 0.95]) if values else [np.nan] * 3
    return {
        "count": len(values), "median": float(median), "low": float(low), "high": float(high),
        "same_sign": float(np.mean(np.sign(values) == np.sign(headline))) if values else float("nan"),
        "rank_of_headline": float(np.mean(np.array(values) <= headline)) if values else float("nan"),
    }  # fmt: skip


def _residual_scale(fit: PairFit) -> float:
    return max(residual_scale(fit.residuals), 1e-9)


def _row_choices(data: PairData, delta: float) -> list[PairData]:
    """All rows; without outliers (|r| > 5 MAD); without each architecture's smallest size."""
    fit = fit_pair(data, "own", delta=delta)
    inliers = np.abs(fit.residuals) <= _OUTLIER_MADS * _residual_scale(fit)
    smallest = np.where(data.is_a, data.x[data.is_a].min(), data.x[~data.is_a].min())
    larger = data.x > smallest * (1 + 1e-9)
    fewer = [data.subset(keep) for keep in (inliers, larger) if not keep.all()]
    return [data, *(choice for choice in fewer if choice.fewest_values >= 4)]


def specification_text(found: Mapping[str, float]) -> str:
    if not found["count"]:
        return "no specification could be fitted"
    return (
        f"{found['count']} specifications: median {found['median']:+.3f}, "
        f"5-95% [{found['low']:+.3f}, {found['high']:+.3f}], "
        f"{found['same_sign']:.0%} share the headline's sign"
    )


def specifications_agree(found: Mapping[str, float], evidence: str) -> bool | None:
    """For a claimed sign: 95% of specifications share it. For no difference there is no sign to keep:
    computed is enough.
    """
    if not found["count"]:
        return None
    return found["same_sign"] >= _AGREEMENT if evidence in ("a steeper", "b steeper") else True
