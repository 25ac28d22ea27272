"""What two plans differ in, in words, for the message that refuses to lay one over the other."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from typing import Any

from recscale.scaling.records.overrides import leaves


def difference(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]], *, but_for: Container[str] = ()
) -> str:
    """In words, what two plans' runs differ in: their numbers, then the settings whose values are not the same.

    but_for: dotted keys of settings that may differ.
    """
    before, after = {row["run_id"] for row in old}, {row["run_id"] for row in new}
    gone, added = len(before - after), len(after - before)
    text = f"{gone} of its {len(before)} runs are not in this sweep, {added} of this sweep's {len(after)} are new"
    old_values, new_values = _values(old), _values(new)
    changes = [
        f"{key} {_listed(old_values.get(key, set()))} there, {_listed(new_values.get(key, set()))} here"
        for key in dict.fromkeys([*old_values, *new_values])
        if old_values.get(key) != new_values.get(key) and key not in but_for
    ]
    return text + (f"; {'; '.join(changes[:5])}" if changes else "") + ("; ..." if len(changes) > 5 else "")


def _values(rows: Sequence[Mapping[str, Any]]) -> dict[str, set[str]]:
    """{dotted key: the values it takes over the rows, as JSON}."""
    values: dict[str, set[str]] = {}
    for row in rows:
        for key, value in leaves(row["config"]).items():
            values.setdefault(key, set()).add(json.dumps(value))
    return values


def _listed(values: set[str]) -> str:
    shown = sorted(values)[:4]
    return ("absent" if not shown else ", ".join(shown)) + (", ..." if len(values) > 4 else "")
