"""Does architecture a scale better than b? Yes, no or cannot tell, with the numbers and reasons behind it.

"Scales better" means a larger exponent: a's advantage grows with the axis. A constant factor (the same
exponent, less of the axis for the same metric) is a better architecture, not better scaling, and is reported
as a multiplier. What is computed, for y = E + A x^-alpha:

- compute multiplier at equal loss, m(y) = x_b(y) / x_a(y), at both ends and the geometric middle of the
  metrics both have reached;
- the shift model y = E + A (s x)^-alpha, and the first of shared < shift < exponents < own that is not
  clearly worse than a richer one;
- alpha_a - alpha_b under a common floor, own floors, and rival forms where admissible, with cluster-bootstrap
  intervals (paired where shapes and data streams match);
- differences per paired seed, prediction of the held-out largest size, a specification curve of the
  difference, and the claim checklist.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from recscale.scaling.data import metrics
from recscale.scaling.laws.fitting.law_fit import Settings
from recscale.scaling.laws.forms import registry
from recscale.scaling.laws.isoflop.frontier import Excluded, decayed_rows
from recscale.scaling.laws.judgement import gates
from recscale.scaling.laws.judgement.diagnostics import trend
from recscale.scaling.laws.judgement.gates import Gate
from recscale.scaling.laws.tables.validate import Rows, prepare
from recscale.scaling.records.plain import plain

from .checklist import Evidence, Item, checklist, missing
from .pair_checks import difference_specifications, held_out_order, specification_text, specifications_agree
from .pair_models import (
    LEVELS,
    RIVALS,
    PairData,
    PairFit,
    admissible,
    fit_pair,
    leave_one_out_weights,
    nesting_p_value,
    resampled,
    resampling_weights,
    rolling_origin_error,
)
from .pairing import Matching, PairedSize, match_clusters, paired_seeds

_LEVEL = 0.95
Answer = Literal["yes", "no", "cannot tell"]


@dataclass(frozen=True)
class Interval:
    """low <= high. kind: "cluster bootstrap 95%" or "leave-one-cluster-out range" (too few clusters; carries
    no claim).
    """

    low: float
    high: float
    kind: str

    def excludes(self, value: float) -> bool:
        return self.low > value or self.high < value


@dataclass(frozen=True)
class EqualLoss:
    """x_b / x_a at one metric value: above 1, a needs less. `where` is "worst", "middle" or "best" common
    metric.
    """

    where: str
    metric: float
    multiplier: float | None
    interval: Interval | None


@dataclass(frozen=True)
class Level:
    """One nesting level: residual sum of squares of ln y, F-test against the next, rolling-origin error."""

    model: str
    parameters: int
    rss: float
    p_against_next: float | None
    rolling_error: float | None


@dataclass(frozen=True)
class ExponentDifference:
    """alpha_a - alpha_b under one model (slopes for log_linear); `reason` says why it is not admissible, and then the
    numbers are NaN.
    """

    model: str
    admissible: bool
    reason: str
    alpha_a: float
    alpha_b: float
    difference: float
    interval: Interval | None


@dataclass(frozen=True)
class Comparison:
    """The answer and everything it rests on. `evidence` is what the numbers alone say, before the checklist.

    answer: "yes" | "no" | "cannot tell".
    evidence: "a steeper", "b steeper", "no relevant difference" or "undecided".
    """

    a: str
    b: str
    axis: str
    target: str
    answer: Answer = "cannot tell"
    reasons: list[str] = field(default_factory=list)
    evidence: str = "undecided"
    steeper: str | None = None
    level: str | None = None
    levels: list[Level] = field(default_factory=list)
    shift: float | None = None
    shift_interval: Interval | None = None
    multipliers: list[EqualLoss] = field(default_factory=list)
    differences: list[ExponentDifference] = field(default_factory=list)
    paired: list[PairedSize] = field(default_factory=list)
    paired_note: str = ""
    matched: bool = False
    matching_note: str = ""
    checklist: list[Item] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)
    specifications: dict[str, float] = field(default_factory=dict)
    excluded: Excluded = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """Plain dictionary, JSON-safe (NaN and infinities become null)."""
        return plain(asdict(self))


def compare(
    table: pd.DataFrame,
    a: str,
    b: str,
    *,
    axis: str = "train_flops",
    target: str = "logloss",
    by: str = "architecture",
    cluster: str | None = None,
    match: str | None = None,
    bootstrap: int = Settings.bootstrap,
    delta: float = 1e-3,
    margin: float = 0.1,
    paired_seeds_needed: int = 5,
    equalised: str | None = None,
    known_truth: str | None = None,
    seed: int = 0,
) -> Comparison:
    """Whether `a` scales better than `b` along `axis`: "yes", "no" or "cannot tell", with the reasons.

    yes: alpha_a > alpha_b with 95% intervals above 0 under two admissible models, and every required
      checklist item ticked.
    no: the same for b; or a larger alpha_a is ruled out beyond `margin` times the exponent under all
      admissible models, at least two. Otherwise: cannot tell.

    Arguments:
      by: column naming the architecture. cluster: rows resampled together (default shape_id).
      match: column whose equal values make two shapes partners (default flops_target, then the axis).
      bootstrap: resampled refits. delta: Huber width on ln y.
      equalised: what the sweep held equal, for the record.
      paired_seeds_needed: paired seeds at one size without which no claim is made.
      known_truth: name of the record in which this pipeline recovered known exponents.

    Raises KeyError for an unknown column or architecture, ValueError for a metric where higher is better.
    Tables that cannot answer do not raise: they return "cannot tell" with the gates that refused.
    """
    _check_arguments(table, a, b, by, target)
    names = (str(a), str(b))
    settings = {
        "by": by, "cluster": cluster, "match": match, "bootstrap": bootstrap, "delta": delta,
        "margin": margin, "paired_seeds_needed": paired_seeds_needed, "equalised": equalised,
        "known_truth": known_truth, "seed": seed, "table_hash": _table_hash(table),
    }  # fmt: skip
    chosen = table[table[by].isin([a, b])].reset_index(drop=True)
    diverged = _diverged(chosen, by, names)
    chosen, undecayed = decayed_rows(chosen)
    rows = prepare(chosen, registry.get("power_offset"), {"x": axis}, target, cluster=cluster)
    excluded = undecayed + [(e.run_id, e.reason) for e in rows.exclusions]
    is_a = (rows.frame[by] == a).to_numpy() if len(rows.y) else np.zeros(0, bool)
    found = _gates_before(rows, is_a, names)
    blank = Comparison(*names, axis, target, gates=found, excluded=excluded, settings=settings)
    if any(gates.EVERYTHING in gate.refuses for gate in found if gate.passed is False):
        return replace(blank, reasons=[f"{g.id}: {g.reason}" for g in found if g.passed is False])
    labels = np.array([rows.cluster_labels[code] for code in rows.codes])
    matching = match_clusters(rows.frame, is_a, labels, axis, match)
    data = PairData(rows.axes["x"], rows.y, is_a, matching.codes, matching.matched)
    return _compared(blank, rows.frame, data, matching, names, found, diverged)


def _compared(
    blank: Comparison,
    frame: pd.DataFrame,
    data: PairData,
    matching: Matching,
    names: tuple[str, str],
    found: list[Gate],
    diverged: Mapping[str, int] | None,
) -> Comparison:
    """Fit, resample, judge: everything after the rows are known to be usable."""
    options = blank.settings
    clusters = _cluster_count(data)
    found = [*found, gates.clusters(clusters)]
    resample = clusters >= gates.MIN_CLUSTERS and options["bootstrap"] > 0
    weights = (
        resampling_weights(data, options["bootstrap"], options["seed"]) if resample else leave_one_out_weights(data)
    )
    kind = "cluster bootstrap 95%" if resample else "leave-one-cluster-out range"
    fits = {model: fit_pair(data, model, delta=options["delta"]) for model in LEVELS + RIVALS}
    still = _still(data, names)
    verdicts = {
        model: (False, still) if still else admissible(fit, fits["own"], data.clusters) for model, fit in fits.items()
    }
    for model, fit in fits.items():
        # Only what will be quoted is resampled: rivals that are not admissible are not.
        if model in ("shift", "exponents", "own") or verdicts[model][0]:
            fits[model] = resampled(fit, data, weights, delta=options["delta"], seed=options["seed"])
    found.append(gates.convergence(fits["own"].convergence_share))
    levels = _levels(data, fits, options["delta"])
    level = _first_not_worse(levels, fits, data)
    differences = [_difference(fits[model], *verdicts[model], kind) for model in fits if model not in LEVELS[:2]]
    paired, paired_note = paired_seeds(frame, data.is_a, matching, blank.target)
    span_refused = [g for g in found if g.id == "span" and g.passed is False]
    evidence, evidence_reasons = _evidence(differences, names, options["margin"], resample, span_refused)
    headline = float(fits["exponents"].exponent_difference())
    specifications = difference_specifications(frame, data, headline, options["delta"])
    held_right, held_detail = held_out_order(data, fits[level].model, paired, options["delta"])
    facts = Evidence(
        resample, sum(d.admissible for d in differences), held_right, held_detail,
        specification_text(specifications), specifications_agree(specifications, evidence), diverged,
        options["table_hash"],
    )  # fmt: skip
    items = checklist(
        frame, data.is_a, names, blank.axis, blank.target, paired, paired_note, facts,
        min_paired_seeds=options["paired_seeds_needed"], equalised=options["equalised"],
        known_truth=options["known_truth"],
    )  # fmt: skip
    shift_fit = fits["shift"]
    answer, reasons = _answer(evidence, evidence_reasons, items, found)
    return replace(
        blank,
        answer=answer,
        reasons=reasons,
        evidence=evidence,
        steeper={"a steeper": "a", "b steeper": "b"}.get(evidence),
        level=level,
        levels=levels,
        shift=float(np.exp(shift_fit.log_shift())),
        shift_interval=_exponentiated(_interval(shift_fit.log_shift(shift_fit.draws), kind)),
        multipliers=_multipliers(data, fits["own"], kind),
        differences=differences,
        paired=paired,
        paired_note=paired_note,
        matched=matching.matched,
        matching_note=matching.reason,
        checklist=items,
        gates=found,
        specifications=specifications,
    )


def _check_arguments(table: pd.DataFrame, a: str, b: str, by: str, target: str) -> None:
    if by not in table.columns:
        raise KeyError(f"no column {by!r} naming the architecture; columns: {list(table.columns)}")
    known = sorted(str(value) for value in table[by].dropna().unique())
    for name in (a, b):
        if name not in set(table[by]):
            raise KeyError(f"no run of {by} {name!r} in the table; it has: {', '.join(known)}")
    if a == b:
        raise ValueError(f"cannot compare {a!r} with itself")
    if metrics.describe(target.lower()).lower_is_better is False:
        raise ValueError(
            f"{target} is a metric where higher is better and whose power law is in t = 2 Phi^-1(AUC)^2; "
            "compare on logloss (or ne), where the exponents live"
        )


def _diverged(rows: pd.DataFrame, by: str, names: tuple[str, str]) -> dict[str, int] | None:
    if "status" not in rows.columns:
        return None
    runs = rows.drop_duplicates("run_id") if "run_id" in rows.columns else rows
    return {name: int(((runs[by] == name) & (runs["status"] == "diverged")).sum()) for name in names}


def _gates_before(rows: Rows, is_a: np.ndarray, names: tuple[str, str]) -> list[Gate]:
    """Rules that need only the table, per architecture."""
    found = list(rows.problems)
    form = registry.get("power_offset")
    for name, side in zip(names, (is_a, ~is_a), strict=True):
        count = int(side.sum())
        if not count:
            found.append(_refusal("rows", f"no usable row of {name}"))
            continue
        x = rows.axes["x"][side]
        if len(np.unique(x)) < 3:
            found.append(
                _refusal("dof", f"{name} has {len(np.unique(x))} distinct values of the axis, a curve needs 3")
            )
            continue
        gate = gates.span(form, "x", x)
        found.append(replace(gate, reason=f"{name}: {gate.reason}") if gate.reason else gate)
        if count < 3 + gates.SPARE_ROWS:
            found.append(
                _refusal("dof", f"{name} has {count} rows for three parameters; at least {3 + gates.SPARE_ROWS}")
            )
    return found


def _refusal(name: str, reason: str) -> Gate:
    return gates.rule(name, None, "", reason, "nothing can be compared")


def _still(data: PairData, names: tuple[str, str]) -> str:
    """Which architecture's metric does not move along the axis by more than noise does: it has no exponent."""
    for name, side in zip(names, (data.is_a, ~data.is_a), strict=True):
        own = data.subset(side)
        p = trend(np.log(own.x)[:, None], np.log(own.y), np.ones(len(own.y)), 0)
        if not p < gates.NO_TREND:
            return f"{name} has no trend (p = {p:.2g})"
    return ""


