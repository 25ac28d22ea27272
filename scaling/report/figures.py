"""Figures of laws: what was measured, what was fitted to it, what is known to be true, and what is refused.

    law_figure(table, x="dense_params")                     one panel, metric against axis
    law_figure(view, excess=True, style="column")           metric minus a floor on logarithmic axes, 3.35 in wide
    law_figure(table, ax=ax)                                 into axes of one's own
    save(figure, "law.pdf")

A power law is a straight line where a floor is subtracted. Below the panels: a key, and every architecture with its
floor and exponent, or the gate that refuses them, and one text with form, metric, slice and coverage.

    mean and range over seeds   filled marker with a bar, single runs as dots
    held-out largest size       open marker, never fitted
    fitted law                  solid over the fitted sizes, dashed beyond; shaded: 95 % bootstrap band of the law
    no law                      where a parameter of the curve is refused: a thin grey line from size to size
    diverged or failed runs     crosses at the top edge
    beyond the axis             triangles at the edge: one noisy architecture does not set the axis of all
    true constants              black lines, where the log knows them; the slope is that of a perfect learner

Points of equal sizes stand beside each other by a few points of the page. Nothing here touches matplotlib's global
state: figures are made without pyplot, and every setting lives in a context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from recscale.scaling.data.metrics import describe
from recscale.scaling.records.number_text import amount

from . import captions, frame
from . import truth as truths
from .frame import CaptionLine, figure_bytes, mark_of, save, sign
from .panel import CURVE_POINTS, EXTRAPOLATED, Panel, axis_in_words, floor_of, no_excess
from .series import FITTED, HELD_OUT, Series, View
from .truth import Truth
from .views import make_views, varying_axes
from .wording import architecture_words, axis_words, target_words

__all__ = ["figure_bytes", "joint_figure", "law_figure", "save", "study_figure"]


def law_figure(
    source: View | Sequence[View] | pd.DataFrame,
    *,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    x: str | None = None,
    y: str | None = None,
    logx: bool = True,
    logy: bool = False,
    excess: bool = False,
    title: str | None = None,
    labels: Mapping[str, str] | None = None,
    caption: bool = True,
    legend: bool = True,
    truth: Truth | None = None,
    style: str = "report",
    **options: Any,
) -> Figure:
    """Draws the runs of every architecture along one axis with their laws, and returns the figure.

    Args:
        source: a view; views of one axis and metric, drawn together; or a run table, which is fitted here.
        ax: axes to draw into, with the settings they have. A key inside, no caption: its texts are of a whole figure.
        figsize: inches of the whole figure, higher only if the panel would have no room left; None is the style's.
        x, y: of a table: axis (None: the first that varies) and metric column (None: logloss, or loss).
        logx, logy: logarithmic axes. excess: metric minus the true asymptote, or minus each fitted floor, on
            logarithmic axes; an architecture whose floor is refused has none.
        title: None says what is granted, "" is none. labels: architecture -> its name.
        caption, legend: whether to write them.
        truth: known constants; None finds those of a table's log, and is none for a view.
        style: see `frame`. options: of a table: see `make_views` (form, bootstrap, hold_out_largest, ...).

    Raises:
        ValueError: an unknown style or column, views of several axes, or an excess where no floor is granted.
    """
    view = view_of(source, x, y, options)
    if truth is None and isinstance(source, pd.DataFrame):
        truth = truths.find(source)
    truth = _in_nats(view, truth)
    floors = [floor_of(series, truth) if excess else 0.0 for series in view.series]
    if all(floor is None for floor in floors):
        reasons = "; ".join(no_excess(series) for series in view.series)
        raise ValueError(f"there is no excess to draw: {reasons}. Leave excess out, or state the truth")
    panel = Panel(view, truth, excess, logx, logy or excess, labels or {})
    if ax is not None:
        panel.draw(ax)
        ax.set_title(title or "")
        if legend:
            ax.legend(handles=panel.architectures())
        return ax.get_figure(root=True) or Figure()
    with frame.style(style):
        figure, (axes,) = frame.panels(1, style, figsize)
        notes = panel.draw(axes)
        handles = [*panel.architectures(), *panel.signs()] if legend else []
        text = _caption(view, panel.labels, notes) if caption else []
        frame.lay_out(figure, _heading(view) if title is None else title, handles, text, fixed=figsize is not None)
    return figure


def study_figure(view: View, *, truth: Truth | None = None, style: str = "report") -> Figure:
    """A view as a report shows it: the metric, and beside it the excess where a floor is granted or known."""
    truth = _in_nats(view, truth)
    panels = [Panel(view, truth, False, True, False, {})]
    if any(floor_of(series, truth) is not None for series in view.series):
        panels.append(Panel(view, truth, True, True, True, {}))
    with frame.style(style):
        figure, axes = frame.panels(len(panels), style, None)
        notes = [note for panel, ax in zip(panels, axes, strict=True) for note in panel.draw(ax)]
        signs = {handle.get_label(): handle for panel in panels for handle in panel.signs()}
        handles = [*panels[0].architectures(), *signs.values()]
        frame.lay_out(figure, _heading(view), handles, _caption(view, {}, notes))
    return figure


def joint_figure(series: Series, columns: Mapping[str, str], *, style: str = "report") -> Figure:
    """A law of two axes on one architecture: the metric against each axis, one curve per value of the other."""
    first, second = list(columns.values())[:2]
    caption: list[CaptionLine] = [(None, text) for text in captions.joint_text(series, columns)]
    name = architecture_words(series.architecture)
    both = f"{axis_words(first)} and {axis_words(second)}"
    with frame.style(style):
        figure, (left, right) = frame.panels(2, style, None)
        handles = [
            *_joint_panel(left, series, columns, first, second),
            *_joint_panel(right, series, columns, second, first),
        ]
        title = f"{name}: {series.target} against {both}: {_verdict([series], 'joint ')}"
        frame.lay_out(figure, title, handles, caption)
    return figure


def view_of(source: Any, x: str | None, y: str | None, options: Mapping[str, Any]) -> View:
    """The view that `law_figure` draws of its source."""
    if isinstance(source, View):
        return source
    if isinstance(source, pd.DataFrame):
        axis = x or next(iter(varying_axes(source)), None)
        return make_views(source, axes=None if axis is None else [axis], target=y, **options)[0]
    drawn = {(view.axis, view.target, view.form) for view in source}
    if len(drawn) != 1:
        raise ValueError(f"views of one axis, metric and form are drawn together, these are of {sorted(drawn)}")
    (axis, target, form), series = drawn.pop(), tuple(one for view in source for one in view.series)
    return View(axis, target, form, series, tuple(dict.fromkeys(note for view in source for note in view.notes)))


def _in_nats(view: View, truth: Truth | None) -> Truth:
    """What is known of the metric that is drawn: a log's constants are losses in nats."""
    return truth if truth is not None and describe(view.target).in_nats else Truth()


