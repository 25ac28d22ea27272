"""Rates found before a sweep: on a stream of its own, recorded, and the same when asked again."""

import json

import pandas as pd
import pytest

from recscale import sweeps
from recscale.scaling.records.runs import collect
from recscale.sweeps.engine.plan import read_plan
from recscale.sweeps.engine.rates import at_found_rates, beyond_edges

POINTS = sweeps.product(
    sweeps.noted(sweeps.axis("model.width", [8]), arm="narrow") + sweeps.noted([{"model.width": 16}], arm="wide"),
    sweeps.axis("training.lr", [4e-3]),
    sweeps.seeds(2),
)


def searched(losses, statuses=None):
    """The run table of a search whose trials ended at these losses."""
    rows = [
        {"match_id": point["note.match_id"], "lr_dense": point["training.lr"], "logloss": loss, "status": "done"}
        for point, loss in zip(sweeps.rate_search(POINTS, trials=3), losses, strict=True)
    ]
    return pd.DataFrame(rows).assign(**({} if statuses is None else {"status": statuses}))


def test_every_point_takes_the_rate_that_was_best_for_its_settings():
    found = at_found_rates(POINTS, searched([0.5, 0.4, 0.6, 0.3, 0.4, 0.5]))
    assert [(p["model.width"], p["seed"], p["training.lr"]) for p in found] == [
        (8, 0, 4e-3), (8, 1, 4e-3), (16, 0, 2e-3), (16, 1, 2e-3),
    ]  # fmt: skip
    assert [p["note.lr_bracketed"] for p in found] == [True, True, False, False]
    assert {p["note.lr_trials"] for p in found} == {3} and [p["note.arm"] for p in found][::2] == ["narrow", "wide"]


def test_a_diverged_rate_is_never_best_and_none_at_all_is_an_error():
    statuses = ["diverged", "done", "done", "done", "diverged", "done"]
    found = at_found_rates(POINTS, searched([0.1, 0.4, 0.3, None, None, 0.2], statuses))
    assert [p["training.lr"] for p in found] == [8e-3, 8e-3, 8e-3, 8e-3]
    with pytest.raises(ValueError, match="no rate of the search was trained to its end"):
        at_found_rates(POINTS, searched([0.1] * 6, ["diverged"] * 3 + ["done"] * 3))


def test_a_search_goes_on_beyond_an_edge_up_to_four_rates_and_not_elsewhere():
    first = sweeps.rate_search(POINTS, trials=3)
    table = searched([0.5, 0.4, 0.6, 0.3, 0.4, 0.5])  # narrow: best inside; wide: at the lowest rate
    further = beyond_edges(first, table)
    assert [(p["model.width"], p["training.lr"]) for p in further] == [(16, 1e-3), (16, 5e-4)]
    assert [dict(p, **{"training.lr": 2e-3}) for p in further] == [first[3]] * 2

    def trained(points, losses, status="done"):
        rows = [{"match_id": p["note.match_id"], "lr_dense": p["training.lr"]} for p in points]
        return pd.concat([table, pd.DataFrame(rows).assign(logloss=losses, status=status)], ignore_index=True)

    assert not beyond_edges(first, trained(further, [0.31, 0.35]))
    assert not beyond_edges(first, trained(further, [None, None], "diverged"))
    table = trained(further, [0.29, 0.28])
    further = beyond_edges(first, table)
    assert [p["training.lr"] for p in further] == [2.5e-4, 1.3e-4]
    table = trained(further, [0.27, 0.26])
    assert not beyond_edges(first, table)
    found = at_found_rates(POINTS, table)
    assert [p["note.lr_bracketed"] for p in found] == [True, True, False, False] and found[2]["note.lr_trials"] == 7
    assert {p["note.lr_first_trials"] for p in found} == {3}
    assert at_found_rates(POINTS, table, trials=4, factor=2.0)[0]["note.lr_first_trials"] == 4


SWEEP = """
from recscale.scaling.report.orderings import Ordering, as_option
from recscale.scaling.training import get_config as base_config
from recscale.sweeps import chain, noted, product, seeds
def get_config():
    config = base_config("dlrm_mlp", "known_truth")
    config.data.preset, config.data.overrides = "dense", {"quanta": 24, "code_bits": 3}
    config.data.holdout_rows = 256
    config.training.requests = 64
    config.training.examples = 256
    return config
def get_rates():
    return {"trials": 3, "factor": 4.0}
def get_sweep():
    wide = [{"model.widths": (4,), "training.lr": 0.3}]
    narrow = [{"model.widths": (2,), "training.lr": 0.075}]
    return product(chain(noted(wide, arm="wide"), noted(narrow, arm="narrow")), seeds(3))
def get_report():
    return {"orderings": as_option([Ordering("w", "wide", "narrow", 0.1, "table 1", "1e9")])}
"""


def test_a_sweep_searches_its_rates_then_judges_its_orderings(call, tmp_path):
    path, out = tmp_path / "orders.py", tmp_path / "out"
    path.write_text(SWEEP)
    printed = call("sweep", path, "--out", out, "--workers", 1, "--json")
    result = json.loads(printed.out.splitlines()[-1])
    assert result["runs"] == 6 and (out / "report" / "orderings.csv").exists()
    (judged,) = result["report"]["orderings"]
    rates, table = collect(out / "rates"), collect(out)
    assert len(rates) == table.groupby("arm")["lr_trials"].first().sum() and set(table["arm"]) == {"wide", "narrow"}
    assert set(rates["data_seed"]) == {1} and set(table["data_seed"]) == {0}
    assert (table["lr_first_trials"] == 3).all()
    tried = table.groupby("arm")[["lr_trials", "lr_bracketed"]].first()
    assert tried["lr_bracketed"].all() and tried["lr_trials"].to_dict() == {"wide": 3, "narrow": 5}
    best = rates.loc[rates.groupby("group_id")["logloss"].idxmin()].set_index("shape_id")["lr_dense"]
    assert all(row.lr_dense == best[row.shape_id] for row in table.itertuples())
    assert judged["outcome"] in ("held", "failed", "inside noise", "not judged")
    assert {row["stage"] for row in read_plan(out / "rates")} == {0, 1}  # the second went beyond an edge
    planned = read_plan(out)
    assert call("sweep", path, "--out", out).out.count("6 done") == 1 and read_plan(out) == planned


def test_a_search_is_planned_alone_and_the_sweep_only_after_it(call, tmp_path):
    path, out = tmp_path / "orders.py", tmp_path / "out"
    path.write_text(SWEEP)
    assert "rates that are not found yet: `recscale sweep " in call("plan", path, "--out", out, code=1).err
    assert "6 runs in " in call("plan", path, "--rates", "--out", out / "rates").out
    assert "not found yet" in call("plan", path, "--out", out, code=1).err
    assert "asks for no search" in call("plan", "smoke", "--rates", "--out", tmp_path / "other", code=1).err


def test_papers_are_listed_and_a_wrong_name_has_a_nearest(call):
    assert "rankmixer" in call("paper").out.split()
    assert "nearest is 'rankmixer'" in call("paper", "rankmixr", code=2).err
