"""Checks that configs of several families share."""

from __future__ import annotations

from typing import Any


def require_sizes(config: Any, *names: str) -> None:
    """Raises ValueError if one of these settings is a size below 1: a number, a tuple of them, or None for unset."""
    for name in names:
        value = getattr(config, name)
        sizes = value if isinstance(value, tuple) else () if value is None else (value,)
        if any(size < 1 for size in sizes):
            raise ValueError(f"{name} is {value}, expected at least 1{' everywhere' if len(sizes) > 1 else ''}")
