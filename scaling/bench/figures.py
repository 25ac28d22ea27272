"""Figures for people: every benchmark's result as lines and tables under the names that its JSON has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def figure_lines(values: Mapping[Any, Any], prefix: str = "") -> list[str]:
    """One line per figure, nested names dotted; what can be compared stands in one table, a row each.

    Compared are the members of a mapping that have a time (`median_ms`), or all of them if they are mappings, or else
    those that hold the same figures as another one.
    """
    rows = _comparable(values)
    lines = _table(prefix.rstrip("."), rows) if rows else []
    for name, value in values.items():
        if name in rows:
            value = {key: inner for key, inner in value.items() if _nested(inner)}
        elif isinstance(value, Sequence) and _nested(value):
            value = {str(number): inner for number, inner in enumerate(value)}
        if isinstance(value, Mapping):
            lines += figure_lines(value, f"{prefix}{name}.")
        else:
            lines.append(f"{f'{prefix}{name}':44s} {figure_text(value)}")
    return lines


def figure_text(value: Any) -> str:
    """Six digits of a number, a list's values in a row."""
    if isinstance(value, list | tuple):
        return " ".join(figure_text(one) for one in value)
    if value is None or isinstance(value, str | bool):
        return "-" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else str(value)


def _comparable(values: Mapping[Any, Any]) -> dict[Any, Mapping[str, Any]]:
    rows = {name: value for name, value in values.items() if isinstance(value, Mapping)}
    rows = {name: row for name, row in rows.items() if not all(_nested(value) for value in row.values())}
    timed = {name: row for name, row in rows.items() if "median_ms" in row}
    if timed or len(rows) == len(values) > 1:
        return timed or rows
    kinds = [set(row) for row in rows.values()]
    return {name: row for name, row in rows.items() if kinds.count(set(row)) > 1}


def _nested(value: Any) -> bool:
    """Whether a value has lines of its own, rather than a place in a line."""
    within = isinstance(value, list | tuple) and any(isinstance(one, Mapping | list | tuple) for one in value)
    return within or isinstance(value, Mapping)


def _table(title: str, rows: Mapping[Any, Mapping[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(key for row in rows.values() for key, value in row.items() if not _nested(value)))
    cells = [
        [title, *names],
        *([str(name), *(figure_text(row.get(key)) for key in names)] for name, row in rows.items()),
    ]
    first, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
    return [
        f"{name:{first}s}" + "".join(f"  {text:>{width}s}" for text, width in zip(texts, widths, strict=True))
        for name, *texts in cells
    ]
