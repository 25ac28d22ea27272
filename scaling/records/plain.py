"""Values of NumPy and JAX, dataclasses and paths as the plain data that JSON holds, and their hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any


def plain(value: Any) -> Any:
    """A copy of dictionaries, lists, texts, numbers and None alone.

    Arrays and other collections become lists, dataclasses dictionaries of their fields, array scalars Python's numbers;
    NaN and infinities, which JSON does not have, None; anything else its text.
    """
    if value is None or isinstance(value, str | bool):
        return value
    if hasattr(value, "tolist"):  # NumPy and JAX, scalars included
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, bytes):
        return [plain(item) for item in value]
    return str(value)


def checksum(value: Any) -> str:
    """SHA-256 (hexadecimal) of the canonical JSON of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
