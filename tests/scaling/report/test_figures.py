"""Figures: what is drawn is what was fitted, held out, lost or refused, and matplotlib is left as it was."""

import dataclasses
import itertools
import re

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb

from recscale.scaling.report import estimands, truth, views
from recscale.scaling.report import figures as plots
from recscale.scaling.report.frame import COLOURS, GREY, MARKERS, mark_of
from recscale.scaling.report.wording import architecture_words

FAST = dict(bootstrap=60, profile=False)


@pytest.fixture(scope="module")
def table(make_runs):
    # Steep laws far above their floor, of which nothing is refused.
    return make_runs({"dlrm_mlp": (0.03, 0.6), "rankmixer": (0.026, 0.7)}, noise=5e-5)


@pytest.fixture(scope="module")
def view(table):
    return views.make_views(table, axes=["dense_params"], **FAST)[0]


@pytest.fixture(scope="module")
def known(table):
    return truth.find(table)


@pytest.fixture(scope="module")
def figure(view, known):
    return plots.study_figure(view, truth=known)


@pytest.fixture(scope="module")
def short_view(make_runs):
    return views.make_views(make_runs(sizes=(2e3, 5e3, 1.2e4, 3e4)), axes=["dense_params"], **FAST)[0]


def words(figure):
    """Everything written outside the panels."""
    return " ".join(" ".join(text.get_text() for text in figure.texts).split())


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def curves(ax, colour, dashed):
    """Fitted curves: lines of many points in an architecture's colour, solid or dashed."""
    lines = [line for line in ax.get_lines() if line.get_color() == colour and len(line.get_xdata()) > 50]
    return [line for line in lines if (line.get_linestyle() == "--") == dashed]


def markers(ax, colour, face):
    """Positions of the large markers with a given face."""
    found = [line for line in ax.get_lines() if line.get_markeredgecolor() == colour and line.get_markersize() == 6.0
             and line.get_marker() in MARKERS]  # fmt: skip
    return np.concatenate([line.get_xdata() for line in found if line.get_markerfacecolor() == face])


def test_two_panels_with_axis_metric_and_excess(figure, view):
    left, right = figure.axes
    assert left.get_xlabel() == "dense parameters (dense_params)"
    assert left.get_ylabel() == "logloss (nats per label)"
    assert right.get_yscale() == right.get_xscale() == left.get_xscale() == "log"
    assert "true asymptote" in right.get_ylabel()


def test_the_law_is_solid_over_the_fitted_sizes_and_dashed_beyond(figure, view):
    for number, series in enumerate(view.series):
        low, high = series.span
        (solid,) = curves(figure.axes[0], mark_of(number)[0], dashed=False)
        (dashed,) = curves(figure.axes[0], mark_of(number)[0], dashed=True)
        np.testing.assert_allclose([solid.get_xdata()[0], solid.get_xdata()[-1]], [low, high])
        assert dashed.get_xdata()[0] == pytest.approx(high)
        assert dashed.get_xdata()[-1] > series.cells(views.HELD_OUT)["x"].max()
        np.testing.assert_allclose(solid.get_ydata(), series.fit.predict({"x": solid.get_xdata()}))


def test_the_largest_size_is_held_out_and_drawn_open(figure, view, table):
    for number, series in enumerate(view.series):
        sizes = np.unique(table.loc[table["architecture"] == series.architecture, "dense_params"])
        colour = mark_of(number)[0]
        assert set(markers(figure.axes[0], colour, "white")) == {sizes[-1]}
        assert set(markers(figure.axes[0], colour, colour)) == set(sizes[:-1])
        assert series.fit.rows.axes["x"].max() == sizes[-2]


def test_markers_are_seed_means_and_bars_their_range(figure, view):
    series = view.series[0]
    rows = series.rows(views.FITTED)
    own = rows[rows["dense_params"] == rows["dense_params"].min()]["logloss"]
    cell = series.cells(views.FITTED).iloc[0]
    assert (cell["low"], cell["high"], cell["seeds"]) == (own.min(), own.max(), 3)
    assert cell["mean"] == pytest.approx(own.mean())


