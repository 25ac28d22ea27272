"""Architectures: arrays in, arrays out. Nothing here trains or reads data; of the other rooms it imports
`pallas_kernels` alone.

    from recscale.models import build, count, get_config, list_models

The functions are loaded on first use, so `import recscale.models` is cheap.
"""

from __future__ import annotations

import importlib
from typing import Any

_REGISTRY = (
    "build",
    "count",
    "default_dtype",
    "freeze_config",
    "get_config",
    "list_models",
    "list_presets",
    "reads_history",
    "size_space",
)

__all__ = list(_REGISTRY)


def __getattr__(name: str) -> Any:
    if name in _REGISTRY:
        return getattr(importlib.import_module(".registry", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_REGISTRY])
