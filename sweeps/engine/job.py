"""A job: planned runs that are trained together in one program, and what is on record of them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from recscale.scaling.records.runs import FINISHED, read_record, write_record


@dataclasses.dataclass
class Job:
    """Runs trained together: what one worker does at a time. `rows` are lines of the plan."""

    id: str
    rows: list[dict[str, Any]]
    attempts: int = 0

    @property
    def memory_bytes(self) -> int:
        return max(row["predicted"]["peak_memory_bytes"] for row in self.rows)

    @property
    def seconds(self) -> float:
        return max(row["predicted"]["job_seconds"] for row in self.rows)

    @property
    def label(self) -> str:
        first = self.rows[0]
        return f"{first['config']['architecture']} {first['counts']['dense_params']:,}"

    def log(self, out: Path) -> Path:
        return out / "groups" / self.id / "log.txt"


def pending_jobs(out: Path, rows: Sequence[dict[str, Any]]) -> list[Job]:
    """Jobs with an unfinished run, longest predicted first (so that the last to end is short)."""
    jobs: dict[str, Job] = {}
    for row in rows:
        jobs.setdefault(row["job"], Job(row["job"], [])).rows.append(row)
    statuses = run_statuses(out, rows)
    left = [job for job in jobs.values() if any(statuses[row["run_id"]] not in FINISHED for row in job.rows)]
    return sorted(left, key=lambda job: -job.seconds)


def run_statuses(out: Path, rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Run id -> status as recorded, "planned" where there is no record yet."""
    found = {row["run_id"]: read_record(out / "runs" / row["run_id"]) for row in rows}
    return {run: "planned" if record is None else record["status"] for run, record in found.items()}


def count(statuses: Iterable[str]) -> dict[str, int]:
    """How many there are of each, in alphabetical order."""
    return dict(sorted(Counter(statuses).items()))


def labels(row: dict[str, Any]) -> dict[str, Any]:
    """What a planned row adds to its run's record."""
    return {
        "sweep": row["sweep"],
        "job": row["job"],
        "stage": row["stage"],
        "flops_target": row["targets"]["train_flops"],
        "params_target": row["targets"]["dense_params"],
    }


def mark_failed(out: Path, rows: Sequence[dict[str, Any]], reasons: Sequence[str]) -> None:
    """Records the unfinished ones of the planned runs as failed."""
    for row in rows:
        folder = out / "runs" / row["run_id"]
        record = read_record(folder) or _planned_record(row)
        if record["status"] not in FINISHED:
            write_record(folder, record | {"status": "failed", "reasons": list(reasons)})


def _planned_record(row: dict[str, Any]) -> dict[str, Any]:
    """The record of a run no worker has touched."""
    identity = {key: row[key] for key in ("run_id", "group_id", "shape_id", "trunk_id", "sweep", "config", "counts")}
    work = {
        "flops_target": row["targets"]["train_flops"],
        "params_target": row["targets"]["dense_params"],
    }
    return identity | {"status": "planned", "reasons": [], "labels": labels(row), "work": work, "metrics": {}}
