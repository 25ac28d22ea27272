"""The command that trains a recorded run again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from recscale.scaling.data.sources import STORED
from recscale.scaling.records.overrides import leaves
from recscale.scaling.records.plain import plain
from recscale.scaling.training.config import get_config


def redo_command(record: Mapping[str, Any]) -> str:
    """`recscale train ARCHITECTURE --out again --set KEY=VALUE ...` with every setting that is not the default."""
    config = record["config"]
    data = config["data"]["name"]
    default = plain(leaves(get_config(config["architecture"], data)))
    folder = record.get("data", {}).get("folder") or config["data"].get("root")
    parts = ["recscale", "train", config["architecture"], "--out", "again"]
    parts += ["--dataset", str(folder)] if data == STORED else [] if data == "known_truth" else ["--dataset", data]
    for key, value in leaves(config).items():
        if default.get(key) != value and key not in ("data.root", "data.log", "data.name", "architecture"):
            text = ",".join(value) if key in ("data.metrics", "data.extra_tables") else _text(value)
            parts += ["--set", f"{key}={text}"]
    return shlex.join(parts)


def _text(value: Any) -> str:
    """A setting as `--set` reads it; JSON's lists are tuples."""
    return repr(tuple(value)) if isinstance(value, list) else str(value)
