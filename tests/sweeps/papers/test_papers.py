"""Published orderings as sweeps: every arm they name is planned, with rates to search around and paired seeds. Those of
studies that are no sweep are judged by the committed tables."""

import importlib
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from recscale.scaling.laws import published
from recscale.scaling.report.orderings import as_option, judge, lines, markdown
from recscale.sweeps import rate_search
from recscale.sweeps.engine.combinators import split_notes
from recscale.sweeps.engine.loading import installed, load, papers

RUNS = Path(__file__).parents[3] / "notebooks" / "runs"
# Paper -> committed runs of its sweep, or of one with arms of the same names.
TRAINED = {
    "longer": "paper_longer",
    "rankmixer": "paper_rankmixer",
    "lemur": "lemur_cold_items",
    "mdl": "mdl_shared_fraction",
}
STUDIES = {"budgets": ("budgets",), "promo": ("cold_start", "cold_start_movielens")}  # paper -> committed tables


@pytest.mark.parametrize("name", [name for name in papers() if name in installed()])
def test_every_arm_of_an_ordering_is_planned(name):
    loaded = load(name)
    orderings, points = loaded.report()["orderings"], loaded.points()
    seeds = {}
    for point in points:
        seeds.setdefault(split_notes(point)[1]["arm"], set()).add(point["seed"])
    assert all(found == set(range(5)) for found in seeds.values())
    built = [ordering for ordering in orderings if not ordering["lacking"]]
    assert {ordering[side] for ordering in built for side in ("better", "worse")} == set(seeds)
    assert len({ordering["id"] for ordering in orderings}) == len(orderings)
    pairs = [(ordering["better"], ordering["worse"], ordering["metric"]) for ordering in built]
    assert len(set(pairs)) == len(pairs) and not {(b, a, metric) for a, b, metric in pairs} & set(pairs)
    trials = loaded.rates()["trials"]
    assert trials in (3, 5) and len(rate_search(points, trials=trials)) == trials * len(seeds)


@pytest.fixture(scope="module")
def judged():
    return {
        name: judge(pd.read_parquet(RUNS / f"{table}.parquet"), load(name).report()["orderings"])
        for name, table in TRAINED.items()
    }


def test_the_notes_of_papers_say_what_their_tables_hold(judged):
    note = (RUNS / "papers.md").read_text(encoding="utf-8")
    for found in judged.values():
        assert "\n".join(markdown(found)) in note and lines(found)[-1] in note


def test_at_least_forty_published_orderings_have_a_verdict(judged):
    verdicts = [one for name in ("longer", "rankmixer") for one in judged[name] if one.interval is not None]
    assert len(verdicts) >= 40 and {one.pairs for one in verdicts} == {5}


def test_the_note_on_longer_says_how_many_seeds_start_and_how_far_rates_went():
    table = pd.read_parquet(RUNS / "paper_longer.parquet")
    assert (table[table["arm"] == "LONGER"]["logloss"] > 0.693).sum() == 1
    beyond = table[table["lr_trials"] > 5]
    assert set(beyond["arm"]) == {"DIN, recent 25", "TWIN", "SumPooling", "no history"} and table["lr_bracketed"].all()


@pytest.mark.parametrize(("paper", "table"), [(paper, table) for paper, tables in STUDIES.items() for table in tables])
def test_a_study_judges_the_table_that_is_there(call, tmp_path, paper, table):
    shutil.copy(RUNS / f"{table}.parquet", tmp_path / "runs.parquet")
    printed = call("paper", paper, "--out", tmp_path, "--json").out.splitlines()
    found = pd.DataFrame(json.loads(printed[-1])["report"]["orderings"])
    runs, orderings = importlib.import_module(f"recscale.sweeps.papers.{paper}").get_orderings(
        pd.read_parquet(RUNS / f"{table}.parquet")
    )
    note = (RUNS / "papers.md").read_text(encoding="utf-8")
    judged = judge(runs, as_option(orderings))
    assert "\n".join(markdown(judged)) in note and lines(judged)[-1] in note
    built = found[found["outcome"] != "cannot be built"]
    assert len(built) and not built["why"].fillna("").str.contains("no run of|paired seeds").any()
    assert found["id"].is_unique and (found.loc[built.index, "pairs"] == 5).sum() == built["difference"].notna().sum()
    said = f"{len(found)} published orderings: "
    assert [line for line in printed if line.startswith(said)] and (tmp_path / "report" / "orderings.csv").exists()
    assert (tmp_path / "report" / "orderings.png").exists() == bool(len(built.dropna(subset="difference")))


def test_figures_are_those_transcribed():
    records = json.loads((Path(published.__file__).parent / "domains.json").read_text())
    means = {}
    for r in records:
        if r["paper"] == "MDL" and (r["kind"] == "absolute" or r["table_or_figure"] == "ablation table"):
            means.setdefault(r["model"], []).append(r["value"])
    means = {model: sum(values) / len(values) for model, values in means.items()}
    by_id = {o["id"]: o["published"] for o in load("mdl").report()["orderings"]}
    rivals = {"shared bottom": "SharedBottom", "MMoE": "MMoE"}
    above = {f"MDL at 0.5>{arm} at 0.5": name for arm, name in rivals.items()} | {
        n: n for n in ("HMoE", "STAR", "PEPNet")
    }
    for name, model in above.items():
        assert by_id[name] == round(100 * (means["MDL"] - means[model]), 3)
    ablations = {"scenario tokens": "scenario tokens", "task tokens": "task tokens (task towers instead)"}
    ablations |= {"global token": "the global scenario token", "scenario attention": "scenario-feature attention"}
    for arm, words in (ablations | {"task attention": "task-feature attention"}).items():
        assert by_id[f"ablation.no {arm}"] == round(-means[f"without {words}"], 3)
    lemur = {r["model"]: r["value"] for r in records if r["paper"] == "LEMUR" and r["metric"].startswith("QAUC")}
    by_id = {o["id"]: o["published"] for o in load("lemur").report()["orderings"]}
    for arm, words in {"history": "the long sequence", "SQDC": "SQDC", "cosine": "cosine similarity",
                       "session mask": "the session mask"}.items():  # fmt: skip
        assert by_id[f"ablation.no {arm}"] == -lemur[f"without {words}"]
    shares = [lemur[name] for name in ("no sampling", "p=100 q=20", "p=q=20", "p=q=10")]
    gaps = [published for name, published in by_id.items() if name.startswith("sampling.")]
    assert gaps == [round(a - b, 6) for a, b in zip(shares, shares[1:], strict=False)]
    assert by_id["contrastive"] == -lemur["with an added content-id contrastive loss"]


def test_papers_are_sweeps_or_studies_that_refuse_what_is_a_sweeps(call, tmp_path):
    assert set(papers()) == {name for name, path in installed().items() if path.parent.name == "papers"} | set(STUDIES)
    refused = call("paper", "budgets", "--out", tmp_path, "--set", "training.lr=1", code=2)
    assert "no sweep: it takes --out" in refused.err
    assert "leave --data out" in call("paper", "budgets", "--out", tmp_path, "--data", tmp_path, code=1).err
    assert not list(tmp_path.iterdir())
