"""What a comparison makes of its fits: intervals, multipliers, the level, the evidence and the answer, case by case."""

import hashlib

import numpy as np
import pandas as pd
import pytest

from recscale.scaling.laws.comparing import compare as comparing
from recscale.scaling.laws.comparing import pair_checks
from recscale.scaling.laws.comparing.checklist import Item
from recscale.scaling.laws.comparing.compare import ExponentDifference, Interval, Level
from recscale.scaling.laws.comparing.pair_models import PairData, PairFit
from recscale.scaling.laws.comparing.pairing import PairedSize
from recscale.scaling.laws.forms.registry import get
from recscale.scaling.laws.judgement.gates import Gate
from recscale.scaling.laws.tables.validate import prepare

BOOTSTRAP = "cluster bootstrap 95%"


def data_of(x_a, x_b, y=None, clusters=None, matched=False):
    x = np.array([*x_a, *x_b], float)
    y = np.full(len(x), 0.5) if y is None else np.asarray(y, float)
    clusters = np.arange(len(x)) if clusters is None else np.asarray(clusters)
    return PairData(x, y, np.arange(len(x)) < len(x_a), clusters, matched)


def test_intervals_leave_out_the_outer_fortieths():
    values = np.append(np.arange(1000.0), np.nan)[::-1]
    assert comparing._interval(values, BOOTSTRAP) == Interval(24.0, 974.0, BOOTSTRAP)
    assert comparing._interval(values, "leave-one-cluster-out range") == Interval(
        0.0, 999.0, "leave-one-cluster-out range"
    )
    open_end = np.where(np.arange(1000) < 970, np.arange(1000.0), np.inf)
    assert comparing._interval(open_end, BOOTSTRAP).high == np.inf
    assert comparing._interval(np.full(3, np.nan), BOOTSTRAP) is None
    grown = comparing._exponentiated(Interval(0.0, np.log(2.0), BOOTSTRAP))
    assert (grown.low, grown.high, grown.kind) == (1.0, pytest.approx(2.0), BOOTSTRAP)
    assert comparing._exponentiated(None) is None


@pytest.mark.parametrize(("value", "outside"), [(0.9, True), (1.0, False), (2.0, False), (2.1, True)])
def test_an_interval_excludes_what_lies_outside(value, outside):
    assert Interval(1.0, 2.0, BOOTSTRAP).excludes(value) is outside


def test_multipliers_are_read_where_both_have_been():
    """a: .4 + .05 e^(-u / 2); b the same with twice as much of x."""
    phi = np.array([np.log(0.4), 0.0, np.log(0.05) - np.log(2) / 4, -np.log(2) / 2, np.log(0.5), 0.0])
    draws = np.stack([phi, phi + np.array([0, 0, 0, -0.1, 0, 0])])
    own = PairFit("own", phi, 0.1, 1.0, 1.0, np.zeros(4), draws)
    data = data_of([1, 2], [1, 2], [0.5, 0.42, 0.48, 0.41])
    found = comparing._multipliers(data, own, "leave-one-cluster-out range")
    assert [(m.where, m.metric) for m in found] == [
        ("worst", 0.48), ("middle", pytest.approx(np.sqrt(0.48 * 0.42))), ("best", 0.42),
    ]  # fmt: skip
    for m in found:
        assert m.multiplier == pytest.approx(2.0)
        assert (m.interval.low, m.interval.high) == pytest.approx((2.0, 2.0 * np.exp(0.2)))
    below = comparing._multipliers(data_of([1, 2], [1, 2], [0.5, 0.3, 0.48, 0.2]), own, BOOTSTRAP)
    assert [m.multiplier is None for m in below] == [False, True, True]
    apart = PairFit("own", phi + [0, 0.2, 0, 0, 0, 0], 0.1, 1.0, 1.0, np.zeros(4), draws)
    near = comparing._multipliers(data_of([1, 2], [1, 2], [0.5, 0.42, 0.48, 0.37]), apart, BOOTSTRAP)
    assert [m.multiplier is None for m in near] == [False, False, True]  # below the floor of one of them
    for low in (0.48, 0.49):  # no metric in common, or one only
        assert comparing._multipliers(data_of([1, 2], [1, 2], [0.5, low, 0.48, 0.41]), own, BOOTSTRAP) == []


def difference(low, high, model="own", alpha=0.5, admissible=True):
    interval = None if low is None else Interval(low, high, BOOTSTRAP)
    return ExponentDifference(model, admissible, "" if admissible else "poor", alpha, alpha, 0.0, interval)


