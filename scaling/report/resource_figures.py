"""What quality costs: a metric against every resource that runs used, and the resource that a fixed loss takes.

recscale plot runs/study --figure resources
recscale plot runs/study --figure reach --at 0.43 --axes device_hours

resources   metric against resource, with the Pareto set of every architecture: what no cheaper cell beats
reach       the least of a resource with which a measured cell reaches a loss, against the loss

A cell is one setting of everything but the seed, and stands at its means. Nothing is interpolated. What a run did not
measure is absent, and the caption says of how many runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from recscale.scaling.data.metrics import describe
from recscale.scaling.records.number_text import amount

from . import frame
from .frame import CaptionLine, mark_of, sign
from .panel import axis_in_words
from .ticks import label_log_axis
from .wording import architecture_words, axis_words, target_words

# Columns of run tables, the first that runs have are drawn unless one is named.
RESOURCES = (
    "train_flops", "device_hours", "energy_kwh", "cost_usd", "communication_bytes", "peak_device_bytes",
    "activation_bytes", "peak_host_bytes",
)  # fmt: skip
_PANELS = 4

# What tells cells of an architecture apart, where a table has it.
_CELL = ("arm", "shape_id", "dense_params", "examples", "history_length", "memory_slots", "lr_dense", "lr_embedding")


def resources_figure(
    table: pd.DataFrame, *, x: str | None = None, y: str = "logloss", style: str = "report", **_: Any
) -> Figure:
    """A panel per resource: all cells, and a line through the Pareto set of every architecture.

    Args:
        x: one resource, None for all that were measured. y: metric column.

    Raises:
        ValueError: no run has a figure of such a resource, or neither way of the metric is better.
    """
    cells, columns, notes = _prepared(table, x, y)
    with frame.style(style):
        figure, axes = frame.panels(len(columns), style, None)
        caption: list[CaptionLine] = []
        for number, (name, group) in enumerate(cells.groupby("architecture", sort=True)):
            colour, marker = mark_of(number)
            counts = []
            for ax, column in zip(axes, columns, strict=True):
                known = group.dropna(subset=[column])
                best = pareto_set(known, column, y)
                ax.plot(known[column], known[y], marker, color=colour, alpha=0.35)
                ax.plot(best[column], best[y], marker + "-", color=colour, lw=0.9, drawstyle="steps-post")
                counts.append(f"{len(best)} of {axis_words(column)}")
            text = f"{architecture_words(str(name))}: {len(group)} cells; in the Pareto set {', '.join(counts)}"
            caption.append(((colour, marker), text))
        for ax, column in zip(axes, columns, strict=True):
            axis_in_words(ax, column)
            ax.set_ylabel(target_words(y))
        caption.append((None, "lines join the cells that no cheaper one beats; means over seeds, no law"))
        caption += [(None, note) for note in notes]
        frame.lay_out(figure, f"{y} against what it took", [sign("a cell", marker="o")], caption)
    return figure


def reach_figure(
    table: pd.DataFrame,
    *,
    x: str | None = None,
    y: str = "logloss",
    at: float | None = None,
    style: str = "report",
    **_: Any,
) -> Figure:
    """A panel per resource: the least of it with which a measured cell of every architecture is as good as a value.

    Args:
        x, y: see `resources_figure`. at: the value that the caption quotes; None is the best that all reach.

    Raises:
        ValueError: as `resources_figure`.
    """
    cells, columns, notes = _prepared(table, x, y)
    best = cells.groupby("architecture")[y].agg("min" if _lower_is_better(y) else "max")
    level = float(best.max() if _lower_is_better(y) else best.min()) if at is None else at
    with frame.style(style):
        figure, axes = frame.panels(len(columns), style, None)
        caption: list[CaptionLine] = []
        for number, (name, group) in enumerate(cells.groupby("architecture", sort=True)):
            colour, marker = mark_of(number)
            taken = []
            for ax, column in zip(axes, columns, strict=True):
                found = pareto_set(group.dropna(subset=[column]), column, y)
                # Every value down to that of a cell takes that cell: the step lies at its end.
                ax.plot(found[y], found[column], marker + "-", color=colour, lw=0.9, drawstyle="steps-pre")
                least = least_to_reach(found, column, y, level)
                taken.append(f"{axis_words(column)} {'not reached' if least is None else amount(least)}")
            caption.append(((colour, marker), f"{architecture_words(str(name))}: {', '.join(taken)}"))
        for ax, column in zip(axes, columns, strict=True):
            ax.axvline(level, color=frame.GREY, lw=0.8, linestyle=":")
            ax.set(xlabel=target_words(y), ylabel=axis_words(column), yscale="log")
            label_log_axis(ax.yaxis, amount)
            if _lower_is_better(y):
                ax.invert_xaxis()
        caption += [(None, note) for note in ("least of measured cells, means over seeds, no law", *notes)]
        handles = [sign(f"{y} {level:.5g}, quoted below", color=frame.GREY, lw=0.8, linestyle=":")]
        frame.lay_out(figure, f"what it took to reach a {y}", handles, caption)
    return figure


def pareto_set(cells: pd.DataFrame, column: str, y: str) -> pd.DataFrame:
    """The cells, cheapest first, that are better than all that take as little of a resource or less."""
    ordered = cells.assign(_worse=cells[y] if _lower_is_better(y) else -cells[y]).sort_values(
        [column, "_worse"], kind="stable"
    )
    values = ordered.pop("_worse").to_numpy(float)
    before = np.minimum.accumulate(np.concatenate([[np.inf], values[:-1]])) if len(values) else values
    return ordered[values < before]


def least_to_reach(cells: pd.DataFrame, column: str, y: str, level: float) -> float | None:
    """The least of a resource among cells that are as good as a value of the metric; None where none is."""
    reached = cells[y] <= level if _lower_is_better(y) else cells[y] >= level
    return float(cells.loc[reached, column].min()) if reached.any() else None


def _prepared(table: pd.DataFrame, x: str | None, y: str) -> tuple[pd.DataFrame, Sequence[str], list[str]]:
    """Cells of finished runs with their means, the resources to draw, and what the caption says is missing."""
    done = table[table["status"] == "done"] if "status" in table.columns else table
    done = done[np.isfinite(done[y].astype(float))]
    done = done if "architecture" in done.columns else done.assign(architecture="runs")
    asked = RESOURCES if x is None else (x,)
    found = {column: done[column].astype(float).where(done[column].astype(float) > 0) for column in asked
             if column in done.columns}  # fmt: skip
    columns = [column for column, values in found.items() if values.notna().any()]
    if not columns:
        raise ValueError(f"no finished run has a figure of {', '.join(asked)}: these are absent, not zero")
    lacking = {column: len(done) - int(found[column].notna().sum()) if column in found else len(done)
               for column in asked}  # fmt: skip
    absent = [f"{axis_words(column)} in {count} of {len(done)} runs" for column, count in lacking.items() if count]
    notes = [f"absent, never 0: {', '.join(absent)}"] if absent else []
    if len(columns) > _PANELS:
        notes.append(f"measured as well, drawn by --axes: {', '.join(columns[_PANELS:])}")
        columns = columns[:_PANELS]
    keys = ["architecture", *(column for column in _CELL if column in done.columns)]
    done = done.assign(**{column: found[column] for column in columns})
    return done.groupby(keys, dropna=False, as_index=False)[[*columns, y]].mean(), columns, notes


def _lower_is_better(y: str) -> bool:
    better = describe(y).lower_is_better
    if better is None:
        raise ValueError(f"neither a low nor a high {y} is better, so no run beats another: choose another --target")
    return better
