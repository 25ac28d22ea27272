"""Budgets of compute: what a unit costs, and the split of a budget with its refusals."""

from types import SimpleNamespace

import numpy as np

from recscale.scaling.laws.isoflop import allocation


def test_a_unit_of_the_axes_costs_what_the_rows_did():
    frame = {"train_flops": np.array([12.0, 36.0, 50.0])}
    rows = SimpleNamespace(
        frame={key: SimpleNamespace(to_numpy=lambda _, v=value: v) for key, value in frame.items()}, y=np.ones(3),
        stacked=np.array([[1.0, 2.0], [2.0, 3.0], [2.0, 5.0]]), columns={"N": "p", "D": "q"},
    )  # fmt: skip
    value, told = allocation.per_unit_of(SimpleNamespace(rows=rows))
    assert value == 6.0 and told == "train_flops = 6 x p x q over the rows (from 5 to 6)"
    assert allocation.per_unit_of(SimpleNamespace(rows=SimpleNamespace(frame={}, y=np.ones(3))))[0] == 1.0
    assert allocation.per_unit_of(SimpleNamespace(rows=SimpleNamespace(frame=frame, y=[])))[0] == 1.0
    law = SimpleNamespace(derived={"a": 0.45}, intervals={"a": (0.4, 0.5)})
    (line,) = allocation.exponents_line(law)
    assert "a = 0.45 [0.4 to 0.5]" in line and "b = 0.55" in line
    assert "a = 0.45," in allocation.exponents_line(SimpleNamespace(derived={"a": 0.45}, intervals={}))[0]
    assert allocation.exponents_line(SimpleNamespace(derived={"a": None}, intervals={})) == []


def test_a_split_is_told_or_refused_where_it_lies_too_far_out(monkeypatch):
    seen = {}

    def optimum(law, budgets, cost, *, interval):
        seen.update(budgets=budgets, cost=cost, interval=interval)
        return {
            "N": np.array([20.0, 1e9]), "D": np.array([30.0, 40.0]), "metric": np.array([0.4, 0.3]),
            "N_interval": (np.array([15.0, 1.0]), np.array([25.0, 2.0])),
        }  # fmt: skip

    monkeypatch.setattr(allocation, "optimum", optimum)
    axes = {"N": np.array([1.0, 10.0]), "D": np.array([1.0, 100.0])}
    rows = SimpleNamespace(axes=axes, columns={"N": "p", "D": "q"}, target="logloss")
    law = SimpleNamespace(rows=rows, form=SimpleNamespace(axes=("N", "D")), draws=np.zeros((2, 3)))
    near, far = allocation.splits(law, [1e3, 1e4], 6.0)
    assert near == {"budget": 1e3, "metric": 0.4, "refused": "", "N": 20.0, "D": 30.0, "N_interval": [15.0, 25.0]}
    assert far["metric"] is None and "N" not in far and far["refused"].startswith("range")
    assert seen["cost"](np.array([2.0]), np.array([3.0])) == 36.0 and seen["interval"] is True
    law.draws = None
    allocation.splits(law, [1e3, 1e4], 6.0)
    assert seen["interval"] is False
    grid = allocation.as_grid(law, [near, far])
    assert list(grid.headings) == ["budget", "p", "95 %", "q", "95 %", "logloss", ""]
    assert grid.rows[0] == ["1000", "20", "15 to 25", "30", "", "0.4", ""]
    assert grid.rows[1] == ["1e+04", "refused", "", "refused", "", "refused", far["refused"]]
