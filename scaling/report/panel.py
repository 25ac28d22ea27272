"""One panel of a law figure: the runs of every architecture along an axis, their laws, and what is known to be true."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from recscale.scaling.records.number_text import amount

from .estimands import ExactSlope, exact_slope, perfect_learner
from .frame import GREY, mark_of, sign
from .series import FITTED, HELD_OUT, Series, View, predict
from .ticks import DistinctLabels, label_log_axis, plain_number
from .truth import Truth
from .wording import architecture_words, axis_words, target_words

EXTRAPOLATED, _SLOPE, _ASYMPTOTE, _ENTROPY = (0, (4, 2)), (0, (9, 2, 1, 2)), "-.", ":"
_GUIDE: dict[str, Any] = {"color": GREY, "lw": 0.7, "alpha": 0.6}
CURVE_POINTS = 160
_TINY = 1e-12  # keeps the lower edge of a band on a logarithmic axis
_BEYOND = 1.5  # how far past the largest drawn point a curve goes on
_BESIDE = 0.5  # of a marker's width, between points of one size
_SAME_SIZE = 1.02  # sizes closer than this stand on top of each other
_NOISY, _STRETCHED = 2.0, 3.0  # see `_window`


def floor_of(series: Series, truth: Truth) -> float | None:
    """What is subtracted: the true asymptote of the axis, or the fitted floor; None where that is refused."""
    known = truth.floor(series.axis)
    own = series.floor() if known is None else None
    return known if own is None else own.value


def no_excess(series: Series) -> str:
    own = series.floor()
    if own is None:
        return f"{series.architecture}: form {series.fit.form.id} has no floor"
    return f"{series.architecture}: no excess, the floor is refused ({', '.join(own.gates)})"


@dataclass(frozen=True)
class Panel:
    """What one panel shows of a view: the metric, or its excess over a floor."""

    view: View
    truth: Truth
    excess: bool
    logx: bool
    logy: bool
    labels: Mapping[str, str]

    @property
    def shown(self) -> list[tuple[int, Series, float]]:
        """(number, series, what is subtracted) of the architectures that can be drawn."""
        floors = [floor_of(series, self.truth) if self.excess else 0.0 for series in self.view.series]
        drawn = zip(self.view.series, floors, strict=True)
        return [(number, series, floor) for number, (series, floor) in enumerate(drawn) if floor is not None]

    def draw(self, ax: Axes) -> list[str]:
        """Draws into the axes; returns what a reader must be told of what is not drawn."""
        notes = []
        if self.logy:
            ax.set_yscale("log")
        beside = _beside([series for _, series, _ in self.shown])
        for (number, series, floor), shift in zip(self.shown, beside, strict=True):
            _draw_curve(ax, series, mark_of(number)[0], floor)
            _draw_points(ax, series, number, floor, shift)
            _draw_lost(ax, series, mark_of(number)[0])
        axis_in_words(ax, self.view.axis, self.logx)
        self._finish_y(ax)
        for number, series, floor in self.shown:
            notes += _draw_beyond(ax, series, number, floor, self.logy)
        drawn = {number for number, _, _ in self.shown}
        notes += [no_excess(s) for number, s in enumerate(self.view.series) if number not in drawn]
        return notes

    def architectures(self) -> list[Line2D]:
        """Their entries in the key."""
        width = matplotlib.rcParams["lines.linewidth"]
        words = [self.labels.get(s.architecture, architecture_words(s.architecture)) for s in self.view.series]
        marks = [mark_of(number) for number in range(len(words))]
        return [
            sign(word, color=colour, marker=marker, lw=width if series.has_curve else 0)
            for series, word, (colour, marker) in zip(self.view.series, words, marks, strict=True)
        ]

    def signs(self) -> list[Any]:
        """What the drawing means, listing only what this panel contains."""
        series, width = [s for _, s, _ in self.shown], matplotlib.rcParams["lines.linewidth"]
        several = any((s.cells(FITTED, HELD_OUT)["seeds"] > 1).any() for s in series)
        handles: list[Any] = [sign("mean over seeds, bar: range" if several else "measured, one run each", marker="o")]
        if any(len(s.rows(HELD_OUT)) for s in series):
            handles.append(sign("held out, not fitted", marker="o", mfc="white"))
        if any(s.has_curve for s in series):
            handles.append(sign("law over the fitted sizes", lw=width))
        if any(_extrapolates(s) for s in series):
            handles.append(sign("extrapolation", lw=width, linestyle=EXTRAPOLATED))
        if not all(s.has_curve for s in series):
            handles.append(sign("no law", **_GUIDE))
        if any(s.has_curve and s.fit.draws is not None for s in series):
            handles.append(Patch(color=GREY, alpha=0.22, lw=0, label="95 % bootstrap band of the law"))
        if any(len(s.lost) for s in series):
            handles.append(sign("diverged or failed run", marker="x"))
        for value, name, dash in self._levels():
            handles.append(sign(f"{name} = {value:.4f} (true)", color="black", lw=0.7 * width, linestyle=dash))
        if self.view.published is not None and not self.excess:
            law = self.view.published.law
            handles.append(sign(f"published: {law.label}", color="black", lw=0.75 * width, linestyle=law.linestyle))
        if self.exact is not None:
            text = f"true of a perfect learner: slope −{self.exact.slope:.3g}"
            handles.append(sign(text, color="black", lw=0.6 * width, linestyle=_SLOPE))
        return handles

    def _levels(self) -> list[tuple[float, str, str]]:
        """(value, name, dashes) of the true constants of the metric itself."""
        name = "asymptote of this axis" if self.view.axis in self.truth.floors else "asymptote $E_\\infty$"
        levels = (
            (self.truth.floor(self.view.axis), name, _ASYMPTOTE),
            (self.truth.entropy_floor, "entropy floor $H^*$", _ENTROPY),
        )
        return [(value, name, dash) for value, name, dash in levels if value is not None]

    def _draw_perfect_learner(self, ax: Axes) -> None:
        """Its excess, at the height of the runs: units of the two need not be the same."""
        exact = self.exact
        if exact is None or self.truth.log is None:
            return
        cells = [(series.cells(FITTED, HELD_OUT), floor) for _, series, floor in self.shown]
        x = np.concatenate([c["x"].to_numpy(float) for c, _ in cells])
        y = np.concatenate([c["mean"].to_numpy(float) - floor for c, floor in cells])
        points = np.geomspace(x.min(), x.max(), CURVE_POINTS // 4)
        curve = perfect_learner(self.truth.log, self.view.axis, points, exact.examples)
        if curve is None or not (y > 0).any():
            return
        nearest = np.exp(np.interp(np.log(x[y > 0]), np.log(points), np.log(curve)))
        height = np.exp(np.mean(np.log(y[y > 0] / nearest)))
        width = 0.6 * matplotlib.rcParams["lines.linewidth"]
        ax.plot(points, height * curve, color="black", lw=width, linestyle=_SLOPE, zorder=1.7)

    @cached_property
    def exact(self) -> ExactSlope | None:
        """The exact slope over the drawn values, of an excess over the true asymptote."""
        if not self.excess or self.truth.floor(self.view.axis) is None:
            return None
        rows = [series.rows(FITTED, HELD_OUT) for series in self.view.series]
        return exact_slope(self.truth.log, self.view.axis, pd.concat(rows))[0]

    def _finish_y(self, ax: Axes) -> None:
        """Limits that hold the points and what is true of them, round ticks, and words."""
        low, high = _window([_means_and_runs(series, floor) for _, series, floor in self.shown], self.logy)
        floor, levels = self.truth.floor(self.view.axis), self._levels()
        if self.excess:
            # Only the entropy floor lies above what is subtracted.
            levels = [(value - floor, name, dash) for value, name, dash in levels if floor and value > floor]
        reach = low / 3.5 if self.logy else low - 2 * (high - low)
        near = [value for value, _, _ in levels if reach < value < low]
        if near:
            low = min(near) / 1.2 if self.logy else min(near) - 0.06 * (high - min(near))
        ax.set_ylim(low, high)
        for value, _, dash in levels:
            if low <= value <= high:
                width = 0.7 * matplotlib.rcParams["lines.linewidth"]
                ax.axhline(value, color="black", lw=width, linestyle=dash, zorder=1.8)
        self._draw_perfect_learner(ax)
        if self.view.published is not None and not self.excess:
            x = np.geomspace(*ax.get_xlim(), CURVE_POINTS)
            width = 0.75 * matplotlib.rcParams["lines.linewidth"]
            ax.plot(x, self.view.published(x), color="black", lw=width, linestyle=self.view.published.law.linestyle)
            ax.set(xlim=(x[0], x[-1]), ylim=(low, high))
        if self.logy:
            label_log_axis(ax.yaxis, plain_number)
        else:
            ax.yaxis.set_major_locator(MaxNLocator(nbins=6, min_n_ticks=3, steps=[1, 2, 5, 10]))
        if not self.excess:
            ax.set_ylabel(target_words(self.view.target))
        else:
            ax.set_ylabel(f"{self.view.target} − {'true asymptote' if floor is not None else 'fitted floor $E$'}")


def _beside(series: Sequence[Series]) -> list[float]:
    """Shift of each architecture's points in marker widths, so that those of equal sizes do not hide each other."""
    sizes = [np.log(s.cells(FITTED, HELD_OUT)["x"].to_numpy(float)) for s in series]
    shared = [
        any(len(other) and np.abs(own[:, None] - other).min(initial=np.inf) < np.log(_SAME_SIZE) for other in rest)
        for k, own in enumerate(sizes)
        for rest in [[*sizes[:k], *sizes[k + 1 :]]]
    ]
    places = np.cumsum(shared) - 0.5 * (sum(shared) + 1)
    return [_BESIDE * float(place) if own else 0.0 for place, own in zip(places, shared, strict=True)]


