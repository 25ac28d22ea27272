"""From a run table to arrays: which rows enter a fit, which do not and why, what makes a table unusable.

Nothing is dropped silently. Rows whose status says they did not finish are excluded by name. Values that are
wrong (missing, not a number, zero or negative where a logarithm is taken, copies of another row) refuse the
whole fit unless the caller asks for them to be excluded: a fit over the rest of a broken table is a choice,
not a default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd

from recscale.pallas_kernels import names
from recscale.scaling.laws.forms.form import Form
from recscale.scaling.laws.forms.metric_maps import auc_to_t
from recscale.scaling.laws.judgement.gates import Gate, rule
from recscale.scaling.records.number_text import amount

from .columns import numbers
from .conditions import rows_where
from .read import notes

RUN_NAMES = ("run_id", "run", "run_name", "name")
_MEND = "mend the table, or pass invalid='exclude' to leave those rows out"


@dataclass(frozen=True)
class Exclusion:
    """One row left out: its position in the table given, its run and the reason."""

    row: int
    run_id: str
    reason: str


@dataclass(frozen=True)
class Rows:
    """The rows of one fit.

    axes: slot -> raw values [n]; columns: slot -> column name.
    y[n]: the metric on the scale that is fitted (t for AUC forms); second[n]: t, for forms of two streams.
    weights[n]: precision weights with mean 1; codes[n]: cluster index.
    problems: gates that refuse the table as it is.
    """

    axes: dict[str, np.ndarray]
    columns: dict[str, str]
    y: np.ndarray
    target: str
    weights: np.ndarray
    codes: np.ndarray
    cluster: str
    cluster_labels: tuple[str, ...]
    run_ids: tuple[str, ...]
    frame: pd.DataFrame = field(repr=False)
    exclusions: tuple[Exclusion, ...] = ()
    problems: tuple[Gate, ...] = ()
    warnings: tuple[str, ...] = ()
    second: np.ndarray | None = field(default=None, repr=False)

    @property
    def stacked(self) -> np.ndarray:
        """Raw axes [n, d] in slot order."""
        return np.stack(list(self.axes.values()), axis=1)

    @property
    def described(self) -> str:
        """Which rows these are; two fits of one table may differ in them."""
        told = [f"{len(self.y)} rows"]
        if not len(self.y):
            return told[0]
        for slot, column in self.columns.items():
            values = self.axes[slot]
            told.append(
                f"{len(np.unique(values))} values of {column} from {amount(values.min())} to {amount(values.max())}"
            )
        keys = [c for c in dict.fromkeys(("shape_id", *self.columns.values())) if c in self.frame]
        if "architecture" in self.frame and (kinds := self.frame["architecture"].nunique()) > 1:
            told.append(f"{kinds} architectures as one")
        if "lr_dense" in self.frame and "lr_dense" not in keys:
            rates = int(self.frame.groupby(keys, dropna=False)["lr_dense"].nunique().max())
            told += [f"up to {rates} learning rates a size, good and bad alike"] if rates > 1 else []
        return ", ".join(told)


def require(table: pd.DataFrame, column: str, purpose: str) -> None:
    """Raise ValueError naming the nearest column if the table lacks this one."""
    if column not in table.columns:
        raise ValueError(f"no column {column!r} for {purpose}{names.nearest(column, map(str, table.columns))}")


def prepare(
    table: pd.DataFrame,
    form: Form,
    columns: Mapping[str, str],
    target: str,
    *,
    cluster: str | None = None,
    weights: str | None = None,
    where: str | None = None,
    invalid: Literal["refuse", "exclude"] = "refuse",
    positive: bool = True,
    auc: str | None = None,
) -> Rows:
    """Validate a table for one form. See `fit` for the arguments.

    positive: whether the metric must be above 0. auc: AUC column of forms that also fit t (the second
    stream).

    Raises ValueError for an unknown column, form axis or `invalid` policy. Everything else becomes exclusions
    and problems.
    """
    if invalid not in ("refuse", "exclude"):
        raise ValueError(f"invalid must be 'refuse' or 'exclude', found {invalid!r}")
    if not isinstance(table, pd.DataFrame):
        raise TypeError(
            f"table must be a pandas DataFrame, found {type(table).__name__}; a file is read by laws.tables.read"
        )
    if "stage" in columns.values() and "stage" not in table and "decayed" in table:
        table = table.assign(stage=np.where(table["decayed"].eq(True), 1.0, 2.0))  # see forms.trunk
    for slot, column in columns.items():
        require(table, column, f"axis {slot} of form {form.id}")
    named = ((target, "the target"), (auc, "the AUC stream"), (cluster, "cluster"), (weights, "weights"))
    for column, purpose in named:
        if column is not None:
            require(table, column, purpose)
    table = table.reset_index(drop=True)
    runs = _run_ids(table)
    reasons: dict[int, str] = {}
    _exclude_by_status(table, reasons)
    _exclude_by_query(table, where, reasons)

    metrics = {target: "auc" if form.target == "auc" else "positive" if positive else "any"}
    metrics |= {auc: "auc"} if auc is not None else {}
    numeric = {c: numbers(c, table[c]) for c in {*columns.values(), *metrics}}
    wrong = _wrong_values(table, numeric, form, columns, metrics, reasons)
    copies = _copies(table, {**reasons, **wrong})
    problems = []
    if invalid == "refuse":
        named = (("values", wrong), ("duplicates", copies))
        problems = [_problem(name, found, runs) for name, found in named if found]
    reasons |= wrong | copies

    keep = np.array([i for i in range(len(table)) if i not in reasons], int)
    kept = table.iloc[keep].reset_index(drop=True)
    y = numeric[target][keep]
    if form.target == "auc":
        y = auc_to_t(y) if len(y) else y
    labels, codes, name, warnings = _clusters(kept, cluster)
    exclusions = tuple(Exclusion(i, runs[i], reasons[i]) for i in sorted(reasons))
    if not len(keep):
        reason = f"no row of {len(table)} is left: {_tally(reasons)}"
        problems.append(rule("empty", 0, ">= 1 row", reason, _MEND))
    return Rows(
        {slot: numeric[column][keep] for slot, column in columns.items()},
        dict(columns),
        y,
        target,
        _weights(kept, weights),
        codes,
        name,
        labels,
        tuple(runs[i] for i in keep),
        kept,
        exclusions,
        tuple(problems),
        (*notes(table), *warnings),
        auc_to_t(numeric[auc][keep]) if auc is not None and len(keep) else None,
    )


def _run_ids(table: pd.DataFrame) -> list[str]:
    """A name per row: the run column if there is one, else the row's position."""
    for column in RUN_NAMES:
        if column in table.columns:
            return [str(value) for value in table[column]]
    return [f"row {i}" for i in range(len(table))]


