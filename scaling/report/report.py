"""From a folder of runs to a law on paper: `fit.json`, figures and one self-contained page.

    summary = make_report("runs/quickstart")
    print_summary(summary)

What is written to `OUT/report/`:

    fit.json      the summary, the truth and the full record of every fit
    loss.png      the figure of the first axis (and loss.svg); further axes as loss_<axis>.png
    report.html   everything on one page: no script, no link, nothing loaded from elsewhere
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from recscale.scaling import laws
from recscale.scaling.laws.tables import axes as law_axes
from recscale.scaling.laws.tables.read import read as read_table
from recscale.scaling.records import provenance, runs
from recscale.scaling.records.files import write_atomically
from recscale.scaling.records.plain import plain

from . import figures as plots
from . import page as report_page
from . import truth as truths
from . import views
from .summary import build_summary, print_summary
from .truth import Truth
from .views import Series, View
from .wording import axis_words

__all__ = ["make_report", "print_summary"]

FOLDER = "report"
FIT, PLOT, PAGE = "fit.json", "loss", "report.html"

# The law drawn on every axis, and the joint law where sizes and examples vary freely.
VIEW_FORM, JOINT_FORM = "power_offset", "chinchilla"

_PACKAGES = ("recscale", "jax", "numpy", "scipy", "pandas", "matplotlib")


def make_report(
    out_dir: Path | str,
    *,
    form: str = VIEW_FORM,
    axes: Mapping[str, str] | Sequence[str] | str | None = None,
    target: str = "logloss",
    bootstrap: int = 1000,
    hold_out_largest: bool = True,
    truth: Truth | Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Fits every architecture of a run table, draws it and writes `OUT/report/`; returns the summary as plain data.

    Args:
        out_dir: sweep folder with `runs.parquet`, or with run folders from which it is collected.
        form: a law of one axis, drawn on every axis; or of several axes (chinchilla, kappa, ...): fitted jointly, while
            the axes are drawn with `power_offset`. Where sizes and examples vary freely, chinchilla is always added.
        axes: columns to draw, or slot -> column; None takes every axis that varies.
        target: metric column.
        bootstrap: resampled refits behind every interval; 0 for none.
        hold_out_largest: leave the largest value of each axis out of its fit and score the prediction.
        truth: known constants (keys asymptote, entropy_floor, alpha, exponents); None reads them from the runs.
        options: passed to `laws.fit` (seed, cluster, weights, huber_delta, profile, ...).

    Raises:
        FileNotFoundError: no runs. ValueError: an unknown column, form or option, or nothing varies.
    """
    out = Path(out_dir)
    table = _table(out)
    known = _truth(truth, table, out)
    options = {"bootstrap": bootstrap, **options}
    view_form, joint_form, columns, joint_axes = _forms(form, axes, table)
    drawn = views.make_views(
        table, form=view_form, axes=columns, target=target, hold_out_largest=hold_out_largest, **options
    )
    # Held-out scores of the first axis only: they refit the law at every cut.
    drawn[0] = views.scored(drawn[0])
    joint = views.joint_series(table, joint_form, joint_axes, target, hold_out_largest, **options) if joint_axes else []
    paths, figures = _draw(out / FOLDER, drawn, joint, joint_axes, known)
    summary = build_summary(out, drawn, joint, joint_axes, known, paths, table)
    summary = plain(summary | {"provenance": _provenance(out, table)})
    _write(out / FOLDER, summary, drawn, joint, figures, table)
    return summary


def _table(out: Path) -> pd.DataFrame:
    """The run table of a folder, collected if it has not been."""
    if not out.is_dir():
        raise FileNotFoundError(f"there is no folder {out}; name the --out folder of a sweep")
    if (out / runs.TABLE).exists():
        return read_table(out)
    return runs.collect(out)


def _truth(given: Truth | Mapping[str, Any] | None, table: pd.DataFrame, out: Path) -> Truth:
    if isinstance(given, Truth):
        return given
    return truths.from_mapping(given) if given is not None else truths.find(table, out)


def _forms(form: str, axes: Any, table: pd.DataFrame) -> tuple[str, str, list[str] | None, dict[str, str]]:
    """(form of the views, joint form, columns to draw or None, slot -> column of the joint law or empty)."""
    named = dict(axes) if isinstance(axes, Mapping) else {}
    columns = [axes] if isinstance(axes, str) else list(named.values() or axes or []) or None
    resolved = laws.forms.get(form, tuple(named) or None)
    if columns and not named and all(slot.name == slot.column for slot in resolved.slots):
        # The axes of a plain sum are whatever columns it is given.
        resolved = laws.forms.get(form, tuple(columns))
    if len(resolved.slots) > 1:
        slots = law_axes.resolve_axes(resolved, named or columns)
        return VIEW_FORM, form, columns or list(slots.values()), slots
    joint = law_axes.resolve_axes(laws.forms.get(JOINT_FORM), None)
    wanted = views.both_vary(table) and (columns is None or set(joint.values()) <= set(columns))
    return resolved.id, JOINT_FORM, columns, joint if wanted else {}


def _draw(
    folder: Path, drawn: Sequence[View], joint: Sequence[Series], columns: Mapping[str, str], truth: Truth
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Writes the figures; returns their paths and (title, svg) for the page."""
    files: dict[str, str] = {}
    figures = []
    for number, view in enumerate(drawn):
        stem = folder / (PLOT if number == 0 else f"{PLOT}_{view.axis}")
        png, svg = plots.save(plots.law_figure(view, truth=truth), stem)
        files[view.axis] = str(png)
        figures.append((f"{view.target} against {axis_words(view.axis)}", svg.read_text(encoding="utf-8")))
    for series in joint if len(columns) == 2 else ():
        stem = folder / f"{PLOT}_joint_{_file_name(series.architecture)}"
        png, svg = plots.save(plots.joint_figure(series, dict(columns)), stem)
        files[f"joint {series.architecture}"] = str(png)
        figures.append((f"{series.architecture}: joint fit", svg.read_text(encoding="utf-8")))
    named = {"plot": str(folder / f"{PLOT}.png"), "page": str(folder / PAGE), "fit": str(folder / FIT)}
    return {**named, "figures": files}, figures


def _file_name(architecture: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in architecture)


def _write(
    folder: Path,
    summary: dict[str, Any],
    drawn: Sequence[View],
    joint: Sequence[Series],
    figures: Sequence[tuple[str, str]],
    table: pd.DataFrame,
) -> None:
    """`fit.json` and `report.html`, each replaced in one step."""
    records = {view.axis: {s.architecture: s.record for s in view.series} for view in drawn}
    if joint:
        records["joint"] = {s.architecture: s.record for s in joint}
    text = json.dumps(plain(summary | {"records": records}), indent=1)
    write_atomically(folder / FIT, text + "\n")
    write_atomically(folder / PAGE, report_page.page(summary, figures, drawn, joint, records, table))


def _provenance(out: Path, table: pd.DataFrame) -> dict[str, Any]:
    """What made this report: date, command, versions; and the device and versions the runs were trained with."""
    trained: dict[str, set[str]] = {}
    for folder in sorted((out / "runs").glob("*")):
        record = runs.read_record(folder) or {}
        for name, version in (record.get("versions") or {}).items():
            trained.setdefault(name, set()).add(str(version))
    devices = sorted(table["device"].dropna().astype(str).unique()) if "device" in table.columns else []
    return {
        "date": provenance.now(),
        "command": provenance.command(),
        "versions": provenance.versions(_PACKAGES),
        "trained_on": devices,
        "trained_with": {name: sorted(found) for name, found in sorted(trained.items())},
    }