def _draw_points(ax: Axes, series: Series, number: int, floor: float, shift: float) -> None:
    """Seeds as dots, their mean with the range; the held-out size open. shift: to the right, in marker widths."""
    colour, marker = mark_of(number)
    size = matplotlib.rcParams["lines.markersize"]
    figure = ax.get_figure(root=True)
    assert figure is not None
    place = ax.transData + ScaledTranslation(shift * size / 72, 0, figure.dpi_scale_trans)
    for role, face in ((FITTED, colour), (HELD_OUT, "white")):
        rows, cells = series.rows(role), series.cells(role)
        several = rows.groupby(series.axis)[series.target].transform("count") > 1
        dots = rows[several]
        ax.plot(
            dots[series.axis].to_numpy(float),
            dots[series.target].to_numpy(float) - floor,
            ".",
            ms=0.55 * size,
            color=colour,
            alpha=0.45,
            zorder=3,
            transform=place,
        )
        # A mean of equal values may differ from them in the last bit.
        bars = np.maximum(np.stack([cells["mean"] - cells["low"], cells["high"] - cells["mean"]]), 0.0)
        ax.errorbar(
            cells["x"],
            cells["mean"] - floor,
            yerr=bars,
            fmt=marker,
            ms=size,
            mfc=face,
            mec=colour,
            mew=0.22 * size,
            color=colour,
            elinewidth=0.18 * size,
            capsize=0.4 * size,
            zorder=4,
            transform=place,
        )


