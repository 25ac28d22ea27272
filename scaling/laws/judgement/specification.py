"""Specification curve: one number of a law refitted under every defensible choice, one row per choice.

Choices that the user does not freeze: form, Huber width, outliers, which rows, what counts as size, which
metric, row weights. The spread of the curve is uncertainty that no interval of a single fit contains.
Precedent: the fits of one public suite range over alpha .21-.33 and E 1.60-2.22 by subset alone (arXiv
2502.06857), and counting the output layer or not moves a compute exponent by .13-.17 (arXiv 2406.19146).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from recscale.scaling.laws.fitting.fit import fit
from recscale.scaling.laws.fitting.law_fit import LawFit, Refused
from recscale.scaling.laws.fitting.problem import residual_scale, residuals
from recscale.scaling.laws.forms import registry
from recscale.scaling.laws.grids import Grid, number
from recscale.scaling.laws.uncertainty.seed_noise import seed_noise

from .gates import EVERYTHING

FORMS = {
    1: ("power_offset", "power", "log_linear"),
    2: ("chinchilla", "chinchilla_tied", "kaplan_offset", "kappa", "kappa_tied"),
}
DIMENSIONS = ("form", "huber_delta", "outliers", "rows", "size", "metric", "weights")
_SIZE_COLUMNS = ("dense_params", "active_params", "dense_plus_head", "train_flops")
_OUTLIER_MADS = 5.0
_LEAST_SQUARES = 1e6  # a Huber width no residual reaches
_WORST_FIT = 1.5  # a form whose rms residual exceeds the best form's by more than this is not admissible
_TRAILING = 5  # checkpoints per run in the "trailing checkpoints" choice
_NOISE_COLUMN = "specification_noise_se"


@dataclass(frozen=True)
class SpecificationCurve:
    """All specifications sorted by `value`, refused ones last with their reason.

    rows: columns of DIMENSIONS, `value`, `objective`, `rows_used`, `reason`, `headline`.
    rank: position of the headline among the `count` values, from 1. low, high: 5% and 95% of the values.
    possible: how many combinations there were before `limit`.
    """

    quantity: str
    rows: pd.DataFrame = field(repr=False)
    headline: float | None
    rank: int | None
    count: int
    possible: int
    median: float | None
    low: float | None
    high: float | None
    inadmissible_forms: dict[str, str]

    def summary(self) -> dict[str, Any]:
        """Plain numbers for a record: median, 5-95% range, headline and its rank."""
        return {
            "quantity": self.quantity, "headline": self.headline, "rank": self.rank, "count": self.count,
            "possible": self.possible, "refused": int(self.rows["value"].isna().sum()), "median": self.median,
            "low_5": self.low, "high_95": self.high, "inadmissible_forms": dict(self.inadmissible_forms),
        }  # fmt: skip


def specification_curve(
    table: pd.DataFrame,
    form: str,
    axes: Mapping[str, str],
    *,
    target: str = "logloss",
    quantity: str = "forecast",
    at: Mapping[str, float] | None = None,
    cluster: str | None = None,
    freeze: Mapping[str, Any] | None = None,
    forms: Sequence[str] | None = None,
    limit: int = 200,
    seed: int = 0,
) -> SpecificationCurve:
    """Refit `quantity` under all combinations of choices; `form`, `axes`, `target` make the headline.

    Arguments:
      quantity: "forecast" of the metric at the point `at` (axis name or column -> value), or a parameter or
        derived name ("alpha", "E", "a"). The metric is varied for alpha on one axis only: forecasts of
        different metrics are not one number.
      freeze: choices not to vary, such as {"size": "dense_params", "huber_delta": 1e-3}; None as a value
        freezes at the headline.
      forms: rivals to try; by default the floor, no-floor and log-linear forms on one axis, and the sum and
        bottleneck forms on two. A form that is refused, or fits clearly worse than the best, is not admitted.
      limit: at most this many specifications: the headline and a random subset of the others (`seed`).

    Raises ValueError for an unknown frozen dimension or a forecast without `at`, Refused where the headline fit, or the
    quantity in it, is.
    """
    freeze = dict(freeze or {})
    unknown = sorted(set(freeze) - set(DIMENSIONS))
    if unknown:
        raise ValueError(f"cannot freeze {unknown}; the choices are {', '.join(DIMENSIONS)}")
    if quantity == "forecast" and not at:
        raise ValueError("quantity 'forecast' needs `at`, the axis values to forecast")
    headline_form = registry.get(form)
    space = _Space(_with_columns(table, axes), dict(axes), target, cluster, quantity, dict(at or {}), _size_slot(axes))
    headline = _headline(space, headline_form.id, freeze)
    base = space.fit(headline)
    if base.refused:
        raise Refused(f"the headline fit is refused: {_refusal(base)}")
    if quantity in base.form.names and (judged := space.fit(headline, profile=True)).params[quantity] is None:
        # What the fit itself does not print is not printed under other choices either.
        raise Refused(f"{quantity} of the headline fit is refused: {judged.reason(quantity)}")
    choices, inadmissible = _choices(space, base, headline, freeze, forms or FORMS.get(len(axes), (headline_form.id,)))
    picked, possible = _pick(choices, headline, limit, seed)
    found = pd.DataFrame([_row(space, base, choice, headline) for choice in picked])
    return _summarised(quantity, found, possible, inadmissible)


@dataclass(frozen=True)
class _Space:
    """What does not change between specifications."""

    table: pd.DataFrame
    axes: dict[str, str]
    target: str
    cluster: str | None
    quantity: str
    at: dict[str, float]
    size_slot: str | None

    def fit(self, choice: Mapping[str, Any], keep: np.ndarray | None = None, profile: bool = False) -> LawFit:
        """One refit without resampling; `keep` marks rows of `table` that stay; profile: with the gates on width."""
        rows = self.rows(choice["rows"])
        keep = rows if keep is None else rows & keep
        axes = dict(self.axes)
        if self.size_slot and choice["size"]:
            axes[self.size_slot] = choice["size"]
        options = {"weights": choice["weights"]} if choice["weights"] else {}
        target, form = self.target, choice["form"]
        if choice["metric"] == "auc":
            target, form = "auc", "auc"
        return fit(
            self.table[keep], form, axes, target, bootstrap=0, cluster=self.cluster, profile=profile,
            huber_delta=choice["huber_delta"], **options,
        )  # fmt: skip

    def rows(self, choice: str) -> np.ndarray:
        return _row_masks(self.table)[choice]

    def point(self, law: LawFit, choice: Mapping[str, Any], keep: np.ndarray) -> dict[str, float]:
        """`at` in the axes of this specification: another size definition is reached by a log-log line
        through the rows.
        """
        point = {slot: self.at[slot] if slot in self.at else self.at[column] for slot, column in self.axes.items()}
        if not self.size_slot or choice["size"] in (None, self.axes[self.size_slot]):
            return point
        rows = self.table[keep]
        design = np.column_stack([np.ones(len(rows)), *(np.log(rows[c].to_numpy(float)) for c in self.axes.values())])
        line, *_ = np.linalg.lstsq(design, np.log(rows[choice["size"]].to_numpy(float)), rcond=None)
        wanted = np.array([1.0, *(np.log(point[slot]) for slot in self.axes)])
        return {**point, self.size_slot: float(np.exp(wanted @ line))}


def _headline(space: _Space, form: str, freeze: Mapping[str, Any]) -> dict[str, Any]:
    size = space.axes[space.size_slot] if space.size_slot else None
    default = {
        "form": form, "huber_delta": 1e-3, "outliers": "all", "rows": "all", "size": size,
        "metric": space.target, "weights": None,
    }  # fmt: skip
    return {**default, **{name: value for name, value in freeze.items() if value is not None}}


def _choices(
    space: _Space, base: LawFit, headline: Mapping[str, Any], freeze: Mapping[str, Any], rivals: Sequence[str]
) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """The values each dimension may take, the headline's first, and forms left out with the reason."""
    r = _residuals(base)
    sigma = max(residual_scale(r), 1e-9)
    masks = _row_masks(space.table)
    noise = _NOISE_COLUMN in space.table.columns
    columns = set(space.table.columns)
    sizes = [c for c in _SIZE_COLUMNS if c in columns and c not in set(space.axes.values())]
    has_auc = "auc" in columns and len(space.axes) == 1 and space.quantity == "alpha"
    options: dict[str, list[Any]] = {
        "huber_delta": [sigma / 3, 1e-3, _LEAST_SQUARES],
        "outliers": ["all", "drop beyond 5 MAD", "drop smallest size"],
        "rows": list(masks),
        "size": sizes if space.size_slot else [],
        "metric": ["auc"] if has_auc else [],
        "weights": [_NOISE_COLUMN] if noise else [],
    }
    admitted, inadmissible = ([], {}) if "form" in freeze else _admissible_forms(space, headline, rivals)
    options["form"] = admitted
    varied = {name: [] if name in freeze else options[name] for name in DIMENSIONS}
    return {name: list(dict.fromkeys([headline[name], *varied[name]])) for name in DIMENSIONS}, inadmissible


