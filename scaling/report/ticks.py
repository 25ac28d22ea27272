"""Ticks of an axis: round values that are far enough apart to be read, three at least on a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axis import Axis
from matplotlib.ticker import Formatter, Locator, MaxNLocator, NullFormatter, NullLocator

from recscale.scaling.records.number_text import amount

# Tried in this order: whole decades, halves and doubles of them, thirds.
_LEADING = ((1,), (2, 5), (3,), (1.5, 7))
_FEWEST, _MOST = 3, 8


def label_log_axis(axis: Axis, text: Callable[[float, int], str]) -> None:
    """Ticks and labels of a logarithmic axis; text: (value, digits) -> label."""
    axis.set_major_locator(LogTicks())
    axis.set_major_formatter(DistinctLabels(text))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def plain_number(value: float, digits: int) -> str:
    """`0.0125`, without a suffix."""
    return f"{value:.{digits}g}"


class LogTicks(Locator):
    """As many round values as the axis has room for, at least three; none nearer to another than a label is wide."""

    def __call__(self) -> Sequence[float]:
        assert self.axis is not None
        low, high = self.axis.get_view_interval()
        room = self.axis.get_tick_space() if isinstance(self.axis, Axis) else _MOST
        return log_ticks(low, high, min(max(room, _FEWEST), _MOST))

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        return log_ticks(vmin, vmax, _MOST)


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Round values in [low, high] of a logarithmic axis with room for `most` labels, at least three."""
    low, high = sorted((low, high))
    if not 0 < low < high:
        return [low]
    found: list[float] = []
    # Three labels matter more than the space between them.
    for room in (max(most, _FEWEST + 1), 2 * most, 4 * most):
        if len(found) < _FEWEST:
            found = _chosen(low, high, math.log(high / low) / room)
    return found


def _chosen(low: float, high: float, apart: float) -> list[float]:
    """Candidates in their order, those nearer to one that is already chosen than `apart` left out."""
    found: list[float] = []
    for candidates in (*(_scaled(lead, low, high) for lead in _LEADING), *_even(low, high)):
        for value in candidates:
            if all(abs(math.log(value / other)) >= apart for other in found):
                found.append(value)
    return sorted(found)


def _scaled(leading: Sequence[float], low: float, high: float) -> list[float]:
    """leading * 10^e within [low, high]."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    return [value for e in decades for lead in leading if low <= (value := lead * 10.0**e) <= high]


def _even(low: float, high: float) -> Iterable[list[float]]:
    """Round steps of a plain axis, for spans that hold few round values: coarse ones first."""
    for steps in (3, 6, 12):
        ticks = MaxNLocator(steps, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        yield [float(tick) for tick in ticks if low <= tick <= high]


class DistinctLabels(Formatter):
    """Labels with three significant digits, or as many as keep two ticks from reading the same."""

    def __init__(self, text: Callable[[float, int], str] = amount):
        self._text = text

    def __call__(self, x: float, pos: Any = None) -> str:
        return self._text(x, 3)

    def format_ticks(self, values: Sequence[float] | np.ndarray) -> list[str]:
        labels: list[str] = []
        for digits in range(3, 9):
            labels = [self._text(float(value), digits) for value in values]
            if len(set(labels)) == len(labels):
                break
        return labels
