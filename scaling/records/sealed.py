"""JSON objects that carry a hash of themselves, so that a byte changed on disk is noticed and not believed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .plain import checksum

SEAL = "check"


def sealed(data: Mapping[str, Any], **layout: Any) -> str:
    """JSON of plain data and its hash; `layout` are options of `json.dumps`."""
    read: dict[str, Any] = json.loads(json.dumps(data))  # as it will be read: keys are texts, tuples lists
    return json.dumps(read | {SEAL: checksum(read)}, **layout) + "\n"


def unsealed(text: bytes) -> dict[str, Any] | None:
    """The data of `sealed`, None if it is not as it was written, or has no hash."""
    try:
        data = json.loads(text)
    except ValueError:
        return None
    if not isinstance(data, dict):
        return None
    return data if data.pop(SEAL, None) == checksum(data) else None