def _admissible_forms(
    space: _Space, headline: Mapping[str, Any], rivals: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Forms whose fit is not refused and whose rms residual is within 1.5 times the best one's."""
    spread, reasons = {}, {}
    for name in dict.fromkeys([headline["form"], *rivals]):
        law = space.fit({**headline, "form": name})
        if law.refused:
            reasons[name] = _refusal(law)
        else:
            spread[name] = float(np.sqrt(np.mean(_residuals(law) ** 2)))
    best = min(spread.values())
    for name, value in spread.items():
        # Exact data leave residuals of rounding only, where ratios mean nothing.
        if value > _WORST_FIT * best + 1e-9 and name != headline["form"]:
            reasons[name] = f"rms residual {value:.3g}, the best form has {best:.3g}"
    return [name for name in spread if name not in reasons], reasons


def _pick(
    choices: Mapping[str, list[Any]], headline: Mapping[str, Any], limit: int, seed: int
) -> tuple[list[dict[str, Any]], int]:
    """The headline and at most limit - 1 other combinations, in a fixed order."""
    combinations = product(*(choices[name] for name in DIMENSIONS))
    every: list[dict[str, Any]] = [dict(zip(DIMENSIONS, values, strict=True)) for values in combinations]
    # The AUC form is one form: it does not multiply with the others.
    every = [c for c in every if c["metric"] != "auc" or c["form"] == headline["form"]]
    others = [c for c in every if c != headline]
    if len(others) > limit - 1:
        index = np.random.default_rng(seed).choice(len(others), size=limit - 1, replace=False)
        others = [others[i] for i in sorted(index)]
    return [dict(headline), *others], len(every)


def _row(space: _Space, base: LawFit, choice: Mapping[str, Any], headline: Mapping[str, Any]) -> dict[str, Any]:
    keep = _outlier_mask(space, base, choice)
    used = space.rows(choice["rows"]) & keep
    row = {**choice, "value": np.nan, "objective": np.nan, "rows_used": int(used.sum()), "reason": ""}
    row["headline"] = choice == headline
    law = space.fit(choice, keep)
    if law.refused:
        return {**row, "reason": _refusal(law)}
    row["objective"] = law.solved()[1].objective
    if space.quantity != "forecast":
        values = {**law.params, **law.derived}
        if space.quantity not in values:
            return {**row, "reason": f"form {law.form.id} has no {space.quantity}"}
        value = values[space.quantity]
        return {**row, "reason": law.reason(space.quantity)} if value is None else {**row, "value": float(value)}
    try:
        # How far the point lies is the same for every row; the curve shows the spread at that distance.
        value = law.predict(space.point(law, choice, used), beyond_range=True)
    except Refused as error:
        return {**row, "reason": str(error)}
    return {**row, "value": float(value)}


def _residuals(law: LawFit) -> np.ndarray:
    problem, solution = law.solved()
    return residuals(problem, solution.phi)


def _refusal(law: LawFit) -> str:
    """Why nothing may be read from a fit."""
    return "; ".join(gate.reason for gate in law.refusals if EVERYTHING in gate.refuses)


def _outlier_mask(space: _Space, base: LawFit, choice: Mapping[str, Any]) -> np.ndarray:
    """Rows of the table that stay under an outlier rule, judged by the headline fit."""
    everything = np.ones(len(space.table), bool)
    if choice["outliers"] == "drop beyond 5 MAD":
        predicted = base.predict(
            {slot: space.table[c].to_numpy(float) for slot, c in space.axes.items()}, beyond_range=True
        )
        with np.errstate(invalid="ignore"):
            r = np.log(predicted) - np.log(space.table[space.target].to_numpy(float))
        scale = max(residual_scale(r[np.isfinite(r)]), 1e-9)
        return ~(np.abs(r) > _OUTLIER_MADS * scale)
    if choice["outliers"] == "drop smallest size":
        column = space.axes[space.size_slot or next(iter(space.axes))]
        return (space.table[column] > space.table[column].min()).to_numpy()
    return everything


def _row_masks(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Row choices that differ from each other: all; decayed; the final decayed row of a run; its trailing
    checkpoints.
    """
    masks = {"all": np.ones(len(table), bool)}
    order = table["examples"] if "examples" in table.columns else pd.Series(np.arange(len(table)), index=table.index)
    runs = table["run_id"] if "run_id" in table.columns else pd.Series(np.arange(len(table)), index=table.index)
    from_end = order.groupby(runs).rank(ascending=False, method="first").to_numpy()
    if "decayed" in table.columns:
        decayed = table["decayed"].eq(True).to_numpy()
        masks["decayed"] = decayed
        ranks = order.where(decayed).groupby(runs).rank(ascending=False, method="first").to_numpy()
        masks["final decayed"] = decayed & (ranks == 1)
    masks["trailing checkpoints"] = from_end <= _TRAILING
    kept: dict[str, np.ndarray] = {}
    for name, mask in masks.items():
        if mask.any() and not any(np.array_equal(mask, other) for other in kept.values()):
            kept[name] = mask
    return kept


def _with_columns(table: pd.DataFrame, axes: Mapping[str, str]) -> pd.DataFrame:
    """The table with the derived columns specifications may use: dense + head, and the standard error of seed
    noise.
    """
    table = table.reset_index(drop=True)
    if {"dense_params", "head_params"} <= set(table.columns) and table["head_params"].notna().all():
        table = table.assign(dense_plus_head=table["dense_params"] + table["head_params"])
    metric = next((c for c in ("logloss", "loss") if c in table.columns), None)
    noise = None if metric is None else seed_noise(table, list(axes.values()), table[metric].to_numpy(float))
    if noise is not None:
        table = table.assign(**{_NOISE_COLUMN: noise.sd(table[metric].to_numpy(float))})
    complete = [c for c in _SIZE_COLUMNS if c in table.columns and table[c].notna().all() and (table[c] > 0).all()]
    return table.drop(columns=[c for c in _SIZE_COLUMNS if c in table.columns and c not in (*complete, *axes.values())])


def _size_slot(axes: Mapping[str, str]) -> str | None:
    return next((slot for slot, column in axes.items() if column in _SIZE_COLUMNS), None)


def _summarised(quantity: str, rows: pd.DataFrame, possible: int, inadmissible: dict[str, str]) -> SpecificationCurve:
    rows = rows.sort_values("value", kind="stable", na_position="last").reset_index(drop=True)
    values = rows["value"].dropna().to_numpy(float)
    own = rows.loc[rows["headline"], "value"]
    headline = float(own.iloc[0]) if own.notna().all() else None
    quantiles = [float(q) for q in np.quantile(values, [0.05, 0.5, 0.95])] if len(values) else [None] * 3
    rank = None if headline is None else int(np.flatnonzero(rows["headline"])[0]) + 1
    return SpecificationCurve(
        quantity,
        rows,
        headline,
        rank,
        len(values),
        possible,
        quantiles[1],
        quantiles[0],
        quantiles[2],
        inadmissible,
    )


def as_grid(curve: SpecificationCurve) -> Grid:
    """The spread of a number over choices, and its median under each of them."""
    if curve.median is None or curve.low is None or curve.high is None:
        spread = f"{curve.quantity}: refused under all {len(curve.rows)} specifications"
    else:
        own = "refused" if curve.headline is None else f"{curve.headline:.4g}, rank {curve.rank} of {curve.count}"
        spread = (
            f"{curve.quantity}: median {curve.median:.4g}, from {curve.low:.4g} to {curve.high:.4g} (5 to 95 %) over "
            f"{curve.count} specifications of {curve.possible}; headline {own}"
        )
    varied = [name for name in DIMENSIONS if curve.rows[name].nunique(dropna=False) > 1]
    rows = [
        (name, str(choice), f"{len(part)}", number(part["value"].median() if part["value"].notna().any() else None))
        for name in varied
        for choice, part in curve.rows.groupby(name, dropna=False, sort=False)
    ]
    untried = [f"form {name} not tried: {reason}" for name, reason in curve.inadmissible_forms.items()]
    return Grid("Median by choice", ("choice", "taken", "specifications", curve.quantity), rows, [spread, *untried])
