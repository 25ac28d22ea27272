"""A fitted exponent beside a published one: does either lie inside the other's interval?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from recscale.scaling.laws.fitting.law_fit import LawFit, Refused
from recscale.scaling.laws.grids import Grid, between, number
from recscale.scaling.laws.judgement.gates import COMPARISON

from .catalogue import CannotPlot, PublishedCurve, overlay

_NORMAL = 1.96  # half-width of a 95 % interval in standard errors


@dataclass(frozen=True)
class Beside:
    """One exponent, published and fitted; intervals are 95 %, None where nothing is printed or resampled."""

    name: str
    published: float
    published_interval: tuple[float, float] | None
    fitted: float | None
    fitted_interval: tuple[float, float] | None
    verdict: str


def beside(
    law_id: str, law: LawFit, *, metric: str, axes: Sequence[str], convention: str | Sequence[str] | None
) -> tuple[PublishedCurve, list[Beside]]:
    """The published curve and its exponents beside those of a fit of the same form.

    `metric`, `axes` and `convention` say what was fitted in the words of the published law. Raises OverlayRefused where
    they do not match it, CannotPlot for a law without constants, Refused for a fit that may not be compared.
    """
    told = convention if convention is None or isinstance(convention, str) else list(convention)
    curve = overlay(law_id, axes=list(axes), metric=metric, convention=told)
    if any(COMPARISON in gate.refuses for gate in law.refusals) or law.refused:
        raise Refused(f"the fit may not be compared: {'; '.join(gate.reason for gate in law.refusals)}")
    printed = curve.law.parameters
    names = [p.name for p in law.form.parameters if p.role in ("exponent", "slope") and p.name in printed]
    if not names:
        raise CannotPlot(f"{law_id!r} prints no exponent of form {law.form.id}")
    return curve, [_one(name, curve, law) for name in names]


def _one(name: str, curve: PublishedCurve, law: LawFit) -> Beside:
    theirs, se = float(curve.law.parameters[name]), (curve.law.parameters.get("se") or {}).get(name)
    around = None if se is None else (theirs - _NORMAL * se, theirs + _NORMAL * se)
    mine, interval = law.params[name], law.intervals.get(name)
    if mine is None:
        verdict = f"the fitted one is refused ({law.reason(name)})"
    elif interval is None and around is None:
        verdict = "neither has an interval"
    else:
        inside = [
            f"{what} {'inside' if ends[0] <= value <= ends[1] else 'outside'} {whose} interval"
            for what, value, whose, ends in (
                ("the published one", theirs, "the fitted one's", interval),
                ("the fitted one", mine, "the published one's", around),
            )
            if ends is not None
        ]
        verdict = "; ".join(inside)
    return Beside(name, theirs, around, mine, interval, verdict)


def as_grid(label: str, found: Sequence[Beside], remarks: Sequence[str] = ()) -> Grid:
    """Published exponents and fitted ones."""
    rows = [
        (f.name, number(f.published), between(f.published_interval), number(f.fitted), between(f.fitted_interval),
         f.verdict)
        for f in found
    ]  # fmt: skip
    return Grid(label, ("", "published", "95 %", "fitted", "95 %", ""), rows, remarks)
