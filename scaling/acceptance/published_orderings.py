"""Orderings that PROMO and the decision-focused budget papers published, with the arms of the studies here that ask.

Their figures are HR, NDCG, AUCC or revenue, most on data of their own; ours are ranks on MovieLens, and exact excess
loss and regret on synthetic data, so a direction can be compared and no value. Arms are the `method`s of the benchmarks
`cold-start`, `cold-start-log` and `budgets`. arXiv 2302.04477, whose reconstruction "nes" is, printed no figure.
"""

from __future__ import annotations

from recscale.scaling.report.orderings import Ordering


def promo(*, ranks: bool = True) -> list[Ordering]:
    """Of arXiv 2412.18082; what is printed of parts left out may be relative or in points.

    ranks: by the metrics of `cold-start-log`, or by the excess loss of `cold-start` (items of fewer than 10 positives).
    """
    movielens, all_sets = "MovieLens-100K, leave-one-out, 100 sampled negatives", "KuaiRand, MovieLens, Tmall"
    no_features = "the base reads no feature of an item"
    gains, decides = {"HR@10": 13.1}, "-HR@10" if ranks else "excess"
    if ranks:
        gains |= {"HR@5": 16.3, "NDCG@5": 14.7, "NDCG@10": 13.7}
    found = [
        Ordering(f"base.{metric}", "promo", "frozen", gain, "main table, over SASRec", movielens, f"% of {metric}",
                 metric=f"-{metric}" if ranks else decides)
        for metric, gain in gains.items()
    ]  # fmt: skip
    found += [
        Ordering("M", "promo", "promo_shared", None, "ablation", all_sets, metric=decides),
        Ordering("T", "promo", "feedback as a feature", None, "ablation", all_sets, lacking="the arm is not built"),
    ]
    for metric, gap in (("HR@10", 10.6), ("NDCG@10", 11.9)):
        arm, unit = "ids and features as prompt", f"% of {metric}"
        found.append(Ordering(f"IF.{metric}", "promo", arm, gap, "ablation", movielens, unit, no_features))
    return found


def budgets() -> list[Ordering]:
    """Of DFCL (arXiv 2407.13664) and Bi-DFCL (2510.19517)."""
    public, private = "Criteo-Uplift v2", "a private marketing trial"
    points = "AUCC points x 100"
    hybrid, table = "Criteo-Uplift v2, .70M rows of the trial, 20 runs", "Bi-DFCL, main table"
    outcome, eom = "DFCL, expected outcome", {"margin": 2.85, "softmax, tau": 2.06, "softmax": 1.98}
    found = [Ordering("AUCC.margin", "margin", "two_stage", 3.94, "DFCL, AUCC", public, "% of AUCC", metric="-aucc")]
    for arm, gain in eom.items():
        found.append(Ordering(f"EOM.{arm}", arm, "two_stage", gain, outcome, private, "% of EOM", metric="regret"))
    found += [
        Ordering("EOM.margin>softmax", "margin", "softmax", 0.87, outcome, private, "% of EOM", metric="regret"),
        Ordering("logloss", "two_stage", "margin", None, "DFCL, logloss .2165 is the best", public, "logloss"),
        Ordering("small.margin>softmax", "margin", "softmax", 0.25, table, hybrid, points, metric="-aucc"),
        Ordering("bilevel", "bi-level", "margin", 3.71, table, hybrid, points, "no bi-level arm"),
    ]
    return found
