"""From a table to rows: what is left out and why, what refuses the whole table, clusters, weights and metrics."""

import numpy as np
import pandas as pd
import pytest

from recscale.scaling.laws.forms.metric_maps import auc_to_t
from recscale.scaling.laws.forms.registry import get
from recscale.scaling.laws.tables.axes import (
    over_floor,
    parse_axes,
    parse_point,
    resolve_axes,
    usual_cluster,
    usual_target,
)
from recscale.scaling.laws.tables.validate import prepare


def table(**columns):
    known = {
        "run_id": list("abcdef"),
        "p": [1.0, 2, 3, 4, 5, 6],
        "q": [1.0, 1, 2, 2, 3, 3],
        "loss": np.linspace(0.6, 0.5, 6),
    }
    return pd.DataFrame({**known, **columns})


def prepared(frame, form="power", columns=None, target="loss", **options):
    return prepare(frame, get(form), columns or {"x": "p"}, target, **options)


def test_good_rows_are_taken_as_they_are():
    rows = prepared(table().set_axis(range(10, 16)))
    assert rows.axes["x"].tolist() == [1, 2, 3, 4, 5, 6] and rows.y.tolist() == table().loss.tolist()
    assert rows.run_ids == tuple("abcdef") and rows.exclusions == () and rows.problems == () and rows.second is None
    assert np.all(rows.weights == 1) and list(rows.codes) == list(range(6)) and rows.cluster == "row"
    assert rows.columns == {"x": "p"} and rows.target == "loss" and list(rows.frame.index) == list(range(6))
    two = prepared(table(), "chinchilla", {"N": "p", "D": "q"})
    np.testing.assert_array_equal(two.stacked, table()[["p", "q"]].to_numpy())
    assert prepared(table().rename(columns={"run_id": "name"})).run_ids == tuple("abcdef")
    assert prepared(table().drop(columns="run_id")).run_ids[:2] == ("row 0", "row 1")


WRONG = table(p=[1.0, np.nan, 0.0, 4, 5, 6], loss=[0.5, 0.5, 0.5, np.inf, -0.1, 0.4])


def test_wrong_values_refuse_a_table_or_are_left_out():
    rows = prepared(WRONG)
    (problem,) = rows.problems
    assert (problem.id, problem.value, problem.passed, problem.refuses) == ("values", 4, False, ("*",))
    for words in ("4 rows are unusable (b: axis x: p is ", "; c: axis x: p is 0, not positive; d: loss is "):
        assert words in problem.reason
    assert "and 1 more" in problem.reason and "invalid='exclude'" in problem.consequence
    told = {e.run_id: e.reason for e in rows.exclusions}
    assert told["e"] == "loss is -0.1, not positive" and [e.row for e in rows.exclusions] == [1, 2, 3, 4]
    left = prepared(WRONG, invalid="exclude")
    assert left.problems == () and left.run_ids == ("a", "f") and left.exclusions == rows.exclusions
    three = prepared(WRONG[:4])
    assert "more" not in three.problems[0].reason
    signed = prepared(WRONG, positive=False)
    assert "e" in signed.run_ids and signed.problems[0].value == 3


def test_axes_that_are_no_logarithm_begin_at_one():
    frame = table(stage=[1.0, 2, 0.9, 0, 1, 1])
    rows = prepared(frame, "trunk", {"N": "p", "D": "q", "stage": "stage"})
    told = {e.run_id: e.reason for e in rows.exclusions}
    assert told == {"c": "axis stage: stage is 0.9, below 1", "d": "axis stage: stage is 0, below 1"}
    decayed = table(decayed=[True, False, None, True, True, False])
    rows = prepared(decayed, "trunk", {"N": "p", "D": "q", "stage": "stage"})
    assert rows.axes["stage"].tolist() == [1, 2, 2, 1, 1, 2]
    own = prepared(decayed.assign(stage=1.0), "trunk", {"N": "p", "D": "q", "stage": "stage"})
    assert np.all(own.axes["stage"] == 1)


