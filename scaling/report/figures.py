"""Figures of laws: what was measured, what was fitted to it, what is known to be true, and what is refused.

A law figure has two panels: the metric against an axis, and the metric minus a floor on logarithmic axes, where a power
law is a straight line. Below them: every architecture with its floor and exponent, or the gate that refuses them, and
one text with form, metric, slice and coverage.

    mean and range over seeds   filled marker with a bar, single runs as dots
    held-out largest size       open marker, never fitted
    fitted law                  solid over the fitted sizes, dashed beyond; shaded: 95 % bootstrap band of the law
    no law                      where a parameter of the curve is refused: a thin grey line from size to size
    diverged or failed runs     crosses at the top edge
    true constants              black lines, where the log knows them; the slope is that of a perfect learner

Nothing here touches matplotlib's global state: figures are made without pyplot, and every setting lives in a context.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from recscale.scaling.data.metrics import describe
from recscale.scaling.records.number_text import amount

from . import captions
from .estimands import ExactSlope, exact_slope, perfect_learner
from .frame import DPI, GREY, CaptionLine, behind, key, mark_of, png, save, style, svg, title, two_panels, write_caption
from .series import FITTED, HELD_OUT, Series, View, predict
from .truth import Truth
from .wording import architecture_words, axis_words, target_words

__all__ = ["DPI", "joint_figure", "law_figure", "png", "save", "svg"]

_EXTRAPOLATED, _SLOPE = (0, (4, 2)), (0, (9, 2, 1, 2))
_GUIDE: dict[str, Any] = {"color": GREY, "lw": 0.7, "alpha": 0.6}
_CURVE_POINTS = 160
_TINY = 1e-12  # keeps the lower edge of a band on a logarithmic axis
_BEYOND = 1.5  # how far past the largest drawn point a curve goes on


def law_figure(view: View, *, truth: Truth | None = None) -> Figure:
    """The two-panel figure of a view: metric against the axis, and excess over a floor on logarithmic axes.

    The excess is over the true asymptote where `truth` has it, otherwise over each architecture's fitted floor; an
    architecture whose floor is refused has no excess, and the panel says so.
    """
    truth = truth if truth is not None and describe(view.target).in_nats else Truth()
    caption = _marked(view)
    with style():
        figure, (left, right) = two_panels(len(caption))
        title(figure, _heading(view))
        for number, series in enumerate(view.series):
            _draw_loss(left, series, number)
        _finish_loss(left, view, truth)
        _draw_published(left, view)
        drawn = _excess_panel(right, view, truth, left.get_xlim())
        key(figure, _style_handles(view, truth, drawn), len(caption))
        write_caption(figure, caption)
    return figure


def joint_figure(series: Series, columns: Mapping[str, str]) -> Figure:
    """A law of two axes on one architecture: the metric against each axis, one curve per value of the other."""
    first, second = list(columns.values())[:2]
    caption = [line for text in captions.joint_text(series, columns) for line in behind(None, text)]
    with style():
        figure, panels = two_panels(len(caption))
        title(
            figure,
            f"{architecture_words(series.architecture)}: {series.target} against {axis_words(first)} and "
            f"{axis_words(second)}: {_verdict([series], 'joint ')}",
        )
        _joint_panel(panels[0], series, columns, first, second)
        _joint_panel(panels[1], series, columns, second, first)
        write_caption(figure, caption)
    return figure


def _heading(view: View) -> str:
    return f"{view.target} against {axis_words(view.axis)}: {_verdict(view.series)}"


def _verdict(series: Sequence[Series], kind: str = "fitted ") -> str:
    """What the records grant: a law or a trend, of how many of the architectures, or neither."""
    drawn = [s for s in series if s.has_curve]
    if not drawn:
        return "measured, no law"
    word = f"{kind}{'law' if all(s.is_law for s in drawn) else 'trend'}"
    return word if len(drawn) == len(series) else f"{word} of {len(drawn)} of {len(series)} architectures"


# Loss panel --------------------------------------------------------------------------------


def _draw_loss(ax: Axes, series: Series, number: int) -> None:
    colour = mark_of(number)[0]
    _draw_curve(ax, series, colour, 0.0)
    _draw_points(ax, series, number, 0.0)
    _draw_lost(ax, series, colour)


def _draw_points(ax: Axes, series: Series, number: int, floor: float) -> None:
    """Seeds as dots, their mean with the range; the held-out size open."""
    colour, marker = mark_of(number)
    for role, face in ((FITTED, colour), (HELD_OUT, "white")):
        rows, cells = series.rows(role), series.cells(role)
        several = rows.groupby(series.axis)[series.target].transform("count") > 1
        dots = rows[several]
        ax.plot(
            dots[series.axis].to_numpy(float),
            dots[series.target].to_numpy(float) - floor,
            ".",
            ms=3.5,
            color=colour,
            alpha=0.45,
            zorder=3,
            linestyle="none",
        )
        # A mean of equal values may differ from them in the last bit.
        bars = np.maximum(np.stack([cells["mean"] - cells["low"], cells["high"] - cells["mean"]]), 0.0)
        ax.errorbar(
            cells["x"],
            cells["mean"] - floor,
            yerr=bars,
            fmt=marker,
            ms=6.5,
            mfc=face,
            mec=colour,
            mew=1.4,
            color=colour,
            elinewidth=1.1,
            capsize=2.5,
            zorder=4,
        )


def _draw_curve(ax: Axes, series: Series, colour: str, floor: float) -> None:
    """The law solid over the fitted sizes and dashed beyond, with its band; without a law a guide for the eye."""
    span = series.span
    if span is None or not series.has_curve:
        cells = series.cells(FITTED)
        ax.plot(cells["x"], _above(cells["mean"].to_numpy(), floor), zorder=1.6, **_GUIDE)
        return
    last = max(float(series.rows(FITTED, HELD_OUT)[series.axis].max()), span[1]) * _BEYOND
    for start, stop, dash in ((*span, "-"), (span[1], last, _EXTRAPOLATED)):
        if stop <= start:
            continue
        x = np.geomspace(start, stop, _CURVE_POINTS)
        value, band, _ = predict(series.fit, series.axis, x)
        ax.plot(x, _above(value, floor), linestyle=dash, color=colour, lw=1.6, zorder=2.5)
        if band is not None:
            shade = 0.20 if dash == "-" else 0.11
            low_edge, high_edge = (np.maximum(end - floor, _TINY) if floor else end for end in band)
            ax.fill_between(x, low_edge, high_edge, color=colour, alpha=shade, lw=0, zorder=1.5)


def _draw_published(ax: Axes, view: View) -> None:
    """A published law over the drawn values, in its own units, which are the axis' own or there is no overlay."""
    if view.published is None:
        return
    limits, x = ax.get_ylim(), np.geomspace(*ax.get_xlim(), _CURVE_POINTS)
    ax.plot(x, view.published(x), color="black", lw=1.2, linestyle=view.published.law.linestyle, zorder=2)
    ax.set_ylim(limits)


