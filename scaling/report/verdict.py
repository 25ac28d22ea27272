"""What a study of two architectures on the known-truth log ends with: a law and a forecast each, and which needs less.

The floor is known there, so the law is that of the excess over the asymptote, A N^-alpha, with nothing else to fit: it
says how the architecture scales. The fit that does not know the floor stands beside it: what one would conclude on a
real log. A forecast is the largest size, predicted from the smaller ones.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from recscale.scaling.laws.comparing.compare import compare
from recscale.scaling.laws.comparing.equal_loss import EqualLossVerdict, equal_loss
from recscale.scaling.records.number_text import amount, value_text

from .series import Series
from .views import make_views
from .wording import axis_words

TARGET = "excess_logloss"


def verdict_lines(table: pd.DataFrame, first: str, second: str, axis: str = "dense_params") -> list[str]:
    """The last lines of a study: the law and the forecast of either architecture, then the share that `first` needs.

    table: runs on one known-truth log, with its `asymptote`.
    """
    over_asymptote = table.assign(**{TARGET: table["logloss"] - table["asymptote"]})
    known, free = (
        {series.architecture: series for series in make_views(rows, form=form, axes=[axis], target=target)[0].series}
        for rows, form, target in ((over_asymptote, "power", TARGET), (table, "power_offset", "logloss"))
    )
    lines = [_law(known[name]) + " " + _free(free[name]) for name in (first, second)]
    found = equal_loss(compare(over_asymptote, first, second, axis=axis, target=TARGET))
    return [*lines, _share(first, second, axis, found)]


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
