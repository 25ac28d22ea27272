"""A job: planned runs that are trained together in one program, and what is on record of them."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from recscale.scaling.records.locks import is_held
from recscale.scaling.records.number_text import byte_text
from recscale.scaling.records.planned import labels, planned_record, read_plan
from recscale.scaling.records.runs import FINISHED, check_metrics, read_record, write_record

__all__ = [
    "Job",
    "check_disk",
    "count",
    "job_lease",
    "job_statuses",
    "labels",
    "mark_failed",
    "pending_jobs",
    "run_statuses",
]


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
    def checkpoint_bytes(self) -> int:
        return max(row["predicted"].get("checkpoint_bytes", 0) for row in self.rows)

    @property
    def seconds(self) -> float:
        return max(row["predicted"]["job_seconds"] for row in self.rows)

    @property
    def label(self) -> str:
        first = self.rows[0]
        return f"{first['config']['architecture']} {first['counts']['dense_params']:,}"

    @property
    def mesh(self) -> str:
        return self.rows[0]["config"]["training"].get("mesh", "")

    def log(self, out: Path) -> Path:
        return out / "groups" / self.id / "log.txt"


def pending_jobs(out: Path, rows: Sequence[dict[str, Any]]) -> list[Job]:
    """Jobs with an unfinished run, longest predicted first (so that the last to end is short).

    Raises:
        ValueError: a record, or the metrics of a finished run, are damaged; the message says what to do.
    """
    jobs: dict[str, Job] = {}
    for row in rows:
        jobs.setdefault(row["job"], Job(row["job"], [])).rows.append(row)
    statuses = run_statuses(out, rows)
    left = [job for job in jobs.values() if any(statuses[row["run_id"]] not in FINISHED for row in job.rows)]
    return sorted(left, key=lambda job: -job.seconds)


def check_disk(out: Path, jobs: Iterable[Job]) -> None:
    """Raises ValueError if the checkpoints that jobs are still to write will not fit on the disk of `out`."""
    begun = out / "groups"
    needed = sum(job.checkpoint_bytes for job in jobs if not (begun / job.id / "checkpoints").exists())
    free = shutil.disk_usage(next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())).free
    if needed > free:
        raise ValueError(
            f"the checkpoints of this sweep take about {byte_text(needed)}, and {byte_text(free)} are free at {out}: "
            "free some, or choose another folder with --out"
        )


def run_statuses(out: Path, rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Run id -> status as recorded, "planned" where there is no record yet."""
    found = {row["run_id"]: read_record(out / "runs" / row["run_id"]) for row in rows}
    for run, record in found.items():
        if record is not None:
            check_metrics(out / "runs" / run, record)
    return {run: "planned" if record is None else record["status"] for run, record in found.items()}


def job_statuses(out: Path, jobs: Sequence[str]) -> dict[str, Any]:
    """What has become of jobs that were handed over, as far as their records and leases say: see `executors.State`."""
    wanted: dict[str, list[dict[str, Any]]] = {job: [] for job in jobs}
    for row in read_plan(out):
        if row["job"] in wanted:
            wanted[row["job"]].append(row)
    found = run_statuses(out, [row for rows in wanted.values() for row in rows])
    return {job: _state(out, job, {found[row["run_id"]] for row in rows}) for job, rows in wanted.items()}


def job_lease(out: Path, job: str) -> Path:
    """The file whose lease the process that trains a job holds."""
    return out / "groups" / job / "lock"


def _state(out: Path, job: str, statuses: set[str]) -> str:
    if statuses <= set(FINISHED):
        return "done"
    if is_held(job_lease(out, job)):
        return "running"
    if "failed" in statuses:
        return "failed"
    return "requeued" if "running" in statuses else "queued"


def count(statuses: Iterable[str]) -> dict[str, int]:
    """How many there are of each, in alphabetical order."""
    return dict(sorted(Counter(statuses).items()))


def mark_failed(out: Path, rows: Sequence[dict[str, Any]], reasons: Sequence[str]) -> None:
    """Records the unfinished ones of the planned runs as failed."""
    for row in rows:
        folder = out / "runs" / row["run_id"]
        record = read_record(folder) or planned_record(row)
        if record["status"] not in FINISHED:
            write_record(folder, record | {"status": "failed", "reasons": list(reasons)})