def _above(value: np.ndarray, floor: float) -> np.ndarray:
    """value - floor, not a number where nothing is left on a logarithmic axis."""
    return np.where(value - floor > 0, value - floor, np.nan) if floor else value


def _draw_lost(ax: Axes, series: Series, colour: str) -> None:
    x = series.lost[series.axis].to_numpy(float)
    x = x[np.isfinite(x)]
    ax.plot(
        x, np.ones(len(x)), "x", transform=ax.get_xaxis_transform(), color=colour, ms=8, mew=2, zorder=5, clip_on=False
    )


def _finish_loss(ax: Axes, view: View, truth: Truth) -> None:
    ax.set_ylabel(target_words(view.target))
    _axis_in_words(ax, view.axis)
    low, high = ax.get_ylim()
    drawn = [series.rows(FITTED, HELD_OUT)[view.target] for series in view.series]
    values = np.concatenate([column.to_numpy(float) for column in drawn]) if drawn else np.array([])
    if len(values):
        spread = max(np.ptp(values), 1e-3 * abs(values.mean()), 1e-9)
        reach = 2.0 * spread
        low, high = values.min() - 0.08 * spread, values.max() + 0.16 * spread
        true = (truth.floor(view.axis), truth.entropy_floor)
        near = [v for v in true if v is not None and v > values.min() - reach]
        if near:
            low = min(low, min(near) - 0.06 * (high - min(near)))
        ax.set_ylim(low, high)
    named = (
        (truth.floor(view.axis), _asymptote_name(view, truth), "-."),
        (truth.entropy_floor, "entropy floor $H^*$", ":"),
    )
    _true_levels(ax, [(value, name, dash) for value, name, dash in named if value is not None], low)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
    # Not over the crosses at the top edge.
    ax.legend(
        handles=_architecture_handles(view), loc="best", bbox_to_anchor=(0, 0, 1, 0.96), handlelength=2.4, fontsize=9.5
    )


