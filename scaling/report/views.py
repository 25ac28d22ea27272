"""Views of a run table: one axis, one metric, every architecture with its fitted law and its held-out largest size.

A view decides, row by row, what enters a fit, and writes the decision into a column `role`:

    fitted        enters the fit
    held out      the largest value of the axis: never fitted, predicted instead
    other ...     the table varies something else as well, and this row is off the slice (or has another rate)
    diverged, failed, running, planned    the run's status

Nothing is dropped: every row of an architecture is in its series with one of these roles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from recscale.scaling import laws
from recscale.scaling.laws.forms.registry import ONE_AXIS
from recscale.scaling.laws.isoflop import frontier
from recscale.scaling.laws.judgement.rolling import MIN_TEST, MIN_TRAIN, rolling_origin
from recscale.scaling.laws.tables import validate as tables
from recscale.scaling.laws.tables.axes import usual_cluster, usual_target
from recscale.scaling.records.number_text import amount

from .series import FITTED, HELD_OUT, Series, View
from .wording import axis_words

AXES = ("dense_params", "examples", "history_length", "memory_slots", "train_flops")
# Axes a sweep sets by itself; training FLOPs follow from them.
_INDEPENDENT = ("dense_params", "examples", "history_length", "memory_slots")

# Facts of every run this package trains, for the fit records; `group_id` is a column of no other table.
_OWN_RUNS = "group_id"
_FACTS = {
    "size_counts": "every trained parameter outside embedding tables and memories",
    "data_counts": "rows consumed in training, or those of one pass where validation ends the passes; epochs beside it",
    "flop_convention": "2 per multiply-add of the matrix products, forward and backward, nothing recomputed",
    "shape_choice": "nearest hardware-friendly shape to a target, or as the sweep file says",
    "smoothing": "none: metrics of one fixed holdout after the last step",
    "checkpoints_used": "the last of each run",
}


def make_views(
    table: pd.DataFrame,
    *,
    form: str = ONE_AXIS,
    axes: Sequence[str] | None = None,
    target: str | None = None,
    hold_out_largest: bool = True,
    **options: Any,
) -> list[View]:
    """One view per axis, the most important first.

    Args:
        table: run table. form: a law of one axis. target: metric column, the usual one by default.
        axes: columns; None takes those of `AXES` that vary over the finished runs.
        hold_out_largest: leave the largest value of each axis out of the fit.
        options: passed to `laws.fit` (bootstrap, seed, cluster, weights, ...).

    Raises:
        ValueError: a column or form does not exist, the form has several axes, or nothing varies.
    """
    target = target or usual_target(table)
    tables.require(table, target, "the target")
    chosen = list(axes) if axes is not None else varying_axes(table)
    if not chosen:
        raise ValueError(f"none of {', '.join(AXES)} varies over the finished runs: there is no axis to fit or plot")
    shape = laws.forms.get(form)
    if len(shape.slots) != 1:
        raise ValueError(
            f"form {shape.id} has {len(shape.slots)} axes; a view takes a law of one axis (power_offset, ...)"
        )
    return [_view(table, shape.id, column, target, hold_out_largest, options) for column in chosen]


def with_rows_of_a_pass(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the rows of one pass as `examples` of runs whose passes validation ended: how many those were is a
    finding of each run and no axis of the sweep; `epochs` says it."""
    if not {"protocol", "examples", "unique_examples"} <= set(table.columns):
        return table
    counts = table["examples"].where(table["protocol"] != "passes", table["unique_examples"])
    return table.assign(examples=counts)


def scored(view: View, **options: Any) -> View:
    """The view with rolling-origin scores of its form and of the law without a floor, where there are runs enough."""
    return replace(view, series=tuple(_scored(series, options) for series in view.series))


def _scored(series: Series, options: Mapping[str, Any]) -> Series:
    rows = series.rows(FITTED, HELD_OUT)
    if series.fit.refused or len(rows) < MIN_TRAIN + MIN_TEST:
        return series
    slot = series.fit.form.slots[0].name
    candidates = list(dict.fromkeys([series.fit.form.id, "power"]))
    cluster = usual_cluster(series.frame, [series.axis])
    found = rolling_origin(
        rows, candidates, {slot: series.axis}, series.target, axis=series.axis, cluster=cluster, **options
    )
    return replace(series, rolling=found)


