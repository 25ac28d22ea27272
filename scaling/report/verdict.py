"""What a study of two architectures on the known-truth log ends with: a law and a forecast each, and which needs less.

The floor is known there, so the law is that of the excess over the asymptote, A N^-alpha, with nothing else to fit: it
says how the architecture scales. The fit that does not know the floor stands beside it: what one would conclude on a
real log. A forecast is the largest size, predicted from the smaller ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from recscale.scaling.laws.comparing.compare import compare
from recscale.scaling.laws.comparing.equal_loss import EqualLossVerdict, equal_loss
from recscale.scaling.records.number_text import amount, value_text

from .estimands import exact_slope, perfect, perfect_learner
from .frame import mark_of, panels, style
from .panel import axis_in_words
from .series import FITTED, HELD_OUT, Series
from .series import predict as curve_of
from .ticks import label_log_axis, plain_number
from .truth import Log, find
from .views import make_views
from .wording import axis_words

TARGET = "excess_logloss"


@dataclass(frozen=True)
class Verdict:
    """known, free: laws of the two architectures, in the order asked for, of the excess and with the floor free.
    share: what the first needs of the second's amount of the axis. log: that of all runs, None if it is not known."""

    axis: str
    known: tuple[Series, ...]
    free: tuple[Series, ...]
    share: EqualLossVerdict
    log: Log | None

    @property
    def lines(self) -> list[str]:
        """The last lines of a study: law and forecast of either architecture, a perfect learner's slope, the share."""
        first, second = (series.architecture for series in self.known)
        laws = [f"{_law(known)} {_free(free)}" for known, free in zip(self.known, self.free, strict=True)]
        return [*laws, *self._exact, _share(first, second, self.axis, self.share)]

    @property
    def _exact(self) -> list[str]:
        """The slope of the log's own closed form over the sizes fitted, where it has one."""
        rows = pd.concat([series.rows(FITTED) for series in self.known])
        exact, _ = exact_slope(self.log, self.axis, rows)
        if exact is None:
            return []
        local = f"from {exact.first:.3f} at the smallest size to {exact.last:.3f} at the largest"
        return [f"Exact slope, {perfect(self.axis)}: true {exact.slope:.3f}, {local}."]


def judge(
    table: pd.DataFrame, first: str, second: str, axis: str = "dense_params", out: Path | str | None = None
) -> Verdict:
    """Fits and compares two architectures; table: runs on one known-truth log, with its `asymptote`; out: the sweep's
    folder, whose records hold the log's settings.
    """
    over_asymptote = table.assign(**{TARGET: table["logloss"] - table["asymptote"]})

    def laws(rows: pd.DataFrame, form: str, target: str) -> tuple[Series, ...]:
        found = make_views(rows, form=form, axes=[axis], target=target)[0].series
        by_name = {series.architecture: series for series in found}
        return by_name[first], by_name[second]

    return Verdict(
        axis,
        laws(over_asymptote, "power", TARGET),
        laws(table, "power_offset", "logloss"),
        equal_loss(compare(over_asymptote, first, second, axis=axis, target=TARGET)),
        find(table, out).log,
    )


def verdict_figure(verdict: Verdict) -> Figure:
    """Excess over the asymptote against the axis, on logarithmic axes, with the laws and the perfect learner's line."""
    with style():
        figure, (ax,) = panels(1, "report", (6.9, 4.4))
        for number, series in enumerate(verdict.known):
            _draw(ax, series, number)
        sizes = np.concatenate([series.cells(FITTED, HELD_OUT)["x"] for series in verdict.known])
        x = np.geomspace(sizes.min(), sizes.max(), 60)
        best = None if verdict.log is None else perfect_learner(verdict.log, verdict.axis, x)
        if best is not None:
            ax.plot(x, best, color="black", lw=1.2, linestyle=(0, (9, 2, 1, 2)), label="perfect learner, a term a unit")
        axis_in_words(ax, verdict.axis)
        ax.set(yscale="log", ylabel="excess logloss over the asymptote")
        label_log_axis(ax.yaxis, plain_number)
        ax.legend()
    return figure


def _draw(ax: Any, series: Series, number: int) -> None:
    colour, marker = mark_of(number)
    for role, face in ((FITTED, colour), (HELD_OUT, "white")):
        cells = series.cells(role)
        low, high = cells["mean"] - cells["low"], cells["high"] - cells["mean"]
        label = series.architecture if role == FITTED else None
        ax.errorbar(cells["x"], cells["mean"], (low, high), fmt=marker, color=colour, mfc=face, capsize=2, label=label)
    if not series.has_curve:
        return
    sizes = series.cells(FITTED, HELD_OUT)["x"].to_numpy(float)
    x = np.geomspace(sizes.min(), sizes.max(), 60)
    value, band, _ = curve_of(series.fit, series.axis, x)
    ax.plot(x, value, color=colour)
    if band is not None:
        ax.fill_between(x, *band, color=colour, alpha=0.2, lw=0)


def _law(series: Series) -> str:
    exponent, prediction = series.exponent(), series.prediction()
    if exponent is None or exponent.value is None:
        return f"{series.architecture}: no law of the excess, {exponent.text() if exponent else 'no exponent'}."
    text = f"{series.architecture}: excess over the asymptote falls as {_axis(series)}^-{exponent.text()}"
    if prediction is None or prediction.predicted is None:
        return f"{text}; no forecast{f' ({prediction.refused})' if prediction else ''}."
    inside = {True: "inside", False: "outside", None: "no interval"}[prediction.inside]
    return (
        f"{text}; held-out {amount(prediction.x)} predicted {value_text(prediction.predicted, prediction.interval)}, "
        f"measured {prediction.measured:.2e} ({inside})."
    )


def _free(series: Series) -> str:
    """The same with the floor free."""
    floor, exponent = series.floor(), series.exponent()
    parts = [f"{q.name} {q.text()}" for q in (floor, exponent) if q is not None]
    return f"With E free: {', '.join(parts)}."


def _share(first: str, second: str, axis: str, found: EqualLossVerdict) -> str:
    middle = found.middle
    words = axis_words(axis)
    question = f"Does {first} need fewer {words} than {second} for the same loss? {found.answer}"
    if middle is None:
        return f"{question}: {'; '.join(found.reasons)}."
    interval = None if middle.interval is None else (middle.interval.low, middle.interval.high)
    text = f"{question}: {value_text(middle.value, interval)} of them at an excess of {middle.metric:.2g}"
    return f"{text}." if found.answer != "cannot tell" else f"{text}, but {'; '.join(found.reasons)}."


def _axis(series: Series) -> str:
    return {"dense_params": "N", "examples": "D", "train_flops": "C"}.get(series.axis, series.axis)


def as_options(options: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, str] | None]:
    """The options of a sweep's report without `versus`, and the two architectures it names, or None."""
    rest = dict(options)
    versus = rest.pop("versus", None)
    return rest, (versus[0], versus[1]) if versus else None
