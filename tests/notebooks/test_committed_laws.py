"""Figures and notes of the committed ladders say what the present fitter grants of their tables, and nothing else."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from committed_runs import RUNS, notes
from PIL import Image

from recscale.scaling.laws import fit
from recscale.scaling.report import captions, figures, frame, truth, views

FOLDER = Path(__file__).parents[2] / "notebooks"
# Of a ladder, the heading of its section in the notes.
HEADINGS = {
    "mixer_ladder": "## The mixer ladder",
    "length_ladder": "## The length ladder",
    "memory_slots_ladder": "## The slot ladder",
}


def load_draw():
    spec = importlib.util.spec_from_file_location("notebooks_draw", FOLDER / "draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=list(HEADINGS))
def ladder(request):
    """(name, heading, view of the committed table)."""
    axis, held_out = load_draw().LADDERS[request.param]
    table = pd.read_parquet(RUNS / f"{request.param}.parquet")
    (view,) = views.make_views(table, axes=[axis], hold_out_largest=held_out, bootstrap=0)
    return request.param, HEADINGS[request.param], view


def test_every_picture_is_drawn_by_the_one_command():
    assert {path.stem for path in RUNS.glob("*.png")} == set(load_draw().FIGURES)


def test_a_figure_says_what_is_granted(ladder):
    name, _, view = ladder
    picture = Image.open(RUNS / f"{name}.png")
    written = picture.text["Description"]
    # One that was drawn in another style has another height; a line more or less is the band's, which is left out here.
    drawn = figures.study_figure(view, truth=truth.find(view.series[0].frame))
    wanted = [frame.DPI * inches for inches in drawn.get_size_inches()]
    assert picture.size == pytest.approx(wanted, abs=40), "draw it again: python notebooks/draw.py"
    assert written.splitlines()[0] == figures.law_figure(view).texts[0].get_text()
    flat = " ".join(written.split())
    for series in view.series:
        assert " ".join(captions.series_text(series).split()) in flat


def test_the_notes_quote_granted_numbers_only(ladder):
    _, heading, view = ladder
    text = notes()
    section = " ".join(text[text.index(heading) :].split("\n## ")[0].split())
    granted = {q.text() for series in view.series for q in series.quantities() if q.value is not None}
    for series in view.series:
        told = [q for q in (series.floor(), series.exponent()) if q is not None and q.value is not None]
        for q in told:
            assert f"{q.name} = {q.text()}" in section, (series.architecture, q.name)
    # An interval in the notes is that of a granted number.
    intervals = re.findall(r"(?:E|alpha) = (\S+ \[[^\]]+\])", section)
    assert set(intervals) <= granted


def test_the_designed_runs_narrow_the_exponent_as_the_notes_say():
    tables = [pd.read_parquet(RUNS / f"{name}.parquet") for name in ("quickstart", "quickstart_designed")]
    runs = pd.concat(tables).query("architecture == 'rankmixer'")
    text = " ".join(notes().split())
    for most, words in ((1.2e5, "half-width of **.015**"), (np.inf, "the half-width is .024")):
        law = fit(runs[runs["dense_params"] < most], "power", "dense_params", "excess_logloss", bootstrap=0)
        low, high = law.intervals["alpha"]
        assert words in text and (high - low) / 2 == pytest.approx(float(words.split()[-1].strip("*")), abs=5e-4)
