"""Orderings that PROMO and the decision-focused budget papers published, with the arms of the studies here that ask.

Their figures are HR, NDCG, AUCC or revenue on data of their own; ours are exact excess loss and regret on synthetic
data, so a direction can be compared and no value. Arms are the `method`s of `recscale bench cold-start` and
`recscale bench budgets`. arXiv 2302.04477, whose reconstruction "nes" is, printed no figure.
"""

from __future__ import annotations

from recscale.scaling.report.orderings import Ordering


def promo() -> list[Ordering]:
    """Of arXiv 2412.18082; what is printed of parts left out may be relative or in points."""
    movielens, all_sets = "MovieLens-100K, leave-one-out, 100 sampled negatives", "KuaiRand, MovieLens, Tmall"
    no_features = "items of the known-truth log have no features but content, and the base reads none"
    found = [
        Ordering("base.HR@5", "promo", "frozen", 16.3, "main table, over SASRec", movielens, "% of HR@5"),
        Ordering("base.HR@10", "promo", "frozen", 13.1, "main table, over SASRec", movielens, "% of HR@10"),
        Ordering("base.NDCG@5", "promo", "frozen", 14.7, "main table, over SASRec", movielens, "% of NDCG@5"),
        Ordering("base.NDCG@10", "promo", "frozen", 13.7, "main table, over SASRec", movielens, "% of NDCG@10"),
        Ordering("M", "promo", "promo_shared", None, "ablation", all_sets),
        Ordering("T", "promo", "feedback as a feature", None, "ablation", all_sets, lacking="the arm is not built"),
    ]
    for metric, gap in (("HR@10", 10.6), ("NDCG@10", 11.9)):
        arm, unit = "ids and features as prompt", f"% of {metric}"
        found.append(Ordering(f"IF.{metric}", "promo", arm, gap, "ablation", movielens, unit, no_features))
    return found


def budgets() -> list[Ordering]:
    """Of DFCL (arXiv 2407.13664) and Bi-DFCL (2510.19517)."""
    public, private = "Criteo-Uplift v2", "a private marketing trial"
    hybrid, table = "Criteo-Uplift v2, .70M rows of the trial, 20 runs", "Bi-DFCL, main table"
    eom = {"margin": 2.85, "softmax, tau": 2.06, "softmax": 1.98}
    found = [Ordering("AUCC.margin", "margin", "two_stage", 3.94, "DFCL, AUCC", public, "% of AUCC")]
    for arm, gain in eom.items():
        source = "DFCL, expected outcome"
        found.append(Ordering(f"EOM.{arm}", arm, "two_stage", gain, source, private, "% of EOM"))
    found += [
        Ordering("EOM.margin>softmax", "margin", "softmax", 0.87, "DFCL, expected outcome", private, "% of EOM"),
        Ordering("logloss", "two_stage", "margin", None, "DFCL, logloss .2165 is the best", public, "logloss"),
        Ordering("small.margin>softmax", "margin", "softmax", 0.25, table, hybrid, "AUCC points x 100"),
        Ordering("bilevel", "bi-level", "margin", 3.71, table, hybrid, "AUCC points x 100", "no bi-level arm"),
    ]
    return found
