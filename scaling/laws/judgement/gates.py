"""Identifiability gates: rules that refuse a quantity with a reason instead of printing a number.

Each rule returns a `Gate`. `passed` is True, False, or None when the table lacks what the rule needs; only
False refuses. Rules before the fit look at the table, rules after it at the optimum and its resampled
neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np

from recscale.scaling.laws.forms.form import Form
from recscale.scaling.laws.uncertainty.profile import Profile

EVERYTHING = "*"
INTERVALS, FORECAST, LAW, COMPARISON = "intervals", "forecast", "law", "comparison"

MIN_DISTINCT, MIN_DECADES = 5, 1.5
MIN_CONVERGENCE = 0.2
MAX_CORRELATION = 0.995
MIN_CLUSTERS = 6
MAX_FORECAST_RATIO = 30.0
BOUND_MARGIN = 0.01
FLOOR_TINY = 1e-6
FLOOR_MIN_RATIO = 1.5
FLOOR_WORSE = 1.2
SPARE_CLUSTERS = 3
SPARE_ROWS = 3
ROUNDING_OF_ENDS = 1e-6
NO_TREND, NO_FIT, MAX_MISFIT = 0.05, 0.01, 0.0025
MAX_RELATIVE_WIDTH = 1.25


@dataclass(frozen=True)
class Gate:
    """Outcome of one rule: what was measured, against which threshold, and what it refuses.

    refuses: parameter names, or "*" (every number), "intervals", "forecast", "law" (the word in a title),
    "comparison".
    """

    id: str
    value: float | str | None
    threshold: str
    passed: bool | None
    reason: str = ""
    consequence: str = ""
    refuses: tuple[str, ...] = ()

    def as_dict(self) -> dict:
        """Plain dictionary for JSON."""
        return asdict(self)


def rule(
    name: str,
    value: float | str | None,
    threshold: str,
    reason: str,
    consequence: str,
    refuses: tuple[str, ...] = (EVERYTHING,),
) -> Gate:
    """The outcome of a rule that has failed, with its consequence and what it refuses, where there is a reason."""
    if not reason:
        return Gate(name, value, threshold, True)
    return Gate(name, value, threshold, False, reason, consequence, refuses)


def _decades(values: np.ndarray) -> float:
    """Range of the positive values, 0 where there are none."""
    positive = values[values > 0]
    return float(np.log10(positive.max() / positive.min())) if len(positive) else 0.0


def span(form: Form, slot: str, values: np.ndarray) -> Gate:
    """Five distinct values over 1.5 decades on an axis, or no exponent on it: only a log-linear slope is
    reported.
    """
    distinct, decades = len(np.unique(values)), _decades(values)
    needed = max(MIN_DISTINCT, form.min_distinct)
    enough = distinct >= needed and decades >= MIN_DECADES - 1e-9
    touched = tuple(
        p.name for p in form.parameters if (slot in p.slots and p.role != "floor") or (p.role in ("floor", "ceiling"))
    )
    return rule(
        "span",
        f"{distinct} values over {decades:.2f} decades",
        f">= {needed} values and >= {MIN_DECADES} decades",
        "" if enough else f"axis {slot} has {distinct} distinct values over {decades:.2f} decades",
        f"no exponent, coefficient or floor is read from {slot}; see the log-linear slope",
        touched,
    )


def degenerate(form: Form, axes: Mapping[str, np.ndarray], y: np.ndarray) -> list[Gate]:
    """An axis with one value, or a constant metric: the form is not a function of what was varied."""
    gates = []
    for slot, values in axes.items():
        if len(np.unique(values)) < 2:
            reason = f"axis {slot} has the single value {values[0]:g}: form {form.id} needs it to vary"
            mend = "choose a form without this axis, or run more sizes"
            gates.append(rule("degenerate", "1 distinct value", ">= 2 distinct values", reason, mend))
    if len(y) and np.ptp(y) <= 1e-12 * np.max(np.abs(y)):
        reason = f"the metric is constant ({y[0]:g}) over all {len(y)} rows"
        gates.append(rule("degenerate", float(np.ptp(y)), "> 0", reason, "there is nothing to explain"))
    return gates


def dof(form: Form, rows: int, clusters: int, distinct: int) -> Gate:
    """rows >= parameters + 3, and clusters and distinct axis points >= parameters."""
    count = len(form.names)
    threshold = f"rows >= {count + SPARE_ROWS}, clusters >= {count}, distinct points >= {count}"
    value = f"{rows} rows, {clusters} clusters, {distinct} distinct points"
    enough = rows >= count + SPARE_ROWS and clusters >= count and distinct >= count
    reason = "" if enough else f"{value} for the {count} parameters of {form.id}"
    return rule("dof", value, threshold, reason, "choose a smaller form or add runs")


def collinear(form: Form, axes: Mapping[str, np.ndarray], columns: Mapping[str, str]) -> list[Gate]:
    """Two axes whose logarithms correlate above .995 (above .9 for parameters with FLOPs) cannot be read
    apart.
    """
    gates = []
    for first, second in combinations(axes, 2):
        a, b = np.log(axes[first]), np.log(axes[second])
        if np.ptp(a) == 0 or np.ptp(b) == 0:
            continue
        value = abs(float(np.corrcoef(a, b)[0, 1]))
        pair = {columns[first], columns[second]} == {"dense_params", "train_flops"}
        limit = 0.9 if pair else MAX_CORRELATION
        if value >= limit:
            touched = tuple(p.name for p in form.parameters if set(p.slots) & {first, second})
            reason = f"ln {first} and ln {second} correlate at {value:.4f} over the rows"
            effect = f"the terms of {first} and {second} cannot be told apart"
            gates.append(rule("correlation", value, f"< {limit}", reason, effect, touched))
    return gates or [Gate("correlation", None, f"axes < {MAX_CORRELATION}", True)]


def convergence(share: float) -> Gate:
    """At least a fifth of the starts must reach the best objective."""
    reason = "" if share >= MIN_CONVERGENCE else f"only {share:.0%} of the starts reached the best objective"
    return rule("convergence", share, f">= {MIN_CONVERGENCE}", reason, "the optimum may be an accident")


def bounds(form: Form, phi: np.ndarray, low: np.ndarray, high: np.ndarray, smallest: float) -> list[Gate]:
    """A parameter within 1% of its search interval's end (in search space), or a floor below 1e-6 of the
    smallest metric.
    """
    gates = []
    for i, parameter in enumerate(form.parameters):
        margin = BOUND_MARGIN * (high[i] - low[i])
        at = "lower" if phi[i] - low[i] < margin else "upper" if high[i] - phi[i] < margin else ""
        reason = f"{parameter.name} ended at its {at} search bound" if at else ""
        log_floor = parameter.role == "floor" and parameter.searched == "log"
        if not at and log_floor and np.exp(phi[i]) < FLOOR_TINY * smallest:
            reason = f"{parameter.name} is below {FLOOR_TINY:g} of the smallest metric"
        if reason:
            interval = f"[{low[i]:.4g}, {high[i]:.4g}] in search space"
            effect = f"{parameter.name} is not determined by these rows"
            gates.append(rule("bound", f"at the {at or 'lower'} end", interval, reason, effect, (parameter.name,)))
    return gates or [Gate("bound", None, "1% inside every search interval", True)]


def trend(form: Form, p_values: Mapping[str, float]) -> list[Gate]:
    """The metric must move along an axis by more than noise does; where it moves along none there is nothing to fit."""
    found = []
    still = [slot for slot, p in p_values.items() if not p < NO_TREND]
    for slot, p in p_values.items():
        reason = f"no trend: the metric does not change with {slot} by more than noise does (p = {p:.2g})"
        touched = tuple(q.name for q in form.parameters if slot in q.slots or q.role in ("floor", "ceiling"))
        effect = f"nothing is read from {slot}"
        if len(still) == len(p_values):
            effect, touched = "there is nothing to fit", (EVERYTHING,)
        found.append(rule("trend", p, f"< {NO_TREND}", reason if slot in still else "", effect, touched))
    return found


def simpler(form: Form, scores: Mapping[str, float]) -> list[Gate]:
    """A law must describe the rows better than what has no exponent; scores are F over its 95% quantile."""
    found = []
    for name, score in scores.items():
        reason = "" if score >= 1 else f"{name} describes the rows no worse than {form.id} (F / F_95 = {score:.2g})"
        effect = "no exponent, coefficient or floor is read; see the log-linear slope"
        found.append(rule("form", score, "F / F_95 >= 1", reason, effect, form.names))
    return found


def misfit(form: Form, left: Mapping[str, tuple[float, float]]) -> list[Gate]:
    """What the fit leaves along an axis must look like noise, or be a small share of what the metric does there."""
    found = []
    for slot, (p, share) in left.items():
        wrong = p < NO_FIT and share > MAX_MISFIT
        reason = f"residuals bend or step along {slot}: {share:.2%} of its variance (p = {p:.2g})" if wrong else ""
        effect = f"{form.id} does not describe the rows: its parameters would mean nothing"
        threshold = f"p >= {NO_FIT} or <= {MAX_MISFIT:.2%} of the variance"
        found.append(rule("form", p, threshold, reason, effect, form.names))
    return found


def floor(name: str, spare: int, evidence: Mapping[str, float], profile: Profile | None) -> Gate:
    """Whether the asymptote is separable from 0; `evidence` is what `diagnostics.floor_evidence` measured, spare the
    clusters beyond those its own parameters use up.
    """
    ratio, held_out = evidence["ratio"], evidence["held_out_ratio"]
    at_zero = profile is not None and profile.interval[0] <= 0.0 <= profile.interval[1]
    rules = [
        (spare < SPARE_CLUSTERS, f"{spare} clusters to spare, fewer than {SPARE_CLUSTERS}"),
        (at_zero, "its 95% interval reaches 0"),
        (ratio < FLOOR_MIN_RATIO, f"the part above the floor changes by only x{ratio:.2f} over the table"),
        (held_out > FLOOR_WORSE, f"held-out error with a floor is {held_out:.2f} times that without"),
    ]
    reasons = [text for failed, text in rules if failed]
    threshold = (
        f"clusters to spare >= {SPARE_CLUSTERS}, interval above 0, ratio >= {FLOOR_MIN_RATIO:g}, "
        f"held-out error <= {FLOOR_WORSE} x"
    )
    value = f"spare {spare}, ratio {ratio:.2f}, held-out {held_out:.2f}"
    effect = f"{name} is not separated from 0: see the fit without a floor and the upper bound of {name}"
    return rule("floor", value, threshold, "; ".join(reasons), effect, (name,))


def width(name: str, profile: Profile, scale: float, what: str = "") -> Gate:
    """The interval must be closed and its half small beside `scale`: the value, or the excess that a floor implies."""
    low, high = profile.interval
    relative = (high - low) / 2 / scale if profile.closed else np.inf
    text = f"[{low:.3g}, {high:.3g}]"
    reason = f"the 95% interval {text} is open" if not profile.closed else ""
    if profile.closed and relative > MAX_RELATIVE_WIDTH:
        reason = f"half the 95% interval {text} is {relative:.2g} times {what or f'{name} itself'}"
    effect = f"{name} is not determined by these rows"
    return rule("width", relative, f"half-width <= {MAX_RELATIVE_WIDTH:g} x", reason, effect, (name,))


def contained(profile: Profile, value: float) -> Gate:
    """An interval that misses its own estimate is an error and is not shown, and neither is the estimate."""
    low, high = profile.interval
    slack = ROUNDING_OF_ENDS * max(abs(value), abs(low) if np.isfinite(low) else 0.0)
    outside = not low - slack <= value <= high + slack
    reason = f"the least-squares interval [{low:.4g}, {high:.4g}] misses the estimate" if outside else ""
    effect = f"a few rows pull {profile.name} to where the others are not: look for outliers"
    return rule("interval", "outside" if outside else "inside", "inside its interval", reason, effect, (profile.name,))


def belongs(form: Form, roots: set[str], refused: set[str]) -> list[Gate]:
    """What belongs to one of the refused `roots` is refused with it, where it is not among the `refused` already."""
    found, touched = [], form.touched_by(roots)
    for name in form.names:
        if name in touched - refused:
            owners = ", ".join(owner for owner in form.belongs_to(name) if owner in touched)
            effect = f"{name} is given only as a range over every admissible value of {owners}, if at all"
            found.append(rule("belongs", owners, "", f"{name} belongs to {owners}, which is refused", effect, (name,)))
    return found


def clusters(count: int) -> Gate:
    """Six clusters at least, or no bootstrap interval: the leave-one-cluster-out range is given instead."""
    reason = "" if count >= MIN_CLUSTERS else f"{count} clusters"
    effect = "no bootstrap intervals; see the leave-one-cluster-out range"
    return rule("clusters", count, f">= {MIN_CLUSTERS}", reason, effect, (INTERVALS,))


def shape(name: str, interval: tuple[float, float] | None) -> Gate:
    """kappa's 95% profile interval must not contain both 1 (a sum) and 20 (a bottleneck)."""
    threshold = "not both 1 and 20 inside the profile interval"
    if interval is None:
        return Gate("shape", None, threshold, None, "the profile was not computed", "its shape is unchecked")
    low, high = interval
    value = f"[{low:.3g}, {high:.3g}]"
    reason = f"the profile interval of {name} is {value}" if low <= 1.0 and high >= 20.0 else ""
    return rule("shape", value, threshold, reason, "sum and bottleneck not distinguished", (name,))