def _asymptote_name(view: View, truth: Truth) -> str:
    return "asymptote of this axis" if view.axis in truth.floors else "asymptote $E_\\infty$"


def _true_levels(ax: Axes, levels: Sequence[tuple[float, str, str]], low: float) -> None:
    """True constants as named lines; those far below the data are named at the lower edge."""
    below = [f"{name} = {value:.4f}" for value, name, _ in levels if value < low]
    if below:
        ax.annotate(f"below: {', '.join(below)} (true)", (0.01, 0.015), xycoords="axes fraction", fontsize=8.5)
    drawn = sorted((level for level in levels if level[0] >= low), reverse=True)
    for k, (value, name, dash) in enumerate(drawn):
        ax.axhline(value, color="black", lw=1.1, linestyle=dash, zorder=1.8)
        crowded = k > 0 and drawn[k - 1][0] - value < 0.06 * np.ptp(ax.get_ylim())
        _name_level(ax, value, f"{name} = {value:.4f} (true)", under=crowded)


def _name_level(ax: Axes, height: float, text: str, under: bool = False) -> None:
    """A text just above (or under) a horizontal line, at the left edge."""
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    shift, side = ((0, -2.5), "top") if under else ((0, 2.5), "bottom")
    ax.annotate(text, (0.01, height), xytext=shift, va=side, fontsize=8.5, **place)


def _sign(label: str, **look: Any) -> Line2D:
    """An entry of a legend; grey and without a line unless it says so."""
    return Line2D([], [], label=label, **{"color": GREY, "lw": 0, "ms": 6} | look)


def _architecture_handles(view: View) -> list[Line2D]:
    marks = [(mark_of(k), architecture_words(series.architecture)) for k, series in enumerate(view.series)]
    return [_sign(words, color=colour, marker=marker, lw=1.6) for (colour, marker), words in marks]


# Excess panel --------------------------------------------------------------------------------


def _excess_panel(ax: Axes, view: View, truth: Truth, span: tuple[float, float]) -> bool:
    """Metric minus floor on logarithmic axes; returns whether anything could be drawn."""
    absent, drawn = [], []
    for number, series in enumerate(view.series):
        floor = truth.floor(view.axis)
        if floor is None:
            own = series.floor()
            floor = own.value if own is not None else None
            if floor is None:
                absent.append(
                    f"{series.architecture}: no excess, the floor is refused ({', '.join(own.gates)})"
                    if own is not None
                    else f"{series.architecture}: form {series.fit.form.id} has no floor"
                )
                continue
        below = series.rows(FITTED, HELD_OUT)[view.target] <= floor
        if below.any():
            absent.append(f"{series.architecture}: {int(below.sum())} runs at or below the floor are not drawn")
        _draw_curve(ax, series, mark_of(number)[0], floor)
        _draw_points(ax, series, number, floor)
        _draw_lost(ax, series, mark_of(number)[0])
        drawn.append((series, floor))
    _axis_in_words(ax, view.axis)
    true_floor = truth.floor(view.axis)
    name = f"true {_asymptote_name(view, truth)}" if true_floor is not None else "fitted floor $E$"
    ax.set_ylabel(f"{view.target} − {name}")
    if drawn:
        _log_excess(ax, drawn)
        _true_slope(ax, view, truth, drawn)
    else:
        ax.set_yticks([])
        ax.set_xlim(*span)
        _axis_in_words(ax, view.axis)
    for k, text in enumerate(absent):
        place, side = ((0.5, 0.6 - 0.09 * k), "center") if not drawn else ((0.99, 0.97 - 0.06 * k), "right")
        ax.annotate(textwrap.fill(text, 64), place, xycoords="axes fraction", ha=side, va="top", fontsize=9, color=GREY)
    if drawn and true_floor is not None and truth.entropy_floor is not None:
        _floor_above_asymptote(ax, truth.entropy_floor - true_floor)
    return bool(drawn)