@pytest.mark.parametrize(
    ("intervals", "told"),
    [
        ([(0.1, 0.2), (0.01, 0.2)], "a steeper"),
        ([(0.1, 0.2), (0.0, 0.2)], "undecided"),
        ([(0.1, 0.2), (0.1, 0.2), (-0.2, -0.1)], "undecided"),
        ([(0.1, 0.2), (0.1, 0.2), (-0.2, 0.3)], "a steeper"),
        ([(-0.2, -0.1), (-0.2, -0.01)], "b steeper"),
        ([(-0.2, -0.1), (-0.2, -0.1), (0.1, 0.2)], "undecided"),
        ([(-0.2, -0.1), (-0.2, 0.0)], "no relevant difference"),
        ([(-0.2, 0.049), (-0.2, 0.049)], "no relevant difference"),
        ([(-0.2, 0.05), (-0.2, 0.049)], "undecided"),
        ([(0.1, 0.2), (None, None)], "undecided"),
    ],
)
def test_what_differences_of_exponents_say_together(intervals, told):
    """Two of them on one side and none on the other; or all below a tenth of the exponent, .5."""
    differences = [difference(*ends) for ends in intervals]
    assert comparing._evidence(differences, ("a", "b"), 0.1, True, [])[0] == told
    refused = [Gate("span", None, "", False, "short")]
    for resample, gates in ((False, []), (True, refused)):
        assert comparing._evidence(differences, ("a", "b"), 0.1, resample, gates)[0] == "undecided"
    # A model that is not admissible does not count.
    first, *rest = intervals
    fewer = [difference(*first, admissible=False), *(difference(*ends) for ends in rest)]
    assert comparing._evidence(fewer, ("a", "b"), 0.1, True, [])[0] == "undecided" or len(rest) > 1


def test_the_margin_is_a_share_of_the_mean_exponent():
    apart = [ExponentDifference("own", True, "", 0.2, 0.6, -0.4, Interval(-0.1, 0.039, BOOTSTRAP))] * 2
    assert comparing._evidence(apart, ("a", "b"), 0.1, True, [])[0] == "no relevant difference"
    wide = [ExponentDifference("own", True, "", 0.2, 0.6, -0.4, Interval(-0.1, 0.041, BOOTSTRAP))] * 2
    assert comparing._evidence(wide, ("a", "b"), 0.1, True, [])[0] == "undecided"


def test_the_answer_follows_the_evidence_unless_something_blocks_it():
    missing = Item("seeds", "seeds", None, "", True)
    beside = Item("counts", "counts", False, "", False)
    whole, part = Gate("dof", 1, "", False, "few", refuses=("*",)), Gate("span", 1, "", False, refuses=("E",))
    fine = Gate("dof", 1, "", True, refuses=("*",))
    for evidence, answer in (
        ("a steeper", "yes"), ("b steeper", "no"), ("no relevant difference", "no"), ("undecided", "cannot tell"),
    ):  # fmt: skip
        assert comparing._answer(evidence, ["so"], [beside], [part, fine]) == (answer, ["so"])
        for items, gates in (([missing], []), ([], [whole])):
            told, reasons = comparing._answer(evidence, ["so"], items, gates)
            assert told == "cannot tell" and len(reasons) == 2


@pytest.mark.parametrize(
    ("beats", "errors", "chosen"),
    [
        ([], [3.0, 2.0, 1.0], "shared"),
        ([("shared", "shift")], [3.0, 2.0, 1.0], "shift"),
        ([("shared", "own")], [3.0, 2.0, 1.0], "shift"),
        ([("shared", "own")], [1.0, 2.0, 1.0], "shared"),  # it extrapolates no better
        ([("shared", "own")], [1.0, 2.0, None], "shift"),
        ([("shared", "own")], [None, 2.0, 5.0], "shift"),
        ([("shared", "shift"), ("shift", "own")], [3.0, 2.0, 1.0], "own"),
    ],
)
def test_the_first_level_that_no_richer_one_beats(monkeypatch, beats, errors, chosen):
    models = ("shared", "shift", "own")
    fits = {model: model for model in models}
    monkeypatch.setattr(
        comparing, "nesting_p_value", lambda small, large, _: 0.049 if (small, large) in beats else 0.05
    )
    levels = [Level(model, 3, 1.0, None, error) for model, error in zip(models, errors, strict=True)]
    assert comparing._first_not_worse(levels, fits, data_of([1], [2])) == chosen


def test_clusters_of_a_pair_are_those_that_are_resampled():
    assert comparing._cluster_count(data_of([1, 2], [1, 2], clusters=[0, 1, 0, 1], matched=True)) == 2
    assert comparing._cluster_count(data_of([1, 2, 3], [1, 2], clusters=[0, 1, 2, 3, 3])) == 1
    assert comparing._cluster_count(data_of([1, 2], [1, 2, 3], clusters=[0, 1, 2, 3, 4])) == 2


