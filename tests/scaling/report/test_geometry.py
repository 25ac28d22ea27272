"""Where things stand on a figure: every text on the canvas, none over another, ticks to read, no ungranted line."""

import dataclasses
import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PolyCollection

from recscale.scaling.records import runs
from recscale.scaling.report import comparison_figures, figures, study_figures, truth, verdict, views
from recscale.scaling.report.frame import COLOURS
from recscale.scaling.report.orderings import Judged, Ordering
from recscale.scaling.report.ticks import log_ticks

NAMES = ("rankmixer", "dlrm_mlp", "dcnv2", "tokenmixer_large", "longer+rankmixer", "hyformer", "memory_plus")


@pytest.fixture(scope="module")
def series_of(make_runs):
    """(sizes, granted) -> a series; a law of three sizes is never granted."""
    found = {}
    for sizes, granted in ((3, False), (12, True), (12, False)):
        law = (0.03, 0.6) if granted else (0.03, 0.02)
        runs = make_runs({"a": law}, sizes=np.geomspace(2e3, 2e6, sizes), noise=5e-5, diverged=False)
        (view,) = views.make_views(runs, axes=["dense_params"], bootstrap=40 if granted else 0, profile=False)
        found[sizes, granted] = view, truth.find(runs)
        assert view.series[0].has_curve == granted
    return found


def many(view, count):
    """The view with its series under several names, and losses a little apart."""
    (series,) = view.series
    return dataclasses.replace(view, series=tuple(dataclasses.replace(
        series, architecture=name, frame=series.frame.assign(logloss=series.frame["logloss"] + 1e-4 * k))
        for k, name in enumerate(NAMES[:count])))  # fmt: skip


def drawn_ticks(axis):
    low, high = sorted(axis.get_view_interval())
    labels = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
    return [label for place, label in labels if low <= place <= high and label.get_text()]


def texts_of(figure):
    found = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for ax in figure.axes:
        found += [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts, *drawn_ticks(ax.xaxis), *drawn_ticks(ax.yaxis)]
    return [text for text in found if text.get_text().strip()]


def check(figure, ticks=True):
    """ticks: whether its axes are scales; layers and tokens are counted."""
    figure.canvas.draw()
    width, height = figure.bbox.width, figure.bbox.height
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts_of(figure)]
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        apart = a.x1 <= b.x0 + 0.5 or b.x1 <= a.x0 + 0.5 or a.y1 <= b.y0 + 0.5 or b.y1 <= a.y0 + 0.5
        assert apart, f"{one!r} and {other!r} overlap"
    for ax in figure.axes if ticks else ():
        for axis in (ax.xaxis, ax.yaxis):
            labels = [label.get_text() for label in drawn_ticks(axis)]
            assert len(labels) >= 3 and len(set(labels)) == len(labels), (axis.axis_name, labels)
            assert box_of(ax).width > 60 and box_of(ax).height > 60
    pdf = figures.figure_bytes(figure, "pdf")
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf


def box_of(ax):
    return ax.get_window_extent()


CASES = list(itertools.product((1, 2, 7), ((3, False), (12, True), (12, False)), ("report", "column")))
FAST = {(1, (3, False), "column"), (2, (12, True), "report"), (7, (3, False), "report"), (7, (12, True), "column")}


@pytest.mark.parametrize(
    ("count", "kind", "style"), [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in CASES]
)
@pytest.mark.parametrize("known", [True, False])
def test_every_figure_is_readable(series_of, count, kind, style, known):
    view, log = series_of[kind]
    view = many(view, count)
    figure = figures.study_figure(view, truth=log if known else None, style=style)
    check(figure)
    assert len(figure.axes) == (2 if known or kind[1] else 1)
    coloured = {line.get_color() for ax in figure.axes for line in ax.get_lines() if len(line.get_xdata()) > 50}
    bands = [band for ax in figure.axes for band in ax.collections if isinstance(band, PolyCollection)]
    assert (coloured == set(COLOURS[: min(count, 6)]) and bands) if kind[1] else not (coloured or bands)


@pytest.mark.slow
@pytest.mark.parametrize("style", ["column", "page", "talk"])
def test_a_figure_of_one_panel_is_readable(series_of, style):
    view, log = series_of[12, True]
    check(figures.law_figure(many(view, 7), truth=log, style=style))
    check(figures.law_figure(many(view, 2), truth=log, style=style, excess=True))


@pytest.fixture(scope="module")
def study():
    """(architectures, sizes) -> a table with everything that further figures draw."""

    def of(count, sizes):
        draw = np.random.default_rng(count)
        rows = []
        for k, (name, budget, seed) in enumerate(itertools.product(NAMES[:count], (3e11, 1e12, 3e12), range(2))):
            best = 2e4 * (budget / 3e11) ** 0.5
            for size in np.geomspace(best / 8, best * 8, sizes):
                loss = 0.43 + 0.02 * (1e11 / budget) ** 0.3 + 0.001 * np.log(size / best) ** 2
                even = 1 - np.exp(-1e5 / size)
                rows.append({
                    "run_id": f"{len(rows)}", "architecture": name, "status": "done", "seed": seed,
                    "dense_params": size, "train_flops": budget, "flops_target": budget,
                    "logloss": loss + 1e-5 * draw.normal() + 1e-4 * k, "memory_slots": round(size),
                    "recovered_N1": min(1, 0.2 + size / 1e6), "recovered_L": draw.uniform(),
                    "memory_usage": even * draw.uniform(0.8, 1), "memory_usage_null": even,
                    "memory_kl": size / 1e5, "memory_kl_null": size / 2e5,
                })  # fmt: skip
        return pd.DataFrame(rows)

    return of


