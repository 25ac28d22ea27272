"""Further figures of a study: isoFLOP groups, frontier, recovered signal, use of memories and experts, learning.

recscale plot runs/study --figure usage

isoflop     metric against size, a colour per planned budget, with the minima that are granted, and N_opt against C
frontier    metric against training FLOPs, with the rows that no cheaper run beats
recovery    share of the signal a model recovered, of each kind the log has: columns recovered_* of known-truth runs
usage       share of slots in use beside what even routing would use, and the divergence from even use
experts     share of rows that open each expert, per layer and token: see `expert_activity`, run folders
resources, reach    what quality costs: see `resource_figures`
curves      progressive loss against examples: run folders
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recscale.scaling.laws.isoflop.frontier import efficient_frontier, isoflop
from recscale.scaling.records import runs
from recscale.scaling.records.number_text import amount

from . import frame
from .expert_activity import experts_figure
from .frame import GREY, CaptionLine, mark_of, sign
from .panel import axis_in_words
from .resource_figures import reach_figure, resources_figure
from .ticks import label_log_axis
from .views import varying_axes
from .wording import architecture_words, axis_words, target_words

_RECOVERED = "recovered_"
_MEASURED = "mean over runs of a size, bar: range"


def study_table(found: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Tables of several studies, by name, as one; of several each architecture carries its study's name."""
    if len(found) == 1:
        return next(iter(found.values()))
    tables = []
    for name, table in found.items():
        own = table["architecture"] if "architecture" in table.columns else pd.Series("runs", index=table.index)
        tables.append(table.assign(architecture=[f"{name}: {architecture}" for architecture in own]))
    return pd.concat(tables, ignore_index=True)


def isoflop_figure(table: pd.DataFrame, *, y: str = "logloss", style: str = "report", **_: Any) -> Figure:
    """Groups of runs with one planned budget each, and what they say about the best size.

    Raises:
        KeyError: the table has no column of planned budgets. ValueError: no group.
    """
    found = isoflop(table, target=y)
    if not found.groups:
        raise ValueError(f"no group of runs with one budget; left out: {found.excluded[:3]}")
    shades = matplotlib.colormaps["viridis"](np.linspace(0.05, 0.85, len(found.groups)))
    with frame.style(style):
        figure, (left, right) = frame.panels(2, style, None)
        handles: list[Any] = []
        for group, shade in zip(found.groups, shades, strict=True):
            left.plot(group.sizes, group.values, "o", color=shade)
            left.plot(group.sizes, group.values, color=GREY, lw=0.6, alpha=0.6)
            best = group.parabola or group.akima
            if best is not None:
                left.plot(best.size, best.value, "*", color=shade, mec="black", ms=11)
                right.plot(group.budget, best.size, "*", color=shade, mec="black", ms=11)
            handles.append(sign(f"{amount(group.budget)} FLOPs", color=shade, marker="o"))
        handles.append(sign("minimum of a parabola", marker="*", mfc="none", mec="black", ms=11))
        law = found.parabola
        if law is not None and found.quotable:
            budgets = np.array([group.budget for group in found.groups])
            right.plot(budgets, law.coefficient * budgets**law.exponent, color="black")
            handles.append(sign(f"N ∝ C^{law.exponent:.3g}", color="black", lw=1.4))
        axis_in_words(left, "dense_params")
        left.set_ylabel(target_words(y))
        axis_in_words(right, "train_flops")
        right.set_yscale("log")
        label_log_axis(right.yaxis, amount)
        right.set_ylabel("compute-optimal size")
        rejected = [
            f"{amount(g.budget)}: {reason}" for g in found.groups for reason in sorted(set(g.rejected.values()))
        ]
        texts = [f"no exponent is granted: {'; '.join(found.reasons)}"] if not found.quotable else []
        texts += [f"budgets without a minimum: {'; '.join(rejected)}"] if rejected else []
        frame.lay_out(figure, f"{y} at equal training FLOPs", handles, [(None, text) for text in texts])
    return figure


def frontier_figure(table: pd.DataFrame, *, y: str = "logloss", style: str = "report", **_: Any) -> Figure:
    """Every finished run, and of each architecture those that no cheaper run beats."""
    with frame.style(style):
        figure, (ax,) = frame.panels(1, style, None)
        caption: list[CaptionLine] = []
        for number, (name, group) in enumerate(_groups(table)):
            colour, marker = mark_of(number)
            found = efficient_frontier(group, target=y).rows
            finished = group[np.isfinite(group[y].astype(float))]
            ax.plot(finished["train_flops"], finished[y], ".", color=colour, alpha=0.35)
            ax.plot(found["train_flops"], found[y], marker + "-", color=colour, lw=0.9)
            caption.append(((colour, marker), f"{architecture_words(name)}: {len(found)} of {len(finished)} runs"))
        axis_in_words(ax, "train_flops")
        ax.set_ylabel(target_words(y))
        caption.append((None, "lines join measured runs: lower convex hull in ln FLOPs, no law"))
        frame.lay_out(figure, f"{y} against training FLOPs: efficient frontier", [], caption)
    return figure


