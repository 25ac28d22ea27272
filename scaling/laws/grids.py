"""Results as tables of texts with remarks: what commands print and what the page of a report lays out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .comparing.decision_accuracy import DecisionAccuracy
from .fitting.law_fit import LawFit
from .isoflop.approaches import Approach
from .judgement.specification import DIMENSIONS, SpecificationCurve
from .published.beside import Beside


@dataclass(frozen=True)
class Grid:
    """A title, the names of the columns, rows of texts, and lines to be read with them."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    remarks: Sequence[str] = ()


def number(value: float | None, spec: str = ".4g") -> str:
    """A number, or `refused`."""
    return "refused" if value is None else format(value, spec)


def between(interval: Sequence[float] | None, spec: str = ".4g") -> str:
    """`low to high`, or nothing."""
    return "" if interval is None else f"{format(interval[0], spec)} to {format(interval[1], spec)}"


def of_decisions(found: DecisionAccuracy) -> Grid:
    """How often smaller scales, and laws of them, order as the largest does."""
    rows = [
        (a.kind, a.name, f"{a.right} of {a.pairs}", number(a.share, ".2f") if a.pairs else "",
         between(a.interval, ".2f"), a.note)
        for a in found.accuracies
    ]  # fmt: skip
    remarks = [found.verdict, *(f"too close to call: {a} and {b}" for a, b in found.too_close)]
    headings = ("by", "", "right", "share", "95 % (Wilson)", "")
    return Grid(f"Order at scale {found.target_scale:.4g}", headings, rows, remarks)


def of_approaches(found: Sequence[Approach], remarks: Sequence[str] = ()) -> Grid:
    """The exponents of compute-optimal allocation by several approaches."""
    rows = [
        (f.name, number(f.a), between(f.interval), "" if f.a is None else number(f.b), f.refused or f.rests_on)
        for f in found
    ]
    headings = ("approach", "a", "95 %", "b", "rests on, or why refused")
    return Grid("N_opt = G C^a, D_opt = G' C^b", headings, rows, remarks)


def of_splits(law: LawFit, found: Sequence[Mapping[str, Any]], remarks: Sequence[str] = ()) -> Grid:
    """Budgets with their best split, as `allocation.splits` gives them."""
    headings, rows = ["budget"], [[f"{entry['budget']:.4g}"] for entry in found]
    for slot in law.form.axes:
        headings += [law.rows.columns[slot], "95 %"]
        for row, entry in zip(rows, found, strict=True):
            row += [number(entry.get(slot)), between(entry.get(f"{slot}_interval"))]
    for row, entry in zip(rows, found, strict=True):
        row += [number(entry["metric"], ".5g"), entry["refused"]]
    return Grid("Best split of a budget", [*headings, law.rows.target, ""], rows, remarks)


def of_specification(curve: SpecificationCurve) -> Grid:
    """The spread of a number over choices, and its median under each of them."""
    if curve.median is None or curve.low is None or curve.high is None:
        spread = f"{curve.quantity}: refused under all {len(curve.rows)} specifications"
    else:
        own = "refused" if curve.headline is None else f"{curve.headline:.4g}, rank {curve.rank} of {curve.count}"
        spread = (
            f"{curve.quantity}: median {curve.median:.4g}, from {curve.low:.4g} to {curve.high:.4g} (5 to 95 %) over "
            f"{curve.count} specifications of {curve.possible}; headline {own}"
        )
    varied = [name for name in DIMENSIONS if curve.rows[name].nunique(dropna=False) > 1]
    rows = [
        (name, str(choice), f"{len(part)}", number(part["value"].median() if part["value"].notna().any() else None))
        for name in varied
        for choice, part in curve.rows.groupby(name, dropna=False, sort=False)
    ]
    untried = [f"form {name} not tried: {reason}" for name, reason in curve.inadmissible_forms.items()]
    return Grid("Median by choice", ("choice", "taken", "specifications", curve.quantity), rows, [spread, *untried])


def of_beside(label: str, found: Sequence[Beside], remarks: Sequence[str] = ()) -> Grid:
    """Published exponents and fitted ones."""
    rows = [
        (f.name, number(f.published), between(f.published_interval), number(f.fitted), between(f.fitted_interval),
         f.verdict)
        for f in found
    ]  # fmt: skip
    return Grid(label, ("", "published", "95 %", "fitted", "95 %", ""), rows, remarks)
