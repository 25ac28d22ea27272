"""Training of one run or one group of runs: configuration in, record out.

`train` and `train_group` are imported on first use, so planning a sweep does not load the checkpointing stack.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .config import get_config, group_id, resolved, run_id, shape_id, trunk_id

if TYPE_CHECKING:
    from .group import RunSpec
    from .loop import train, train_group

__all__ = [
    "RunSpec",
    "get_config",
    "group_id",
    "resolved",
    "run_id",
    "shape_id",
    "train",
    "train_group",
    "trunk_id",
]


def __getattr__(name: str):
    if name == "RunSpec":
        from .group import RunSpec

        return RunSpec
    if name in ("train", "train_group"):
        from . import loop

        return getattr(loop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
