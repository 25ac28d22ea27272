"""A folder belongs to one run: what lies there is compared with what is asked for before either is used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from recscale.scaling.records.overrides import leaves
from recscale.scaling.records.plain import plain

from .config import resolved, run_id
from .group import RunSpec

# Differing keys that an error names.
_NAMED = 3


def refuse_another_run(run: RunSpec, record: Mapping[str, Any], group: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the first settings that differ, if a folder's record is that of another run, or of the
    same run trained together with others than `group`, see `grouped`."""
    asked = run_id(run.config)
    if record.get("run_id") in (None, asked):
        differing = differences({**group, **record}, {**record, **group})
        if differing:
            raise ValueError(
                f"{run.run_dir} holds run {asked} as it is when trained together with other runs: {differing}. "
                "Give this run a folder of its own"
            )
        return
    differing = differences(record.get("config", {}), plain(resolved(run.config)))
    raise ValueError(
        f"{run.run_dir} holds run {record['run_id']} ({record['status']}), not {asked}: {differing}. "
        "Give this run a folder of its own"
    )


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """`training.lr is 0.003 there, 0.1 here; ...`: the first keys in which two nested dictionaries differ."""
    old, new = leaves(there), leaves(here)
    keys = [key for key in dict.fromkeys([*new, *old]) if old.get(key) != new.get(key)]
    named = [f"{key} is {_shown(old, key)} there, {_shown(new, key)} here" for key in keys[:_NAMED]]
    return "; ".join(named) + (f"; {len(keys) - _NAMED} more" if len(keys) > _NAMED else "")


def _shown(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "absent"
