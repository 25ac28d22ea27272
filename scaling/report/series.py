"""One architecture along one axis: its rows with their roles, its law, and what the law says of the largest size."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from recscale.scaling.laws import LawFit, record
from recscale.scaling.laws.judgement.gates import EVERYTHING
from recscale.scaling.laws.judgement.rolling import MIN_CALIBRATION, RATIO_EDGES, RATIO_NAMES, Rolling, ladder_ends
from recscale.scaling.laws.published.catalogue import PublishedCurve
from recscale.scaling.records.number_text import value_text
from recscale.scaling.records.plain import plain

FITTED, HELD_OUT = "fitted", "held out"


@dataclass(frozen=True)
class Quantity:
    """One fitted number with its interval, or the reason it is refused.

    role: floor, coefficient (centred), exponent, ... as the form declares it. method: what the interval is.
    """

    name: str
    role: str
    value: float | None
    interval: tuple[float, float] | None
    method: str
    refused: str = ""

    def text(self) -> str:
        """`0.42 [0.31, 0.55]`, or `refused (span)`."""
        if self.value is None:
            return f"refused ({', '.join(self.gates) or 'the fit'})"
        return value_text(self.value, self.interval)

    @property
    def gates(self) -> tuple[str, ...]:
        """Ids of the gates that refused it."""
        return tuple(dict.fromkeys(part.split(":")[0].strip() for part in self.refused.split("; ") if ":" in part))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "value": self.value,
            "interval": list(self.interval) if self.interval else None,
            "method": self.method,
            "refused": self.refused or None,
            "gates": list(self.gates) if self.value is None else [],
        }


@dataclass(frozen=True)
class Prediction:
    """What the law of the smaller sizes says about the held-out largest one.

    x: axis value; measured: mean over `seeds` runs, with their range; predicted and interval: None where refused.
    ratio: x over the largest fitted value. last_value: error of predicting the mean of the largest fitted size instead.
    """

    x: float
    ratio: float
    measured: float
    measured_range: tuple[float, float]
    seeds: int
    predicted: float | None
    interval: tuple[float, float] | None
    refused: str
    last_value: float

    @property
    def error(self) -> float | None:
        """Predicted minus measured."""
        return None if self.predicted is None else self.predicted - self.measured

    @property
    def inside(self) -> bool | None:
        """Whether the measured mean lies in the interval of the law."""
        return None if self.interval is None else bool(self.interval[0] <= self.measured <= self.interval[1])

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        error = self.error
        return {
            "x": self.x,
            "ratio_beyond_fit": self.ratio,
            "measured": self.measured,
            "measured_range": list(self.measured_range),
            "seeds": self.seeds,
            "predicted": self.predicted,
            "interval": list(self.interval) if self.interval else None,
            "refused": self.refused or None,
            "error": error,
            "relative_error": None if error is None else error / self.measured,
            "inside_interval": self.inside,
            "error_of_last_value": self.last_value,
        }


@dataclass(frozen=True)
class Series:
    """One architecture on one view: rows with `role`, the fit, what the slice holds fixed, rolling-origin scores."""

    architecture: str
    frame: pd.DataFrame
    fit: LawFit
    axis: str
    target: str
    slice: str = ""
    rolling: Rolling | None = None

    def rows(self, *roles: str) -> pd.DataFrame:
        """Rows with one of these roles."""
        return self.frame[self.frame["role"].isin(roles)]

    def cells(self, *roles: str) -> pd.DataFrame:
        """One row per axis value: columns x, mean, low, high, seeds."""
        rows = self.rows(*roles)
        grouped = rows.groupby(rows[self.axis].astype(float), sort=True)[self.target]
        cells = grouped.agg(mean="mean", low="min", high="max", seeds="count")
        return cells.rename_axis("x").reset_index()

    @property
    def span(self) -> tuple[float, float] | None:
        """Smallest and largest fitted axis value."""
        x = self.rows(FITTED)[self.axis].to_numpy(float)
        return (float(x.min()), float(x.max())) if len(x) else None

    @property
    def lost(self) -> pd.DataFrame:
        """Runs that diverged or failed."""
        return self.rows("diverged", "failed")

    @property
    def has_curve(self) -> bool:
        """Whether the record grants the curve: every parameter it is made of."""
        return has_curve(self.fit)

    @property
    def is_law(self) -> bool:
        """Whether a title may say law: the curve is granted and every learning rate is bracketed."""
        tuned = [gate.passed for gate in self.fit.gates if gate.id == "tuning"]
        return self.has_curve and bool(tuned) and all(passed is True for passed in tuned)

    @cached_property
    def record(self) -> dict[str, Any]:
        """The fit record, with the validation that was made."""
        validation = {}
        if self.rolling is not None and not self.fit.refused:
            validation = {"rolling_origin": self.rolling.record(), "ladder_ends": plain(ladder_ends(self.fit))}
        return record(self.fit, validation)

    def coverage(self, ratio: float) -> tuple[float, int] | None:
        """(share, count) of held-out points inside nominal 95 % intervals at this extrapolation; None if too few."""
        if self.rolling is None:
            return None
        place = int(np.clip(np.searchsorted(RATIO_EDGES, ratio, side="left") - 1, 0, len(RATIO_NAMES) - 1))
        found = self.rolling.coverage
        own = (found["form"] == self.fit.form.id) & (found["ratio"] == RATIO_NAMES[place]) & (found["level"] == 0.95)
        rows = found[own]
        if rows.empty or int(rows["points"].iloc[0]) < MIN_CALIBRATION:
            return None
        return float(rows["coverage"].iloc[0]), int(rows["points"].iloc[0])

    def quantities(self) -> list[Quantity]:
        """Floor, exponents, then the rest of the form's parameters."""
        order = {"floor": 0, "exponent": 1}
        found = [quantity(self.fit, parameter.name) for parameter in self.fit.form.parameters]
        return sorted(found, key=lambda q: order.get(q.role, 2))

    def floor(self) -> Quantity | None:
        """E, or None for a form without a floor."""
        return quantity(self.fit, self.fit.form.floor) if self.fit.form.floor else None

    def exponent(self) -> Quantity | None:
        """The first exponent of the form."""
        names = [p.name for p in self.fit.form.parameters if p.role == "exponent"]
        return quantity(self.fit, names[0]) if names else None

    def prediction(self) -> Prediction | None:
        """The held-out largest size against the law; None if nothing is held out."""
        held, fitted = self.cells(HELD_OUT), self.cells(FITTED)
        if held.empty or fitted.empty:
            return None
        cell = held.iloc[-1]
        value, interval, refused = predict(self.fit, self.axis, np.array([cell.x]))
        single = None if interval is None or refused else (float(interval[0][0]), float(interval[1][0]))
        return Prediction(
            float(cell.x),
            float(cell.x / fitted["x"].iloc[-1]),
            float(cell["mean"]),
            (float(cell.low), float(cell.high)),
            int(cell.seeds),
            None if value is None or refused else float(value[0]),
            single,
            refused,
            float(fitted["mean"].iloc[-1] - cell["mean"]),
        )


