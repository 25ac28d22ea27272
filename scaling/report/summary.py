"""The summary of a report as plain data, and its few lines on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recscale.scaling.records.number_text import value_text

from .captions import coverages, headline, missing_facts, series_text
from .contents import Report
from .estimands import FORM, TARGET
from .series import FITTED, HELD_OUT, Quantity, Series
from .wording import axis_words


def build_summary(report: Report, paths: Mapping[str, Any]) -> dict[str, Any]:
    """Everything a reader or a script asks of a report.

    Keys: title, summary (lines of text), target, form, architectures (name -> entry of the first axis), axes (axis ->
    name -> entry), joint (name -> entry), estimands (axis -> name -> what its exponent is an estimate of), answers
    (tables to further questions), truth, notes, runs (status -> count), paths. An entry holds E and exponent as {value,
    interval, method, refused}, all parameters, the held-out prediction, and how many rows took part.
    """
    first, table = report.first, report.table
    axes = {view.axis: {s.architecture: _entry(s) for s in view.series} for view in report.views}
    statuses = table["status"].value_counts().to_dict() if "status" in table.columns else {"done": len(table)}
    notes = dict.fromkeys(note for view in report.views for note in view.notes)
    return {
        "title": _title(report),
        "summary": [headline(s) for s in first.series],
        "out": str(report.out),
        "axis": first.axis,
        "target": first.target,
        "form": first.form,
        "architectures": axes[first.axis],
        "axes": axes,
        "joint": {s.architecture: _joint_entry(s, report.joint_axes) for s in report.joint},
        "estimands": {
            axis: {one.architecture: one.as_dict() for one in found} for axis, found in report.estimands.items()
        },
        "answers": [vars(grid) for grid in report.answers],
        "truth": report.truth.as_dict(),
        "notes": [*notes, *report.truth.notes],
        "runs": {str(name): int(count) for name, count in statuses.items()},
        "paths": dict(paths),
    }


def print_summary(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Fitted floor and exponent of every architecture, on a known log beside what else they could be estimates of;
    refusals by name, and the paths.
    """
    console = console or Console()
    console.print(f"[bold]{escape(summary['title'])}[/bold]", highlight=False)
    told = summary["estimands"].get(summary["axis"], {})
    # Where the law asked for is the one with E free, its numbers stand there.
    if not told or (summary["form"], summary["target"]) != (FORM, TARGET):
        console.print(_parameter_table(summary))
    lines = [
        f"{architecture}, {what} ({words}): {floor}, {exponent}"
        for architecture, one in told.items()
        for what, floor, exponent, words in one["text"]
    ]
    notes = dict.fromkeys([*(one["without"] for one in told.values() if one["without"]), *summary["notes"]])
    lines += [f"{name}: {row['rows_text']}" for name, row in summary["architectures"].items()]
    lines += [*_refusals(summary), *summary["summary"], *(f"note: {note}" for note in notes)]
    for line in lines:
        console.print(escape(line), highlight=False)
    for name in ("plot", "page"):
        console.print(f"{name}  {escape(summary['paths'][name])}", highlight=False, soft_wrap=True)


