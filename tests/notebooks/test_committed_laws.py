"""Figures and notes of the committed ladders say what the present fitter grants of their tables, and nothing else."""

import re
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from recscale.scaling.report import captions, figures, views

RUNS = Path(__file__).parents[2] / "notebooks" / "runs"
# Sweep: axis, whether its largest value is held out, heading of its section in the notes.
LADDERS = {
    "mixer_ladder": ("dense_params", True, "## The mixer ladder"),
    "length_ladder": ("history_length", False, "## The length ladder"),
    "memory_slots_ladder": ("memory_slots", False, "## The slot ladder"),
}


@pytest.fixture(scope="module", params=list(LADDERS))
def ladder(request):
    """(name, heading, view of the committed table)."""
    axis, held_out, heading = LADDERS[request.param]
    table = pd.read_parquet(RUNS / f"{request.param}.parquet")
    (view,) = views.make_views(table, axes=[axis], hold_out_largest=held_out, bootstrap=0)
    return request.param, heading, view


def test_a_figure_says_what_is_granted(ladder):
    name, _, view = ladder
    written = Image.open(RUNS / f"{name}.png").text["Description"]
    assert written.splitlines()[0] == figures.law_figure(view).texts[0].get_text()
    flat = " ".join(written.split())
    for series in view.series:
        assert " ".join(captions.series_text(series).split()) in flat


def test_the_notes_quote_granted_numbers_only(ladder):
    _, heading, view = ladder
    text = (RUNS / "README.md").read_text(encoding="utf-8")
    section = " ".join(text[text.index(heading) :].split("\n## ")[0].split())
    granted = {q.text() for series in view.series for q in series.quantities() if q.value is not None}
    for series in view.series:
        told = [q for q in (series.floor(), series.exponent()) if q is not None and q.value is not None]
        for q in told:
            assert f"{q.name} = {q.text()}" in section, (series.architecture, q.name)
    # An interval in the notes is that of a granted number.
    intervals = re.findall(r"(?:E|alpha) = (\S+ \[[^\]]+\])", section)
    assert set(intervals) <= granted
