"""Fits the runs of a sweep and reports the laws: `fit.json`, figures and one self-contained page.

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
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from recscale.scaling import laws
from recscale.scaling.laws.fitting.law_fit import Settings
from recscale.scaling.laws.forms.registry import ONE_AXIS, SEVERAL_AXES
from recscale.scaling.laws.published import catalogue
from recscale.scaling.laws.tables import axes as law_axes
from recscale.scaling.laws.tables.read import read as read_table
from recscale.scaling.records import provenance, runs
from recscale.scaling.records.files import write_atomically
from recscale.scaling.records.plain import plain

from . import estimands, figures, questions, views
from . import truth as truths
from .contents import Report
from .page import page
from .questions import Published
from .summary import build_summary, print_summary
from .truth import Truth
from .wording import axis_words

__all__ = ["make_report", "print_summary"]

FOLDER = "report"
FIT, PLOT, PAGE = "fit.json", "loss", "report.html"

# The law drawn on every axis, and the joint law where sizes and examples vary freely.
VIEW_FORM, JOINT_FORM = ONE_AXIS, SEVERAL_AXES

_PACKAGES = ("recscale", "jax", "numpy", "scipy", "pandas", "matplotlib")


def make_report(
    out_dir: Path | str,
    *,
    form: str = VIEW_FORM,
    axes: Mapping[str, str] | Sequence[str] | str | None = None,
    target: str | None = None,
    bootstrap: int = Settings.bootstrap,
    hold_out_largest: bool = True,
    truth: Truth | Mapping[str, Any] | None = None,
    published: Published | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Fits every architecture of a run table, draws it and writes `OUT/report/`; returns the summary as plain data.

    Args:
        out_dir: folder of a sweep's runs, or of a `runs.parquet`.
        form: a law of one axis, drawn on every axis; or of several axes (chinchilla, kappa, ...): fitted jointly, while
            the axes are drawn with `power_offset`. Where sizes and examples vary freely, chinchilla is always added.
        axes: columns to draw, or slot -> column; None takes every axis that varies.
        target: metric column; None is logloss, or loss where the table has no logloss.
        bootstrap: resampled refits behind every interval; 0 for none.
        hold_out_largest: leave the largest value of each axis out of its fit and score the prediction.
        published: a published law to draw beside the first axis, and to hold the fitted exponents against.
        truth: known constants (keys asymptote, entropy_floor, alpha, exponents); None reads them from the runs.
        options: passed to `laws.fit` (seed, cluster, weights, huber_delta, profile, ...).

    Raises:
        FileNotFoundError: no runs. ValueError: an unknown column, form or option, or nothing varies. KeyError: an
            unknown published law.
    """
    options = {"bootstrap": bootstrap, **options}
    if not Path(out_dir).is_dir():
        raise FileNotFoundError(f"there is no folder {out_dir}; name the --out folder of a sweep")
    if published is not None:
        catalogue.load(published.law_id)  # an unknown one is named before anything is fitted
    report = fitted(Path(out_dir), form, axes, target, hold_out_largest, truth, options, published)
    paths, figures = _draw(report)
    summary = summarised(report, paths)
    folder = report.out / FOLDER
    write_atomically(folder / FIT, json.dumps(plain(summary | {"records": report.records}), indent=1) + "\n")
    write_atomically(folder / PAGE, page(report, summary, figures))
    return summary


def summarised(report: Report, paths: Mapping[str, Any]) -> dict[str, Any]:
    """The summary of a report with its provenance, as plain data."""
    return plain(build_summary(report, paths) | {"provenance": _provenance(report)})


def fitted(
    out: Path,
    form: str,
    axes: Mapping[str, str] | Sequence[str] | str | None,
    target: str | None,
    hold_out: bool,
    truth: Truth | Mapping[str, Any] | None,
    options: Mapping[str, Any],
    published: Published | None,
) -> Report:
    """The runs of a sweep's folder with their laws; arguments and errors as `make_report`'s."""
    table = views.with_rows_of_a_pass(read_table(out))
    target = target or law_axes.usual_target(table)
    known = _truth(truth, table, out)
    view_form, joint_form, columns, joint_axes = _forms(form, axes, table)
    drawn = views.make_views(table, form=view_form, axes=columns, target=target, hold_out_largest=hold_out, **options)
    # Held-out scores of the first axis only: they refit the law at every cut.
    drawn[0] = views.scored(drawn[0])
    joint = views.joint_series(table, joint_form, joint_axes, target, hold_out, **options) if joint_axes else []
    told = {view.axis: estimands.of_view(view, known, options) for view in drawn}
    answers = questions.asked(drawn[0], joint, joint_axes, options)
    if published is not None:
        curve, beside = questions.overlay(drawn[0], published, options)
        drawn[0] = replace(drawn[0], published=curve)
        answers.append(beside)
    return Report(out, table, tuple(drawn), tuple(joint), joint_axes, known, told, answers)


def named(sources: Sequence[Path]) -> dict[str, Path]:
    """Sources by a short name: the last part of the path, or the whole path where two end alike."""
    names = [source.stem if source.is_file() else source.resolve().name for source in sources]
    pairs = zip(names, sources, strict=True)
    return {name if names.count(name) == 1 else str(source): source for name, source in pairs}


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


def _draw(report: Report) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Writes the figures; returns their paths and (title, svg) for the page."""
    folder, files, drawn = report.out / FOLDER, {}, []

    def save(name: str, title: str, stem: str, figure: Figure) -> None:
        files[name] = str(figures.save(figure, folder / f"{stem}.png"))
        svg = figures.save(figure, folder / f"{stem}.svg")
        drawn.append((title, svg.read_text(encoding="utf-8")))

    for number, view in enumerate(report.views):
        stem = PLOT if number == 0 else f"{PLOT}_{view.axis}"
        figure = figures.study_figure(view, truth=report.log_truth)
        save(view.axis, f"{view.target} against {axis_words(view.axis)}", stem, figure)
    for series in report.joint if len(report.joint_axes) == 2 else ():
        name, figure = series.architecture, figures.joint_figure(series, report.joint_axes)
        save(f"joint {name}", f"{name}: joint fit", f"{PLOT}_joint_{_file_name(name)}", figure)
    named = {"plot": str(folder / f"{PLOT}.png"), "page": str(folder / PAGE), "fit": str(folder / FIT)}
    return {**named, "figures": files}, drawn


def _file_name(architecture: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in architecture)


def _provenance(report: Report) -> dict[str, Any]:
    """What made this report: date, command, versions; and the device and versions the runs were trained with."""
    trained: dict[str, set[str]] = {}
    for folder in sorted((report.out / "runs").glob("*")):
        record = runs.read_record(folder) or {}
        for name, version in (record.get("versions") or {}).items():
            trained.setdefault(name, set()).add(str(version))
    devices = report.table["device"].dropna().astype(str) if "device" in report.table.columns else []
    return {
        "date": provenance.now(),
        "command": provenance.command(),
        "versions": provenance.versions(_PACKAGES),
        "trained_on": sorted(set(devices)),
        "trained_with": {name: sorted(found) for name, found in sorted(trained.items())},
    }