def _heading(view: View) -> str:
    return f"{view.target} against {axis_words(view.axis)}: {_verdict(view.series)}"


def _verdict(series: Sequence[Series], kind: str = "fitted ") -> str:
    """What the records grant: a law or a trend, of how many of the architectures, or neither."""
    drawn = [s for s in series if s.has_curve]
    if not drawn:
        return "measured, no law"
    word = f"{kind}{'law' if all(s.is_law for s in drawn) else 'trend'}"
    return word if len(drawn) == len(series) else f"{word} of {len(drawn)} of {len(series)} architectures"


def _caption(view: View, labels: Mapping[str, str], notes: Sequence[str]) -> list[CaptionLine]:
    """Every architecture behind its marker, what the drawing leaves out, and what the numbers rest on."""
    lines: list[CaptionLine] = []
    for number, series in enumerate(view.series):
        name = labels.get(series.architecture, series.architecture)
        lines.append((mark_of(number), f"{name}: {captions.series_text(series)}"))
    return [*lines, *((None, note) for note in notes), (None, captions.basis(view))]


# Joint panels --------------------------------------------------------------------------------


def _joint_panel(ax: Axes, series: Series, columns: Mapping[str, str], axis: str, other: str) -> list[Line2D]:
    """One curve per value of the other axis, dark to light, dashed beyond the fitted sizes; returns a key of them."""
    rows = series.rows(FITTED, HELD_OUT)
    levels = sorted(set(rows[other].astype(float)))
    shades = [tuple(shade) for shade in matplotlib.colormaps["viridis"](np.linspace(0.05, 0.85, len(levels)))]
    for level, shade in zip(levels, shades, strict=True):
        own = rows[rows[other].to_numpy(float) == level]
        for role, face in ((FITTED, shade), (HELD_OUT, "white")):
            cells = own[own["role"] == role].groupby(axis)[series.target].mean()
            ax.plot(cells.index.to_numpy(float), cells.to_numpy(), "o", mfc=face, mec=shade, zorder=3)
        if series.has_curve:
            x = np.geomspace(float(own[axis].min()), float(own[axis].max()), CURVE_POINTS)
            given = {slot: x if column == axis else np.full_like(x, level) for slot, column in columns.items()}
            _joint_curve(ax, series, x, given, shade)
    axis_in_words(ax, axis)
    ax.set_ylabel(target_words(series.target))
    shown = np.unique(np.linspace(0, len(levels) - 1, min(len(levels), 4)).round().astype(int))
    return [sign(f"{amount(levels[k])} {axis_words(other)}", color=shades[k], lw=1.4, marker="o") for k in shown]


def _joint_curve(ax: Axes, series: Series, x: np.ndarray, given: Mapping[str, np.ndarray], shade: tuple) -> None:
    """The law at x, solid up to the largest fitted value of its first axis."""
    largest = float(series.rows(FITTED)[series.axis].max())
    beyond = next(iter(given.values())) > largest * (1 + 1e-9)
    y = series.fit.predict(given, beyond_range=True)
    ax.plot(np.where(beyond, np.nan, x), y, color=shade, lw=1.4, zorder=2)
    ax.plot(np.where(beyond, x, np.nan), y, color=shade, lw=1.4, linestyle=EXTRAPOLATED, zorder=2)
