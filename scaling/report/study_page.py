"""The page of one or several studies, to be explored in a browser: one HTML file that loads nothing.

It opens with the answer in words. The plots are Plotly's, whose script is embedded; the table of runs and its links to
the plots are `study_page.js`. All that a report prints stands below, folded.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from recscale.scaling.data.metrics import describe
from recscale.scaling.laws.comparing.compare import compare

from .contents import Report
from .frame import COLOURS
from .page import page_contents
from .page_environment import page_environment
from .study_data import answer, study_data
from .wording import architecture_words, axis_words, target_words

# Plotly's names of the markers of `frame.MARKERS`.
_MARKERS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "pentagon")
# Pairs of architectures that are compared; more are a matrix nobody reads.
_MOST_COMPARED = 4

Study = tuple[str, Report, Mapping[str, Any]]


def study_page(studies: Sequence[Study], *, comparisons: bool = True) -> str:
    """The whole page as text.

    Args:
        studies: (name, report, its summary with provenance) of each. comparisons: ask of every pair of architectures of
            a study which scales better, which takes seconds a pair.
    """
    first = studies[0][1].first
    named = [(name if len(studies) > 1 else "", report, summary) for name, report, summary in studies]
    answers = [(name, line) for name, report, _ in named for line in _answers(report)]
    return _template().render(
        title=" and ".join(summary["title"] for _, _, summary in studies),
        question=f"What do more {axis_words(first.axis)} buy?",
        terms=_terms([report for _, report, _ in studies]),
        answers=[f"{name}: {line}" if name else line for name, line in answers],
        refused=[(name, report.out, one) for name, report, _ in named for view in report.views for one in view.series
                 if one.fit.refusals],
        matrices=[_verdicts(report) for _, report, _ in studies] if comparisons else [],
        studies=named,
        contents=page_contents,
        data=_json({"studies": [study_data(report, name) for name, report, _ in studies],
                    "colours": COLOURS, "markers": _MARKERS}),
        plotly=_plotly(),
        script=Markup(Path(__file__).with_name("study_page.js").read_text(encoding="utf-8")),
    )  # fmt: skip


@functools.cache
def _template() -> jinja2.Template:
    environment = page_environment()
    environment.globals |= {"axis_words": axis_words, "architecture_words": architecture_words}
    return environment.get_template("study_page.html.j2")


def _answers(report: Report) -> list[str]:
    """A sentence of each architecture, by the exact floor where the log has one."""
    known = {one.architecture: one.known for one in report.estimands.get(report.first.axis, [])}
    return [answer(series, known.get(series.architecture)) for series in report.first.series]


def _terms(reports: Sequence[Report]) -> str:
    """The words of the answers, for somebody who meets them here first."""
    first = reports[0].first
    goal = f"{target_words(first.target)}, lower is better" if describe(first.target).lower_is_better else first.target
    return (
        f"Measured is the {goal}. The excess is what lies above the best that any amount could reach; a law says how "
        "fast it falls, and is printed only where the runs pin it down. Numbers in brackets are 95 % intervals."
    )


def _verdicts(report: Report) -> list[str]:
    """What a paired comparison says of every two architectures of a study."""
    names = [series.architecture for series in report.first.series]
    if not 2 <= len(names) <= _MOST_COMPARED or not describe(report.first.target).lower_is_better:
        return []
    lines = []
    for a, b in itertools.combinations(names, 2):
        found = compare(report.table, a, b, axis=report.first.axis, target=report.first.target)
        reasons = "; ".join(found.reasons[:2])
        lines.append(f"Does {a} scale better than {b}? {found.answer}{f': {reasons}' if reasons else ''}.")
    return lines


def _json(data: Any) -> Markup:
    """JSON for a script element: nothing in it can end the element."""
    return Markup(json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"))


def _plotly() -> Markup:
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())