def test_areas_under_the_curve_are_taken_as_t():
    frame = table(auc=[0.5, 0.6, 0.7, 0.499, 1.0, np.nan])
    rows = prepared(frame, "auc", {"x": "p"}, "auc")
    assert [e.run_id for e in rows.exclusions] == ["d", "e", "f"] and rows.y == pytest.approx(auc_to_t([0.5, 0.6, 0.7]))
    assert "auc is 0.499, outside" in rows.exclusions[0].reason
    both = prepared(frame, "joint", {"x": "p"}, auc="auc")
    assert both.second == pytest.approx(auc_to_t([0.5, 0.6, 0.7])) and both.y.tolist() == frame.loss.tolist()[:3]
    none = prepared(frame[3:], "joint", {"x": "p"}, auc="auc")
    assert none.second is None and len(none.y) == 0


def test_what_did_not_finish_or_meet_the_condition_is_named_once():
    frame = table(status=["done", "failed", "diverged", "done", "done", "done"])
    rows = prepared(frame, where="p < 6 and p != 3")
    assert {e.run_id: e.reason for e in rows.exclusions} == {
        "b": "status failed", "c": "status diverged", "f": "not where p < 6 and p != 3",
    }  # fmt: skip
    assert rows.run_ids == ("a", "d", "e") and rows.problems == ()
    # Rows that are left out already are not looked at: neither for values nor for copies.
    assert prepared(frame.assign(loss=[0.5, -1, -1, 0.4, 0.4, 0.4])).problems == ()
    empty = prepared(frame, where="p > 9")
    assert [g.id for g in empty.problems] == ["empty"]
    reason = empty.problems[0].reason
    assert reason.startswith("no row of 6 is left: not where p > 9 (4)") and "status failed (1)" in reason
    assert prepared(frame[:0]).problems[0].reason == "no row of 0 is left: the table is empty"


def test_copies_of_a_row_refuse_a_table():
    frame = pd.concat([table(), table()[1:3], table()[1:2]], ignore_index=True)
    rows = prepared(frame)
    assert [g.id for g in rows.problems] == ["duplicates"] and rows.problems[0].value == 3
    assert {e.row: e.reason for e in rows.exclusions} == {
        6: "copy of row 1 in every column", 7: "copy of row 2 in every column", 8: "copy of row 1 in every column",
    }  # fmt: skip
    mixed = table(tag=[1, "1", 1, 2, 2, 2], p=1.0, loss=0.5, q=1.0, run_id="r")
    assert [e.row for e in prepared(mixed).exclusions] == [2, 4, 5]
    wrong = prepared(pd.concat([WRONG, WRONG[1:2]], ignore_index=True))
    assert [g.id for g in wrong.problems] == ["values"]


def test_clusters_are_named_columns_shapes_or_rows():
    shapes = table(shape_id=["s", "t", "s", None, "t", None])
    rows = prepared(shapes)
    assert list(rows.codes) == [0, 1, 0, 2, 1, 3] and rows.cluster == "shape_id"
    assert rows.cluster_labels == ("s", "t", "shape_id missing, row 3", "shape_id missing, row 5")
    assert rows.warnings == ("2 rows have no shape_id: each is its own cluster",)
    named = prepared(shapes, cluster="q")
    assert list(named.codes) == [0, 0, 1, 1, 2, 2] and named.cluster == "q" and named.warnings == ()
    (warning,) = prepared(table(run_id=list("aabbcc"), name="n")).warnings
    assert "every row is its own cluster" in warning and "run_id repeats, so pass cluster='run_id'" in warning
    assert "repeats" not in prepared(table()).warnings[0]


def test_weights_are_ratios_or_standard_errors():
    frame = table(w=[1.0, 1, 2, 2, 3, 3], loss_se=[1.0, 1, 1, 1, 2, 2])
    assert prepared(frame, weights="w").weights == pytest.approx([0.5, 0.5, 1, 1, 1.5, 1.5])
    se = np.array([1, 1, 1, 1, 0.25, 0.25])
    assert prepared(frame, weights="loss_se").weights == pytest.approx(se / se.mean())
    for bad in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="must be positive in every fitted row"):
            prepared(frame.assign(w=[1, 1, 1, 1, 1, bad]), weights="w")
    assert len(prepared(frame, weights="w", where="p > 9").weights) == 0