def _draw_curve(ax: Axes, series: Series, colour: str, floor: float) -> None:
    """The law solid over the fitted sizes and dashed beyond, with its band; without a law a guide for the eye."""
    span = series.span
    if span is None or not series.has_curve:
        cells = series.cells(FITTED)
        ax.plot(cells["x"], _above(cells["mean"].to_numpy(), floor), zorder=1.6, **_GUIDE)
        return
    last = max(float(series.rows(FITTED, HELD_OUT)[series.axis].max()), span[1]) * _BEYOND
    for start, stop, dash in ((*span, "-"), (span[1], last, EXTRAPOLATED)):
        if stop <= start:
            continue
        x = np.geomspace(start, stop, CURVE_POINTS)
        value, band, _ = predict(series.fit, series.axis, x)
        ax.plot(x, _above(value, floor), linestyle=dash, color=colour, zorder=2.5)
        if band is not None:
            shade = 0.20 if dash == "-" else 0.11
            low_edge, high_edge = (np.maximum(end - floor, _TINY) if floor else end for end in band)
            ax.fill_between(x, low_edge, high_edge, color=colour, alpha=shade, lw=0, zorder=1.5)


def _above(value: np.ndarray, floor: float) -> np.ndarray:
    """value - floor, not a number where nothing is left on a logarithmic axis."""
    return np.where(value - floor > 0, value - floor, np.nan) if floor else value