def recovery_figure(table: pd.DataFrame, *, x: str | None = None, style: str = "report", **_: Any) -> Figure:
    """Share of each kind of signal that was recovered, against an axis.

    Raises:
        ValueError: no run has such a column.
    """
    columns = [c for c in table.columns if c.startswith(_RECOVERED) and table[c].notna().any()]
    if not columns:
        raise ValueError(f"no column {_RECOVERED}*: only runs on the known-truth log measure what they recover")
    words = {column: f"share of {column.removeprefix(_RECOVERED)} recovered" for column in columns}
    return _measured(table, x, words, "signal recovered", style)


def usage_figure(table: pd.DataFrame, *, x: str | None = None, style: str = "report", **_: Any) -> Figure:
    """Slots in use and how unevenly, each beside what even routing would show.

    Raises:
        ValueError: no run has a memory.
    """
    words = {"memory_usage": "share of slots in use", "memory_kl": "divergence from even use (nats)"}
    if not set(words) <= set(table.columns):
        raise ValueError("no columns memory_usage and memory_kl: no run of this table has a memory")
    return _measured(table, x, words, "use of the memory", style)


def _measured(table: pd.DataFrame, x: str | None, words: Mapping[str, str], title: str, style: str) -> Figure:
    """A panel per column, every architecture with its means; `<column>_null` where the table has it as open markers."""
    axis = x or next(iter(varying_axes(table)), "dense_params")
    with frame.style(style):
        figure, axes = frame.panels(len(words), style, None)
        groups, null = _groups(table), False
        for ax, (column, text) in zip(axes, words.items(), strict=True):
            for number, (_, group) in enumerate(groups):
                _means(ax, group, axis, column, number, "full")
                if f"{column}_null" in group.columns and group[f"{column}_null"].notna().any():
                    _means(ax, group, axis, f"{column}_null", number, "none")
                    null = True
            axis_in_words(ax, axis)
            ax.set_ylabel(text)
        handles = [sign(architecture_words(name), color=mark_of(k)[0], marker=mark_of(k)[1])
                   for k, (name, _) in enumerate(groups)]  # fmt: skip
        handles.append(sign(_MEASURED, marker="o"))
        handles += [sign("what even routing would show", marker="o", mfc="none")] if null else []
        frame.lay_out(figure, f"{title} against {axis_words(axis)}", handles, [])
    return figure


def _means(ax: Axes, group: pd.DataFrame, axis: str, column: str, number: int, fill: Any) -> None:
    colour, marker = mark_of(number)
    cells = group.dropna(subset=[axis, column]).groupby(axis)[column].agg(["mean", "min", "max"])
    bars = np.maximum([cells["mean"] - cells["min"], cells["max"] - cells["mean"]], 0.0)
    ax.errorbar(cells.index, cells["mean"], bars, fmt=marker, color=colour, fillstyle=fill, capsize=2, elinewidth=0.8)


def curves_figure(folders: Sequence[Path], *, style: str = "report", **_: Any) -> Figure:
    """Loss of every logging interval, scored before it was trained on, against examples; a line per run."""
    with frame.style(style):
        figure, (ax,) = frame.panels(1, style, None)
        names: list[str] = []
        drawn = 0
        for folder, record in runs.records_in(folders):
            rows = [row for row in runs.read_metrics(folder) if row.get("logloss") is not None]
            name = record["config"]["architecture"]
            names += [] if name in names else [name]
            colour = mark_of(names.index(name))[0]
            ax.plot(
                [row["examples"] for row in rows], [row["logloss"] for row in rows], color=colour, lw=0.8, alpha=0.6
            )
            drawn += bool(rows)
        if not drawn:
            raise ValueError(f"no run with metrics in {', '.join(map(str, folders))}")
        axis_in_words(ax, "examples")
        ax.set_ylabel("progressive " + target_words("logloss"))
        handles = [sign(architecture_words(name), color=mark_of(k)[0], lw=1.4) for k, name in enumerate(names)]
        text = f"{drawn} runs; each point is the mean of one logging interval, on rows before they were trained on"
        frame.lay_out(figure, "learning curves", handles, [(None, text)])
    return figure


def _groups(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Finished runs by architecture."""
    done = table[table["status"] == "done"] if "status" in table.columns else table
    if "architecture" not in done.columns:
        return [("runs", done)]
    return [(str(name), group) for name, group in done.groupby("architecture", sort=True)]


# Figures of run tables, and of run folders.
OF_TABLES: dict[str, Callable[..., Figure]] = {
    "isoflop": isoflop_figure,
    "frontier": frontier_figure,
    "recovery": recovery_figure,
    "usage": usage_figure,
    "resources": resources_figure,
    "reach": reach_figure,
}
OF_FOLDERS: dict[str, Callable[..., Figure]] = {"experts": experts_figure, "curves": curves_figure}