def _cluster_count(data: PairData) -> int:
    """Clusters that are resampled: matched shapes, or the smaller architecture's."""
    if data.matched:
        return len(np.unique(data.clusters))
    return min(len(np.unique(data.clusters[data.is_a])), len(np.unique(data.clusters[~data.is_a])))


def _levels(data: PairData, fits: Mapping[str, PairFit], delta: float) -> list[Level]:
    rolling = rolling_origin_error(data, LEVELS, delta=delta)
    result = []
    for i, model in enumerate(LEVELS):
        p = nesting_p_value(fits[model], fits[LEVELS[i + 1]], data.clusters) if i + 1 < len(LEVELS) else None
        result.append(Level(model, fits[model].free, fits[model].rss, p, rolling[model]))
    return result


def _first_not_worse(levels: list[Level], fits: Mapping[str, PairFit], data: PairData) -> str:
    """First level that no richer one beats by the F-test (5%) and, where known, by rolling-origin error."""

    def beats(richer: Level, level: Level) -> bool:
        own, other = level.rolling_error, richer.rolling_error
        extrapolates = own is None or other is None or other < own
        return nesting_p_value(fits[level.model], fits[richer.model], data.clusters) < 0.05 and extrapolates

    places = enumerate(levels, 1)
    return next(level.model for i, level in places if not any(beats(richer, level) for richer in levels[i:]))


