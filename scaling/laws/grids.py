"""Results as tables of texts with remarks: what commands print and what the page of a report lays out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """A title, the names of the columns, rows of texts, and lines to be read with them."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    remarks: Sequence[str] = ()


def number(value: float | None, spec: str = ".4g") -> str:
    """A number, or `refused`."""
    return "refused" if value is None else format(value, spec)


def between(interval: Sequence[float] | None, spec: str = ".4g") -> str:
    """`low to high`, or nothing."""
    return "" if interval is None else f"{format(interval[0], spec)} to {format(interval[1], spec)}"
