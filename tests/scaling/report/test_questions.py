"""Choices, decisions, compute and published laws on the page: answered where runs can, refused by name elsewhere."""

import numpy as np
import pytest

from recscale.scaling.report import figures, questions, views
from recscale.scaling.report.report import make_report

SEQUENTIAL = questions.Published("sequential_rec_2311", "next_item_cross_entropy", ("non_embedding_params",))


@pytest.fixture(scope="module")
def view(make_runs):
    table = make_runs({"dlrm_mlp": (0.03, 0.6), "rankmixer": (0.026, 0.7)}, noise=3e-5, diverged=False)
    table["match_id"] = table.groupby("architecture")["dense_params"].rank("dense").astype(int).astype(str)
    return views.make_views(table, axes=["dense_params"], bootstrap=0)[0]


@pytest.fixture(scope="module")
def answers(view):
    return {grid.title: grid for grid in questions.asked(view, [], {}, {"bootstrap": 0})}


def test_an_exponent_is_refitted_under_other_choices(answers):
    for name in ("dlrm_mlp", "rankmixer"):
        grid = answers[f"Choices: {name}"]
        assert grid.remarks[0].startswith("alpha: median") and {"huber_delta", "outliers"} <= {r[0] for r in grid.rows}


def test_small_runs_of_matched_sizes_are_scored_on_the_largest(answers):
    grid = answers["Decisions from smaller runs"]
    assert [row[0] for row in grid.rows].count("scale") == 6 and grid.rows[-1][0] == "form"


def test_a_refused_exponent_is_not_asked_about(make_runs):
    table = make_runs({"rankmixer": (0.026, 0.7)}, sizes=(2e3, 5e3, 1.2e4, 3e4), diverged=False)
    (view,) = views.make_views(table, axes=["dense_params"], bootstrap=0)
    (grid,) = questions.asked(view, [], {}, {"bootstrap": 0})
    assert not grid.rows and "the exponent is refused (span)" in grid.remarks[0]


def test_a_published_law_is_drawn_where_it_shows_the_same_and_refused_elsewhere(view):
    curve, grid = questions.overlay(view, SEQUENTIAL, {})
    assert curve is not None and [row[0] for row in grid.rows] == ["dlrm_mlp", "rankmixer"]
    assert {row[2] for row in grid.rows} == {"0.121"}
    drawn = figures.law_figure(view.__class__(**{**vars(view), "published": curve}))
    (line,) = [line for line in drawn.axes[0].get_lines() if line.get_color() == "black"]
    np.testing.assert_allclose(line.get_ydata(), curve(line.get_xdata()))
    assert any("2311" in text.get_text() for text in drawn.legends[0].get_texts())
    curve, grid = questions.overlay(view, questions.Published("sequential_rec_2311"), {})
    assert curve is None and not grid.rows and "metric" in grid.remarks[0] and "convention" in grid.remarks[0]


def test_a_joint_law_says_how_to_spend_compute_on_the_page(make_runs, tmp_path):
    table = make_runs({"rankmixer": (0.03, 0.7)}, examples=np.geomspace(1e4, 1e7, 9), data_term=(0.01, 0.7), seeds=1,
                      noise=5e-4, diverged=False)  # fmt: skip
    table.to_parquet(tmp_path / "runs.parquet")
    made = make_report(tmp_path, bootstrap=0, published=SEQUENTIAL)
    told = {grid["title"]: grid for grid in made["answers"]}
    assert any(line.startswith("N_opt = G C^a") for line in told["Compute: rankmixer"]["remarks"])
    approaches = [row[0] for row in told["IsoFLOP: rankmixer"]["rows"]]
    assert approaches[0] == "1 envelope" and approaches[-1] == "3 parametric"
    page = (tmp_path / "report" / "report.html").read_text()
    assert all(title in page for title in told)