def test_true_constants_are_drawn_and_named(figure, known):
    left, right = figure.axes
    levels = [line.get_ydata()[0] for line in left.get_lines() if len(set(line.get_ydata())) == 1]
    assert known.asymptote in levels and known.entropy_floor in levels
    written = " ".join(legend_of(figure))
    assert f"{known.asymptote:.4f} (true)" in written and f"{known.entropy_floor:.4f} (true)" in written
    keys = [text.get_text() for text in figure.legends[0].get_texts()]
    assert not any("0.35" in text for text in keys)  # the teacher's exponent belongs to no network


def test_the_true_slope_is_that_of_a_perfect_learner(figure, known, table):
    (line,) = [line for line in figure.axes[1].get_lines() if len(line.get_xdata()) > 2 and line.get_color() == "black"
               and line.get_ydata()[0] != line.get_ydata()[-1]]  # fmt: skip
    x, y = line.get_data()
    exact, _ = estimands.exact_slope(known.log, "dense_params", table)
    assert np.log(y[-1] / y[0]) / np.log(x[-1] / x[0]) == pytest.approx(-exact.slope)
    assert f"true of a perfect learner: slope −{exact.slope:.3g}" in legend_of(figure)


def test_excess_is_loss_minus_the_true_asymptote(figure, view, known):
    series = view.series[1]
    (solid,) = curves(figure.axes[1], mark_of(1)[0], dashed=False)
    np.testing.assert_allclose(solid.get_ydata(), series.fit.predict({"x": solid.get_xdata()}) - known.asymptote)


def test_lost_runs_are_marked_at_the_top(figure, view):
    crosses = [line for line in figure.axes[0].get_lines() if line.get_marker() == "x" and len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in crosses] == [list(view.series[1].lost["dense_params"])]
    assert list(crosses[0].get_ydata()) == [1.0]


def test_the_caption_carries_form_axis_metric_coverage_and_reservations(figure):
    text = words(figure)
    for part in ("y = E + A x^-alpha", "x = dense_params", "metric logloss", "coverage at ×2.8: uncalibrated",
                 "1.28M training examples", "record incomplete", "learning rates not bracketed"):  # fmt: skip
        assert part in text
    assert "fitted trend" in text and "fitted law" not in text


def test_a_law_may_be_called_one_when_every_rate_is_bracketed(table):
    view = views.make_views(table.assign(lr_bracketed=True), axes=["dense_params"], **FAST)[0]
    assert "fitted law" in words(plots.study_figure(view))


def test_a_reconstruction_is_called_one(view):
    named = dataclasses.replace(view, series=(dataclasses.replace(view.series[0], architecture="lmn_million"),))
    assert legend_of(plots.study_figure(named))[0] == "lmn_million (reconstruction)"
    assert architecture_words("rankmixer") == "rankmixer" and architecture_words("MDL at 0.5") == "MDL at 0.5"
    for name in ("promo_plain", "recscale.models.domains.promo:PROMO", "nes at curvature 2"):
        assert architecture_words(name) == f"{name} (reconstruction)"


def test_refused_numbers_are_written_as_refusals_and_never_extrapolated(short_view):
    figure = plots.study_figure(short_view)
    text = words(figure)
    assert "alpha refused (span)" in text and "E refused" in text and "prediction refused" in text
    assert not re.search(r"alpha = [\d.]", text) and not re.search(r"E = [\d.]", text)
    assert "measured, no law" in text and "fitted" not in text
    for number in range(2):
        colour = mark_of(number)[0]
        assert not [*curves(figure.axes[0], colour, False), *curves(figure.axes[0], colour, True)]
    assert not [c for ax in figure.axes for c in ax.collections if isinstance(c, PolyCollection)]  # no band
    guides = [line for line in figure.axes[0].get_lines() if line.get_color() == GREY and line.get_linewidth() < 1]
    cells = short_view.series[0].cells("fitted")
    assert len(guides) == 2 and list(guides[0].get_ydata()) == list(cells["mean"])
    assert {"no law"} <= set(legend_of(figure)) and not {"extrapolation", "law over the fitted sizes"} & set(
        legend_of(figure)
    )


