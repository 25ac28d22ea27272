"""The plan of a sweep on disk, `plan.jsonl`: one planned run a line, each with a hash of itself."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import write_atomically
from .sealed import sealed, unsealed

PLAN = "plan.jsonl"
SWEEP = "sweep.json"

# Of a row: how many rows were written with it (its `part`).
_WRITTEN = "part_rows"


def read_plan(out: Path | str) -> list[dict[str, Any]]:
    """Rows of `out/plan.jsonl`.

    Raises:
        FileNotFoundError: no plan there.
        ValueError: a line is not as it was written, or lines are missing; names the line and how to get it back.
    """
    path = Path(out) / PLAN
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; plan a sweep first: `{replan_command(out)}`")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        row = unsealed(line)
        if row is None:
            mend = f"mend it with `{replan_command(out)}`"
            raise ValueError(f"{path}, line {number} is not JSON as it was written; {mend}")
        rows.append(row)
    lost = lost_rows(rows)
    if lost or not rows:
        what = f"{lost} of its lines are missing" if rows else "it is empty"
        raise ValueError(f"{path} is damaged, {what}; mend it with `{replan_command(out)}`")
    return rows


def intact_rows(out: Path | str) -> list[dict[str, Any]]:
    """The rows of a plan whose lines are as they were written, whatever has become of the others; none without a
    plan."""
    path = Path(out) / PLAN
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [row for line in lines if (row := unsealed(line)) is not None]


def lost_rows(rows: Sequence[Mapping[str, Any]]) -> int:
    """How many rows a plan had more when they were written."""
    found = Counter(row["part"] for row in rows if _WRITTEN in row)
    written = {row["part"]: row[_WRITTEN] for row in rows if _WRITTEN in row}
    return sum(written[part] - found[part] for part in written)


def write_rows(out: Path | str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Replaces `out/plan.jsonl`; returns the rows as they will be read."""
    sizes = Counter(row["part"] for row in rows)
    rows = [{**row, _WRITTEN: sizes[row["part"]]} for row in rows]
    write_atomically(Path(out) / PLAN, "".join(map(sealed, rows)))
    return rows


def write_sweep(out: Path | str, facts: Mapping[str, Any]) -> None:
    """Replaces `out/sweep.json`: the sweep's name, its file, and the options of its report."""
    write_atomically(Path(out) / SWEEP, sealed(facts, indent=1, sort_keys=True))


def read_sweep(out: Path | str) -> dict[str, Any]:
    """`out/sweep.json`, empty where there is none.

    Raises:
        ValueError: it is not as it was written.
    """
    path = Path(out) / SWEEP
    if not path.exists():
        return {}
    facts = unsealed(path.read_bytes())
    if facts is None:
        raise ValueError(f"{path} is damaged; planning the sweep writes it anew: `{replan_command(out)}`")
    return facts


def replan_command(out: Path | str) -> str:
    """The command that plans the sweep of a folder again, as far as the folder knows it."""
    path = Path(out) / SWEEP
    known = (unsealed(path.read_bytes()) if path.exists() else None) or {}
    roots = {row["config"]["data"].get("root") for row in intact_rows(out) if "config" in row} - {"", None}
    options = [part for root in sorted(roots)[:1] for part in ("--data", root)]
    options += [part for text in known.get("set", ()) for part in ("--set", text)]
    file = shlex.quote(known["file"]) if "file" in known else "FILE"
    return f"recscale plan {file} {shlex.join(['--out', str(out), *options])}"


def labels(row: dict[str, Any]) -> dict[str, Any]:
    """What a planned row adds to its run's record."""
    return {
        "sweep": row["sweep"],
        "job": row["job"],
        "stage": row["stage"],
        "flops_target": row["targets"]["train_flops"],
        "params_target": row["targets"]["dense_params"],
        "notes": row.get("notes", {}),
    }


def planned_record(row: dict[str, Any]) -> dict[str, Any]:
    """The record of a run no worker has touched."""
    identity = {key: row[key] for key in ("run_id", "group_id", "shape_id", "trunk_id", "sweep", "config", "counts")}
    work = {
        "flops_target": row["targets"]["train_flops"],
        "params_target": row["targets"]["dense_params"],
    }
    return identity | {"status": "planned", "reasons": [], "labels": labels(row), "work": work, "metrics": {}}
