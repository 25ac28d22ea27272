"""A folder belongs to one run: what lies there is compared with what is asked for before either is used."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from recscale.scaling.records.overrides import leaves
from recscale.scaling.records.plain import plain

from .config import resolved, run_id
from .group import RunSpec

# Differing keys that an error names.
_NAMED = 3


def replicas(runs: Sequence[RunSpec]) -> list[list[float]]:
    """Seeds and rates of runs that are trained together, for their records. A program of several replicas rounds
    otherwise than one of a single run, in the ninth digit."""
    return [list(replica) for replica in sorted({run.replica for run in runs})]


def refuse_another_run(run: RunSpec, record: Mapping[str, Any], group: list[list[float]]) -> None:
    """Raises ValueError, naming the first settings that differ, if a folder's record is that of another run, or of the
    same run trained with others than `group`, the replicas it is asked for with."""
    asked = run_id(run.config)
    if record.get("run_id") in (None, asked):
        if record.get("replicas", group) != group:
            there = record["replicas"]
            raise ValueError(
                f"{run.run_dir} holds run {asked} as one of {len(there)} seeds and rates trained together, not of "
                f"{len(group)}: {there} there, {group} here. Give this run a folder of its own"
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