@dataclass(frozen=True)
class View:
    """One axis with every architecture. notes: choices made on the way, for the reader; published: a law of others that
    shows the same quantity.
    """

    axis: str
    target: str
    form: str
    series: tuple[Series, ...]
    notes: tuple[str, ...] = ()
    published: PublishedCurve | None = None


def quantity(fit: LawFit, name: str) -> Quantity:
    """A parameter (coefficients at the centre of the fitted rows) with the interval the gates allow."""
    parameter = fit.form[name]
    centred = parameter.role == "coefficient"
    values, intervals = (fit.centred, fit.centred_intervals) if centred else (fit.params, fit.intervals)
    value, refused = values.get(name), fit.reason(name)
    if value is None:
        return Quantity(name, parameter.role, None, None, "none", refused or "fit: no value")
    interval, method = intervals.get(name), "95 % profile, noise of clusters"
    if interval is None:
        ranges: Any = {} if centred else fit.jackknife.get("range", {})
        interval = ranges.get(name)
        method = "leave-one-cluster-out range" if interval else "no interval"
    ends = (float(interval[0]), float(interval[1])) if interval else None
    return Quantity(name, parameter.role, value, ends, method)


def has_curve(fit: LawFit) -> bool:
    """Whether every parameter of a fit may be read, and so its curve, its band and its predictions."""
    return bool(fit.params) and all(fit.params[name] is not None for name in fit.form.names)


def _roots(fit: LawFit) -> list[str]:
    """Why parameters are refused, each reason once; not those that only belong to a refused one."""
    told = [gate for gate in fit.refusals if {EVERYTHING, *fit.form.names} & set(gate.refuses)]
    return list(dict.fromkeys(f"{gate.id}: {gate.reason}" for gate in told if gate.id != "belongs"))


def predict(fit: LawFit, column: str, x: np.ndarray) -> tuple[Any, tuple | None, str]:
    """(predictions, (low, high), reason for refusal or "") of a one-axis law, None for what is refused.

    Points too far beyond the fitted ones are NaN.
    """
    if not has_curve(fit):
        return None, None, "; ".join(_roots(fit))
    slot = next(name for name, own in fit.rows.columns.items() if own == column)
    with warnings.catch_warnings():
        # Points beyond the range gate come back as NaN and are reported below, not on standard error.
        warnings.simplefilter("ignore", UserWarning)
        if fit.draws is None:
            value, band = fit.predict({slot: x}), None
        else:
            value, low, high = fit.predict({slot: x}, interval=True)
            band = (low, high)
    return value, band, "" if np.isfinite(value).all() else "range: too far beyond the largest fitted value"