def _difference(fit: PairFit, allowed: bool, reason: str, kind: str) -> ExponentDifference:
    if not allowed:
        return ExponentDifference(fit.model, False, reason, np.nan, np.nan, np.nan, None)
    c = fit.constants()
    interval = _interval(fit.exponent_difference(fit.draws), kind)
    return ExponentDifference(
        fit.model,
        True,
        "",
        float(c["alpha_a"]),
        float(c["alpha_b"]),
        float(fit.exponent_difference()),
        interval,
    )


def _interval(values: np.ndarray, kind: str) -> Interval | None:
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    if kind.startswith("leave"):
        return Interval(float(values.min()), float(values.max()), kind)
    # A quantile between two infinities is not a number: take an order statistic.
    low, high = np.quantile(values, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], method="closest_observation")
    return Interval(float(low), float(high), kind)


def _exponentiated(interval: Interval | None) -> Interval | None:
    return interval and Interval(float(np.exp(interval.low)), float(np.exp(interval.high)), interval.kind)


def _multipliers(data: PairData, own: PairFit, kind: str) -> list[EqualLoss]:
    """x_b / x_a at both ends and the geometric middle of the metrics both architectures have reached; empty
    without overlap.
    """
    worst = min(data.y[data.is_a].max(), data.y[~data.is_a].max())
    best = max(data.y[data.is_a].min(), data.y[~data.is_a].min())
    if best >= worst:
        return []
    result = []
    for where, metric in (("worst", worst), ("middle", float(np.sqrt(worst * best))), ("best", best)):
        u_a, u_b = own.log_x_at(metric)
        value = float(np.exp(u_b - u_a)) if np.isfinite(u_a) and np.isfinite(u_b) else None
        drawn_a, drawn_b = own.log_x_at(metric, own.draws)
        with np.errstate(invalid="ignore"):
            ratios = drawn_b - drawn_a
        result.append(EqualLoss(where, float(metric), value, _exponentiated(_interval(ratios, kind))))
    return result


