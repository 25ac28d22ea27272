"""Figures of comparisons: what arms save on a baseline, case by case, and what came of published orderings.

Both show means of paired seeds with 95 % intervals; what is not judged is named in the caption and has no point.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from . import frame
from .frame import GREY, CaptionLine, mark_of, sign
from .orderings import Judged, words
from .wording import architecture_words

# Okabe and Ito's green, vermilion and grey.
_OUTCOMES = {"held": frame.COLOURS[2], "failed": frame.COLOURS[1], "inside noise": GREY}
_INCH = 0.34  # of an ordering's two lines


def saved_figure(
    rows: pd.DataFrame,
    case: str,
    *,
    baseline: str,
    title: str,
    value: str,
    cases: str,
    bound: str | None = None,
    scale: float = 1e3,
    note: str = "",
    style: str = "report",
) -> Figure:
    """What every method saves on the baseline, side by side for each case.

    Args:
        rows: of `paired_differences`. case: the column that tells cases apart, drawn in their order.
        title, value, cases: words for the figure, what is saved, and the cases.
        bound: the column of the most that can be saved. scale: of the numbers drawn. note: of the caption.
    """
    drawn = rows[rows["method"] != baseline]
    names, methods = list(drawn[case].unique()), list(drawn["method"].unique())
    step = 0.8 / len(methods)
    with frame.style(style):
        figure, (ax,) = frame.panels(1, style, None)
        for k, method in enumerate(methods):
            own = drawn[drawn["method"] == method].set_index(case).loc[names]
            colour, marker = mark_of(k)
            place = np.arange(len(names)) + step * (k - (len(methods) - 1) / 2)
            mean, low, high = (scale * own[column].to_numpy(float) for column in ("saved", "low", "high"))
            ax.errorbar(place, mean, (mean - low, high - mean), fmt=marker, color=colour, capsize=2, elinewidth=0.8)
        handles = [
            sign(architecture_words(method), color=mark_of(k)[0], marker=mark_of(k)[1])
            for k, method in enumerate(methods)
        ]
        if bound is not None:
            most = scale * drawn.groupby(case, sort=False)[bound].first().loc[names].to_numpy(float)
            ax.hlines(most, np.arange(len(names)) - 0.4, np.arange(len(names)) + 0.4, color="black", ls="--")
            handles.append(sign("the most there is", color="black", lw=1.2, linestyle="--"))
        ax.axhline(0, color=GREY, lw=0.8)
        ax.set(xticks=range(len(names)), xticklabels=names, xlabel=cases)
        ax.set_ylabel(f"{value} x {scale:,g}")
        caption = f"saved on {baseline}: means of paired seeds and their 95 % intervals. {note}".strip()
        frame.lay_out(figure, title, handles, [(None, caption)])
    return figure


def orderings_figure(judged: Sequence[Judged], *, title: str = "published orderings", style: str = "report") -> Figure:
    """Every ordering that was judged, with its interval; the published side is the right one.

    Raises:
        ValueError: none was judged.
    """
    shown = [found for found in judged if found.interval is not None]
    if not shown:
        raise ValueError(f"none of {len(judged)} orderings is judged, so there is nothing to draw")
    counts = Counter(found.outcome for found in judged)
    with frame.style(style):
        width, height = frame.STYLES[style][1]
        figure, (ax,) = frame.panels(1, style, (width, max(height, _INCH * len(shown) + 0.8)))
        for place, found in enumerate(reversed(shown)):
            assert found.difference is not None and found.interval is not None
            low, high = found.interval
            bar = [[1e3 * (found.difference - low)], [1e3 * (high - found.difference)]]
            colour = _OUTCOMES[found.outcome]
            ax.errorbar(1e3 * found.difference, place, xerr=bar, fmt="o", color=colour, capsize=2, elinewidth=0.8)
        ax.axvline(0, color=GREY, lw=0.8)
        names = [words(found.ordering).replace(" above ", "\nabove ") for found in reversed(shown)]
        ax.set_yticks(range(len(shown)), names, fontsize="small")
        ax.set_xlabel("difference x 1,000")
        handles = [sign(f"{name}: {counts[name]}", color=colour, marker="o") for name, colour in _OUTCOMES.items()]
        refused = [f"{counts[name]} {name}" for name in ("not judged", "cannot be built") if counts[name]]
        caption: list[CaptionLine] = [
            (None, "means of paired seeds and their 95 % intervals, of the loss saved or gained")
        ]
        caption += [(None, f"not drawn: {', '.join(refused)}")] if refused else []
        frame.lay_out(figure, title, handles, caption)
    return figure