def test_which_side_does_not_move():
    x = np.geomspace(1, 1e3, 12)
    noise = 1e-3 * np.random.default_rng(0).standard_normal(12)
    falling, flat = 0.4 + 0.1 * x**-0.4 + noise, 0.4 + noise
    for y_a, y_b, told in ((falling, falling, ""), (flat, falling, "fast has"), (falling, flat, "slow has")):
        data = data_of(x, x, np.concatenate([y_a, y_b]))
        assert comparing._still(data, ("fast", "slow")).startswith(told) and bool(told) == bool(
            comparing._still(data, ("fast", "slow"))
        )


def test_either_side_needs_rows_values_and_a_span():
    def told(x_a, x_b):
        """Rules that failed, with whom they name, of two values of y in turn."""
        frame = pd.DataFrame({"x": [*x_a, *x_b], "y": np.linspace(0.6, 0.5, len(x_a) + len(x_b))})
        is_a = np.arange(len(frame)) < len(x_a)
        rows = prepare(frame, get("power_offset"), {"x": "x"}, "y")
        found = comparing._gates_before(rows, is_a, ("fast", "slow"))
        return [(gate.id, gate.reason.split(" ")[0].strip(":")) for gate in found if gate.passed is False], found

    wide, six = np.geomspace(1, 1e3, 6), np.geomspace(1, 1e3, 6)
    failed, found = told(wide, six)
    assert failed == [] and [gate.id for gate in found] == ["span", "span"] and all(g.passed for g in found)
    assert told(wide, six[:5])[0] == [("dof", "slow")] and told(wide[:5], six)[0] == [("dof", "fast")]
    assert told(wide, np.geomspace(1, 9, 6))[0] == [("span", "slow")]
    assert told(np.array([1.0, 2, 3]), six)[0] == [("span", "fast"), ("dof", "fast")]
    assert told(np.array([1.0, 2]), six)[0] == [("dof", "fast")]
    assert told(np.zeros(0), six)[0] == [("rows", "no")]


def test_levels_are_weighed_against_the_next(monkeypatch):
    models = ("shared", "shift", "exponents", "own")
    zeros = np.zeros(3)
    fits = {m: PairFit(m, zeros, 0.1, 1.0, float(k), zeros, zeros) for k, m in enumerate(models)}
    errors = dict(zip(models, (0.4, 0.3, 0.2, None), strict=True))
    monkeypatch.setattr(comparing, "rolling_origin_error", lambda data, names, delta: errors)
    monkeypatch.setattr(comparing, "nesting_p_value", lambda small, large, _: small.rss + 10 * large.rss)
    found = comparing._levels(data_of([1], [2]), fits, 0.02)
    assert [(one.model, one.parameters, one.rss, one.p_against_next, one.rolling_error) for one in found] == [
        ("shared", 3, 0.0, 10.0, 0.4), ("shift", 4, 1.0, 21.0, 0.3), ("exponents", 5, 2.0, 32.0, 0.2),
        ("own", 6, 3.0, None, None),
    ]  # fmt: skip
    phi = np.array([0.0, 0.0, 0.0, 0.0, np.log(0.4), 0.5])
    fit = PairFit("own", phi, 0.1, 1.0, 1.0, zeros, np.stack([phi, phi + [0, 0, 0, 0, 0.1, 0]]))
    refused = comparing._difference(fit, False, "poor", BOOTSTRAP)
    assert (refused.model, refused.admissible, refused.reason, refused.interval) == ("own", False, "poor", None)
    assert np.isnan([refused.alpha_a, refused.alpha_b, refused.difference]).all()
    told = comparing._difference(fit, True, "", "leave-one-cluster-out range")
    ends = 0.4 * np.exp([0.25, -0.25])
    assert (told.alpha_a, told.alpha_b, told.difference) == pytest.approx((*ends, ends[0] - ends[1]))
    assert told.admissible and told.reason == ""
    assert (told.interval.low, told.interval.high) == pytest.approx((told.difference, told.difference * np.exp(0.1)))


def test_diverged_runs_are_counted_once_each():
    rows = pd.DataFrame({"run_id": list("ppqrs"), "architecture": list("aaabb"), "status": ["diverged"] * 4 + ["done"]})
    assert comparing._diverged(rows, "architecture", ("a", "b")) == {"a": 2, "b": 1}
    assert comparing._diverged(rows.drop(columns="run_id"), "architecture", ("a", "b")) == {"a": 3, "b": 1}
    assert comparing._diverged(rows.drop(columns="status"), "architecture", ("a", "b")) is None


def test_a_table_is_known_by_what_it_holds_not_by_its_index():
    table = pd.DataFrame({"x": [1, 2]})
    digest = hashlib.sha256(b"x\n1\n2\n").hexdigest()
    assert comparing._table_hash(table) == digest[:16] == comparing._table_hash(table.set_axis([7, 9]))


