"""The page of one or several studies, to be explored in a browser: one HTML file that loads nothing.

It opens with the answer in words. The plots are Plotly's, whose script is embedded; the table of runs and its links to
the plots are `study_page.js`. All that a report prints stands below, folded.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from recscale.scaling.data.metrics import describe
from recscale.scaling.laws.comparing.compare import Comparison, compare
from recscale.scaling.laws.comparing.equal_loss import equal_loss
from recscale.scaling.records.number_text import value_text

from .contents import Report
from .frame import COLOURS
from .page import page_contents
from .page_environment import page_environment
from .study_data import answer, study_data
from .wording import architecture_words, axis_meaning, axis_words, target_words

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
    compared = [_compared(report) if comparisons else [] for _, report, _ in named]
    answers = [
        (name, line)
        for (name, report, _), found in zip(named, compared, strict=True)
        for line in [*_answers(report), *_shares(found)]
    ]
    return _template().render(
        title=" and ".join(summary["title"] for _, _, summary in studies),
        question=f"What do more {axis_words(first.axis)} buy?",
        terms=_terms([report for _, report, _ in studies]),
        answers=[f"{name}: {line}" if name else line for name, line in answers],
        refused=[(name, report.out, one) for name, report, _ in named for view in report.views for one in view.series
                 if one.fit.refusals],
        verdicts=[(name, _verdict(one)) for (name, _, _), found in zip(named, compared, strict=True) for one in found],
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
    axis, meaning = axis_words(first.axis), axis_meaning(first.axis)
    return (
        f"{axis[0].upper()}{axis[1:]}{f': {meaning}' if meaning else ''}. Measured is the {goal}. The excess is what "
        "lies above the floor, the best that any amount could reach: known of a made-up log, else fitted. A law says "
        "how fast the excess falls, and is printed only where the runs pin it down. Brackets are 95 % intervals."
    )


def _compared(report: Report) -> list[Comparison]:
    """Every two architectures of a study, compared on paired runs."""
    names = [series.architecture for series in report.first.series]
    if not 2 <= len(names) <= _MOST_COMPARED or not describe(report.first.target).lower_is_better:
        return []
    axis, target = report.first.axis, report.first.target
    return [compare(report.table, a, b, axis=axis, target=target) for a, b in itertools.combinations(names, 2)]


def _verdict(found: Comparison) -> str:
    reasons = "; ".join(found.reasons[:2])
    return f"Does {found.a} scale better than {found.b}? {found.answer}{f': {reasons}' if reasons else ''}."


def _shares(compared: Sequence[Comparison]) -> Iterator[str]:
    """What one architecture needs of another's amount of the axis for the same metric, where that is settled."""
    for found in compared:
        verdict = equal_loss(found)
        share = verdict.middle
        if verdict.answer != "cannot tell" and share is not None and share.interval is not None:
            value = value_text(share.value, (share.interval.low, share.interval.high))
            words, target = axis_words(found.axis), found.target
            yield f"For the same {target} {found.a} needs {value} times the {words} of {found.b}."


def _json(data: Any) -> Markup:
    """JSON for a script element: nothing in it can end the element."""
    return Markup(json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"))


def _plotly() -> Markup:
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())
