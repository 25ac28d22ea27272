"""Exact binary metrics on the host, in NumPy float64: logloss, normalised entropy, AUC, grouped AUC,
calibration.

Every function takes logits (or any increasing score, where only the order counts), labels in {0, 1} and an
optional mask of the same shape; entries whose mask is 0 take no part. Logits rather than probabilities,
because float32 probabilities saturate into ties. Nothing is averaged over batches: an average of batch AUCs
is not an AUC.

`METRICS` says of every metric what the rest of the project has to know: which way is better, whether laws and
comparisons may rest on it, its words on a figure. Another distribution adds a `Metric` through the entry-point group
`recscale.metrics`; a run evaluates it when `data.metrics` names it (or its address, `package.module:attribute`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jaxtyping import Float, Num, Shaped

from recscale.pallas_kernels import names
from recscale.scaling.records.runs import run_row

CALIBRATION_BINS = 20
GROUP = "recscale.metrics"

# Arrays of any shape, which all those of one call share.
Rows = Num[np.ndarray, "..."]
Mask = Shaped[np.ndarray, "..."]


@dataclasses.dataclass(frozen=True)
class Metric:
    """What there is to know about one column of results.

    Attributes:
        name: the key in run.json and the column of run tables.
        words: the metric and its unit on a figure; "" for the name itself.
        lower_is_better: None where neither way is better, as for calibration.
        is_loss: the holdout's logloss or a rescaling of it, which a comparison of laws may rest on.
        in_nats: nats per label on the scale of the logloss, so that the log's asymptote and entropy floor can be drawn.
        on_page: whether the report's table of runs has a column of it.
        function: (logits, labels, *, mask, groups) -> float over the holdout; arrays [N] of one task: float logits,
            labels in [0, 1], bool mask of the rows that count, and groups, int ids of a user or request. None for a
            metric that only other tables hold, or that its data set computes from more than these.
    """

    name: str
    words: str = ""
    lower_is_better: bool | None = True
    is_loss: bool = False
    in_nats: bool = False
    on_page: bool = True
    function: Callable[..., float] | None = None


@dataclasses.dataclass(frozen=True)
class GroupedAuc:
    """Mean of per-group AUCs, each weighted by its rows; groups with one class only are skipped and counted.

    value: the mean, NaN if every group was skipped; groups, rows: those that took part; skipped_*: those that
    did not.
    """

    value: float
    groups: int
    rows: int
    skipped_groups: int
    skipped_rows: int


def logloss(logits: Rows, labels: Rows, mask: Mask | None = None) -> float:
    """Mean over observed labels of -ln p(label), p = sigmoid(logit), in nats; exact for logits of any size.

    Raises:
        ValueError: shapes differ, a label is not 0 or 1, or no label is observed.
    """
    logit, label = _select(logits, labels, mask)
    return float(np.mean(_row_losses(logit, label)))


def base_rate(labels: Rows, mask: Mask | None = None) -> float:
    """Share of positive labels among the observed ones."""
    _, label = _select(labels, labels, mask)
    return float(np.mean(label))


def entropy(rate: float | Float[np.ndarray, "*shape"]) -> float | Float[np.ndarray, "*shape"]:
    """Entropy -r ln r - (1-r) ln(1-r) of a Bernoulli label in nats; 0 at r = 0 and r = 1.

    rate: a number, or an array of them; the result has its shape.

    Raises:
        ValueError: a rate lies outside [0, 1].
    """
    rate = np.asarray(rate, np.float64)
    if not np.all((rate >= 0.0) & (rate <= 1.0)):
        raise ValueError(f"a rate lies between 0 and 1, found {rate}")
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = [np.where(part > 0.0, part * np.log(part), 0.0) for part in (rate, 1.0 - rate)]
    found = -(terms[0] + terms[1])
    return found if found.ndim else float(found)


def constant_logloss(rate: float, labels: Rows, mask: Mask | None = None) -> float:
    """Logloss of predicting `rate` for every row: the cross entropy of the observed rate against it."""
    observed_rate = base_rate(labels, mask)
    with np.errstate(divide="ignore"):
        terms = [share * np.log(p) for share, p in ((observed_rate, rate), (1 - observed_rate, 1 - rate)) if share > 0]
    return float(-sum(terms))


def normalised_entropy(logits: Rows, labels: Rows, mask: Mask | None = None) -> float:
    """Logloss divided by the entropy of the base rate of these very labels; 1 is the best constant
    prediction.

    NaN if the labels have one class only. Report `base_rate` beside it, or the number cannot be compared.
    """
    floor = entropy(base_rate(labels, mask))
    return float(logloss(logits, labels, mask) / floor) if floor > 0.0 else float("nan")


def auc(scores: Rows, labels: Rows, mask: Mask | None = None) -> float:
    """Probability that a random positive outranks a random negative, ties counting one half.

    (sum of the positives' midranks - P(P+1)/2) / (P N); constant scores give exactly 0.5, one class or a NaN
    score NaN.
    """
    score, label = _select(scores, labels, mask)
    value, _, _ = _per_group_auc(score, label, np.zeros(score.size, np.int64))
    return float(value[0])


def gauc_by_rows(scores: Rows, labels: Rows, groups: Rows, mask: Mask | None = None) -> GroupedAuc:
    """Mean over groups of the AUC inside the group, weighted by the group's observed rows.

    groups: integer id per row (user or request), same shape as the scores. Groups with one class are skipped.
    """
    score, label = _select(scores, labels, mask)
    group, _ = _select(groups, labels, mask, dtype=None)
    value, rows, two_classes = _per_group_auc(score, label, group)
    used = int(rows[two_classes].sum())
    mean = float(np.sum(value[two_classes] * rows[two_classes]) / used) if used else float("nan")
    return GroupedAuc(
        value=mean,
        groups=int(two_classes.sum()),
        rows=used,
        skipped_groups=int((~two_classes).sum()),
        skipped_rows=int(rows.sum()) - used,
    )


def calibration(logits: Rows, labels: Rows, mask: Mask | None = None) -> float:
    """Sum of predictions over sum of labels: above 1 the model over-predicts; NaN without a positive."""
    logit, label = _select(logits, labels, mask)
    positives = label.sum()
    return float(_sigmoid(logit).sum() / positives) if positives else float("nan")


def calibration_bins(
    logits: Rows,
    labels: Rows,
    mask: Mask | None = None,
    bins: int = CALIBRATION_BINS,
) -> dict[str, list[int] | list[float | None]]:
    """Mean prediction and observed rate in `bins` bins of equal row count, ordered by prediction.

    Equal predictions share a bin (the one of their midrank), so the result does not depend on row order and a
    bin may be empty: its means are None. Returns lists `rows`, `predicted`, `observed`.
    """
    logit, label = _select(logits, labels, mask)
    middle = _midranks(logit, np.zeros(logit.size, np.int64))[0] - 0.5
    place = np.minimum((middle * bins / logit.size).astype(np.int64), bins - 1)
    rows = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, weights=column, minlength=bins) for column in (_sigmoid(logit), label)]
    means = [[float(s / n) if n else None for s, n in zip(total, rows, strict=True)] for total in sums]
    return {"rows": rows.tolist(), "predicted": means[0], "observed": means[1]}


def evaluate_binary(
    logits: Rows,
    labels: Rows,
    *,
    mask: Mask | None = None,
    groups: Rows | None = None,
) -> dict[str, Any]:
    """All metrics of one task as a JSON-able dictionary, with the keys of the run table.

    Keys: rows, base_rate (of these labels), logloss, ne, auc, calibration, calibration_bins; with `groups`
    also gauc, gauc_weighting ("rows"), gauc_groups, gauc_groups_skipped.
    """
    logit, label = _select(logits, labels, mask)
    result: dict[str, Any] = {
        "rows": int(label.size),
        "base_rate": base_rate(label),
        "logloss": logloss(logit, label),
        "ne": normalised_entropy(logit, label),
        "auc": auc(logit, label),
        "calibration": calibration(logit, label),
        "calibration_bins": calibration_bins(logit, label),
    }
    if groups is not None:
        group, _ = _select(groups, labels, mask, dtype=None)
        grouped = gauc_by_rows(logit, label, group)
        result |= {
            "gauc": grouped.value,
            "gauc_weighting": "rows",
            "gauc_groups": grouped.groups,
            "gauc_groups_skipped": grouped.skipped_groups,
        }
    return result


def _select(
    values: np.ndarray, labels: np.ndarray, mask: np.ndarray | None, dtype: type | None = np.float64
) -> tuple[np.ndarray, np.ndarray]:
    """Observed entries of values and labels as flat arrays, after the checks every metric shares."""
    value, label = np.asarray(values, dtype), np.asarray(labels, np.float64)
    if value.shape != label.shape:
        raise ValueError(f"values have shape {value.shape}, labels {label.shape}; they must be equal")
    if mask is not None:
        keep = np.asarray(mask) > 0
        if keep.shape != label.shape:
            raise ValueError(f"the mask has shape {keep.shape}, labels {label.shape}; they must be equal")
        value, label = value[keep], label[keep]
    value, label = value.reshape(-1), label.reshape(-1)
    if not label.size:
        raise ValueError("no label is observed; a metric of nothing is undefined")
    wrong = (label != 0) & (label != 1)
    if wrong.any():
        raise ValueError(f"labels must be 0 or 1, found {label[wrong][0]}")
    return value, label


def _row_losses(logit: np.ndarray, label: np.ndarray) -> np.ndarray:
    # ln(1 + exp(-z)) for a positive, ln(1 + exp(z)) for a negative; logaddexp is exact at both ends.
    return np.logaddexp(0.0, np.where(label > 0, -logit, logit))


def _sigmoid(logit: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -logit))


def _midranks(score: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """1-based rank of each row inside its group, equal scores sharing their mean rank; and the group's dense
    index.
    """
    _, index, rows = np.unique(group, return_inverse=True, return_counts=True)
    # Scores that are not numbers go last; whoever uses the ranks drops their groups.
    _, order = np.unique(np.where(np.isnan(score), np.inf, score), return_inverse=True)
    _, place, equal = np.unique(index * (order.max() + 1) + order, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(equal) - (equal - 1) / 2)[place]
    return ranks - (np.cumsum(rows) - rows)[index], index


def _per_group_auc(
    score: np.ndarray, label: np.ndarray, group: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(AUC, rows, has both classes) of every group, in ascending order of group id; AUC is NaN without both
    classes.
    """
    ranks, index = _midranks(score, group)
    rows = np.bincount(index)
    positives = np.bincount(index, weights=label)
    pairs = positives * (rows - positives)
    ranked = np.bincount(index, weights=ranks * label) - positives * (positives + 1) / 2
    value = np.divide(ranked, pairs, out=np.full(rows.size, np.nan), where=pairs > 0)
    value[np.bincount(index, weights=np.isnan(score)) > 0] = np.nan
    return value, rows, pairs > 0


def _of_groups(scores: np.ndarray, labels: np.ndarray, *, mask: np.ndarray | None = None, groups: np.ndarray) -> float:
    return gauc_by_rows(scores, labels, groups, mask).value


def _without_groups(function: Callable[..., float]) -> Callable[..., float]:
    return lambda logits, labels, *, mask, groups: function(logits, labels, mask)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("logloss", "logloss (nats per label)", is_loss=True, in_nats=True, function=_without_groups(logloss)),
        # Known-truth logs only: logloss minus the entropy floor.
        Metric("excess_logloss", is_loss=True),
        # The same in the least popular tenth of the rows' items.
        Metric("excess_logloss_rare", "excess logloss of rare items", on_page=False),
        Metric("observed_logloss", in_nats=True, on_page=False),
        Metric("progressive_logloss", "progressive logloss (nats per label)", in_nats=True, on_page=False),
        Metric("ne", "normalised entropy", is_loss=True, function=_without_groups(normalised_entropy)),
        Metric("auc", "AUC", lower_is_better=False, function=_without_groups(auc)),
        Metric("gauc", "grouped AUC", lower_is_better=False, on_page=False, function=_of_groups),
        Metric("calibration", lower_is_better=None, function=_without_groups(calibration)),
        # Columns of other people's run tables.
        *(Metric(name, lower_is_better=False, on_page=False) for name in ("qauc", "t", "hr", "ndcg", "recall")),
    )
}