def test_rows_of_a_pair_may_be_left_out_at_either_end(monkeypatch):
    """Of five values a side: an outlier beyond 5 x 1.4826 MAD, and each side's smallest value."""
    data = data_of([1, 2, 3, 4, 5], [2, 3, 4, 5, 6])
    for size, left_out in ((7.5, True), (7.3, False)):
        residuals = np.array([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 0.0, size])
        monkeypatch.setattr(
            pair_checks, "fit_pair", lambda *_, r=residuals, **__: PairFit("own", r, 0.0, 1.0, 1.0, r, r)
        )
        chosen = pair_checks._row_choices(data, 1e-3)
        assert chosen[0] is data and [len(part.x) for part in chosen] == ([10, 9, 8] if left_out else [10, 8])
        assert list(chosen[-1].x) == [2, 3, 4, 5, 3, 4, 5, 6]
    assert len(pair_checks._row_choices(data.subset(data.x < 5), 1e-3)) == 1  # three values are too few


def test_the_order_of_the_largest_is_predicted_from_the_rest(monkeypatch):
    """Curves .4 + .05 e^(-u/2) and .03 instead of .05: the first is worse, as measured or not."""
    seen = {}

    def fitted(data, model, delta):
        seen.update(largest=data.x.max(), model=model, delta=delta)
        phi = np.array([np.log(0.4), 0.0, np.log(np.sqrt(0.0015)), np.log(5 / 3), np.log(0.5), 0.0])
        return PairFit(model, phi, 0.0, 1.0, 1.0, phi, phi)

    monkeypatch.setattr(pair_checks, "fit_pair", fitted)
    x = [1, 2, 3, 4]
    noise = [PairedSize("1", 4, 0.0, 0.02, None, None, None), PairedSize("2", 1, 0.0, None, None, None, None)]
    for gap, paired, right in (
        (0.01, [], True), (-0.01, [], False), (-0.019, noise, True), (-0.021, noise, False), (0.05, noise, True),
    ):  # fmt: skip
        y = np.array([0.6, 0.55, 0.52, 0.5, 0.6, 0.55, 0.52, 0.5 - gap])
        told, detail = pair_checks.held_out_order(data_of(x, x, y), "own", paired, 0.02)
        assert told is right and f"measured {gap:+.3g}" in detail
        centre = np.log([1, 2, 3]).mean()
        assert f"predicted by own {0.02 * np.exp(-(np.log(4) - centre) / 2):+.3g}" in detail
        assert ("within two" in detail) == (paired == noise and abs(gap) < 0.02)
    assert seen == {"largest": 3, "model": "own", "delta": 0.02}
    assert pair_checks.held_out_order(data_of(x[1:], x), "own", [], 0.02)[0] is None


def test_specifications_agree_on_a_sign_nineteen_times_of_twenty():
    for share, agree in ((0.95, True), (0.94, False)):
        found = {"count": 20, "same_sign": share}
        assert pair_checks.specifications_agree(found, "a steeper") is agree
        assert pair_checks.specifications_agree(found, "b steeper") is agree
        assert pair_checks.specifications_agree(found, "undecided") is True
    assert pair_checks.specifications_agree({"count": 0}, "a steeper") is None


def test_specifications_vary_axis_width_rows_and_floor(monkeypatch):
    """Differences of 1 or 2 by Huber width, with a third more under their own floors."""
    widths = []

    def fitted(data, model, delta):
        widths.append(delta)
        r = np.array([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0])[: len(data.x)]
        size = (1.0 if delta < 1 else -2.0) + (model == "own") / 3
        phi = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 2 * np.arcsinh(size / 2)])
        return PairFit(model, phi, 0.0, 1.0, 1.0, r, phi)

    monkeypatch.setattr(pair_checks, "fit_pair", fitted)
    data = data_of([1, 2, 3, 4, 5], [1, 2, 3, 4, 5])
    frame = pd.DataFrame({"train_flops": data.x, "dense_params": data.x**2, "active_params": -data.x})
    found = pair_checks.difference_specifications(frame, data, 1.2, 0.02)
    # Two axes (FLOPs is the one in use, a negative one is none), all rows or without the smallest, three widths, two
    # floors.
    values = np.tile([1.0, 4 / 3, 1.0, 4 / 3, -2.0, -2 + 1 / 3], 4)
    assert found["count"] == 24
    assert [found[name] for name in ("low", "median", "high")] == pytest.approx(np.quantile(values, [0.05, 0.5, 0.95]))
    assert found["same_sign"] == pytest.approx(2 / 3) and found["rank_of_headline"] == pytest.approx(4 / 6)
    assert set(np.round(widths, 6)) == {round(1.4826 / 3, 6), 0.02, 1e6}
    none = pair_checks.difference_specifications(frame[[]], data_of([1, 2, 3], [1, 2, 3]), 1.2, 0.02)
    assert none["count"] == 0 and np.isnan(none["median"]) and np.isnan(none["same_sign"])
