"""Forecasts that carry the doubt about the form: bands of every form that rolling origin does not reject, stacked.

Everything above a cut is held out. The forms are ranked on the rows below it by rolling origin; those whose held-out
error is at most twice the best one's, and no larger than that of repeating the last value, are admitted. The forecast
is their mean, weighted by the inverse of their mean-square error; its interval reaches from the lowest to the highest
of their 95 % bands for new runs: it holds the resampled runs, their scatter and the disagreement of the forms.

How often such intervals hold is counted by how far beyond the fitted rows they reach: on the rolling cuts below the
cut, and on the rows above it, which nothing has seen. What the rolling cuts missed by widens those of the forecast.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from recscale.scaling.laws.fitting.fit import fit
from recscale.scaling.laws.fitting.law_fit import LawFit, Refused
from recscale.scaling.laws.forms import registry
from recscale.scaling.laws.forms.form import Form
from recscale.scaling.laws.judgement.rolling import BASELINES, Rolling, rolling_origin
from recscale.scaling.laws.tables.axes import over_floor
from recscale.scaling.laws.tables.conditions import rows_where
from recscale.scaling.laws.tables.validate import require

REJECTED = 2.0  # times the best form's held-out error
RATIOS = (1.0, 2.0, 10.0, 100.0)


@dataclass(frozen=True)
class Forecast:
    """Predictions of a table's rows above a cut, and of points nobody has run.

    weights: admitted form -> weight; rejected: form -> why not. held_out, points: axis columns, ratio beyond the cut,
    predicted, low, high (missing where refused), wide_low and wide_high (the same widened as far as the rolling cuts
    tell; missing where they do not), and for held-out rows the metric and whether it lies inside low and high.
    calibration: per ratio, rows and share inside on the rolling cuts and above the cut, and the factor of the widening.
    """

    axis: str
    cut: float
    target: str
    weights: dict[str, float]
    rejected: dict[str, str]
    held_out: pd.DataFrame
    points: pd.DataFrame
    calibration: pd.DataFrame
    laws: dict[str, LawFit] = field(repr=False)

    @property
    def granted(self) -> bool:
        """Whether any prediction may be read."""
        return bool(self.held_out["predicted"].notna().any() or self.points["predicted"].notna().any())


def forecast(
    table: pd.DataFrame,
    forms: Sequence[str],
    axes: Mapping[str, str],
    target: str = "logloss",
    *,
    axis: str | None = None,
    cut: float | None = None,
    at: Sequence[Mapping[str, float]] = (),
    cluster: str | None = None,
    where: str | None = None,
    over: str | None = None,
    draws: int = 200,
    seed: int = 0,
) -> Forecast:
    """Hold out the rows whose `axis` (the first of `axes`) lies above `cut` (by default the largest third of its
    logarithm), and predict them and the points `at` (slot -> value).

    over: column of known floors. What is fitted and predicted is then the target's excess over it (`over_floor`), by
    forms whose own floor is held at 0.

    Raises Refused where no form can be ranked below the cut, ValueError for an unknown column or a cut without rows on
    either side.
    """
    axis = axis or next(iter(axes.values()))
    require(table, axis, "the axis of the cut")
    table = table if where is None else table[rows_where(table, where)]
    candidates: list[str | Form] = list(forms)
    if over is not None:
        table, target = over_floor(table, target, over)
        candidates = [_without_floor(registry.get(name, tuple(axes))) for name in forms]
    values = pd.to_numeric(table[axis], errors="coerce")
    if cut is None:
        cut = float(np.exp(np.log(values.min()) + 2 / 3 * np.log(values.max() / values.min())))
    below, above = table[values <= cut], table[values > cut]
    if below.empty or (above.empty and not at):
        raise ValueError(f"the cut {cut:g} leaves {len(below)} rows of {axis} below it and {len(above)} above")
    options: dict[str, Any] = {"cluster": cluster, "seed": seed}
    rolling = rolling_origin(below, candidates, axes, target, axis=axis, draws=draws, **options)
    weights, rejected = _admitted(rolling)
    laws = {
        name: fit(
            below, rolling.fits[name].form, rolling.fits[name].rows.columns, target, draws, profile=False, **options
        )
        for name in weights
    }
    seen = above[above["status"] == "done"] if "status" in above else above
    columns = list(dict.fromkeys([*axes.values(), axis]))
    held_out = _predicted(laws, weights, seen[columns].reset_index(drop=True), axis, cut)
    held_out = held_out.assign(actual=seen[target].to_numpy(float))
    inside = (held_out["actual"] >= held_out["low"]) & (held_out["actual"] <= held_out["high"])
    held_out = held_out.assign(inside=inside.where(held_out["low"].notna()))
    asked = pd.DataFrame([{axes[slot] if slot in axes else slot: x for slot, x in point.items()} for point in at])
    points = _predicted(laws, weights, asked, axis, cut)
    calibration = calibrate(_stacked(rolling, list(weights)), held_out)
    positive = bool((below[target] > 0).all())
    held_out, points = (widen(part, calibration, positive) for part in (held_out, points))
    return Forecast(axis, cut, target, weights, rejected, held_out, points, calibration, laws)


def _without_floor(form: Form) -> Form:
    return form if form.floor is None else form.holding({form.floor: 0.0})


def _admitted(rolling: Rolling) -> tuple[dict[str, float], dict[str, str]]:
    """(form -> weight, form -> why it is rejected) by held-out error."""
    ranking = rolling.ranking
    errors = {str(name): float(error) for name, error in ranking["mean_rms"].to_dict().items()}
    own = {name: error for name, error in errors.items() if name not in BASELINES}
    if not own:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in rolling.refused.items())
        raise Refused(f"no form can be ranked on the rows below the cut ({reasons or 'too few rows'})")
    best = min(own.values())
    limit = min(REJECTED * best, errors.get(BASELINES[0], np.inf))
    rejected = dict(rolling.refused)
    for name, error in own.items():
        if error > limit:
            rejected[name] = f"held-out error {error:.2g}, the best form has {best:.2g}, limit {limit:.2g}"
    kept = {name: float(ranking["weight"].to_dict()[name]) for name, error in own.items() if error <= limit}
    if not kept:
        raise Refused(
            f"no form predicts larger runs better than repeating the last value: {best:.2g} against {limit:.2g}"
        )
    return {name: weight / sum(kept.values()) for name, weight in kept.items()}, rejected


def _predicted(
    laws: Mapping[str, LawFit], weights: Mapping[str, float], points: pd.DataFrame, axis: str, cut: float
) -> pd.DataFrame:
    """The points with ratio beyond the cut, weighted mean and stacked interval; missing where a form refuses."""
    if points.empty:
        return points.assign(ratio=[], predicted=[], low=[], high=[])
    means, lows, highs = [], [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # points too far out come back as NaN
        for name, law in laws.items():
            mean, low, high = law.predict(points, interval=True, noise=True)
            means.append(weights[name] * np.asarray(mean, float))
            lows.append(np.asarray(low, float))
            highs.append(np.asarray(high, float))
    ratio = points[axis].to_numpy(float) / cut if axis in points else np.full(len(points), np.nan)
    return points.assign(
        ratio=ratio, predicted=np.sum(means, axis=0), low=np.min(lows, axis=0), high=np.max(highs, axis=0)
    )


def _stacked(rolling: Rolling, admitted: list[str]) -> pd.DataFrame:
    """Held-out points of the rolling cuts: actual, ends of the stacked interval, ratio; logarithms where positive."""
    own = rolling.points[rolling.points["form"].isin(admitted)].dropna(subset=["low_95"])
    same_point = own.groupby(["cut", "run_id", "ratio", "actual"], as_index=False)
    return same_point.agg(low=("low_95", "min"), high=("high_95", "max"))


def _between(rows: pd.DataFrame, low: float, high: float) -> pd.DataFrame:
    return rows[(rows["ratio"] > low) & (rows["ratio"] <= high)]


def calibrate(stacked: pd.DataFrame, held_out: pd.DataFrame) -> pd.DataFrame:
    """Per ratio beyond the fitted rows: rows and share inside, and what the rolling cuts would widen intervals by."""
    inside = stacked["actual"].between(stacked["low"], stacked["high"])
    rows = []
    for low, high in zip(RATIOS, RATIOS[1:], strict=False):
        past = _between(stacked, low, high)
        new = _between(held_out, low, high)["inside"].dropna().astype(bool)
        shares = [float(part.mean()) if len(part) else None for part in (inside[past.index], new)]
        rows.append((f"up to x{high:g}", len(past), shares[0], len(new), shares[1], _widening(past)))
    columns = ["ratio", "rolling_rows", "rolling_inside", "held_out_rows", "held_out_inside", "widening"]
    return pd.DataFrame(rows, columns=columns)


def _widening(past: pd.DataFrame) -> float | None:
    """Factor on half-widths with which 95 % of past errors, and of one more, would have been inside; at least 1."""
    place = int(np.ceil((len(past) + 1) * 0.95))
    if place > len(past):
        return None
    half = np.maximum((past["high"] - past["low"]) / 2, 1e-300)
    score = np.sort((past["actual"] - (past["low"] + past["high"]) / 2).abs() / half)
    return max(float(score[place - 1]), 1.0)


def widen(points: pd.DataFrame, calibration: pd.DataFrame, positive: bool) -> pd.DataFrame:
    """The points with `wide_low` and `wide_high`, missing where too few errors were seen as far out."""
    there, back = (np.log, np.exp) if positive else (np.asarray, np.asarray)
    place = np.searchsorted(RATIOS, points["ratio"].to_numpy(float), side="left") - 1
    factors = [*calibration["widening"].astype(float), np.nan]
    factor = np.array([factors[at] if 0 <= at < len(calibration) else np.nan for at in place])
    low, high = there(points["low"].to_numpy(float)), there(points["high"].to_numpy(float))
    middle, half = (low + high) / 2, (high - low) / 2 * factor
    return points.assign(wide_low=back(middle - half), wide_high=back(middle + half))
