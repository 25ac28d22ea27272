"""Decision accuracy: how often does the order at small scale, or a law fitted there, give the order at the
largest scale?

Over all pairs of settings (architectures by default). Pairs whose gap at the largest scale is below two
paired standard deviations are listed apart and not counted: nobody can be right about them. A law that does
not beat ranking at one smaller scale is said not to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import special

from recscale.scaling.laws.fitting.problem import make_problem
from recscale.scaling.laws.fitting.solver import solve
from recscale.scaling.laws.forms import registry
from recscale.scaling.laws.forms.form import Form
from recscale.scaling.laws.grids import Grid, between, number
from recscale.scaling.laws.isoflop.frontier import Excluded, usable_rows

_GAP_SDS = 2.0


@dataclass(frozen=True)
class Accuracy:
    """Share of counted pairs ordered right by one predictor, with its Wilson 95% interval.

    kind: "scale" (order at one smaller scale) or "form" (law fitted on all smaller scales); `name` is the
    scale or the form id.
    """

    kind: str
    name: str
    right: int
    pairs: int
    share: float | None
    interval: tuple[float, float] | None
    note: str = ""


@dataclass(frozen=True)
class DecisionAccuracy:
    """All predictors, the pairs too close to call, the scale predicted, and the verdict on laws in words."""

    accuracies: list[Accuracy]
    too_close: list[tuple[str, str]]
    target_scale: float
    verdict: str
    excluded: Excluded


def wilson_interval(right: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).

    Raises ValueError without observations.
    """
    if total < 1 or not 0 <= right <= total:
        raise ValueError(f"expected 0 <= right <= total and total >= 1, got {right} of {total}")
    z = special.ndtri(0.5 + level / 2)
    p = right / total
    centre = (p + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z * np.sqrt(p * (1 - p) / total + z**2 / (4 * total**2)) / (1 + z**2 / total)
    # At 0 and 1 the bound is exact in real arithmetic; rounding must not push it outside.
    return (0.0 if right == 0 else float(centre - half), 1.0 if right == total else float(centre + half))


def decision_accuracy(
    table: pd.DataFrame,
    *,
    by: str = "architecture",
    scale: str = "flops_target",
    axis: str = "train_flops",
    target: str = "logloss",
    forms: Sequence[str] = ("power_offset", "power"),
    delta: float = 1e-3,
) -> DecisionAccuracy:
    """Predict the order of every pair of settings at the largest `scale` from smaller scales and from
    one-axis laws fitted below it.

    `scale` holds the levels all settings share; `axis` is what laws are fitted on. The noise of a pair is the
    sd of differences per `data_seed` and `seed`, pooled over scales; without repeats the gap rule
    cannot be applied and the verdict says so. Raises KeyError for a missing column, ValueError with fewer
    than two settings or scales.
    """
    rows, excluded = usable_rows(table, [scale, axis, target])
    if by not in rows.columns:
        raise KeyError(f"no column {by!r}; columns: {list(rows.columns)}")
    runs = pd.DataFrame({"setting": rows[by], "scale": rows[scale], "x": rows[axis], "y": rows[target]}, dtype=object)
    runs = runs.astype({"scale": float, "x": float, "y": float})
    seeds = [name for name in ("data_seed", "seed") if name in rows.columns]
    runs[seeds] = rows[seeds]
    means = runs.groupby(["setting", "scale"])["y"].mean().unstack("scale")
    shared = [float(level) for level in sorted(means.columns[means.notna().all()])]
    if len(means) < 2 or len(shared) < 2:
        raise ValueError(f"need two settings and two scales run by all of them, found {len(means)} and {len(shared)}")
    final = means[shared[-1]]
    pairs, close, known = _pairs(runs, final, seeds)
    accuracies = [_accuracy("scale", f"{level:.4g}", means[level], pairs, final) for level in shared[:-1]]
    for form in forms:
        predicted, short = _form_predictions(registry.get(form), runs, shared[-1], delta)
        note = f"too few scales below the largest for {', '.join(short)}" if short else ""
        accuracies.append(_accuracy("form", registry.get(form).id, predicted, pairs, final, note))
    return DecisionAccuracy(accuracies, close, shared[-1], _verdict(accuracies, pairs, close, known), excluded)


def _pairs(
    runs: pd.DataFrame, final: pd.Series, seeds: list[str]
) -> tuple[list[tuple[str, str]], list[tuple[str, str]], bool]:
    """Pairs that can be called, pairs that cannot, and whether the noise is known."""
    counted, close = [], []
    known = False
    for a, b in combinations(final.index, 2):
        sd = _paired_sd(runs, a, b, seeds) if seeds else None
        known = known or sd is not None
        too_near = sd is not None and abs(final[a] - final[b]) < _GAP_SDS * sd
        (close if too_near else counted).append((a, b))
    return counted, close, known


def _paired_sd(runs: pd.DataFrame, a: str, b: str, seeds: list[str]) -> float | None:
    """sd of y_a - y_b over shared seeds, pooled over scales; None without two shared seeds at any scale."""
    both = runs[runs["setting"].isin([a, b])]
    means = both.groupby(["setting", "scale", *seeds])["y"].mean().unstack("setting")
    if not {a, b} <= set(means.columns):
        return None
    difference = (means[a] - means[b]).dropna().groupby(level="scale")
    free = difference.count() - 1
    repeated = free > 0
    if not repeated.any():
        return None
    return float(np.sqrt((difference.var()[repeated] * free[repeated]).sum() / free[repeated].sum()))


def _accuracy(
    kind: str, name: str, predicted: pd.Series, pairs: list[tuple[str, str]], final: pd.Series, note: str = ""
) -> Accuracy:
    """Score predicted metrics (setting -> y, some may be missing) against the order at the largest scale."""
    called = [(a, b) for a, b in pairs if a in predicted.index and b in predicted.index]
    right = sum(bool((predicted[a] < predicted[b]) == (final[a] < final[b])) for a, b in called)
    if not called:
        return Accuracy(kind, name, 0, 0, None, None, note or "no pair to call")
    interval = wilson_interval(right, len(called))
    return Accuracy(kind, name, right, len(called), right / len(called), interval, note)


def _form_predictions(form: Form, runs: pd.DataFrame, largest: float, delta: float) -> tuple[pd.Series, list[str]]:
    """The law of each setting, fitted below the largest scale, at that scale's own x; and settings too short
    to fit.
    """
    if len(form.slots) != 1:
        raise ValueError(f"decision accuracy fits one-axis forms, {form.id} has axes {form.axes}")
    predictions, short = {}, []
    wanted = runs[runs["scale"] == largest].groupby("setting")["x"].mean()
    for setting, group in runs[runs["scale"] < largest].groupby("setting"):
        if group["x"].nunique() < len(form.parameters) + 1:
            short.append(str(setting))
            continue
        log_x = np.log(group["x"].to_numpy())
        centre = log_x.mean()
        problem = make_problem(form, (log_x - centre)[:, None], group["y"].to_numpy(), delta=delta)
        where = np.array([[np.log(wanted[setting]) - centre]])
        predictions[setting] = float(form.value(solve(problem).phi, where)[0])
    return pd.Series(predictions, dtype=float), short


def _verdict(accuracies: list[Accuracy], pairs: list, close: list, known: bool) -> str:
    if not pairs:
        return f"all {len(close)} pairs are too close to call"
    single = [a for a in accuracies if a.kind == "scale" and a.share is not None]
    laws = [a for a in accuracies if a.kind == "form" and a.share is not None]
    text = "" if known else "seed noise unknown, so close pairs could not be set apart; "
    if not laws:
        return text + "no law could be fitted below the largest scale"
    best_law, best_single = (max(found, key=lambda a: a.share or 0.0) for found in (laws, single))
    beats = (best_law.share or 0.0) > (best_single.share or 0.0)
    comparison = "beats" if beats else "does not beat"
    return text + (
        f"the best law ({best_law.name}, {best_law.right}/{best_law.pairs}) {comparison} ranking at scale "
        f"{best_single.name} ({best_single.right}/{best_single.pairs})"
    )


def as_grid(found: DecisionAccuracy) -> Grid:
    """How often smaller scales, and laws of them, order as the largest does."""
    rows = [
        (a.kind, a.name, f"{a.right} of {a.pairs}", number(a.share, ".2f") if a.pairs else "",
         between(a.interval, ".2f"), a.note)
        for a in found.accuracies
    ]  # fmt: skip
    remarks = [found.verdict, *(f"too close to call: {a} and {b}" for a, b in found.too_close)]
    headings = ("by", "", "right", "share", "95 % (Wilson)", "")
    return Grid(f"Order at scale {found.target_scale:.4g}", headings, rows, remarks)