def varying_axes(table: pd.DataFrame) -> list[str]:
    """Columns of `AXES` with several values over the finished runs of some architecture."""
    done = table[_status(table) == "done"]
    groups = [group for _, group in done.groupby(_architectures(done))]
    return [a for a in AXES if a in table.columns and any(group[a].dropna().nunique() > 1 for group in groups)]


def _view(table: pd.DataFrame, form: str, axis: str, target: str, hold_out: bool, options: Mapping[str, Any]) -> View:
    tables.require(table, axis, "an axis")
    notes: list[str] = []
    series = []
    for name, group in table.groupby(_architectures(table), sort=True):
        frame, where = _with_roles(group.reset_index(drop=True), axis, target, hold_out, notes)
        series.append(fitted_series(str(name), frame, where, form, axis, target, options))
    return View(axis, target, form, tuple(series), tuple(dict.fromkeys(notes)))


def fitted_series(
    name: str, frame: pd.DataFrame, where: str, form: str, axis: str, target: str, options: Mapping[str, Any]
) -> Series:
    """One architecture's law along an axis, of the rows whose role is fitted; where: what the slice holds fixed."""
    slot = laws.forms.get(form).slots[0].name
    fit = laws.fit(frame, form, {slot: axis}, target, where=f"role == '{FITTED}'", **with_facts(frame, options))
    return Series(name, frame, fit, axis, target, where)


def with_facts(frame: pd.DataFrame, options: Mapping[str, Any]) -> dict[str, Any]:
    """Fit options with what is known about runs of this package; notes the caller gives win."""
    known = _FACTS if _OWN_RUNS in frame.columns else {}
    notes = {**known, **options.get("notes", {})}
    return {**options, "notes": notes} if notes else dict(options)


def _with_roles(
    frame: pd.DataFrame, axis: str, target: str, hold_out: bool, notes: list[str]
) -> tuple[pd.DataFrame, str]:
    """The rows of one architecture with their role, and what the slice holds fixed."""
    role = _status(frame).to_numpy(object, copy=True)
    role[role == "done"] = FITTED
    name = str(_architectures(frame).iloc[0])
    _one_rate(frame, target, role, name, notes)
    where = []
    if axis == "train_flops" and _several_independent(frame[role == FITTED]):
        _keep_frontier(frame, target, role, hold_out)
        notes.append("training FLOPs: rows on the efficient frontier (lower hull of the seed means) are fitted")
        where.append("efficient frontier")
    else:
        for column in _INDEPENDENT:
            if column != axis and column in frame.columns:
                where += _slice(frame, axis, column, role)
        if hold_out:
            _hold_out(frame, axis, role)
    return frame.assign(role=role), ", ".join(where)


def _one_rate(frame: pd.DataFrame, target: str, role: np.ndarray, name: str, notes: list[str]) -> None:
    """Where a shape was trained at several learning rates, keep the rate with the lowest mean over seeds."""
    if "lr_dense" not in frame.columns:
        return
    keys = [c for c in ("shape_id", "dense_params", "examples", "history_length") if c in frame.columns]
    tried = 0
    for _, group in frame[role == FITTED].groupby(keys, dropna=False):
        means = group.groupby("lr_dense")[target].mean()
        if len(means) > 1:
            tried = max(tried, len(means))
            role[group.index[group["lr_dense"] != means.idxmin()]] = "other rate"
    if tried:
        notes.append(
            f"{name}: up to {tried} learning rates per size; the rate with the lowest mean over seeds is kept, "
            "which reads about one seed deviation too low"
        )


def _several_independent(frame: pd.DataFrame) -> bool:
    """Whether two settings vary freely, so that equal FLOPs are spent in different ways."""
    free = [c for c in _INDEPENDENT if c in frame.columns and frame[c].nunique() > 1]
    return any(_crossed(frame, a, b) and _crossed(frame, b, a) for i, a in enumerate(free) for b in free[i + 1 :])