def _draw_lost(ax: Axes, series: Series, colour: str) -> None:
    x = series.lost[series.axis].to_numpy(float)
    _at_edge(ax, x[np.isfinite(x)], 1.0, "x", color=colour, zorder=5)


def _at_edge(ax: Axes, x: np.ndarray, edge: float, marker: str, **look: Any) -> None:
    """Markers at the lower (0) or upper (1) edge of the axes."""
    if len(x):  # an empty line without clipping counts as a point at the corner of the figure
        ax.plot(x, np.full(len(x), edge), marker, transform=ax.get_xaxis_transform(), clip_on=False, **look)


def _draw_beyond(ax: Axes, series: Series, number: int, floor: float, logarithmic: bool) -> list[str]:
    """Triangles at the edges for runs that the axis does not reach; returns how many there are, in words."""
    colour, (low, high) = mark_of(number)[0], ax.get_ylim()
    rows = series.rows(FITTED, HELD_OUT)
    value, x = rows[series.target].to_numpy(float) - floor, rows[series.axis].to_numpy(float)
    lost = value <= 0 if logarithmic else np.zeros(len(value), bool)
    notes = []
    for outside, edge, marker in ((value > high, 1.0, "^"), ((value < low) & ~lost, 0.0, "v")):
        _at_edge(ax, np.unique(x[outside]), edge, marker, mfc="white", mec=colour)
        if outside.any():
            side = "above" if edge else "below"
            notes.append(f"{series.architecture}: {int(outside.sum())} runs lie {side} the axis (triangles)")
    if lost.any():
        notes.append(f"{series.architecture}: {int(lost.sum())} runs at or below the floor are not drawn")
    return notes


def _means_and_runs(series: Series, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """Means from size to size, and all runs, over the floor."""
    means, runs = series.cells(FITTED, HELD_OUT)["mean"], series.rows(FITTED, HELD_OUT)[series.target]
    return means.to_numpy(float) - floor, runs.to_numpy(float) - floor


def _window(series: Sequence[tuple[np.ndarray, np.ndarray]], logarithmic: bool) -> tuple[float, float]:
    """Limits that hold every run, but for an architecture whose noise would set the axis of all.

    series: `_means_and_runs` of each. One is left out of the limits where its means go up and down
    by more than twice what they gain, and the axis would be three times longer for it.
    """
    runs = [np.log(y[y > 0]) if logarithmic else y for _, y in series]
    held = [k for k, y in enumerate(runs) if len(y)]
    for k, (means, _) in enumerate(series):
        others = [runs[j] for j in held if j != k]
        steps = np.diff(np.log(means[means > 0]) if logarithmic else means)
        if not others or k not in held or np.abs(steps).sum() <= _NOISY * abs(steps.sum()):
            continue
        if np.ptp(np.concatenate([*others, runs[k]])) > _STRETCHED * np.ptp(np.concatenate(others)):
            held.remove(k)
    values = np.concatenate([runs[k] for k in held]) if held else np.array([0.0, 1.0])
    if logarithmic:
        return float(np.exp(values.min()) / 1.35), float(np.exp(values.max()) * 1.5)
    spread = max(np.ptp(values), 1e-3 * abs(values.mean()), 1e-9)
    return float(values.min() - 0.08 * spread), float(values.max() + 0.16 * spread)


def _extrapolates(series: Series) -> bool:
    span = series.span
    if span is None or not series.has_curve:
        return False
    value, _, _ = predict(series.fit, series.axis, np.array([span[1] * 1.01]))
    return bool(np.isfinite(value).all())


def axis_in_words(ax: Axes, column: str, logarithmic: bool = True) -> None:
    words = axis_words(column)
    ax.set_xlabel(words if words == column else f"{words} ({column})")
    if logarithmic:
        ax.set_xscale("log")
        label_log_axis(ax.xaxis, amount)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6, min_n_ticks=3))
        ax.xaxis.set_major_formatter(DistinctLabels())
