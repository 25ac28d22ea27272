"""What the interactive page draws, as plain data: runs with what hovering says of them, curves that are granted, and
learning curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recscale.scaling.records import runs
from recscale.scaling.records.planned import PLAN

from .captions import series_text
from .contents import Report
from .redo import redo_command
from .series import FITTED, HELD_OUT, Series, predict
from .views import AXES
from .wording import architecture_words, axis_words, gate_words

_POINTS, _INTERVALS = 60, 80  # of a fitted curve, of a learning curve
_DIGITS = 6


def study_data(report: Report, name: str) -> dict[str, Any]:
    """One study: its axes with the laws along them, its runs, and how they learned."""
    records = {folder.name: runs.read_record(folder) for folder in sorted((report.out / "runs").glob("*"))}
    return {
        "name": name,
        "target": report.first.target,
        "axes": {
            view.axis: {
                "words": axis_words(view.axis),
                "floor": report.truth.floor(view.axis),
                "laws": {series.architecture: _law(series) for series in view.series},
            }
            for view in report.views
        },
        "runs": _runs(report, {name: record for name, record in records.items() if record is not None}),
        "learning": [_learning(report.out / "runs" / name) for name in records],
    }


def answer(series: Series, known: Series | None = None) -> str:
    """One sentence for somebody who has not read the rest: what halving the excess takes, or why there is no law, and
    how far the metric came.

    known: the fit with the log's exact floor, which comes first where there is one.
    """
    name, words = architecture_words(series.architecture), axis_words(series.axis)
    cells = series.cells(FITTED, HELD_OUT)
    if len(cells) < 2:
        return f"{name}: no law, fewer than two sizes finished."
    first, last = cells.iloc[0], cells.iloc[-1]
    span = f"{_short(last.x / first.x)}x the {words} took the {series.target}"
    came = f"{span} from {first['mean']:.4f} to {last['mean']:.4f}"
    for law, floor in ((known, "known"), (series, "fitted")):
        exponent = None if law is None else law.exponent()
        if exponent is not None and exponent.value is not None and exponent.value > 0:
            times = _times(exponent.value, exponent.interval)
            return f"{name}: halving the excess takes {times} the {words} (floor {floor}). In these runs {came}."
    return f"{name}: no law. {came}, but {gate_words(gate.id for gate in series.fit.refusals)}."


def _times(exponent: float, interval: tuple[float, float] | None) -> str:
    """`7.4x [6.1, 9.3]`: 2^(1/alpha), an end that is not above 0 open."""
    middle = f"{_short(2 ** (1 / exponent))}x"
    if interval is None:
        return middle
    high, low = (2 ** (1 / end) if end > 1 / 60 else np.inf for end in interval)
    return f"{middle} [{_short(low)}, {'no limit' if np.isinf(high) else _short(high)}]"


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 99.5 else f"{value:,.0f}"


def _law(series: Series) -> dict[str, Any]:
    floor = series.floor()
    law: dict[str, Any] = {"text": series_text(series), "floor": None if floor is None else floor.value, "curve": None}
    if series.has_curve and series.span is not None:
        start, stop = series.span
        x = np.geomspace(start, float(series.rows(FITTED, HELD_OUT)[series.axis].max()) * 1.5, _POINTS)
        value, band, _ = predict(series.fit, series.axis, x)
        law["curve"] = {"x": _rounded(x), "y": _rounded(value), "fitted_to": stop}
        law["curve"] |= {} if band is None else {"low": _rounded(band[0]), "high": _rounded(band[1])}
    return law


def _runs(report: Report, records: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every run of the table with its role along each axis."""
    frames = [(view.axis, pd.concat([series.frame for series in view.series])) for view in report.views]
    roles = {axis: dict(zip(frame["run_id"], frame["role"], strict=True)) for axis, frame in frames
             if "run_id" in frame.columns}  # fmt: skip
    columns = [column for column in AXES if column in report.table.columns]
    planned = (report.out / PLAN).exists()
    without = f"recscale launch {report.out}" if planned else "the folder of this run is not here"
    found = []
    for number, row in enumerate(report.table.to_dict("records")):
        run = str(row.get("run_id", number))
        found.append(
            {
                "id": run,
                "architecture": str(row.get("architecture", "runs")),
                "status": str(row.get("status", "done")),
                "roles": {axis: own.get(run, "") for axis, own in roles.items()},
                "shape": row.get("shape_id"),
                "seed": row.get("seed"),
                "rate": row.get("lr_dense"),
                "loss": row.get(report.first.target),
                "seconds": row.get("wall_s"),
                "x": {column: row[column] for column in columns},
                "redo": redo_command(records[run]) if run in records else without,
            }
        )
    return [_clean(run) for run in found]


def _learning(folder: Path) -> dict[str, Any]:
    """Progressive loss of one run, at most so many intervals of it, evenly spaced."""
    rows = [row for row in runs.read_metrics(folder) if row.get("logloss") is not None]
    kept = [rows[k] for k in np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _INTERVALS)).round().astype(int))]
    x, y = (np.array([row[key] for row in kept], float) for key in ("examples", "logloss"))
    return {"id": folder.name, "x": _rounded(x), "y": _rounded(y)}


def _rounded(values: Any) -> list[float | None]:
    """Six digits; null for what is not finite, because JSON has no other word for it."""
    return [float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None for value in np.asarray(values, float)]


def _clean(value: Any) -> Any:
    """As JSON holds it: missing numbers null, NumPy's as Python's."""
    if isinstance(value, dict):
        return {name: _clean(entry) for name, entry in value.items()}
    if isinstance(value, float | np.floating):
        return _rounded([value])[0]
    if value is pd.NA or value is None:
        return None
    return value.item() if isinstance(value, np.generic) else value
