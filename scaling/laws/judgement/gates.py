"""Identifiability gates: rules that refuse a quantity with a reason instead of printing a number.

Each rule returns a `Gate`. `passed` is True, False, or None when the table lacks what the rule needs; only
False refuses. Rules before the fit look at the table, rules after it at the optimum and its resampled
neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from recscale.scaling.laws.forms.form import Form

EVERYTHING = "*"
INTERVALS, FORECAST, LAW, COMPARISON = "intervals", "forecast", "law", "comparison"

MIN_DISTINCT, MIN_DECADES = 5, 1.5
MIN_CONVERGENCE = 0.2
MAX_CORRELATION = 0.995
MIN_CLUSTERS = 6
MAX_FORECAST_RATIO = 30.0
BOUND_MARGIN = 0.01
FLOOR_TINY = 1e-6
FLOOR_MIN_RATIO = 2.0
FLOOR_WORSE = 1.2
FLOOR_MIN_DOF = 5
SPARE_ROWS = 3


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
    return float(np.log10(values.max() / values.min()))


def span(form: Form, slot: str, values: np.ndarray) -> Gate:
    """Five distinct values over 1.5 decades on an axis, or no exponent on it: only a log-linear slope is
    reported.
    """
    distinct, decades = len(np.unique(values)), _decades(values)
    needed = max(MIN_DISTINCT, form.min_distinct)
    enough = distinct >= needed and decades >= MIN_DECADES
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


def floor(name: str, evidence: Mapping[str, float]) -> Gate:
    """Whether the asymptote is separable from 0; `evidence` is what `diagnostics.floor_evidence` measured."""
    dof, p_value, ratio, held_out = (evidence[key] for key in ("dof", "p_value", "ratio", "held_out_ratio"))
    rules = [
        (dof < FLOOR_MIN_DOF, f"{dof:.0f} residual degrees of freedom, fewer than {FLOOR_MIN_DOF}"),
        (not p_value < 0.05, f"an F-test does not reject a zero floor (p = {p_value:.2g})"),
        (ratio < FLOOR_MIN_RATIO, f"the part above the floor changes by only x{ratio:.2f} on every axis"),
        (held_out > FLOOR_WORSE, f"held-out error with a floor is {held_out:.2f} times that without"),
    ]
    reasons = [text for failed, text in rules if failed]
    threshold = f"dof >= {FLOOR_MIN_DOF}, p < .05, ratio >= {FLOOR_MIN_RATIO:g}, held-out error <= {FLOOR_WORSE} x"
    value = f"dof {dof:.0f}, p {p_value:.2g}, ratio {ratio:.2f}, held-out {held_out:.2f}"
    effect = f"{name} is not separated from 0: see the fit without a floor and the upper bound of {name}"
    return rule("floor", value, threshold, "; ".join(reasons), effect, (name,))


def correlation(names: Sequence[str], draws: np.ndarray) -> list[Gate]:
    """Pairs of centred parameters whose resampled values correlate above .995; draws[b, p] searched."""
    spread = draws.std(axis=0)
    gates = []
    for i, j in combinations(range(len(names)), 2):
        # Below this the draws differ by rounding only, which correlates for no reason.
        if min(spread[i], spread[j]) < 1e-7:
            continue
        value = abs(float(np.corrcoef(draws[:, i], draws[:, j])[0, 1]))
        if value > MAX_CORRELATION:
            reason = f"{names[i]} and {names[j]} correlate at {value:.4f} over the resampled fits"
            pair, effect = (names[i], names[j]), "only their combination is determined"
            gates.append(rule("correlation", value, f"<= {MAX_CORRELATION}", reason, effect, pair))
    return gates or [Gate("correlation", None, f"resampled pairs <= {MAX_CORRELATION}", True)]


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


def f_test(rss_without: float, rss_with: float, rows: int, parameters: int) -> float:
    """p-value of one extra parameter from the residual sums of squares with and without it."""
    free = rows - parameters
    if free < 1 or not np.isfinite(rss_without):
        return 1.0
    # Below rounding both sums are noise of the arithmetic and prove nothing.
    tiny = 1e-26 * rows
    if rss_without <= tiny:
        return 1.0
    statistic = (rss_without - rss_with) / (max(rss_with, tiny) / free)
    return float(stats.f.sf(max(statistic, 0.0), 1, free))
