"""Sections of a report beyond its laws: on which choices an exponent depends, what decisions small runs support, how to
spend compute, and whether published slopes are the same.

A question that the runs cannot answer stands there with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from recscale.scaling.laws.comparing import decision_accuracy
from recscale.scaling.laws.fitting.law_fit import Refused
from recscale.scaling.laws.forms import registry
from recscale.scaling.laws.grids import Grid
from recscale.scaling.laws.isoflop import allocation, approaches
from recscale.scaling.laws.judgement import specification
from recscale.scaling.laws.published import beside, catalogue
from recscale.scaling.laws.tables.axes import usual_cluster

from .series import FITTED, HELD_OUT, Series, View
from .views import fitted_series

_SPECIFICATIONS = 24  # refits an architecture; `recscale specification` takes more
_BEYOND = (1.0, 10.0)  # budgets of compute, in units of the largest run's
# Columns that settings may share as a level, the first that serves.
_LEVELS = ("match_id", "params_target", "flops_target")


@dataclass(frozen=True)
class Published:
    """A published law to be drawn, and what the fitted axis and metric are in its words."""

    law_id: str
    metric: str | None = None
    convention: tuple[str, ...] = ()


def asked(view: View, joint: Sequence[Series], joint_axes: Mapping[str, str], options: Mapping[str, Any]) -> list[Grid]:
    """The sections of a report: choices, decisions, and compute where a joint law was fitted."""
    found = [_grid(f"Choices: {series.architecture}", lambda s=series: _choices(s)) for series in view.series]
    if len(view.series) > 1:
        found.append(_grid("Decisions from smaller runs", lambda: _decisions(view)))
    for series in joint if set(joint_axes) == {"N", "D"} else ():
        name = series.architecture
        found.append(_grid(f"Compute: {name}", lambda s=series: _allocation(s)))
        rows = series.rows(FITTED, HELD_OUT)
        found.append(_grid(f"IsoFLOP: {name}", lambda r=rows: _isoflop(r, joint_axes, view.target, options)))
    return found


def overlay(
    view: View, published: Published, options: Mapping[str, Any]
) -> tuple[catalogue.PublishedCurve | None, Grid]:
    """The published curve, where it shows what the view does, and its exponents beside the fitted ones."""
    law = catalogue.load(published.law_id)
    title = f"Beside {law.label}"
    curve, rows, remarks = None, [], []
    for series in view.series:
        try:
            form = registry.get(law.form).id
            same = series.fit.form.id == form
            own = series if same else _again(series, form, options)
            curve, found = beside.beside(
                law.id, own.fit, metric=published.metric or view.target, axes=[view.axis],
                convention=published.convention or None,
            )  # fmt: skip
            rows += [(series.architecture, *row) for row in beside.as_grid("", found).rows]
        except (KeyError, ValueError) as reason:
            remarks.append(f"{series.architecture}: {_words(reason)}")
    headings = ("architecture", *beside.as_grid("", []).headings)
    return curve, Grid(title, headings, rows, [*remarks, *([law.caution] if law.caution else [])])


def _again(series: Series, form: str, options: Mapping[str, Any]) -> Series:
    asked = {**options, "bootstrap": 0}
    return fitted_series(series.architecture, series.frame, series.slice, form, series.axis, series.target, asked)


def _grid(title: str, answer: Callable[[], Grid]) -> Grid:
    """The answer under this title, or the reason why there is none."""
    try:
        grid = answer()
    except (KeyError, ValueError) as reason:
        return Grid(title, (), (), [_words(reason)])
    return Grid(title, grid.headings, grid.rows, grid.remarks)


def _words(reason: Exception) -> str:
    return str(reason.args[0]) if reason.args else str(reason)


def _choices(series: Series) -> Grid:
    exponent = series.exponent()
    if exponent is None or exponent.value is None:
        raise Refused(f"the exponent is refused ({', '.join(exponent.gates) if exponent else 'none in this form'})")
    slot = series.fit.form.slots[0].name
    cluster = usual_cluster(series.frame, [series.axis])
    curve = specification.specification_curve(
        series.rows(FITTED), series.fit.form.id, {slot: series.axis}, target=series.target, quantity=exponent.name,
        cluster=cluster, limit=_SPECIFICATIONS,
    )  # fmt: skip
    return specification.as_grid(curve)


def _decisions(view: View) -> Grid:
    rows = pd.concat([series.rows(FITTED, HELD_OUT).assign(architecture=series.architecture) for series in view.series])
    shared = [c for c in _LEVELS if c in rows and rows[c].notna().all()]
    level = shared[0] if shared else view.axis
    if level == "match_id":
        # Partners have one name and nearly one size: the level is the size.
        rows = rows.assign(level=rows.groupby(level)[view.axis].transform("mean"))
        level = "level"
    found = decision_accuracy.decision_accuracy(rows, scale=level, axis=view.axis, target=view.target)
    return decision_accuracy.as_grid(found)


def _allocation(series: Series) -> Grid:
    per_unit, remark = allocation.per_unit_of(series.fit)
    largest = per_unit * float(series.fit.rows.stacked.prod(axis=1).max())
    found = allocation.splits(series.fit, [factor * largest for factor in _BEYOND], per_unit)
    return allocation.as_grid(series.fit, found, [remark, *allocation.exponents_line(series.fit)])


def _isoflop(rows: pd.DataFrame, axes: Mapping[str, str], target: str, options: Mapping[str, Any]) -> Grid:
    draws = int(options.get("bootstrap", 0))
    found, _, remarks = approaches.approaches(rows, size=axes["N"], data=axes["D"], target=target, bootstrap=draws)
    return approaches.as_grid(found, remarks)