def _floor_above_asymptote(ax: Axes, height: float) -> None:
    low, high = ax.get_ylim()
    if 0.3 * low < height < high:
        ax.set_ylim(min(low, height / 1.25), high)
    ax.axhline(height, color="black", lw=1.1, linestyle=":", zorder=1.8)
    _name_level(ax, height, "entropy floor $H^*$ (true)")


def _log_excess(ax: Axes, drawn: Sequence[tuple[Series, float]]) -> None:
    """Logarithmic excess with limits that hold the data, its curves and nothing else."""
    ax.set_yscale("log")
    values = np.concatenate([s.rows(FITTED, HELD_OUT)[s.target].to_numpy(float) - floor for s, floor in drawn])
    values = values[values > 0]
    if len(values):
        ax.set_ylim(values.min() / 1.35, values.max() * 1.5)
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _exact(view: View, truth: Truth) -> ExactSlope | None:
    """The exact slope over the drawn values."""
    rows = [series.rows(FITTED, HELD_OUT) for series in view.series]
    return exact_slope(truth.log, view.axis, pd.concat(rows))[0] if rows else None


def _true_slope(ax: Axes, view: View, truth: Truth, drawn: Sequence[tuple[Series, float]]) -> None:
    """A perfect learner's excess; its height is that of the runs, because units of the two need not be the same."""
    exact = _exact(view, truth)
    if exact is None or truth.log is None:
        return
    cells = [(s.cells(FITTED, HELD_OUT), floor) for s, floor in drawn]
    x = np.concatenate([c["x"].to_numpy(float) for c, _ in cells])
    y = np.concatenate([c["mean"].to_numpy(float) - floor for c, floor in cells])
    points = np.geomspace(x.min(), x.max(), _CURVE_POINTS // 4)
    curve = perfect_learner(truth.log, view.axis, points, exact.examples)
    if curve is None or not (y > 0).any():
        return
    nearest = np.exp(np.interp(np.log(x[y > 0]), np.log(points), np.log(curve)))
    height = np.exp(np.mean(np.log(y[y > 0] / nearest)))
    ax.plot(points, height * curve, color="black", lw=1.0, linestyle=_SLOPE, zorder=1.7)


def _style_handles(view: View, truth: Truth, drawn: bool) -> list:
    """What the drawing means, listing only what this figure contains."""
    series = view.series
    several = any((s.cells(FITTED, HELD_OUT)["seeds"] > 1).any() for s in series)
    measured = "mean over seeds, bar: range" if several else "measured, one run each"
    handles: list = [_sign(measured, marker="o")]
    if any(len(s.rows(HELD_OUT)) for s in series):
        handles.append(_sign("held out, not fitted", marker="o", mfc="white", mew=1.4))
    if any(s.has_curve for s in series):
        handles.append(_sign("law over the fitted sizes", lw=1.6))
    if any(_extrapolates(s) for s in series):
        handles.append(_sign("extrapolation", lw=1.6, linestyle=_EXTRAPOLATED))
    if not all(s.has_curve for s in series):
        handles.append(_sign("no law", **_GUIDE))
    if any(s.has_curve and s.fit.draws is not None for s in series):
        handles.append(Patch(color=GREY, alpha=0.22, lw=0, label="95 % bootstrap band of the law"))
    if any(len(s.lost) for s in series):
        handles.append(_sign("diverged or failed run", marker="x", ms=7, mew=2))
    if view.published is not None:
        law = view.published.law
        handles.append(_sign(f"published: {law.label}", color="black", lw=1.2, linestyle=law.linestyle))
    exact = _exact(view, truth) if drawn else None
    if exact is not None:
        text = f"true of a perfect learner: slope −{exact.slope:.3g}"
        handles.append(_sign(text, color="black", lw=1.0, linestyle=_SLOPE))
    return handles


def _extrapolates(series: Series) -> bool:
    span = series.span
    if span is None or not series.has_curve:
        return False
    value, _, _ = predict(series.fit, series.axis, np.array([span[1] * 1.01]))
    return bool(np.isfinite(value).all())


def _axis_in_words(ax: Axes, column: str) -> None:
    ax.set_xscale("log")
    words = axis_words(column)
    ax.set_xlabel(words if words == column else f"{words} ({column})")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    low, high = ax.get_xlim()
    if high / low < 30:
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))


