"""The words below a figure: of every fit its floor, its exponent and its prediction of the held-out size, or why they
are refused, and what all of them rest on.

An exponent never stands without its floor, form, range and metric. A number that a gate refuses is not printed. Bands
carry the coverage measured at the extrapolation that is shown, or the word `uncalibrated`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from recscale.scaling.records.number_text import amount, decimals, value_text

from .series import FITTED, HELD_OUT, Prediction, Quantity, Series, View
from .wording import axis_words, shortened, target_words


def series_text(series: Series) -> str:
    """Floor, exponent and the held-out prediction in words; refusals with their reasons."""
    if series.fit.refused:
        return f"no law. Refused: {shortened(refusal_text(series), 230)}"
    quoted = [q for q in (series.floor(), series.exponent()) if q is not None]
    prediction = series.prediction()
    held_out = f"; {prediction_text(prediction)}" if prediction is not None else ""
    return _quoted(quoted) + held_out + _reasons(series, quoted)


def _quoted(quantities: Sequence[Quantity]) -> str:
    return ", ".join(f"{q.name} {'= ' if q.value is not None else ''}{q.text()}" for q in quantities)


def _reasons(series: Series, quantities: Sequence[Quantity]) -> str:
    """Why some of these quantities are refused; empty if none is."""
    names = {q.name for q in quantities if q.value is None}
    reasons = dict.fromkeys(f"{g.id}: {g.reason}" for g in series.fit.refusals if names & set(g.refuses))
    return f". Refused by {shortened('; '.join(reasons), 230)}" if reasons else ""


def headline(series: Series) -> str:
    """One sentence: how far the metric came down, and what the law of the smaller sizes says about the largest."""
    cells = series.cells(FITTED, HELD_OUT)
    words = axis_words(series.axis)
    if len(cells) < 2:
        return f"{series.architecture}: fewer than two finished sizes along {words}; nothing to say."
    first, last = cells.iloc[0], cells.iloc[-1]
    verb = "falls" if last["mean"] < first["mean"] else "rises"
    text = (
        f"{series.architecture}: {series.target} {verb} from {first['mean']:.4f} at {amount(first.x)} "
        f"to {last['mean']:.4f} at {amount(last.x)} {words}"
    )
    prediction = series.prediction()
    if prediction is None:
        return f"{text}."
    if prediction.predicted is None:
        return f"{text}; a prediction of the largest from the smaller ones is refused ({prediction.refused})."
    places = min(max(decimals(abs(prediction.error or 0.0)), 4), 6)
    inside = {True: "inside its interval", False: "outside its interval", None: "without an interval"}[
        prediction.inside
    ]
    better = "better" if abs(prediction.error or 0.0) < abs(prediction.last_value) else "no better"
    return (
        f"{text}; the law of the smaller ones is off by {prediction.error:+.{places}f} at the largest, {inside} "
        f"and {better} than repeating the last fitted size ({prediction.last_value:+.{places}f})."
    )


def prediction_text(prediction: Prediction) -> str:
    """Held-out size: predicted with its interval, measured, error."""
    place = f"held out {amount(prediction.x)} (×{prediction.ratio:.2g})"
    if prediction.predicted is None:
        return f"{place}: prediction refused, measured {prediction.measured:.4f}"
    scale = (
        0.5 * (prediction.interval[1] - prediction.interval[0]) if prediction.interval else abs(prediction.error or 0.0)
    )
    places = min(max(decimals(scale), 4), 6)
    return (
        f"{place}: predicted {value_text(prediction.predicted, prediction.interval)}, "
        f"measured {prediction.measured:.{places}f}, error {prediction.error:+.{places}f}"
    )


def refusal_text(series: Series) -> str:
    """Reasons of the gates that refuse everything, or of all refusals."""
    gates = [g for g in series.fit.refusals if "*" in g.refuses] or series.fit.refusals
    return "; ".join(f"{gate.id}: {gate.reason}" for gate in gates)


def basis(view: View) -> str:
    """Form, metric, slice, method and coverage of the numbers above."""
    if not view.series:
        return ""
    methods = list(dict.fromkeys(q.method for s in view.series for q in s.quantities() if q.interval))
    parts = [
        view.series[0].fit.form.equation,
        f"x = {view.axis}",
        f"metric {target_words(view.target)}",
        *_slices(view),
    ]
    parts += [f"brackets: {' / '.join(methods)}"] if methods else []
    parts += coverages(view.series)
    return " · ".join(parts + _reservations(view.series))


def _slices(view: View) -> list[str]:
    """What the sweep holds fixed; with the architecture's name where they differ."""
    own = {s.architecture: s.slice for s in view.series if s.slice}
    if len(set(own.values())) <= 1:
        return list(dict.fromkeys(own.values()))
    return [f"{name} at {text}" for name, text in own.items()]


def coverages(series: Sequence[Series]) -> list[str]:
    """Coverage of the bands at the extrapolation a figure shows: measured, or `uncalibrated`."""
    found: dict[str, list[float]] = {}
    for one in series:
        ratio = extrapolation(one) if one.has_curve else None
        if ratio is not None:
            found.setdefault(coverage_at(one, ratio), []).append(ratio)
    return [f"coverage at ×{_range(ratios)}: {text}" for text, ratios in found.items()]


def _reservations(series: Sequence[Series]) -> list[str]:
    """What keeps a figure from being a law on record."""
    found = []
    if any(not s.is_law for s in series):
        found.append("a trend, not a law: learning rates not bracketed")
    most = max((len(missing_facts(s)) for s in series), default=0)
    return found + ([f"record incomplete: {most} facts missing"] if most else [])


def missing_facts(series: Series) -> list[str]:
    """Required facts that the fit record lacks."""
    return list(series.record["checklist"]["missing"])


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return low if low == high else f"{low}–{high}"


def extrapolation(series: Series) -> float | None:
    """Largest drawn axis value over the largest fitted one; None when nothing is held out."""
    held, span = series.rows(HELD_OUT), series.span
    return None if held.empty or span is None else float(held[series.axis].max()) / span[1]


def coverage_at(series: Series, ratio: float) -> str:
    """Measured coverage of nominal 95 % intervals at an extrapolation ratio, or `uncalibrated`."""
    measured = series.coverage(ratio)
    return "uncalibrated" if measured is None else f"{measured[0]:.2f} of nominal 0.95 ({measured[1]} held-out points)"


def joint_text(series: Series, columns: Mapping[str, str]) -> tuple[str, str]:
    """(numbers or the refusal, what they rest on) of a law of several axes."""
    parts = [
        series.fit.form.equation,
        *(f"{slot} = {column}" for slot, column in columns.items()),
        f"metric {target_words(series.target)}",
        "coefficients at the centre of the fitted rows",
        "open points held out, not fitted",
        *coverages([series]),
    ]
    rests_on = " · ".join(parts + _reservations([series]))
    if series.fit.refused:
        return f"no law. Refused: {refusal_text(series)}", rests_on
    return _quoted(series.quantities()) + _reasons(series, series.quantities()), rests_on