STUDY_CASES = list(itertools.product((1, 2, 7), (3, 12), ("report", "column")))
QUICK = {("usage", 7, 3, "column"), ("isoflop", 2, 12, "report")}


@pytest.mark.parametrize(
    ("kind", "count", "sizes", "style"),
    [
        pytest.param(kind, *case, marks=() if (kind, *case) in QUICK else pytest.mark.slow)
        for kind in study_figures.OF_TABLES
        for case in STUDY_CASES
    ],
)
def test_every_further_figure_of_a_table_is_readable(study, kind, count, sizes, style):
    check(study_figures.OF_TABLES[kind](study(count, sizes), style=style))


@pytest.mark.slow
@pytest.mark.parametrize("style", ["report", "column"])
@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("kind", list(study_figures.OF_FOLDERS))
def test_every_figure_of_run_folders_is_readable(tmp_path, kind, count, style):
    for k, name in enumerate(NAMES[:count]):
        folder = tmp_path / f"run{k}"
        record = {"run_id": f"run{k}", "status": "done", "config": {"architecture": name}, "work": {"batch_rows": 512}}
        runs.write_record(folder, record)
        for step in range(1, 40):
            load = np.full((2, 8, 4), 0.3 + 0.01 * k).tolist()
            row = {"step": step, "examples": 512 * step, "logloss": 0.6 / step**0.1 + 0.01 * k, "rows": 512}
            runs.append_metrics(folder, row | {"model_expert_load": load})
    folders = sorted(tmp_path.iterdir())
    check(study_figures.OF_FOLDERS[kind](folders, style=style), ticks=kind == "curves")


@pytest.mark.slow
@pytest.mark.parametrize("style", ["report", "column"])
@pytest.mark.parametrize("levels", [1, 3, 9])
def test_a_joint_law_is_readable(make_runs, levels, style):
    examples = np.geomspace(1e4, 1e7, levels)
    table = make_runs({"longer+rankmixer": (0.03, 0.7)}, examples=examples, data_term=(0.01, 0.7), seeds=1, noise=5e-4)
    columns = {"N": "dense_params", "D": "examples"}
    (series,) = views.joint_series(table, "chinchilla", columns, "logloss", True, bootstrap=0, profile=False)
    check(figures.joint_figure(series, columns, style=style))


@pytest.mark.parametrize("most", [3, 5, 8])
def test_a_log_axis_of_any_span_has_three_ticks_apart(most):
    draw = np.random.default_rng(0)
    for low, span in zip(10 ** draw.uniform(-6, 15, 300), 10 ** draw.uniform(-1.5, 1, 300), strict=True):
        high = low * np.exp(span)
        ticks = np.array(log_ticks(low, high, most))
        assert len(ticks) >= 3 and low <= ticks[0] and ticks[-1] <= high, (low, high, ticks)
        assert np.diff(np.log(ticks)).min() >= 0.999 * span / (2 * most)


STYLED = [pytest.param(style, marks=() if style == "column" else pytest.mark.slow) for style in ("column", "report")]


@pytest.mark.parametrize("style", STYLED)
def test_what_arms_save_is_readable(style):
    draw = np.random.default_rng(0)
    rows = [
        {"method": method, "case": case, "saved": saved, "low": saved - 2e-3, "high": saved + 3e-3, "bound": 0.04}
        for case in ("0", "1-2", "3-9", "10+")
        for method, saved in zip(("frozen", "longer", "promo", "promo_plain"), draw.normal(0, 0.01, 4), strict=True)
    ]
    words = dict(title="what prompts save", value="excess logloss", cases="positives of the item", note="Made up.")
    given = pd.DataFrame(rows)
    figure = comparison_figures.saved_figure(given, "case", baseline="frozen", bound="bound", style=style, **words)
    check(figure)
    points = [line for line in figure.axes[0].get_lines() if line.get_marker() in "os^"]
    drawn = sorted(y for line in points for y in line.get_ydata())
    np.testing.assert_allclose(drawn, sorted(1e3 * given.loc[given["method"] != "frozen", "saved"]))


@pytest.mark.parametrize("style", STYLED)
@pytest.mark.parametrize("count", [3, pytest.param(24, marks=pytest.mark.slow)])
def test_published_orderings_are_readable(count, style):
    judged = [
        Judged(
            Ordering(f"{k}", f"softmax, tau at curvature {k}", "two_stage at curvature 2", 0.1, "table 1", "private"),
            outcome, 5, difference, (difference - 2e-3, difference + 2e-3),
        )
        for k, (outcome, difference) in zip(
            range(count), itertools.cycle([("held", 4e-3), ("failed", -5e-3), ("inside noise", 1e-3)]), strict=False
        )
    ]  # fmt: skip
    refused = Judged(dataclasses.replace(judged[0].ordering, id="x"), "not judged", why="no run")
    figure = comparison_figures.orderings_figure([*judged, refused], style=style)
    check(figure)
    assert "not drawn: 1 not judged" in [text.get_text() for text in figure.texts]
    with pytest.raises(ValueError, match="none of 1 orderings is judged"):
        comparison_figures.orderings_figure([refused])


@pytest.mark.parametrize("floor", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_verdict_is_readable(series_of, floor):
    """floor: with the fitted laws, or with points alone."""
    view, _ = series_of[12, floor]
    pair = many(view, 2).series
    check(verdict.verdict_figure(verdict.Verdict("dense_params", pair, pair, None, None)))
