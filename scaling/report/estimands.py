"""What an exponent fitted on the known-truth log is an estimate of: three numbers side by side, each with its estimand.

    E free          what one would conclude on a real log, where nobody knows the floor
    E known         fixed at the log's exact asymptote: the exponent of this architecture
    exact slope     of the log's own closed form over the fitted values, at the runs' amount of data: what a perfect
                    learner limited by this resource alone would show

Only the last is a truth: the log fixes what a term, an event or a pair is worth, and no architecture has to use them as
a perfect learner does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float64

from recscale.scaling.data.known_truth.batches import make_schema
from recscale.scaling.data.known_truth.expectations import gaussian_constants
from recscale.scaling.data.known_truth.laws import has_exact, predict
from recscale.scaling.data.known_truth.world import build_world
from recscale.scaling.data.metrics import describe
from recscale.scaling.laws.forms.registry import ONE_AXIS

from .series import FITTED, Quantity, Series, View
from .truth import Log, Truth
from .views import fitted_series
from .wording import axis_words

FORM, TARGET = ONE_AXIS, "logloss"
FREE = "what one would conclude on a real log"
KNOWN = "the exponent of this architecture"
# Of the options of a report's fits, what these say of the parameters themselves.
_SAID = ("fixed", "bounds", "priors", "bootstrap")


@dataclass(frozen=True)
class ExactSlope:
    """-d ln excess / d ln x of the log's closed form: over the whole fitted range, and at its smallest and largest
    value. examples: rows the perfect learner has seen, inf where it has every row."""

    slope: float
    first: float
    last: float
    examples: float


@dataclass(frozen=True)
class Estimands:
    """One architecture along one axis. floor: the exact asymptote of the axis. known, exact: None where there is none,
    with the reason in `without`."""

    architecture: str
    axis: str
    floor: float
    free: Series
    known: Series | None
    exact: ExactSlope | None
    without: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the three with their words, parameters that were given named as such."""
        told = {"E_free": {"estimand": FREE, **_numbers(self.free)}}
        if self.known is not None:
            given = {"E": {"value": self.floor, "given": "the log's exact asymptote"}}
            told["E_known"] = {"estimand": KNOWN, **_numbers(self.known), **given}
        if self.exact is not None:
            about = {"slope": self.exact.slope, "at_smallest": self.exact.first, "at_largest": self.exact.last}
            rows = None if np.isinf(self.exact.examples) else self.exact.examples
            told["exact_slope"] = {"estimand": perfect(self.axis), "true": about, "examples": rows}
        return {**told, "without": self.without or None, "text": self.rows}

    @property
    def rows(self) -> list[tuple[str, str, str, str]]:
        """(what, floor, exponent, estimand) in words, for a terminal or a page."""
        found = [("E free", _told(self.free.floor()), _told(self.free.exponent()), FREE)]
        if self.known is not None:
            found.append(("E known", f"E given: {self.floor:.4f}", _told(self.known.exponent()), KNOWN))
        if self.exact is not None:
            local = f"{self.exact.first:.3f} at the smallest, {self.exact.last:.3f} at the largest"
            found.append(
                (
                    "exact slope",
                    f"true E {self.floor:.4f}",
                    f"true {self.exact.slope:.3f} ({local})",
                    perfect(self.axis),
                )
            )
        return found


def _told(q: Quantity | None) -> str:
    """`alpha = .3 [.2, .4]`, or which gates refuse it."""
    return "" if q is None else f"{q.name} {'= ' if q.value is not None else ''}{q.text()}"


def perfect(axis: str) -> str:
    """The estimand of the exact slope in words."""
    return f"what a perfect learner limited by {axis_words(axis)} alone would show"


def _numbers(series: Series) -> dict[str, Any]:
    return {q.name: q.as_dict() for q in series.quantities()}