def _crossed(frame: pd.DataFrame, axis: str, other: str) -> bool:
    """Whether one value of the axis occurs with several values of another column."""
    return bool((frame.groupby(axis)[other].nunique() > 1).any())


def _slice(frame: pd.DataFrame, axis: str, column: str, role: np.ndarray) -> list[str]:
    """Keeps one value of another axis, the one with the most sizes (the largest of those), where both vary freely."""
    fitted = frame[role == FITTED]
    values = fitted[column].dropna()
    if values.nunique() < 2:
        return [f"{amount(float(values.iloc[0]))} {axis_words(column)}"] if len(values) and column == "examples" else []
    if not _crossed(fitted, axis, column):
        return [] if axis == "train_flops" else [f"{axis_words(column)} vary with it"]
    counts = fitted.groupby(column)[axis].nunique()
    kept = float(max(counts[counts == counts.max()].index))
    role[(role == FITTED) & (frame[column].to_numpy(float) != kept)] = f"other {column}"
    return [f"{amount(kept)} {axis_words(column)}"]


def _hold_out(frame: pd.DataFrame, axis: str, role: np.ndarray) -> None:
    x = frame[axis].to_numpy(float)
    fitted = role == FITTED
    if len(np.unique(x[fitted])) >= 2:
        role[fitted & (x == x[fitted].max())] = HELD_OUT


def _keep_frontier(frame: pd.DataFrame, target: str, role: np.ndarray, hold_out: bool) -> None:
    """Fits the cells on the lower hull of (ln FLOPs, mean over seeds); the most expensive one of them is held out."""
    keys = ["dense_params", "train_flops"]
    cells = [tuple(cell) for cell in frame[keys].to_numpy(float)]
    means = frame[role == FITTED].groupby(keys, as_index=False)[target].mean()
    hull = _hull(means, keys, target)
    held = hull[-1] if hold_out and len(hull) > 1 else None
    if held is not None:
        # The hull of what is left may pass through other cells.
        hull = _hull(means[means["train_flops"] < held[1]], keys, target)
    for i, cell in enumerate(cells):
        if role[i] == FITTED and cell not in hull:
            role[i] = HELD_OUT if cell == held else "off the frontier"


def _hull(means: pd.DataFrame, keys: list[str], target: str) -> list[tuple[float, ...]]:
    return [tuple(cell) for cell in frontier.efficient_frontier(means, target=target).rows[keys].to_numpy(float)]


def joint_series(
    table: pd.DataFrame, form: str, columns: Mapping[str, str], target: str, hold_out: bool, **options
) -> list[Series]:
    """A law of several axes per architecture, on every row, the largest value of the first axis held out."""
    first = next(iter(columns.values()))
    found = []
    for name, group in table.groupby(_architectures(table), sort=True):
        frame = group.reset_index(drop=True)
        role = _status(frame).to_numpy(object, copy=True)
        role[role == "done"] = FITTED
        _one_rate(frame, target, role, str(name), [])
        if hold_out:
            _hold_out(frame, first, role)
        frame = frame.assign(role=role)
        fit = laws.fit(frame, form, dict(columns), target, where=f"role == '{FITTED}'", **with_facts(frame, options))
        found.append(Series(str(name), frame, fit, first, target))
    return found


def both_vary(table: pd.DataFrame) -> bool:
    """Whether sizes and examples vary freely, so that a joint law can be asked for."""
    done = table[_status(table) == "done"]
    if not {"dense_params", "examples"} <= set(table.columns):
        return False
    return any(
        _crossed(group, "dense_params", "examples") and _crossed(group, "examples", "dense_params")
        for _, group in done.groupby(_architectures(done))
    )


def _status(table: pd.DataFrame) -> pd.Series:
    """Status per row; a table without the column holds finished runs."""
    if "status" in table.columns:
        return table["status"].astype(object)
    return pd.Series("done", index=table.index, dtype=object)


def _architectures(table: pd.DataFrame) -> pd.Series:
    if "architecture" in table.columns:
        return table["architecture"].astype(object).fillna("unnamed")
    return pd.Series("runs", index=table.index, dtype=object)
