"""The page of a report: one HTML file with inline style and inline SVG, readable without a network or a script."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from recscale.pallas_kernels import names
from recscale.scaling.data.metrics import GROUP, METRICS, describe
from recscale.scaling.records.number_text import value_text

from .captions import basis, refusal_text
from .summary import true_text
from .truth import EXPONENT_UNITS
from .views import Quantity, Series, View
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

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; color: #1b1b1b;
  background: #fff; max-width: 1120px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.55rem; line-height: 1.25; margin: 0 0 .4rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
.lead { font-size: 1.05rem; margin: .25rem 0; }
.quiet { color: #555; }
figure { margin: 1.2rem 0; }
figure svg { width: 100%; height: auto; }
figcaption { color: #555; font-size: .88rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; margin: .4rem 0 1rem; }
th, td { text-align: left; vertical-align: top; padding: .22rem .7rem .22rem 0; border-bottom: 1px solid #ececec; }
th { border-bottom: 1px solid #999; font-weight: 600; white-space: nowrap; }
td.num { text-align: right; white-space: nowrap; }
tr.lost td { background: #fdf1ea; }
.no { color: #9b3b00; }
.yes { color: #00664b; }
code { font-size: .9em; overflow-wrap: anywhere; }
details { margin: .4rem 0; }
summary { cursor: pointer; font-weight: 600; }
@media print { body { max-width: none; margin: 0; } details > * { display: block; } }
"""

_MEANING = """
<p>On this log the truth is known, and it means something precise. The <b>asymptote</b> E<sub>&infin;</sub> is the loss
with the resource unlimited: every term of the teacher known, its infinite tail included. No model can reach it on a
finite log. The <b>entropy floor</b> H* is the loss of the Bayes predictor from the inputs that models are given;
nothing goes below it except by chance. The <b>exponent</b> belongs to the teacher: in the direction of dense parameters
it counts <em>quanta known</em>, not parameters. A network's exponent in dense parameters need not equal it, because
nothing fixes how many quanta a parameter buys; and a sweep with a fixed number of examples has a floor of its own, at
or above E<sub>&infin;</sub>. Agreement says that the pipeline is right and that the architecture uses the resource as
the teacher offers it; disagreement is a result, not an error.</p>
"""


def page(
    summary: Mapping[str, Any],
    figures: Sequence[tuple[str, str]],
    drawn: Sequence[View],
    joint: Sequence[Series],
    records: Mapping[str, Mapping[str, Any]],
    table: pd.DataFrame,
) -> str:
    """The whole page as text."""
    parts = [
        f"<h1>{_text(summary['title'])}</h1>",
        *(f'<p class="lead">{_text(line)}</p>' for line in summary["summary"]),
        _run_counts(summary),
        *(_figure(number, title, svg) for number, (title, svg) in enumerate(figures)),
        "<h2>Fitted numbers beside the truth</h2>",
        _parameters(drawn, joint, summary["truth"]),
        _truth(summary["truth"]),
        "<h2>The held-out largest size</h2>",
        _predictions(drawn),
        _extrapolation(drawn),
        "<h2>What the fits refuse, and why</h2>",
        _gates(drawn, joint),
        "<h2>Runs</h2>",
        _runs(drawn[0], table),
        "<h2>Fit records</h2>",
        _checklists(records),
        "<h2>Provenance</h2>",
        _provenance(summary),
    ]
    title = _text(summary["title"])
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"


def inline_svg(svg: str, prefix: str) -> str:
    """The `<svg>` element alone, its ids prefixed so that several figures can share a page."""
    body = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # An id that another figure also uses would make a reference draw that figure's shape.
    body = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', body)
    body = re.sub(r'(xlink:href|href)="#([^"]+)"', rf'\1="#{prefix}\2"', body)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}\1)", body)


def _text(value: Any) -> str:
    return html.escape(str(value))