def _exclude_by_status(table: pd.DataFrame, reasons: dict[int, str]) -> None:
    """Runs that are not done stay in the table but never enter a fit."""
    if "status" in table.columns:
        for i, status in enumerate(table["status"]):
            if status != "done":
                reasons[i] = f"status {status}"


def _exclude_by_query(table: pd.DataFrame, where: str | None, reasons: dict[int, str]) -> None:
    """Rows the caller's condition leaves out."""
    if where is None:
        return
    inside = rows_where(table, where)
    for i in range(len(table)):
        if not inside[i] and i not in reasons:
            reasons[i] = f"not where {where}"


def _wrong_values(table, numeric, form, columns, metrics, done) -> dict[int, str]:
    """Row -> reason for values no fit may use; metrics: column -> "positive", "any" or "auc"."""
    wrong: dict[int, str] = {}
    checks = [(column, slot, next(s for s in form.slots if s.name == slot)) for slot, column in columns.items()]
    for i in range(len(table)):
        if i in done:
            continue
        found = []
        for column, slot, description in checks:
            value = numeric[column][i]
            if not np.isfinite(value):
                found.append(f"axis {slot}: {column} is {table[column].iloc[[i]].tolist()[0]!r}")
            elif description.transform == "log" and value <= 0:
                found.append(f"axis {slot}: {column} is {value:g}, not positive")
            elif description.transform == "linear" and value < 1:
                found.append(f"axis {slot}: {column} is {value:g}, below 1")
        for column, kind in metrics.items():
            value = numeric[column][i]
            if not np.isfinite(value):
                found.append(f"{column} is {table[column].iloc[[i]].tolist()[0]!r}")
            elif kind == "auc" and not 0.5 <= value < 1:
                found.append(f"{column} is {value:g}, outside [.5, 1)")
            elif kind == "positive" and value <= 0:
                found.append(f"{column} is {value:g}, not positive")
        if found:
            wrong[i] = "; ".join(found)
    return wrong