# Joint panels --------------------------------------------------------------------------------


def _joint_panel(ax: Axes, series: Series, columns: Mapping[str, str], axis: str, other: str) -> None:
    """One curve per value of the other axis, dark to light; dashed beyond the fitted sizes."""
    rows = series.rows(FITTED, HELD_OUT)
    levels = sorted(set(rows[other].astype(float)))
    shades = [tuple(shade) for shade in matplotlib.colormaps["viridis"](np.linspace(0.05, 0.85, len(levels)))]
    for level, shade in zip(levels, shades, strict=True):
        own = rows[rows[other].to_numpy(float) == level]
        for role, face in ((FITTED, shade), (HELD_OUT, "white")):
            cells = own[own["role"] == role].groupby(axis)[series.target].mean()
            ax.plot(cells.index.to_numpy(float), cells.to_numpy(), "o", ms=5.5, mfc=face, mec=shade, mew=1.3, zorder=3)
        if series.has_curve:
            x = np.geomspace(float(own[axis].min()), float(own[axis].max()), _CURVE_POINTS)
            given = {slot: x if column == axis else np.full_like(x, level) for slot, column in columns.items()}
            _joint_curve(ax, series, x, given, shade)
    _axis_in_words(ax, axis)
    ax.set_ylabel(target_words(series.target))
    shown = np.unique(np.linspace(0, len(levels) - 1, min(len(levels), 6)).round().astype(int))
    handles = [_sign(amount(levels[k]), color=shades[k], lw=1.4, marker="o", ms=5) for k in shown]
    ax.legend(
        handles=handles,
        title=axis_words(other),
        loc="upper left",
        bbox_to_anchor=(-0.02, -0.135),
        ncols=6,
        handlelength=1.4,
        columnspacing=1.0,
        title_fontsize=8.5,
    )


def _joint_curve(ax: Axes, series: Series, x: np.ndarray, given: Mapping[str, np.ndarray], shade: tuple) -> None:
    """The law at x, solid up to the largest fitted value of its first axis."""
    largest = float(series.rows(FITTED)[series.axis].max())
    beyond = next(iter(given.values())) > largest * (1 + 1e-9)
    y = series.fit.predict(given, beyond_range=True)
    ax.plot(np.where(beyond, np.nan, x), y, color=shade, lw=1.4, zorder=2)
    ax.plot(np.where(beyond, x, np.nan), y, color=shade, lw=1.4, linestyle=_EXTRAPOLATED, zorder=2)


# Text --------------------------------------------------------------------------------


def _marked(view: View) -> list[CaptionLine]:
    """Lines below the panels: every architecture behind its marker, then what the numbers rest on."""
    lines: list[CaptionLine] = []
    for number, series in enumerate(view.series):
        mark = mark_of(number)
        lines += behind(mark, f"{series.architecture}: {captions.series_text(series)}")
    return lines + behind(None, captions.basis(view))