def test_arguments_that_are_wrong_are_named():
    for options, words in (
        ({"invalid": "drop"}, "invalid must be"), ({"cluster": "runs"}, "no column 'runs' for cluster"),
        ({"weights": "v"}, "no column 'v' for weights"), ({"target": "los"}, "no column 'los' for the target"),
        ({"columns": {"x": "r"}}, "no column 'r' for axis x of form power"), ({"auc": "a"}, "'a' for the AUC"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            prepared(table(), **options)
    with pytest.raises(TypeError, match="found list"):
        prepared([1, 2])


def test_rows_are_described_as_they_are():
    frame = table(architecture=list("xxyyzz"), shape_id=list("ssssss"), lr_dense=[1, 2, 1, 1, 1, 1])
    rows = prepared(frame, "chinchilla", {"N": "p", "D": "q"})
    told = rows.described
    assert told.startswith("6 rows, 6 values of p from 1 to 6, 3 values of q from 1 to 3, 3 architectures as one")
    assert "rates" not in told  # every size has one
    rates = prepared(table(shape_id=list("ssttuu"), p=[1, 1, 2, 2, 3, 3], lr_dense=[1, 2, 1, 2, 1, 1]))
    assert rates.described.endswith("up to 2 learning rates a size, good and bad alike")
    assert "rates" not in prepared(table(lr_dense=[1, 2, 3, 4, 5, 6]), columns={"x": "lr_dense"}).described
    assert prepared(table(architecture="x")).described == "6 rows, 6 values of p from 1 to 6"
    assert prepared(table(), where="p > 9").described == "0 rows"


def test_axes_are_written_in_order_or_by_slot():
    assert parse_axes("p, q") == ["p", "q"] and parse_axes("N = p,D=q") == {"N": "p", "D": "q"}
    assert parse_axes(None) is None and parse_axes("  ") is None
    for text in ("N=p,q", "p,,q", "N=", "=p", "N=p,D="):
        with pytest.raises(ValueError, match="is neither a list of columns"):
            parse_axes(text)
    with pytest.raises(ValueError, match="names 'N' twice"):
        parse_axes("N=p,N=q")
    assert parse_point("N=1e7, D=2") == {"N": 1e7, "D": 2.0}
    with pytest.raises(ValueError, match="is no point"):
        parse_point("N=many")
    form = get("chinchilla")
    assert resolve_axes(form, None) == {"N": "dense_params", "D": "examples"}
    assert resolve_axes(form, "p") == {"N": "p", "D": "examples"} == resolve_axes(form, ["p"])
    assert resolve_axes(form, ["p", "q"]) == {"N": "p", "D": "q"} == resolve_axes(form, {"x1": "p", "D": "q"})
    with pytest.raises(ValueError, match="has 2 axes, found 3"):
        resolve_axes(form, ["p", "q", "r"])
    with pytest.raises(ValueError, match="has no axis 'Q'; its axes are N .default dense_params., D"):
        resolve_axes(form, {"Q": "p"})


def test_what_is_usual_follows_from_the_columns():
    both, loss, neither = (
        pd.DataFrame({"logloss": [1], "loss": [1]}),
        pd.DataFrame({"loss": [1]}),
        pd.DataFrame({"a": [1]}),
    )
    assert [usual_target(t) for t in (both, loss, neither)] == ["logloss", "loss", "logloss"]
    frame, name = over_floor(pd.DataFrame({"loss": [0.5], "best": [0.4]}), None, "best")
    assert name == "loss over best" and frame[name].tolist() == pytest.approx([0.1])
    assert over_floor(frame, "best", "loss")[0]["best over loss"].tolist() == pytest.approx([-0.1])
    with pytest.raises(ValueError, match="no column 'floor' for an excess"):
        over_floor(frame, None, "floor")
    trunks = pd.DataFrame({"trunk_id": [1, 2], "run_id": [1, None]})
    assert usual_cluster(trunks, ["examples"]) == "trunk_id" and usual_cluster(trunks, ["dense_params"]) is None
    assert usual_cluster(trunks, ["examples", "dense_params"]) is None
    assert usual_cluster(trunks.drop(columns="trunk_id"), ["examples"]) is None
    assert usual_cluster(pd.DataFrame({"run_id": [1]}), ["examples"]) == "run_id"
