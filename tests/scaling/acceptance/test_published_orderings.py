"""Published orderings of PROMO and budgets: figures are those of the transcribed tables, arms those of the studies."""

import json
from pathlib import Path

import recscale.scaling.laws.published as published
from recscale.scaling.acceptance import published_orderings
from recscale.scaling.acceptance.budgets import METHODS
from recscale.scaling.acceptance.cold_start import ARMS

RECORDS = json.loads((Path(published.__file__).parent / "domains.json").read_text())


def value(paper, **wanted):
    (found,) = [r["value"] for r in RECORDS if r["paper"] == paper and all(r[k] == v for k, v in wanted.items())]
    return found


def test_arms_are_run_or_said_to_be_lacking():
    promo = [(published_orderings.promo(ranks=ranks), ARMS) for ranks in (True, False)]
    for orderings, arms in (*promo, (published_orderings.budgets(), METHODS)):
        assert len({ordering.id for ordering in orderings}) == len(orderings)
        for ordering in orderings:
            assert ({ordering.better, ordering.worse} <= set(arms)) != bool(ordering.lacking), ordering.id


def test_figures_are_those_transcribed():
    for ordering in published_orderings.promo(ranks=True):
        kind, _, metric = ordering.id.partition(".")
        if kind == "base":
            assert ordering.metric == f"-{metric}"
            assert ordering.published == value("PROMO", metric=metric, dataset="MovieLens-100K", baseline="SASRec")
        elif kind == "IF":
            assert ordering.published == -value("PROMO", metric=metric, table_or_figure="ablation")
    by_id = {ordering.id: ordering.published for ordering in published_orderings.budgets()}
    assert by_id["AUCC.margin"] == value("DFCL", metric="AUCC", kind="delta_percent")
    eom = {"margin": "IFD", "softmax, tau": "MER", "softmax": "PL"}
    eom = {arm: value("DFCL", metric="EOM", model=model) for arm, model in eom.items()}
    assert {arm: by_id[f"EOM.{arm}"] for arm in eom} == eom
    assert by_id["EOM.margin>softmax"] == round(eom["margin"] - eom["softmax"], 2)
    means = {r["model"]: r["value"] for r in RECORDS if r["paper"] == "Bi-DFCL" and r["metric"] == "AUCC mean"}
    assert by_id["small.margin>softmax"] == round(100 * (means["DFCL-DIFD"] - means["DFCL-DPL"]), 2)
    assert by_id["bilevel"] == round(100 * (means["Bi-DFCL variant 2"] - means["DFCL-DIFD"]), 2)