def test_of_several_architectures_only_those_with_a_law_get_a_curve(view, short_view):
    mixed = dataclasses.replace(view, series=(view.series[0], short_view.series[1]))
    figure = plots.study_figure(mixed)
    assert "fitted trend of 1 of 2 architectures" in words(figure)
    assert curves(figure.axes[0], mark_of(0)[0], False) and not curves(figure.axes[0], mark_of(1)[0], False)
    assert {"no law", "law over the fitted sizes"} <= set(legend_of(figure))
    band = [c for c in figure.axes[0].collections if isinstance(c, PolyCollection)]
    assert {to_rgb(c.get_facecolor()[0][:3]) for c in band} == {to_rgb(mark_of(0)[0])}


def test_without_truth_and_floor_there_is_one_panel_and_no_excess(short_view):
    assert len(plots.study_figure(short_view).axes) == 1
    with pytest.raises(ValueError, match="no excess to draw.*the floor is refused"):
        plots.law_figure(short_view, excess=True)


def test_without_truth_the_excess_is_over_the_fitted_floor(make_runs):
    # A steep law far above its floor, so that the floor is not refused.
    runs = make_runs({"dcnv2": (0.03, 0.6)}, truth=False, noise=5e-5, floor=0.43, diverged=False)
    view = views.make_views(runs, axes=["dense_params"], **FAST)[0]
    floor = view.series[0].floor().value
    assert floor == pytest.approx(0.43, abs=1e-3)
    right = plots.study_figure(view, truth=truth.find(runs)).axes[1]
    assert "fitted floor" in right.get_ylabel()
    (solid,) = curves(right, mark_of(0)[0], dashed=False)
    np.testing.assert_allclose(solid.get_ydata(), view.series[0].fit.predict({"x": solid.get_xdata()}) - floor)


def test_truth_in_nats_is_not_drawn_on_another_metric(table, known):
    view = views.make_views(table, axes=["dense_params"], target="base_rate", **FAST)[0]
    assert not any("true" in text for text in legend_of(plots.study_figure(view, truth=known)))


@pytest.mark.parametrize(("examples", "curves"), [(np.geomspace(1e4, 1e7, 9), 9), ((1e5, 1e6, 1e7), 0)])
def test_the_joint_figure_draws_a_curve_per_level_of_the_other_axis(make_runs, examples, curves):
    table = make_runs({"rankmixer": (0.03, 0.7)}, examples=examples, data_term=(0.01, 0.7), seeds=1, noise=5e-4,
                      diverged=False)  # fmt: skip
    columns = {"N": "dense_params", "D": "examples"}
    (series,) = views.joint_series(table, "chinchilla", columns, "logloss", True, **FAST)
    figure = plots.joint_figure(series, columns)
    shades = {line.get_color() if isinstance(line.get_color(), str) else tuple(line.get_color())
              for line in figure.axes[0].get_lines() if len(line.get_xdata()) > 50}  # fmt: skip
    assert len(shades) == curves
    assert ("joint trend" if curves else "measured, no law") in words(figure)
    assert "beta" in words(figure) and "held out" in words(figure)
    assert ("uncalibrated" in words(figure)) == bool(curves)


def test_global_settings_are_left_alone(view, known):
    before = dict(matplotlib.rcParams)
    plots.figure_bytes(plots.study_figure(view, truth=known), "png")
    assert dict(matplotlib.rcParams) == before


