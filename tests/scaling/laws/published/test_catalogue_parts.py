"""Published laws that are laid out by hand: curves of every form, ranges, labels, and a fit beside them."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from recscale.scaling.laws import Refused
from recscale.scaling.laws.judgement.gates import Gate
from recscale.scaling.laws.published import beside as comparing
from recscale.scaling.laws.published import catalogue
from recscale.scaling.laws.published.catalogue import CannotPlot, OverlayRefused, PublishedLaw

LAW = PublishedLaw(
    "made_up", "Made Up: a paper", "2401.00001", None, None, "P1", None, {"E": 0.4, "A": 3.0, "alpha": 0.3},
    ("dense_params",), ("params",), ("params",), ((1e3, 1e6),), 9, ("logloss",), ("logloss",), None, "table", None,
    None, None,
)  # fmt: skip


_MINE, _THEIRS = "the fitted one's interval", "the published one's interval"


@pytest.fixture
def shown(monkeypatch):
    """Laws by id, in the place of those of the file."""
    laws = {}
    monkeypatch.setattr(catalogue, "load", laws.__getitem__)

    def add(**changes):
        laws["made_up"] = replace(LAW, **changes)
        return laws["made_up"]

    return add


@pytest.mark.parametrize(
    ("form", "constants", "x", "y"),
    [
        ("P0", {"A": 3.0, "alpha": 0.5}, (4.0,), 1.5),
        ("P0", {"x0": 4.0, "alpha": 0.5}, (16.0,), 0.5),
        ("P1", {"E": 0.25, "log_A": np.log(3.0), "alpha": 0.5}, (4.0,), 1.75),
        ("LL", {"a": 1.0, "b": 0.5}, (np.exp(1.0),), 0.5),
        ("C", {"E": 0.25, "A": 3.0, "alpha": 0.5, "B": 2.0, "beta": 1.0}, (4.0, 8.0), 2.0),
        ("GAIN", {"c": 2.0, "gamma": 0.5}, (4.0,), 4.0),
        ("HYPER", {"c": 2.0, "n": 0.5, "d": -1.0}, (4.0, 8.0), 0.5),
    ],
)
def test_a_published_form_is_its_equation(shown, form, constants, x, y):
    axes = ("dense_params", "examples")[: len(x)]
    shown(form=form, parameters=constants, axes=axes)
    assert catalogue.curve("made_up")(*x) == pytest.approx(y)
    shown(form=form, parameters=constants, axes=axes, printed_as="percent_change")
    assert catalogue.curve("made_up")(*x) == pytest.approx(y - 100)
    lacking = dict(list(constants.items())[1:]) if form != "HYPER" else {"n": 0.5, "d": -1.0}
    shown(form=form, parameters=lacking, axes=axes)
    with pytest.raises(CannotPlot, match="missing"):
        catalogue.curve("made_up")


def test_a_curve_takes_its_axes_and_knows_its_range(shown):
    shown()
    curve = catalogue.curve("made_up")
    np.testing.assert_array_equal(curve.inside(np.array([999.0, 1e3, 1e6, 1.1e6])), [False, True, True, False])
    with pytest.raises(ValueError, match="expected 1 arguments, got 2"):
        curve(1.0, 2.0)
    for x in (0.0, -1.0, np.array([1.0, 0.0])):
        with pytest.raises(ValueError, match="must be positive"):
            curve(x)
    shown(range=None)
    with pytest.raises(ValueError, match="no numeric range"):
        catalogue.curve("made_up").inside(1.0)
    shown(form="ODD")
    with pytest.raises(CannotPlot, match="stored for reference"):
        catalogue.curve("made_up")
    assert catalogue._numeric_range([1, 2]) == ((1.0, 2.0),) and catalogue._numeric_range([[1, 2], [3, 4]])[1] == (
        3.0,
        4.0,
    )
    assert catalogue._numeric_range("large") is None and catalogue._numeric_range(None) is None
    assert (LAW.linestyle, LAW.label) == ("-", "Made Up (arXiv 2401.00001)")
    unchecked = replace(LAW, grade="secondary", arxiv=None)
    assert (unchecked.linestyle, unchecked.label) == ("--", "Made Up: a paper [secondary]")


def test_an_overlay_shows_the_same_thing_or_says_what_differs(shown):
    shown()
    same = dict(axes="dense_params", metric="logloss", convention="params")
    assert catalogue.overlay("made_up", **same).law.id == "made_up"
    for changes, words in (
        ({"axes": "examples"}, "axis"), ({"metric": "auc"}, "metric"), ({"convention": "flops"}, "convention"),
        ({"convention": None}, "not stated"), ({"axes": ["dense_params", "examples"]}, "axis"),
    ):  # fmt: skip
        with pytest.raises(OverlayRefused, match=words) as error:
            catalogue.overlay("made_up", **{**same, **changes})
        assert len(error.value.mismatches) == (2 if isinstance(changes.get("axes"), list) else 1)
    for changes, words in (({"form": "GAIN"}, "form GAIN"), ({"conventions": (None,)}, "does not state")):
        shown(**changes)
        with pytest.raises(OverlayRefused, match=words):
            catalogue.overlay("made_up", **same)


@pytest.mark.parametrize(
    ("fitted", "interval", "se", "verdict"),
    [
        (0.31, (0.30, 0.32), 0.01, f"the published one inside {_MINE}; the fitted one inside {_THEIRS}"),
        (0.33, (0.31, 0.35), 0.01, f"the published one outside {_MINE}; the fitted one outside {_THEIRS}"),
        (0.319, (0.301, 0.32), 0.01, f"the published one outside {_MINE}; the fitted one inside {_THEIRS}"),
        (0.31, None, 0.01, f"the fitted one inside {_THEIRS}"),
        (0.31, (0.29, 0.30), None, f"the published one inside {_MINE}"),
        (0.31, None, None, "neither has an interval"),
        (None, None, 0.01, "the fitted one is refused (wide)"),
    ],
)  # fmt: skip
def test_an_exponent_is_inside_or_outside_the_others_interval(shown, fitted, interval, se, verdict):
    shown(parameters=LAW.parameters | ({} if se is None else {"se": {"alpha": se}}))
    parameters = [SimpleNamespace(name=name, role=role) for name, role in (("E", "floor"), ("alpha", "exponent"))]
    law = SimpleNamespace(
        form=SimpleNamespace(parameters=parameters, id="power_offset"), params={"alpha": fitted}, refused=False,
        intervals={"alpha": interval}, reason=lambda name: "wide", refusals=[],
    )  # fmt: skip
    told = dict(metric="logloss", axes=["dense_params"], convention="params")
    curve, (found,) = comparing.beside("made_up", law, **told)
    assert found.verdict == verdict and (found.published, found.fitted) == (0.3, fitted) and curve.law.id == "made_up"
    assert found.published_interval == (None if se is None else pytest.approx((0.3 - 0.0196, 0.3 + 0.0196)))
    grid = comparing.as_grid("beside", [found])
    assert grid.rows[0][:2] == ("alpha", "0.3") and grid.rows[0][3] == (
        "refused" if fitted is None else f"{fitted:.4g}"
    )
    law.form.parameters = parameters[:1]
    with pytest.raises(CannotPlot, match="prints no exponent"):
        comparing.beside("made_up", law, **told)
    for changes in (dict(refused=True), dict(refusals=[Gate("gain", 1, "", False, refuses=("comparison",))])):
        with pytest.raises(Refused, match="may not be compared"):
            comparing.beside("made_up", SimpleNamespace(**{**vars(law), **changes}), **told)
