"""The fit record: everything a reader needs to believe or repeat a fit, as plain data."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .fitting import LawFit


def build_record(fit: LawFit) -> dict:
    """The record of a fit as nested plain dictionaries."""
    return {"form": fit.form.id, "params": fit.params, "refusals": [gate.as_dict() for gate in fit.refusals]}


def plain(value):
    """JSON-safe copy: arrays to lists, NumPy scalars to Python, NaN and infinities to None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (np.floating, float)):
        return float(value) if np.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, np.bool_):
        return bool(value)
    return value


def to_json(record: dict, indent: int | None = 2) -> str:
    """The record as JSON text."""
    return json.dumps(plain(record), indent=indent)