def _figure(number: int, title: str, svg: str) -> str:
    picture = inline_svg(svg, f"f{number}-").replace("<svg", f'<svg role="img" aria-label="{_text(title)}"', 1)
    return f"<figure>{picture}</figure>"


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = (), lost: Sequence[int] = ()
) -> str:
    """Cells are HTML already; `numeric` columns are right-aligned, `lost` rows tinted."""
    top = "".join(f"<th>{_text(name)}</th>" for name in head)
    body = []
    for index, row in enumerate(rows):
        cells = "".join(f'<td class="num">{c}</td>' if k in numeric else f"<td>{c}</td>" for k, c in enumerate(row))
        body.append(f'<tr class="lost">{cells}</tr>' if index in lost else f"<tr>{cells}</tr>")
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _run_counts(summary: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{count} {status}" for status, count in summary["runs"].items())
    notes = "".join(f"<li>{_text(note)}</li>" for note in summary["notes"])
    return f'<p class="quiet">Runs: {_text(counts)}.</p>' + (f'<ul class="quiet">{notes}</ul>' if notes else "")


def _parameters(drawn: Sequence[View], joint: Sequence[Series], truth: Mapping[str, Any]) -> str:
    rows = [
        [_text(s.architecture), _text(axis_words(view.axis)), *_quantity_cells(q), _text(_true(q, view.axis, truth))]
        for view in drawn
        for s in view.series
        for q in s.quantities()
    ]
    rows += [
        [_text(s.architecture), f"joint: {_text(s.fit.form.id)}", *_quantity_cells(q), _text(_true(q, "", truth))]
        for s in joint
        for q in s.quantities()
    ]
    bases = "".join(f"<li>{_text(axis_words(view.axis))}: {_text(basis(view))}</li>" for view in drawn)
    table = _table(("architecture", "axis", "quantity", "fitted", "bracket is", "true"), rows)
    return f'{table}<ul class="quiet">{bases}</ul>'


def _quantity_cells(q: Quantity) -> list[str]:
    name = f"{q.name} ({q.role}{', at the centre' if q.role == 'coefficient' else ''})"
    if q.value is None:
        return [_text(name), f'<span class="no">refused</span>: {_text(q.refused)}', ""]
    return [_text(name), _text(value_text(q.value, q.interval)), _text(q.method)]


def _true(q: Quantity, axis: str, truth: Mapping[str, Any]) -> str:
    if q.role == "floor":
        return true_text(truth["floors"].get(axis, truth["asymptote"]), "asymptote")
    if q.role == "exponent" and axis:
        return true_text(truth["exponents"].get(axis), EXPONENT_UNITS.get(axis, ""))
    return ""


def _truth(truth: Mapping[str, Any]) -> str:
    if truth["asymptote"] is None and truth["entropy_floor"] is None and not truth["exponents"]:
        return '<p class="quiet">The truth of this log is not known: no true value stands beside the fitted ones.</p>'
    rows = [
        [_text(name), _text(true_text(value, unit))]
        for name, value, unit in (
            ("asymptote E", truth["asymptote"], "nats per label, every resource unlimited"),
            *(
                (f"asymptote, {axis_words(axis)} alone", value, "nats per label, others as in the runs")
                for axis, value in truth["floors"].items()
            ),
            ("entropy floor", truth["entropy_floor"], "nats per label"),
            *(
                (f"exponent, {axis_words(axis)}", value, EXPONENT_UNITS.get(axis, ""))
                for axis, value in truth["exponents"].items()
            ),
        )
    ]
    return f"<h3>What true means here</h3>{_MEANING}{_table(('constant', 'true value'), rows)}" + (
        f'<p class="quiet">Source: {_text(truth["source"])}.</p>'
    )


def _predictions(drawn: Sequence[View]) -> str:
    rows = []
    for view in drawn:
        for series in view.series:
            p = series.prediction()
            if p is None:
                continue
            predicted = value_text(p.predicted, p.interval) if p.predicted is not None else f"refused: {p.refused}"
            inside = {True: "yes", False: "no", None: ""}[p.inside]
            error = "" if p.error is None else f"{p.error:+.6f}"
            rows.append(
                [
                    _text(c)
                    for c in (
                        series.architecture,
                        axis_words(view.axis),
                        f"{p.x:.6g}",
                        f"{p.ratio:.3g}",
                        p.seeds,
                        f"{p.measured:.6f}",
                        predicted,
                        error,
                        inside,
                        f"{p.last_value:+.6f}",
                    )
                ]
            )
    if not rows:
        return '<p class="quiet">Nothing was held out.</p>'
    head = (
        "architecture",
        "axis",
        "held-out value",
        "times beyond the fit",
        "seeds",
        "measured mean",
        "predicted",
        "error",
        "measured inside interval",
        "error of repeating the last fitted size",
    )
    return _table(head, rows, numeric=(2, 3, 4, 5, 7, 9))


def _extrapolation(drawn: Sequence[View]) -> str:
    """Held-out error of the law and its rivals when fitted to the smaller sizes only."""
    rows = [
        [
            _text(c)
            for c in (s.architecture, axis_words(view.axis), form, f"{r.mean_rms:.2e}", f"{r.worst_rms:.2e}", r.cuts)
        ]
        for view in drawn
        for s in view.series
        if s.rolling is not None
        for form, r in s.rolling.ranking.iterrows()
    ]
    if not rows:
        return '<p class="quiet">Too few runs to score extrapolation by rolling origin: bands are uncalibrated.</p>'
    head = ("architecture", "axis", "form", "mean held-out rms of ln y", "worst", "cuts")
    note = (
        "Every form is fitted to the sizes below each of several cuts and scored on those above; the first row is best."
    )
    return f'<h3>Rolling origin</h3><p class="quiet">{note}</p>{_table(head, rows, numeric=(3, 4, 5))}'


def _gates(drawn: Sequence[View], joint: Sequence[Series]) -> str:
    groups = [(axis_words(view.axis), s) for view in drawn for s in view.series] + [("joint law", s) for s in joint]
    parts = []
    for number, (where, series) in enumerate(groups):
        rows = [
            [
                f"<code>{_text(g.id)}</code>",
                _outcome(g.passed),
                _text(_shown(g.value)),
                _text(g.threshold),
                _text(g.reason),
                _text(g.consequence),
                _text(", ".join(g.refuses)),
            ]
            for g in series.fit.gates
        ]
        failed = len(series.fit.refusals)
        word = f"{failed} refusal{'s' if failed > 1 else ''}: {refusal_text(series)}" if failed else "nothing refused"
        heading = _text(f"{series.architecture}, {where}: {word}")
        table = _table(("gate", "outcome", "measured", "threshold", "reason", "consequence", "refuses"), rows)
        opened = " open" if number < 2 else ""
        parts.append(f"<details{opened}><summary>{heading}</summary>{table}</details>")
    return "".join(parts)


def _outcome(passed: bool | None) -> str:
    return {True: '<span class="yes">passed</span>', False: '<span class="no">refused</span>', None: "unknown"}[passed]


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _runs(view: View, table: pd.DataFrame) -> str:
    """Every run of the table, diverged and failed ones included, with its role on the first axis."""
    frame = pd.concat([s.frame for s in view.series], ignore_index=True) if view.series else table
    shown = [*RUN_COLUMNS, *(c for c in names.available(GROUP, {}) if describe(c).on_page)]
    columns = [c for c in shown if c in frame.columns and frame[c].notna().any() and (frame[c].astype(str) != "").any()]
    order = [c for c in ("architecture", "dense_params", "examples", "lr_dense", "seed") if c in frame.columns]
    frame = frame.sort_values(order, ignore_index=True)
    rows = [[_text(_cell(value)) for value in row] for row in frame[columns].itertuples(index=False)]
    numeric = [k for k, c in enumerate(columns) if pd.api.types.is_numeric_dtype(frame[c])]
    lost = [i for i, role in enumerate(frame["role"]) if role in ("diverged", "failed")] if "role" in frame else []
    opened = " open" if len(frame) <= 60 else ""
    legend = f"{len(frame)} runs. Role: what the run is to the fit along {axis_words(view.axis)}."
    return f"<details{opened}><summary>{_text(legend)}</summary>{_table(columns, rows, numeric, lost)}</details>"


def _cell(value: Any) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def _checklists(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Which fields of each record are filled; a record with an empty required one is called incomplete."""
    parts = []
    for axis, by_name in records.items():
        for name, record in by_name.items():
            missing = set((record.get("checklist") or {}).get("missing", ()))
            state = f"incomplete, missing {', '.join(sorted(missing))}" if missing else "complete"
            rows = [
                [f"<code>{_text(section)}</code>", _text(field), _outcome_of_field(section, field, value, missing)]
                for section in RECORD_SECTIONS
                for field, value in (record.get(section) or {"(nothing)": None}).items()
            ]
            what = f"{name}, {axis_words(axis)}: {state}"
            table = _table(("section", "field", "value"), rows)
            parts.append(f"<details><summary>{_text(what)}</summary>{table}</details>")
    return "".join(parts) + '<p class="quiet">The full records are in <code>fit.json</code> beside this page.</p>'


def _outcome_of_field(section: str, field: str, value: Any, missing: set[str]) -> str:
    if f"{section}.{field}" in missing or section in missing:
        return '<span class="no">missing</span>'
    return f"<code>{_text(shortened(json.dumps(value), _FIELD_CHARACTERS))}</code>"


def _provenance(summary: Mapping[str, Any]) -> str:
    made = summary["provenance"]

    def versions(found: Mapping[str, Any]) -> str:
        return ", ".join(f"{name} {v if isinstance(v, str) else ' / '.join(v)}" for name, v in found.items() if v)

    rows = [
        ("made", made["date"]),
        ("command", made["command"]),
        ("by", versions(made["versions"])),
        ("runs trained on", ", ".join(made["trained_on"]) or "not recorded"),
        ("runs trained with", versions(made["trained_with"]) or "not recorded"),
        ("runs from", summary["out"]),
    ]
    return _table(("", ""), [[_text(name), f"<code>{_text(value)}</code>"] for name, value in rows])