def of_view(view: View, truth: Truth, options: Mapping[str, Any]) -> list[Estimands]:
    """The three of every architecture of a view; none where the log's asymptote is unknown or no loss is fitted.

    options: those of the report's fits.
    """
    floor = truth.floor(view.axis)
    columns = [column for series in view.series for column in series.frame.columns]
    if floor is None or TARGET not in columns or not describe(view.target).is_loss:
        return []
    rest = {name: value for name, value in options.items() if name not in _SAID}
    return [_of_series(series, floor, truth, rest) for series in view.series]


def _of_series(series: Series, floor: float, truth: Truth, options: Mapping[str, Any]) -> Estimands:
    def fitted(**given: Any) -> Series:
        asked = {**options, "bootstrap": 0, **given}
        return fitted_series(series.architecture, series.frame, series.slice, FORM, series.axis, TARGET, asked)

    rows = series.rows(FITTED)
    below = int((rows[TARGET] <= floor).sum())
    known = None if below else fitted(fixed={"E": floor})
    same = series.target == TARGET and series.fit.form.id == FORM and not series.fit.given
    exact, reason = exact_slope(truth.log, series.axis, rows)
    without = (
        [f"{below} runs lie at or below the exact asymptote {floor:.4f}: E cannot be fixed at it"] if below else []
    )
    without += [f"no exact slope: {reason}"] if reason else []
    return Estimands(
        series.architecture, series.axis, floor, series if same else fitted(), known, exact, "; ".join(without)
    )


def exact_slope(log: Log | None, axis: str, rows: pd.DataFrame) -> tuple[ExactSlope | None, str]:
    """The slope over the values that an axis takes in these rows, at their amount of data, or why there is none."""
    if log is None:
        return None, "the settings of the log are not recorded with the runs"
    x = rows[axis].dropna().to_numpy(float) if axis in rows.columns else np.empty(0)
    if len(np.unique(x)) < 2:
        return None, "the axis has a single value"
    low, high, step = x.min(), x.max(), 1.05
    points = np.array([low, low * step, high / step, high])
    # Labels that are probabilities hide nothing: terms are known after a few rows.
    limited = axis == "dense_params" and not log.config.soft_labels
    seen = float(rows["examples"].median()) if limited else np.inf
    excess = perfect_learner(log, axis, points, seen)
    if excess is None:
        return None, f"the log has no closed form in {axis_words(axis)}"
    first, last = np.log(excess[0] / excess[1]) / np.log(step), np.log(excess[2] / excess[3]) / np.log(step)
    whole = np.log(excess[0] / excess[3]) / np.log(high / low)
    return ExactSlope(float(whole), float(first), float(last), seen), ""


def perfect_learner(
    log: Log, axis: str, x: Float64[np.ndarray, " n"], examples: float = np.inf
) -> Float64[np.ndarray, " n"] | None:
    """Excess over the axis' asymptote of a learner that is short of this resource alone, the log's others as in the
    runs; None where the log has no closed form along the axis.

    A hidden unit's parameters (its inputs, a bias and an output weight) know one term, a slot stores one pair.
    examples: rows seen, where terms have to be learned from labels.
    """
    config, world = log.config, build_world(log.config)
    alone = not (config.has_l or config.has_m)
    resources: dict[str, tuple[bool, dict[str, Any], dict[str, Any]]] = {
        "dense_params": (
            config.has_n and config.shows_codes,
            {"quanta": x / (make_schema(config).width + 2), "examples": examples},
            {"quanta": np.inf},
        ),
        "examples": (
            alone and config.has_n and not config.soft_labels,
            {"quanta": np.inf, "examples": x},
            {"quanta": np.inf},
        ),
        "history_length": (config.has_l, {"history_length": x}, {"history_length": np.inf}),
        "memory_slots": (config.has_m, {"pairs": x}, {"ranks": np.inf}),
    }
    has_form, short, unlimited = resources.get(axis, (False, {}, {}))
    if not has_form:
        return None
    v = log.card.get("v") or gaussian_constants(config.b, config.signal)["v"]
    # The second-order form covers what the exact integral does not know.
    shared = {"history_length": log.history_length, "exact": has_exact(config), "constants": {"asymptote": 0.0, "v": v}}
    return np.asarray(predict(world, **{**shared, **short}) - predict(world, **{**shared, **unlimited}))
