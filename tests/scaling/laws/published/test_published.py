"""Published laws as data: evaluation against constants worked out by hand, and the rules on what may be drawn
or compared.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize, stats

from recscale.scaling.laws.published import catalogue as published

# 40-digit decimal arithmetic on the printed constants.
HAND_COMPUTED = [
    ("steplaw_lr", (1e9, 1e11), 0.001663213789839893851750858559),
    ("steplaw_batch", (1e11,), 1106246.286972024980880870827),
    ("chinchilla_printed", (7e10, 1.4e12), 1.936645470558717504088534008),
    ("chinchilla_unrounded", (7e10, 1.4e12), 1.920846026565606196940028694),
    ("chinchilla_epoch", (7e10, 1.4e12), 1.973581863158563868560142124),
    ("wukong_task1", (108.0,), -0.77041910674616513313906496703),
    ("sequential_rec_2311", (98300.0,), 6.163672698701614585541927346),
]


@pytest.mark.parametrize(("law_id", "x", "expected"), HAND_COMPUTED)
def test_printed_constants_evaluate_to_hand_computed_values(law_id, x, expected):
    assert published.curve(law_id)(*x) == pytest.approx(expected, rel=1e-12)


def test_wukong_points_return_the_printed_power_law():
    points = published.points("wukong_table5_wukong")
    x = points["gflop_per_example"].to_numpy()
    y = points["relative_logloss_task1_percent"].to_numpy()
    (a, alpha), _ = optimize.curve_fit(
        lambda x, a, alpha: -100 + a * x**-alpha, x, y, p0=(100.0, 1e-3), xtol=1e-14, ftol=1e-14
    )
    assert a == pytest.approx(99.5602, abs=5e-4)
    assert alpha == pytest.approx(7.072e-4, abs=1e-6)
    printed = published.load("wukong_task1").parameters
    assert (round(a, 2), round(alpha, 5)) == (printed["A"], printed["alpha"])
    assert stats.linregress(np.log(x), y).slope == pytest.approx(-0.07029, abs=5e-6)
    np.testing.assert_allclose(published.curve("wukong_task1")(x), y, atol=0.06)


def test_longer_logloss_is_linear_in_squared_separation():
    points = published.points("longer_auc_logloss_pairs")
    separation = 2 * stats.norm.ppf(points["auc"]) ** 2
    line = stats.linregress(separation, points["logloss"])
    assert line.slope == pytest.approx(-0.0740, abs=2e-4)
    assert line.rvalue**2 >= 0.997


def test_every_law_loads_and_either_draws_or_says_why_not():
    drawn, refused = [], []
    for law_id in published.ids():
        law = published.load(law_id)
        assert law.grade and len(law.axes) == len(law.conventions) == len(law.axis_units)
        try:
            curve = published.curve(law_id)
        except published.CannotPlot as error:
            assert law_id in str(error)
            refused.append(law_id)
        else:
            assert np.isfinite(curve(*[1e3] * len(law.axes)))
            drawn.append(law_id)
    assert len(drawn) == 15 and len(refused) == 17
    assert {"longer", "llatte", "dlrm_scaling_2208", "fat", "deres", "farseer"} <= set(refused)


@pytest.mark.parametrize(
    ("law_id", "style", "in_label"),
    [
        ("wukong_task1", "-", "2403.02545"),
        ("hstu_ne", "--", "[secondary]"),
        ("chinchilla_printed", "-", "2203.15556"),
    ],
)
def test_unchecked_grades_are_dashed_and_named(law_id, style, in_label):
    curve = published.curve(law_id)
    assert curve.law.linestyle == style
    assert in_label in curve.law.label
    assert ("[" in curve.law.label) == (style == "--")


def test_overlay_needs_the_same_axis_metric_and_convention():
    right = dict(axes="train_flops_per_row", metric="relative_logloss_percent", convention="gflop_per_example")
    assert published.overlay("wukong_task1", **right)(1.0) == pytest.approx(-0.44, abs=1e-9)
    for key, wrong in [
        ("axes", "dense_params"),
        ("metric", "logloss"),
        ("convention", "flop"),
        ("convention", None),
    ]:
        with pytest.raises(published.OverlayRefused) as refusal:
            published.overlay("wukong_task1", **{**right, key: wrong})
        assert len(refusal.value.mismatches) == 1
        assert refusal.value.mismatches[0].startswith({"axes": "axis"}.get(key, key))
    with pytest.raises(published.OverlayRefused, match="axis.*metric.*convention"):
        published.overlay("wukong_task1", axes="examples", metric="auc", convention="rows")


def test_gain_exponents_are_never_compared():
    with pytest.raises(published.OverlayRefused, match="never compared"):
        published.overlay(
            "unimixer_unimixer", axes="dense_params", metric="auc_gain", convention="million_params_assumed"
        )


def test_errors_name_the_thing():
    with pytest.raises(KeyError, match="wukong_task1"):
        published.load("wukong_task")
    with pytest.raises(ValueError, match="expected 2 arguments"):
        published.curve("chinchilla_printed")(1e9)
    with pytest.raises(ValueError, match="must be positive"):
        published.curve("wukong_task1")(np.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="no numeric range"):
        published.curve("hstu_ne").inside(1.0)
    with pytest.raises(KeyError, match="nonsense"):
        published.results("mixers", nonsense=1)


def test_range_of_a_curve():
    curve = published.curve("chinchilla_printed")
    assert bool(curve.inside(1e9, 1e10)) and not bool(curve.inside(1e12, 1e10))
    np.testing.assert_array_equal(
        published.curve("wukong_task1").inside(np.array([0.1, 1.0, 200.0])), [False, True, False]
    )


def test_result_collections_hold_graded_cells():
    for name, rows in [
        ("mixers", 540),
        ("sequence", 414),
        ("memory", 232),
        ("domains", 217),
        ("quality", 440),
    ]:
        frame = published.results(name)
        assert len(frame) == rows
        assert set(frame["provenance"]) <= {"read", "secondary", "digitised"}
        assert frame["value"].notna().mean() > 0.9
    baseline = published.results("mixers", paper="RankMixer", model="DLRM-MLP", metric="finish_auc")
    assert baseline["value"].tolist() == [0.8554]
    assert set(published.significance_thresholds()["source"]) >= {"Wukong", "RankMixer"}
    assert published.reference_fit("lr_curvature")["range"] == [0.0083, 0.0177]


def test_readme_counts_match_the_files():
    folder = Path(published.__file__).parent
    readme = (folder / "README.md").read_text(encoding="utf-8")
    for path in folder.glob("*.json"):
        data = json.loads(path.read_text(encoding="utf-8"))
        count = f"{len(data['laws'])} laws, {len(data['points'])} point sets" if path.stem == "laws" else str(len(data))
        assert f"| `{path.name}` | {count}" in readme