def _parameter_table(summary: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    for name in ("", "floor", f"exponent of {axis_words(summary['axis'])}"):
        table.add_column(name, no_wrap=True)
    for architecture, row in summary["architectures"].items():
        table.add_row(architecture, *(escape(_short(row[name])) for name in ("E", "exponent")))
    return table


def _short(entry: Mapping[str, Any] | None) -> str:
    """`E = 0.42 [0.41, 0.43]`, or which gates refuse it."""
    if entry is None:
        return "not in this form"
    if entry["value"] is None:
        return f"{entry['name']} refused ({', '.join(entry['gates'])})"
    return f"{entry['name']} = {fitted_text(entry)}"


def _refusals(summary: Mapping[str, Any]) -> list[str]:
    """One line per architecture and reason: which numbers are refused, and by what."""
    lines = []
    for architecture, row in summary["architectures"].items():
        by_reason: dict[str, list[str]] = {}
        for entry in (row["E"], row["exponent"]):
            if entry is not None and entry["value"] is None:
                by_reason.setdefault(entry["refused"], []).append(entry["name"])
        for reason, names in by_reason.items():
            lines.append(f"{architecture}: {' and '.join(names)} refused. {reason}")
    return lines


def true_text(value: float | None, unit: str) -> str:
    """`0.3500 per quantum known`, or `unknown`."""
    return "unknown" if value is None else f"{value:.4f} {unit}".strip()


def fitted_text(entry: Mapping[str, Any]) -> str:
    """A value with its interval, or the refusal with its reason."""
    if entry["value"] is None:
        return f"refused: {entry['refused']}"
    text = value_text(entry["value"], tuple(entry["interval"]) if entry["interval"] else None)
    return text if entry["method"].startswith("95") else f"{text} ({entry['method']})"


def _title(report: Report) -> str:
    """Sweep, log and axis in one line."""
    table, view = report.table, report.first

    def names(column: str) -> str:
        found = table[column].dropna().astype(str).unique() if column in table.columns else []
        return ", ".join(sorted(found))

    log = " ".join(part for part in (names("dataset"), names("preset")) if part)
    sweep = names("sweep") or report.out.name
    return f"{sweep}: {view.target} against {axis_words(view.axis)}" + (f" on {log}" if log else "")


def _entry(series: Series) -> dict[str, Any]:
    prediction = series.prediction()
    fitted = series.rows(FITTED)
    return {
        "axis": series.axis,
        "form": series.fit.form.id,
        "equation": series.fit.form.equation,
        "E": _named(series.floor()),
        "exponent": _named(series.exponent()),
        "parameters": {q.name: q.as_dict() | {"role": q.role} for q in series.quantities()},
        "fitted_range": list(series.span) if series.span else None,
        "rows_text": _rows_text(series),
        "fitted_rows": len(fitted),
        "fitted_sizes": int(fitted[series.axis].nunique()),
        "clusters": len(series.fit.rows.cluster_labels),
        "held_fixed": series.slice,
        "held_out": None if prediction is None else prediction.as_dict(),
        "coverage": coverages([series]),
        "record_missing": missing_facts(series),
        "roles": {str(k): int(v) for k, v in series.frame["role"].value_counts().items()},
        "law": series.is_law,
        "refusals": [gate.as_dict() for gate in series.fit.refusals],
        "warnings": list(series.fit.warnings),
        "text": series_text(series),
    }


def _rows_text(series: Series) -> str:
    """Which rows were fitted, and what became of the others."""
    counts = series.frame["role"].value_counts().drop(FITTED, errors="ignore")
    others = ", ".join(f"{count} {role}" for role, count in counts.items())
    return f"fitted to {series.fit.rows.described}" + (f"; not fitted: {others}" if others else "")


def _named(quantity: Quantity | None) -> dict[str, Any] | None:
    return None if quantity is None else {"name": quantity.name, **quantity.as_dict()}


def _joint_entry(series: Series, columns: Mapping[str, str]) -> dict[str, Any]:
    """The joint law of one architecture, with the root-mean-square error over the held-out size."""
    held = series.rows(HELD_OUT)
    error = None
    if len(held) and series.has_curve:
        given = {slot: held[column].to_numpy(float) for slot, column in columns.items()}
        predicted = series.fit.predict(given, beyond_range=True)
        error = float(np.sqrt(np.mean((predicted - held[series.target].to_numpy(float)) ** 2)))
    return {
        "form": series.fit.form.id,
        "equation": series.fit.form.equation,
        "axes": dict(columns),
        "parameters": {q.name: q.as_dict() | {"role": q.role} for q in series.quantities()},
        "derived": {
            name: {"value": value, "interval": series.fit.intervals.get(name)}
            for name, value in series.fit.derived.items()
        },
        "fitted_rows": len(series.rows(FITTED)),
        "held_out_rows": len(held),
        "held_out_rms_error": error,
        "refusals": [gate.as_dict() for gate in series.fit.refusals],
    }
