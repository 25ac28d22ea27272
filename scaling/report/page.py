"""The page of a report: one HTML file with inline style and inline SVG, readable without a network or a script.

The markup is the template `page.html.j2`, in which every value is escaped; here is what it is filled with.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup, escape

from recscale.pallas_kernels import names
from recscale.scaling.data.metrics import GROUP, METRICS, describe
from recscale.scaling.records.number_text import amount, value_text

from .captions import basis, refusal_text
from .contents import Report
from .page_environment import page_environment, page_parts
from .summary import true_text
from .truth import EXPONENT_UNITS
from .wording import axis_words, shortened

# Columns of the table of runs, where the run table has them.
RUN_COLUMNS = (
    "run_id",
    "architecture",
    "status",
    "role",
    "reasons",
    "seed",
    "dense_params",
    "active_params",
    "encoder_params",
    "position_params",
    "backbone_params",
    "head_params",
    "embedding_params",
    "examples",
    "epochs",
    "train_flops",
    "history_length",
    "memory_slots",
    "lr_dense",
    "lr_bracketed",
    *(metric.name for metric in METRICS.values() if metric.on_page),
    "wall_s",
    "rows_per_s",
    "device",
)

# Sections of a fit record, in the order a reader checks them.
RECORD_SECTIONS = ("hypothesis", "runs", "fit", "result", "validation", "ranking", "provenance")

# Of a record's field on the page; the rest is in the JSON file.
_FIELD_CHARACTERS = 160


def page(report: Report, summary: Mapping[str, Any], figures: Sequence[tuple[str, str]]) -> str:
    """The whole page as text.

    Args:
        summary: of the report, as plain data, with its provenance.
        figures: (title, SVG text) in the order they are shown.
    """
    return _template().render(**_variables(report, summary, figures))


def page_contents(report: Report, summary: Mapping[str, Any]) -> Markup:
    """What stands below the figures: every number, refusal, run and record of a report, for another page."""
    template = _template()
    context = template.new_context(_variables(report, summary, ()))
    return Markup("".join(template.blocks["contents"](context)))


def _variables(report: Report, summary: Mapping[str, Any], figures: Sequence[tuple[str, str]]) -> dict[str, Any]:
    along = [(series, series.axis) for view in report.views for series in view.series]
    predictions = [(series, series.prediction()) for series, _ in along]
    return {
        "report": report,
        "summary": summary,
        "truth": summary["truth"],
        "figures": figures,
        "fits": [*along, *((series, "") for series in report.joint)],
        "predictions": [(series, found) for series, found in predictions if found is not None],
        "scored": [series for series, _ in along if series.rolling is not None],
        "runs": _runs(report),
    }


@functools.cache
def _template() -> jinja2.Template:
    environment = page_environment()
    environment.filters |= {
        "inline": inline_svg,
        "measured": lambda value: _number(value, "{:.4g}"),
        "cell": cell_text,
        "short_json": lambda value: shortened(json.dumps(value), _FIELD_CHARACTERS),
    }
    environment.globals |= {
        "axis_words": axis_words,
        "basis": basis,
        "refusal_text": refusal_text,
        "sections": RECORD_SECTIONS,
        "table": page_parts("table"),
        "true_text": true_text,
        "units": EXPONENT_UNITS,
        "value_text": value_text,
        "versions": _versions,
    }
    return environment.get_template("page.html.j2")


def inline_svg(svg: str, number: int, title: str) -> Markup:
    """The `<svg>` element alone, its ids prefixed so that several figures can share a page."""
    prefix = f"f{number}-"
    body = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # An id that another figure also uses would make a reference draw that figure's shape.
    body = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', body)
    body = re.sub(r'(xlink:href|href)="#([^"]+)"', rf'\1="#{prefix}\2"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}\1)", body)
    return Markup(body.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1))


def _runs(report: Report) -> dict[str, Any]:
    """Every run of the table, diverged and failed ones included, with its role on the first axis: names of the columns,
    places of the numeric ones, and (cells, whether the run is lost) a row.
    """
    parts = [series.frame for series in report.first.series]
    frame = pd.concat(parts, ignore_index=True) if parts else report.table
    shown = [*RUN_COLUMNS, *(name for name in names.available(GROUP, {}) if describe(name).on_page)]
    columns = [c for c in shown if c in frame.columns and frame[c].notna().any() and (frame[c].astype(str) != "").any()]
    order = [c for c in ("architecture", "dense_params", "examples", "lr_dense", "seed") if c in frame.columns]
    frame = frame.sort_values(order, ignore_index=True)
    roles = frame["role"] if "role" in frame else [""] * len(frame)
    rows = zip(frame[columns].itertuples(index=False), roles, strict=True)
    return {
        "columns": columns,
        "numeric": [k for k, c in enumerate(columns) if pd.api.types.is_numeric_dtype(frame[c])],
        "rows": [(cells, role in ("diverged", "failed")) for cells, role in rows],
    }


def cell_text(value: Any) -> str:
    """A cell of the table of runs: four significant digits, large numbers with a suffix."""
    if isinstance(value, int | float | np.number) and not isinstance(value, bool) and value == value:
        return amount(float(value), 4)
    return _number(value, "{}")


def _number(value: Any, digits: str) -> str:
    """A cell's text: a float with these digits, nothing for what is missing."""
    if value is None or value is pd.NA or (isinstance(value, float) and value != value):
        return ""
    return digits.format(value) if isinstance(value, float) else str(value)


def _versions(found: Mapping[str, Any]) -> str:
    """`jax 0.10.2, numpy 2.3.0 / 2.4.1`."""
    return ", ".join(f"{name} {v if isinstance(v, str) else ' / '.join(v)}" for name, v in found.items() if v)