def test_files_are_what_their_name_says_and_reproducible(figure, tmp_path):
    png = plots.save(figure, tmp_path / "deep" / "loss.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(png[16:20], "big") == round(figure.get_figwidth() * 150)
    svg = plots.save(figure, tmp_path / "loss.svg").read_bytes()
    assert svg == plots.figure_bytes(figure, "svg") and b"<svg" in svg
    pdf = plots.save(figure, tmp_path / "loss.pdf").read_bytes()
    # Every font of the file is embedded as TrueType, none is left to the reader's machine or drawn as Type 3.
    assert pdf[:5] == b"%PDF-" and pdf == plots.figure_bytes(figure, "pdf")
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf
    with pytest.raises(ValueError, match="a figure is written as .pdf, .svg, .png"):
        plots.save(figure, tmp_path / "loss.docx")


# The API ---------------------------------------------------------------------------------------


def test_a_table_is_fitted_and_drawn_into_given_axes(table, known):
    from matplotlib.figure import Figure

    mine = Figure(figsize=(5, 3))
    left, right = mine.subplots(1, 2)
    words = {"rankmixer": "ours"}
    options = dict(x="dense_params", bootstrap=0, profile=False, labels=words)
    assert plots.law_figure(table, ax=left, title="loss", logx=False, **options) is mine
    assert plots.law_figure(table, ax=right, excess=True, legend=False, truth=known, **options) is mine
    assert left.get_title() == "loss" and left.get_xscale() == "linear" and not mine.texts and not mine.legends
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["dlrm_mlp", "ours"]
    assert right.get_yscale() == "log" and right.get_legend() is None
    assert mine.get_size_inches().tolist() == [5, 3]


def test_figures_have_the_size_and_the_words_they_are_given(view):
    figure = plots.law_figure(view, figsize=(3.35, 2.6), title="", caption=False, logy=True, style="column")
    assert figure.get_size_inches().tolist() == [3.35, 2.6] and not figure.texts
    assert figure.axes[0].get_yscale() == "log" and figure.axes[0].yaxis.label.get_fontsize() == 8
    bare = plots.law_figure(view, title="ours", caption=False, legend=False)
    assert not bare.legends and [text.get_text() for text in bare.texts] == ["ours"]
    with pytest.raises(ValueError, match="no style 'colum'; did you mean 'column'"):
        plots.law_figure(view, style="colum")


def test_views_of_several_studies_stand_in_one_figure(view, short_view):
    both = plots.law_figure([view, short_view])
    assert legend_of(both)[:4] == ["dlrm_mlp", "rankmixer"] * 2
    with pytest.raises(ValueError, match="views of one axis, metric and form"):
        plots.law_figure([view, dataclasses.replace(view, axis="examples")])


def test_points_of_one_size_stand_beside_each_other(view):
    same = dataclasses.replace(view, series=(view.series[0], dataclasses.replace(view.series[0], architecture="twin")))
    figure = plots.law_figure(same)
    figure.canvas.draw()
    firsts = []
    for number in range(2):
        points = [line for line in figure.axes[0].get_lines() if line.get_marker() == mark_of(number)[1]]
        x, y = points[0].get_data()
        firsts.append(points[0].get_transform().transform((x[0], y[0]))[0])
    assert firsts[1] - firsts[0] > 2  # pixels, of equal values


def test_one_noisy_architecture_does_not_set_the_axis(view):
    series = view.series[0]
    wild = series.frame.assign(logloss=series.frame["logloss"] + 5.0 * (np.arange(len(series.frame)) // 3 % 2))
    noisy = dataclasses.replace(series, architecture="noisy", frame=wild)
    figure = plots.law_figure(dataclasses.replace(view, series=(view.series[1], noisy)))
    calm = plots.law_figure(dataclasses.replace(view, series=(view.series[1],)))
    assert figure.axes[0].get_ylim() == pytest.approx(calm.axes[0].get_ylim())
    assert "noisy: 9 runs lie above the axis (triangles)" in words(figure)
    assert len([line for line in figure.axes[0].get_lines() if line.get_marker() == "^" and len(line.get_xdata())]) == 1


# Full-severity matrices of Machado, Oliveira and Fernandes (2009) in linear RGB.
DEFICIENCIES = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_architectures_stay_apart_for_colour_blind_readers(deficiency):
    linear = [np.array(to_rgb(colour)) ** 2.2 for colour in COLOURS]
    seen = [np.clip(np.array(DEFICIENCIES[deficiency]) @ rgb, 0, 1) ** (1 / 2.2) for rgb in linear]
    # A step of .1 in one channel is plainly visible; markers differ as well.
    assert min(np.abs(a - b).max() for a, b in itertools.combinations(seen, 2)) > 0.1
    assert len({mark_of(k) for k in range(42)}) == 42