def _evidence(
    differences: list[ExponentDifference],
    names: tuple[str, str],
    margin: float,
    resample: bool,
    span_refused: list[Gate],
) -> tuple[str, list[str]]:
    """What the admissible differences say together, and why."""
    usable = [(d, d.interval) for d in differences if d.admissible and d.interval is not None]
    if span_refused:
        return "undecided", [f"span: {gate.reason}" for gate in span_refused]
    if not resample:
        return "undecided", ["fewer than 6 clusters: no bootstrap interval for the difference of exponents"]
    if len(usable) < 2:
        rejected = "; ".join(f"{d.model}: {d.reason}" for d in differences if not d.admissible)
        return "undecided", [f"only {len(usable)} admissible model of the exponents ({rejected})"]
    quoted = ", ".join(f"{d.model} {d.difference:+.3f} [{i.low:+.3f}, {i.high:+.3f}]" for d, i in usable)
    above = sum(interval.low > 0 for _, interval in usable)
    below = sum(interval.high < 0 for _, interval in usable)
    if above >= 2 and not below:
        return "a steeper", [f"{names[0]} has the larger exponent: {quoted}"]
    if below >= 2 and not above:
        return "b steeper", [f"{names[1]} has the larger exponent: {quoted}"]
    if all(interval.high < margin * abs(d.alpha_a + d.alpha_b) / 2 for d, interval in usable):
        return "no relevant difference", [
            f"an exponent of {names[0]} larger by {margin:.0%} or more is ruled out: {quoted}"
        ]
    return "undecided", [f"the intervals of the difference of exponents decide nothing: {quoted}"]


def _answer(evidence: str, reasons: list[str], items: list[Item], found: list[Gate]) -> tuple[Answer, list[str]]:
    blocking = [f"{g.id}: {g.reason}" for g in found if g.passed is False and gates.EVERYTHING in g.refuses]
    blocking += missing(items)
    if evidence == "undecided" or blocking:
        return "cannot tell", [*reasons, *blocking]
    return ("yes" if evidence == "a steeper" else "no"), reasons


def _table_hash(table: pd.DataFrame) -> str:
    """First 16 hex digits of SHA-256 over the table as CSV: the identity of what was compared."""
    return hashlib.sha256(table.to_csv(index=False).encode()).hexdigest()[:16]