def tuning(bracketed: np.ndarray | None) -> Gate:
    """Every row's learning rate must be bracketed before the word law may stand in a title."""
    if bracketed is None:
        reason, effect = "the table has no lr_bracketed column", "whether learning rates were tuned is unknown"
        return Gate("tuning", None, "every row bracketed", None, reason, effect)
    missing = int(np.sum(~bracketed))
    reason = f"{missing} of {len(bracketed)} rows have a learning rate that is not bracketed" if missing else ""
    return rule("tuning", missing, "0 rows not bracketed", reason, "titles say trend, not law", (LAW,))


def gains(form: Form) -> list[Gate]:
    """A gain exponent is stored and compared with nothing: it depends on the baseline and the range."""
    if form.id != "gain":
        return []
    value, threshold = "gamma of a gain over a baseline", "an exponent of the metric itself"
    reason = "gamma of a gain depends on the baseline and the range, and falls where the loss exponent rises"
    return [rule("gain", value, threshold, reason, "gamma is compared with no other exponent", (COMPARISON,))]


def forecast(fitted: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> np.ndarray:
    """True where a forecast is refused: beyond 30 times the largest fitted value, or the fitted span again in
    logs, on any axis.
    """
    refused = np.zeros(np.broadcast(*(np.asarray(v) for v in wanted.values())).shape, bool)
    for slot, values in wanted.items():
        low, high = float(fitted[slot].min()), float(fitted[slot].max())
        reach = min(MAX_FORECAST_RATIO, high / low)
        refused = refused | (np.asarray(values, float) > high * reach * (1 + 1e-12))
    return refused


def effective_rows(residuals: np.ndarray, codes: np.ndarray) -> float:
    """n / (1 + (m - 1) rho): rows discounted by the intra-cluster correlation rho of residuals[n], m rows per
    cluster (ANOVA).
    """
    n = len(residuals)
    sizes = np.bincount(codes)
    count = len(sizes)
    if count == n or count < 2:
        return float(n)
    means = np.bincount(codes, residuals) / sizes
    between = np.sum(sizes * (means - residuals.mean()) ** 2) / (count - 1)
    within = np.sum((residuals - means[codes]) ** 2) / (n - count)
    typical = (n - np.sum(sizes**2) / n) / (count - 1)
    total = between + (typical - 1) * within
    rho = float(np.clip((between - within) / total, 0.0, 1.0)) if total > 0 else 0.0
    return n / (1.0 + (n / count - 1.0) * rho)
