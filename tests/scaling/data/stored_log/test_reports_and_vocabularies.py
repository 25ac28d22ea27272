"""Counting of rejected rows, and ids of values."""

import numpy as np
import pytest

from recscale.scaling.data.stored_log.card import ReadReport, Reason, TooManyRowsDropped
from recscale.scaling.data.stored_log.vocabulary import Vocabulary, build_vocabulary, unknown_share


def test_report_counts_and_keeps_three_examples():
    report = ReadReport(rows_read=1000)
    for line in range(5):
        report.drop(Reason.UNPARSABLE, f"file:{line}")
    report.repair(Reason.OUT_OF_VOCABULARY, "file:9")
    assert report.rows_kept == 995
    assert report.to_dict() == {
        "rows_read": 1000,
        "rows_kept": 995,
        "dropped": {"unparsable": 5},
        "repaired": {"out_of_vocabulary": 1},
        "examples": {"unparsable": ["file:0", "file:1", "file:2"], "out_of_vocabulary": ["file:9"]},
        "tables": {},
    }
    assert ReadReport.from_dict(report.to_dict()) == report
    assert "dropped 5: unparsable, for example file:0; file:1; file:2" in report.summary()


def test_more_than_one_percent_dropped_is_an_error():
    report = ReadReport(rows_read=1000)
    report.drop(Reason.MISSING_LABEL, "file:1", count=10)
    report.check("set")
    report.drop(Reason.DUPLICATE, "file:2")
    with pytest.raises(TooManyRowsDropped, match=r"11 of 1000 rows were rejected \(1.10%\)(?s:.*)duplicate.*file:2"):
        report.check("set")
    report.check("set", max_dropped=0.02)


def test_an_unknown_reason_is_refused():
    plain = ReadReport(rows_read=1).to_dict() | {"dropped": {"bored": 1}}
    with pytest.raises(ValueError, match="bored"):
        ReadReport.from_dict(plain)


def test_long_examples_are_cut():
    report = ReadReport()
    report.drop(Reason.UNPARSABLE, "x" * 1000)
    assert len(report.examples[Reason.UNPARSABLE][0]) < 200


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([30, 7, 7, 9, 30, 7, 100]), [7, 30, 9, 100]),  # count, then value as a number (9 before 100)
        (np.array(["b", "a", "c", "b"]), ["b", "a", "c"]),
    ],
)
def test_ids_by_descending_count_then_value(values, expected):
    vocabulary = build_vocabulary(values)
    assert vocabulary.values.tolist() == expected
    assert vocabulary.size == len(expected) + 2
    assert vocabulary.encode(np.array(expected)).tolist() == list(range(2, 2 + len(expected)))


def test_unseen_values_are_unknown():
    vocabulary = build_vocabulary(np.array([5, 5, 6, 8]), min_count=2)
    ids = vocabulary.encode(np.array([[5, 6], [7, 5]]))
    assert ids.dtype == np.int32 and ids.tolist() == [[2, 1], [1, 2]]
    assert unknown_share(ids) == 0.5
    assert unknown_share(np.array([0, 0, 2, 1])) == 0.5, "padding is not counted"
    assert Vocabulary(np.array([], np.int64)).encode(np.array([3])).tolist() == [1]
