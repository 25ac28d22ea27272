"""The plan of a sweep on disk, `plan.jsonl`: one planned run a line, each with a hash of itself."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

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
    mend, rows = f"mend it with `{replan_command(out)}`", {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        row = unsealed(line)
        if row is None:
            raise ValueError(f"{path}, line {number} is not JSON as it was written; {mend}")
        if row["run_id"] in rows:
            raise ValueError(f"{path}, line {number} has run {row['run_id']} again; {mend}")
        rows[row["run_id"]] = row
    lost = lost_rows(list(rows.values()))
    if lost or not rows:
        what = f"{lost} of its lines are missing" if rows else "it is empty"
        raise ValueError(f"{path} is damaged, {what}; {mend}")
    return list(rows.values())


def intact_rows(out: Path | str) -> list[dict[str, Any]]:
    """The rows of a plan whose lines are as they were written, every run once, whatever has become of the others; none
    without a plan."""
    path, rows = Path(out) / PLAN, {}
    for line in path.read_bytes().splitlines() if path.exists() else []:
        if (row := unsealed(line)) is not None:
            rows.setdefault(row["run_id"], row)
    return list(rows.values())


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


def write_sweep(out: Path | str, name: str, report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Replaces `out/sweep.json`: the sweep's name, the options of its report, and the arguments its rows were planned
    with."""
    facts = {"name": name, "report": report, "arguments": _arguments(rows)}
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
    """The command that plans the sweep of a folder again; where it was extended, several, joined by &&. With FILE for
    the sweep file where nothing intact of the folder knows it."""
    path = Path(out) / SWEEP
    known = (unsealed(path.read_bytes()) if path.exists() else None) or {}
    asked = _arguments([*({"arguments": own} for own in known.get("arguments", ())), *intact_rows(out)])
    commands = [
        shlex.join(["recscale", "plan", *arguments, "--out", str(out), *(["--extend"] if number else [])])
        for number, arguments in enumerate(asked or [["FILE"]])
    ]
    return " && ".join(commands)


def _arguments(rows: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """What `recscale plan` was given for these rows, each once, in their order."""
    return list(map(list, dict.fromkeys(tuple(row["arguments"]) for row in rows if row.get("arguments"))))


def grouped(configs: Iterable[ConfigDict | Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Seeds and rates, and numbers of examples, of runs that are trained together, for their records.

    A program of several replicas rounds otherwise than one of a single run, in the ninth digit, and the shortest
    horizon decides how often metrics are logged.
    """
    trainings = [(config["seed"], config["training"]) for config in configs]
    return {
        "replicas": [list(own) for own in sorted({(int(seed), float(own["lr"])) for seed, own in trainings})],
        "horizons": sorted({own["examples"] for _, own in trainings}),
    }


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