def _copies(table: pd.DataFrame, done: Mapping[int, str]) -> dict[int, str]:
    """Row -> reason for rows equal to an earlier one in every column."""
    left = table.loc[[i for i in range(len(table)) if i not in done]]
    plain = left.apply(lambda column: column.map(repr) if column.dtype == object else column)
    if not plain.duplicated().any():
        return {}
    groups = plain.groupby(list(plain.columns), dropna=False, sort=False).ngroup()
    first: dict[int, int] = {}
    copies = {}
    for i, group in zip(groups.index.tolist(), groups.tolist(), strict=True):
        if group in first:
            copies[i] = f"copy of row {first[group]} in every column"
        else:
            first[group] = i
    return copies


def _problem(name: str, found: Mapping[int, str], runs: list[str]) -> Gate:
    """A refusal of the whole table, naming the first few of the rows that are wrong."""
    shown = "; ".join(f"{runs[i]}: {reason}" for i, reason in list(found.items())[:3])
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return rule(name, len(found), "0 rows", f"{len(found)} rows are unusable ({shown}{more})", _MEND)


def _tally(reasons: Mapping[int, str]) -> str:
    """Reasons with counts, most frequent first."""
    counts = pd.Series(list(reasons.values())).value_counts()
    return ", ".join(f"{reason} ({count})" for reason, count in counts.head(4).items()) or "the table is empty"


def _clusters(kept: pd.DataFrame, cluster: str | None) -> tuple[tuple[str, ...], np.ndarray, str, tuple[str, ...]]:
    """(labels, code per row, column used, warnings): the named column, else shape_id, else one cluster per
    row.
    """
    column = cluster or ("shape_id" if "shape_id" in kept.columns else None)
    if column is None:
        repeated = [c for c in RUN_NAMES if c in kept.columns and kept[c].duplicated().any()]
        hint = f"; {repeated[0]} repeats, so pass cluster={repeated[0]!r}" if repeated else ""
        warning = (
            "no shape_id column: every row is its own cluster, which understates uncertainty if runs "
            f"share a shape{hint}"
        )
        return tuple(str(i) for i in range(len(kept))), np.arange(len(kept)), "row", (warning,)
    values = kept[column].astype(object)
    missing = values.isna()
    named = [
        f"{column} missing, row {i}" if gone else str(v)
        for i, (v, gone) in enumerate(zip(values, missing, strict=True))
    ]
    codes, labels = pd.factorize(pd.Series(named, dtype=object))
    warnings = (f"{int(missing.sum())} rows have no {column}: each is its own cluster",) if missing.any() else ()
    return tuple(str(label) for label in labels), np.asarray(codes, int), column, warnings


def _weights(kept: pd.DataFrame, column: str | None) -> np.ndarray:
    """Precision weights scaled to mean 1; a column ending in _se holds standard errors."""
    if column is None:
        return np.ones(len(kept))
    values = numbers(column, kept[column])
    if len(values) and not np.all(np.isfinite(values) & (values > 0)):
        raise ValueError(f"weights column {column!r} must be positive in every fitted row")
    values = 1.0 / values**2 if column.endswith("_se") else values
    return values / values.mean() if len(values) else values
