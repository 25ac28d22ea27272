"""The parts of a specification curve by hand: rows, columns, outliers, sizes, combinations and the summary."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from recscale.scaling.laws import Refused
from recscale.scaling.laws.judgement import specification
from recscale.scaling.laws.judgement.gates import Gate
from recscale.scaling.laws.judgement.specification import DIMENSIONS, _Space

HEADLINE = dict(
    form="power", huber_delta=1e-3, outliers="all", rows="all", size="dense_params", metric="logloss", weights=None
)


def table(**columns):
    """Two runs of eight checkpoints each, the last two of either decayed."""
    step = np.tile(np.arange(1.0, 9.0), 2)
    known = {
        "run_id": np.repeat(["r", "s"], 8),
        "examples": step,
        "decayed": step > 6,
        "dense_params": np.repeat([1.0, 2.0], 8),
    }
    return pd.DataFrame({**known, "logloss": 0.5 - 0.01 * step, **columns})


def space_of(frame=None, axes=None, slot="x", **changes):
    frame = table() if frame is None else frame
    known = dict(target="logloss", cluster=None, quantity="forecast", at={"x": 3.0})
    return _Space(frame, axes or {"x": "dense_params"}, size_slot=slot, **{**known, **changes})


def test_row_choices_are_those_that_differ():
    masks = specification._row_masks(table())
    step = table().examples.to_numpy()
    assert list(masks) == ["all", "decayed", "final decayed", "trailing checkpoints"]
    for name, mask in (
        ("all", step > 0),
        ("decayed", step > 6),
        ("final decayed", step == 8),
        ("trailing checkpoints", step > 3),
    ):
        np.testing.assert_array_equal(masks[name], mask)
    # The last decayed row of a run, not its last row.
    other = specification._row_masks(table(decayed=step == 7))
    np.testing.assert_array_equal(other["decayed"], step == 7)
    assert "final decayed" not in other and "decayed" not in specification._row_masks(table(decayed=False))
    assert list(specification._row_masks(table().drop(columns=["run_id", "decayed"]))) == ["all"]
    unordered = specification._row_masks(table().drop(columns=["examples", "decayed"]))
    np.testing.assert_array_equal(unordered["trailing checkpoints"], step > 3)


def test_derived_columns_and_incomplete_sizes():
    frame = table(head_params=5.0, active_params=3.0, train_flops=np.where(np.arange(16) > 0, 1.0, np.nan))
    found = specification._with_columns(frame.set_axis(range(5, 21)), {"x": "dense_params"})
    assert list(found.index) == list(range(16)) and found["dense_plus_head"].tolist() == [6.0] * 8 + [7.0] * 8
    assert "train_flops" not in found and "active_params" in found and specification._NOISE_COLUMN not in found
    for odd in (table(head_params=np.where(np.arange(16) > 0, 1.0, np.nan)), table()):
        assert "dense_plus_head" not in specification._with_columns(odd, {"x": "dense_params"})
    assert "active_params" not in specification._with_columns(table(active_params=0.0), {"x": "dense_params"})
    assert "active_params" in specification._with_columns(table(active_params=0.0), {"x": "active_params"})
    seeds = table(seed=np.tile([0, 1], 8), dense_params=np.repeat([1.0, 2.0, 3.0, 4.0], 4))
    noisy = specification._with_columns(seeds, {"x": "dense_params"})
    assert np.all(noisy[specification._NOISE_COLUMN] > 0)
    assert specification._size_slot({"D": "examples", "N": "dense_params"}) == "N"
    assert specification._size_slot({"D": "examples"}) is None


def test_a_point_is_moved_to_another_size_by_a_line_through_the_rows():
    x = np.exp([0.0, 1.0, 2.0, 3.0])
    frame = pd.DataFrame({"dense_params": x, "active_params": 3 * x**1.5})
    space = space_of(frame, at={"x": np.exp(5.0)})
    keep = np.ones(4, bool)
    assert space.point(None, HEADLINE | {"size": "dense_params"}, keep) == {"x": np.exp(5.0)}
    assert space.point(None, HEADLINE | {"size": None}, keep) == {"x": np.exp(5.0)}
    moved = space.point(None, HEADLINE | {"size": "active_params"}, keep)
    assert moved == {"x": pytest.approx(3 * np.exp(7.5))}
    frame.loc[3, "active_params"] = 1e9  # a row that is left out does not count
    assert space.point(None, HEADLINE | {"size": "active_params"}, np.arange(4) < 3)["x"] == pytest.approx(
        3 * np.exp(7.5)
    )
    by_column = space_of(frame, at={"dense_params": 7.0})
    assert by_column.point(None, HEADLINE | {"size": None}, keep) == {"x": 7.0}


def test_a_choice_is_one_fit(monkeypatch):
    calls = []
    monkeypatch.setattr(specification, "fit", lambda *given, **options: calls.append((given, options)))
    space = space_of(cluster="c")
    keep = np.arange(16) % 2 == 0
    space.fit(HEADLINE | {"rows": "decayed", "size": "active_params", "weights": "w", "huber_delta": 0.1}, keep)
    (rows, form, axes, target), options = calls[0]
    assert rows.examples.tolist() == [7.0, 7.0] and (form, target) == ("power", "logloss")
    assert axes == {"x": "active_params"} and space.axes == {"x": "dense_params"}
    assert options == dict(bootstrap=0, cluster="c", profile=False, huber_delta=0.1, weights="w")
    space.fit(HEADLINE | {"metric": "auc", "size": None}, profile=True)
    (rows, form, axes, target), options = calls[1]
    assert len(rows) == 16 and (form, target) == ("auc", "auc") and axes == {"x": "dense_params"}
    assert options["profile"] is True and "weights" not in options


def law_of(values, form="power", **changes):
    """A fit as far as the curve reads it."""
    known = dict(refused=False, refusals=[], derived={}, params={"alpha": 0.3})
    found = SimpleNamespace(form=SimpleNamespace(id=form), **{**known, **changes})
    found.reason = lambda name: f"no {name}"
    found.predict = lambda axes, beyond_range: values
    found.solved = lambda: (None, SimpleNamespace(objective=0.25))
    return found


def test_outliers_are_judged_by_the_headline_fit():
    residual = np.array([1.0, -1.0] * 7 + [0.0, 7.0]) * 1e-3
    frame = table(logloss=0.5 * np.exp(-residual))
    space, base = space_of(frame), law_of(np.full(16, 0.5))
    mask = specification._outlier_mask(space, base, HEADLINE | {"outliers": "drop beyond 5 MAD"})
    np.testing.assert_array_equal(mask, [True] * 16)
    frame = table(logloss=0.5 * np.exp(-np.append(residual[:-1], 7.5e-3)))
    mask = specification._outlier_mask(space_of(frame), base, HEADLINE | {"outliers": "drop beyond 5 MAD"})
    np.testing.assert_array_equal(mask, [True] * 15 + [False])
    smallest = specification._outlier_mask(space, base, HEADLINE | {"outliers": "drop smallest size"})
    np.testing.assert_array_equal(smallest, frame.dense_params > 1)
    no_size = space_of(frame, {"x": "examples"}, slot=None)
    smallest = specification._outlier_mask(no_size, base, HEADLINE | {"outliers": "drop smallest size"})
    np.testing.assert_array_equal(smallest, frame.examples > 1)
    assert specification._outlier_mask(space, base, HEADLINE).all()


@pytest.mark.parametrize(("error", "admitted"), [(1.49, True), (1.51, False)])
def test_forms_that_fit_half_as_badly_again_are_not_tried(monkeypatch, error, admitted):
    errors = {"power": 5.0, "power_offset": 1.0, "kappa": error}
    refused = [Gate("dof", 1, "", False, "few", refuses=("*",)), Gate("span", 1, "", False, "short", refuses=("E",))]
    monkeypatch.setattr(specification, "_residuals", lambda law: np.array([-1.0, 1.0]) * errors[law.form.id])

    def fit(choice):
        return law_of(
            None, choice["form"], **({} if choice["form"] in errors else dict(refused=True, refusals=refused))
        )

    found, reasons = specification._admissible_forms(
        SimpleNamespace(fit=fit), HEADLINE, ["power_offset", "kappa", "m4"]
    )
    assert found == ["power", "power_offset", *(["kappa"] if admitted else [])]  # the headline's own always is
    assert reasons["m4"] == "few" and ("kappa" in reasons) is not admitted
    errors.update(power_offset=0.0, kappa=0.9e-9)
    assert "kappa" in specification._admissible_forms(SimpleNamespace(fit=fit), HEADLINE, ["power_offset", "kappa"])[0]


def test_combinations_are_all_or_a_random_part():
    choices = {name: [HEADLINE[name]] for name in DIMENSIONS}
    choices |= {"form": ["power", "kappa"], "metric": ["logloss", "auc"], "rows": ["all", "decayed", "final"]}
    picked, possible = specification._pick(choices, HEADLINE, 200, 0)
    # Twice three of the metric, and three of AUC, which is one form.
    assert possible == len(picked) == 9 and picked[0] == HEADLINE and picked.count(HEADLINE) == 1
    assert [c["form"] for c in picked if c["metric"] == "auc"] == ["power"] * 3
    few, possible = specification._pick(choices, HEADLINE, 4, 1)
    assert possible == 9 and len(few) == 4 and few[0] == HEADLINE and all(c in picked for c in few)
    places = [picked.index(c) for c in few]
    assert places == sorted(set(places)) and few != specification._pick(choices, HEADLINE, 4, 2)[0]
    assert specification._pick(choices, HEADLINE, 9, 0)[0] == picked


def test_what_varies_follows_from_the_columns(monkeypatch):
    monkeypatch.setattr(specification, "_residuals", lambda law: np.array([-0.03, 0.03, 0.01, -0.01]))
    monkeypatch.setattr(specification, "_admissible_forms", lambda *_: (["power", "kappa"], {"m4": "few"}))
    frame = table(active_params=3.0, auc=0.7, **{specification._NOISE_COLUMN: 0.01})
    headline = specification._headline(space_of(frame), "power", {"huber_delta": None, "rows": "decayed"})
    assert headline == HEADLINE | {"rows": "decayed"}
    found, out = specification._choices(space_of(frame, quantity="alpha"), None, headline, {"rows": "decayed"}, ())
    assert out == {"m4": "few"} and found["form"] == ["power", "kappa"] and found["rows"] == ["decayed"]
    assert found["size"] == ["dense_params", "active_params"] and found["metric"] == ["logloss", "auc"]
    assert found["weights"] == [None, specification._NOISE_COLUMN] and len(found["outliers"]) == 3
    assert found["huber_delta"] == [1e-3, pytest.approx(1.4826 * 0.02 / 3), 1e6]
    plain, out = specification._choices(space_of(frame), None, headline, {"form": None}, ())
    assert plain["metric"] == ["logloss"] and plain["form"] == ["power"] and out == {}
    two = space_of(frame, {"N": "dense_params", "D": "examples"}, quantity="alpha", slot=None)
    found, _ = specification._choices(two, None, specification._headline(two, "power", {}), {}, ())
    assert found["metric"] == ["logloss"] and found["size"] == [None]


def test_a_row_of_the_curve_is_a_number_or_a_reason(monkeypatch):
    base, given = law_of(np.full(16, 0.5)), {}

    def row(quantity="forecast", law=None, **choice):
        space = space_of(quantity=quantity)
        monkeypatch.setattr(_Space, "fit", lambda self, choice, keep: given.update(keep=keep) or law)
        return specification._row(space, base, HEADLINE | choice, HEADLINE)

    found = row(law=law_of(0.4))
    assert (found["value"], found["objective"], found["rows_used"], found["reason"]) == (0.4, 0.25, 16, "")
    assert found["headline"] is True
    part = row(law=law_of(0.4), rows="decayed", outliers="drop smallest size")
    assert part["rows_used"] == 2 and part["headline"] is False and given["keep"].sum() == 8
    few = [Gate("dof", 1, "", False, "few", refuses=("*",))]
    refused = row(law=law_of(0.4, refused=True, refusals=few))
    assert np.isnan(refused["value"]) and np.isnan(refused["objective"]) and refused["reason"] == "few"
    assert row("alpha", law_of(0.4))["value"] == 0.3 and row("a", law_of(0.4, derived={"a": 0.5}))["value"] == 0.5
    assert row("beta", law_of(0.4))["reason"] == "form power has no beta"
    assert row("alpha", law_of(0.4, params={"alpha": None}))["reason"] == "no alpha"
    far = law_of(0.4)

    def predict(axes, beyond_range):
        raise Refused("too far")

    far.predict = predict
    assert row(law=far)["reason"] == "too far"


def test_a_curve_is_summed_up_by_its_quantiles_and_the_headlines_rank():
    values = [0.5, np.nan, 0.1, 0.3, 0.2, 0.4]
    rows = pd.DataFrame({"value": values, "headline": [False] * 3 + [True] + [False] * 2})
    rows = rows.assign(**{name: HEADLINE[name] for name in DIMENSIONS}).assign(form=list("aabbbb"))
    found = specification._summarised("alpha", rows, 99, {"m4": "few"})
    assert (found.headline, found.rank, found.count, found.possible) == (0.3, 3, 5, 99)
    assert (found.low, found.median, found.high) == pytest.approx((0.12, 0.3, 0.48))
    assert found.rows["value"].tolist()[:5] == [0.1, 0.2, 0.3, 0.4, 0.5] and found.summary()["refused"] == 1
    grid = specification.as_grid(found)
    assert "median 0.3, from 0.12 to 0.48" in grid.remarks[0] and "5 specifications of 99" in grid.remarks[0]
    assert "rank 3 of 5" in grid.remarks[0] and grid.remarks[1] == "form m4 not tried: few"
    assert {(row[0], row[1], row[2], row[3]) for row in grid.rows} == {
        ("form", "a", "2", "0.5"),
        ("form", "b", "4", "0.25"),
    }
    noisy = specification._summarised("alpha", rows.assign(form="a", weights=[None] * 2 + ["se"] * 4), 99, {})
    assert [row[2] for row in specification.as_grid(noisy).rows if row[0] == "weights"] in (["2", "4"], ["4", "2"])
    none = specification._summarised("alpha", rows.assign(value=np.nan), 99, {})
    assert (none.headline, none.rank, none.count, none.median) == (None, None, 0, None)
    assert "refused under all 6" in specification.as_grid(none).remarks[0]
    own = specification._summarised("alpha", rows.assign(value=[0.5, 0.2, 0.1, np.nan, 0.2, 0.4]), 99, {})
    assert own.headline is None and own.rank is None and "headline refused" in specification.as_grid(own).remarks[0]
