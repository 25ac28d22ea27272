"""Tables a person reads: the plan before a launch, the state of every run after it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from recscale.scaling.records.planned import read_plan
from recscale.scaling.records.runs import FINISHED, check_metrics, read_metrics, read_record, run_row
from recscale.scaling.resources import energy_and_money, figure
from recscale.scaling.training.run_resources import stated_figures

from .executors import ACTIVE
from .locks import has_launcher
from .plan import run_config
from .submission import job_states


def plan_table(rows: Sequence[dict[str, Any]]) -> str:
    """Every planned run with its counted sizes and predicted cost. Runs of a job are trained together, so memory is the
    job's and the seconds of its runs add up to the job's."""
    lines = []
    for row in rows:
        counts, predicted, training = row["counts"], row["predicted"], row["config"]["training"]
        error = row["target_error"]
        lines.append(
            {
                "run": row["run_id"],
                "job": row["job"][:6] + row["job"][12:],
                "architecture": row["config"]["architecture"],
                "dense": f"{counts['dense_params']:,}",
                "off": "" if error is None else f"{100 * error:+.1f} %",
                "embedding": f"{counts['embedding_params']:,}",
                "examples": f"{predicted['examples']:,}",
                "train FLOPs": f"{predicted['train_flops']:.3g}",
                "lr": f"{training['lr']:g}",
                "seed": str(row["config"]["seed"]),
                "memory (est.)": f"{predicted['peak_memory_bytes'] / 1e9:.2f} GB",
                "time (est.)": f"{predicted['seconds']:.0f} s",
            }
        )
    return render(lines)


def bill(
    rows: Sequence[dict[str, Any]], overrides: Sequence[str] = (), device_flops: float | None = None
) -> dict[str, dict[str, Any]]:
    """What a plan will take in all, as predicted: core-hours, or device-hours where somebody says what a device
    reaches, and the energy and cost of these hours, where the plan's `tracking` section says watts and prices.

    Args:
        overrides: `key=value` settings of `tracking`, in place of the plan's own.
        device_flops: FLOP/s of training that one accelerator reaches.
    """
    jobs = {row["job"]: row["predicted"] for row in rows}
    flops = sum(row["predicted"]["train_flops"] for row in rows)
    cores = sum(job["job_seconds"] for job in jobs.values()) / 3600
    devices = None if device_flops is None else flops / device_flops / 3600
    examples = sum(row["predicted"]["examples"] for row in rows)
    stated = stated_figures(run_config(rows[0], overrides).tracking)
    money = energy_and_money(cores if devices is None else devices, examples, stated)
    return {
        "train_flops": figure(flops, "FLOP", "counted"),
        "core_hours": figure(cores, "h", "estimated"),
        "device_hours": figure(devices, "h", "estimated"),
        **money,
    }


def bill_line(found: dict[str, dict[str, Any]]) -> str:
    """A bill in one line; what is absent is left out."""
    words = {"train_flops": "training FLOPs", "core_hours": "core-hours", "device_hours": "device-hours",
             "energy_kwh": "kWh", "co2e_kg": "kg CO2e", "cost_usd": "$"}  # fmt: skip
    parts = [f"{found[name]['value']:.3g} {word}" for name, word in words.items() if found[name]["value"] is not None]
    return f"bill (estimated but for FLOPs): {', '.join(parts)}"


def planned_table(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """A plan in the columns of a run table; what only training tells is null."""
    told = [
        row
        | row.get("notes", {})
        | {"status": "planned", "work": row["predicted"], "history_length": row["config"]["data"].get("history_length")}
        for row in rows
    ]
    return pd.DataFrame([run_row(row) for row in told])


def run_states(out: Path | str) -> list[dict[str, Any]]:
    """One dictionary per planned run: state, size, share trained, newest logloss, reasons.

    Of a run whose job was handed to a scheduler the state is what that says: queued, running, requeued, or lost. One
    recorded as running is "stopped" when nothing was handed over and no launcher works on the folder.
    """
    out, states = Path(out), []
    busy, handed_over = has_launcher(out), job_states(out)
    for row in read_plan(out):
        folder = out / "runs" / row["run_id"]
        record = read_record(folder) or {"status": "planned"}
        check_metrics(folder, record)
        metrics = read_metrics(folder)
        final = record.get("metrics") or {}
        state = record["status"]
        if state not in FINISHED and row["job"] in handed_over:
            state = handed_over[row["job"]]
        elif state == "running" and not busy:
            state = "stopped"
        examples = metrics[-1].get("examples", 0) if metrics else 0
        states.append(
            {
                "run_id": row["run_id"],
                "job": row["job"],
                "architecture": row["config"]["architecture"],
                "dense_params": row["counts"]["dense_params"],
                "lr": row["config"]["training"]["lr"],
                "seed": row["config"]["seed"],
                "state": state,
                "trained": min(examples / max(row["predicted"]["examples"], 1), 1.0),
                "logloss": final.get("logloss", metrics[-1].get("logloss") if metrics else None),
                "reasons": record.get("reasons", []),
            }
        )
    return states


def waiting_runs(out: Path | str) -> list[str]:
    """Ids of the runs that a scheduler is still to train."""
    states = job_states(Path(out))
    return [row["run_id"] for row in read_plan(out) if states.get(row["job"]) in ACTIVE] if states else []


def status_table(states: Sequence[dict[str, Any]]) -> str:
    """The states of `run_states` as a table."""
    lines = [
        {
            "run": state["run_id"],
            "job": state["job"][:6] + state["job"][12:],
            "architecture": state["architecture"],
            "dense": f"{state['dense_params']:,}",
            "lr": f"{state['lr']:g}",
            "seed": str(state["seed"]),
            "state": state["state"],
            "trained": f"{100 * state['trained']:.0f} %",
            "logloss": "" if state["logloss"] is None else f"{state['logloss']:.5f}",
            "reasons": "; ".join(state["reasons"]),
        }
        for state in states
    ]
    return render(lines)


def render(lines: Sequence[dict[str, str]]) -> str:
    """Rows of texts as an aligned table, wide as its content: words to the left, numbers to the right."""
    words = ("run", "job", "architecture", "state", "reasons")
    cells = [{name: name for name in lines[0]}, *lines]
    widths = {name: max(len(line[name]) for line in cells) for name in lines[0]}
    return "\n".join(
        "  ".join(f"{line[name]:{'<' if name in words else '>'}{width}}" for name, width in widths.items()).rstrip()
        for line in cells
    )
