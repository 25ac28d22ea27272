"""Submitting a plan to an executor, and what has become of it: `submitted.jsonl`, one line a job handed over.

A job that its executor still knows as queued or running is not submitted again.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recscale.scaling.records.provenance import now

from .executors import ACTIVE, Executor, Launch, Outcome, State, executor_class
from .job import Job, check_disk, pending_jobs
from .locks import only_launcher
from .plan import read_plan, run_config
from .resources import Resources, resources

SUBMITTED = "submitted.jsonl"


def carry_out(
    launch: Launch,
    name: str = "local",
    plan: Sequence[dict[str, Any]] | None = None,
    *,
    wait: bool = False,
    gpus_per_run: int = 0,
    gpus_per_node: int | None = None,
    told: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Has every unfinished run of a plan trained by the executor `name`, or handed to it.

    Args:
        plan: rows; default those of `out/plan.jsonl`.
        wait: stay until the jobs of an executor that goes on by itself are through, too.
        gpus_per_run, gpus_per_node: see `resources`. told: gets a line whenever states change while waiting.

    Raises:
        Busy: another launcher holds the folder.
        FileNotFoundError: there is no plan.
        PlanError: the plan is another version's. OverrideError: a setting that would change the runs.
        ValueError: an option that the executor does not take, or the disk has no room for the checkpoints.
    """
    out = launch.out
    rows = read_plan(out) if plan is None else plan
    if rows:
        run_config(rows[0], launch.overrides)  # what does not fit is told here, once, and not by every worker
    executor = executor_class(name)(launch)
    with only_launcher(out):
        began = time.monotonic()
        jobs = pending_jobs(out, rows)
        if name != "local":  # which first refuses the jobs that are too large for this machine
            check_disk(out, jobs)
        active = active_jobs(out, [job.id for job in jobs])
        mesh = next((text.partition("=")[2] for text in launch.overrides if text.startswith("training.mesh=")), "")
        alike: dict[Resources, list[Job]] = defaultdict(list)
        for job in jobs:
            if job.id not in active:
                alike[resources(job, mesh, gpus_per_run, gpus_per_node)].append(job)
        handles: dict[str, str] = {}
        for needed, group in alike.items():
            found = dict(zip([job.id for job in group], executor.submit(group, needed), strict=True))
            if executor.hands_over:
                _note(out, name, launch.options, found)
            handles |= found
        stays = wait or not executor.hands_over
        interrupted = executor.wait(handles | {job: active[job] for job in active}, told) if stays else False
        submitted = handles if executor.hands_over and not wait else None
        return Outcome.of(out, rows, time.monotonic() - began, interrupted=interrupted, submitted=submitted)


def active_jobs(out: Path, jobs: Sequence[str]) -> dict[str, str]:
    """{job: handle} of those that were handed over and are still queued or running."""
    known = submissions(out)
    states = job_states(out, jobs)
    return {job: known[job]["handle"] for job, state in states.items() if state in ACTIVE}


def job_states(out: Path, jobs: Sequence[str] | None = None) -> dict[str, State]:
    """What the executors that jobs were handed to say of them, of all by default; those never handed over are left
    out."""
    known = submissions(out)
    jobs = list(known) if jobs is None else jobs
    by_executor: dict[tuple[str, tuple[str, ...]], dict[str, str]] = defaultdict(dict)
    for job in jobs:
        if job in known:
            line = known[job]
            by_executor[line["executor"], tuple(line["options"])][job] = line["handle"]
    states: dict[str, State] = {}
    for (name, options), handles in by_executor.items():
        states |= _executor(out, name, options).states(handles)
    return states


def cancel_jobs(out: Path) -> dict[str, str]:
    """Cancels every job that is queued or running; returns {job: handle} of them."""
    known = submissions(out)
    active = active_jobs(out, list(known))
    for job, handle in active.items():
        _executor(out, known[job]["executor"], tuple(known[job]["options"])).cancel(handle)
    return active


def submissions(out: Path) -> Mapping[str, dict[str, Any]]:
    """{job: its last line of `submitted.jsonl`}."""
    path = out / SUBMITTED
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line["job"]: line for line in lines}


def _executor(out: Path, name: str, options: tuple[str, ...]) -> Executor:
    return executor_class(name)(Launch(out, options=options))


def _note(out: Path, name: str, options: Sequence[str], handles: Mapping[str, str]) -> None:
    facts = {"executor": name, "options": list(options), "submitted": now()}
    with open(out / SUBMITTED, "a") as file:
        file.writelines(json.dumps({"job": job, "handle": handle, **facts}) + "\n" for job, handle in handles.items())