def describe(column: str) -> Metric:
    """What is known about a column of a run table; of one that nobody declared, its name."""
    if column in METRICS:
        return METRICS[column]
    brought = column in names.available(GROUP, {})
    return find(column) if brought else Metric(column)


def find(name: str) -> Metric:
    """The metric of a name or an address, ready to be evaluated.

    Raises:
        ValueError: there is none (the nearest is named), it is no `Metric` or has no function, or run tables have a
            column of its name already.
    """
    own = METRICS.get(name)
    metric = own or names.load(GROUP, name, dict.fromkeys(METRICS, ""), "metric")
    if not isinstance(metric, Metric):
        raise ValueError(f"metric {name!r} is {metric!r}, expected a recscale.scaling.data.metrics.Metric")
    if own is None and (metric.name in METRICS or metric.name in run_row({"status": "planned"})):
        raise ValueError(f"metric {name!r} calls itself {metric.name!r}, a column that run tables have; rename it")
    if metric.function is None:
        raise ValueError(f"metric {name!r} has no function to evaluate: it is a column of results, not of these logits")
    return metric


def evaluate(wanted: Iterable[str], logits: Rows, labels: Rows, *, mask: Mask, groups: Rows) -> dict[str, float]:
    """Metrics by name or address on the rows of a holdout: {name: value}. Arrays have one shape.

    The functions get them flat.
    """
    flat = [np.asarray(array).reshape(-1) for array in (logits, labels, mask, groups)]
    found = {}
    for metric in map(find, wanted):
        assert metric.function is not None
        found[metric.name] = float(metric.function(flat[0], flat[1], mask=flat[2] > 0, groups=flat[3]))
    return found
