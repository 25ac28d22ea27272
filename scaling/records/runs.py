"""Run records on disk: one folder a run, `run.json` (replaced atomically) and `metrics.jsonl` (append-only).

`collect` turns the folders of a sweep into one run table; its column names are those of every table the law fitter
reads. A diverged or failed run is a result and stays in the table with its status and reasons.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .advice import advised
from .files import replacing, write_atomically
from .locks import is_held, launch_lock
from .overrides import leaves
from .plain import plain
from .planned import PLAN, SWEEP, grouped, planned_record, read_plan, replan_command
from .sealed import sealed, unsealed

if TYPE_CHECKING:
    import pandas as pd

RECORD = "run.json"
METRICS = "metrics.jsonl"
TABLE = "runs.parquet"

STATUSES = ("planned", "running", "done", "diverged", "failed", "lost")

# A run that needs no more work, whatever came of it.
FINISHED = ("done", "diverged")


def read_record(folder: Path | str) -> dict[str, Any] | None:
    """The record of a run folder, None where there is none.

    Raises:
        ValueError: the file is not the JSON object this package writes; names the file.
    """
    path = Path(folder) / RECORD
    if not path.exists():
        return None
    mend = f"delete it and run again, the run goes on from its newest checkpoint: {advised('rm', path)}"
    record = unsealed(path.read_bytes())
    if record is None:
        raise ValueError(f"{path} is not valid JSON as it was written: it was damaged or edited; {mend}")
    if record.get("status") not in STATUSES:
        raise ValueError(f"{path} is not a run record: status is {record.get('status')!r}, expected {STATUSES}; {mend}")
    return record


def write_record(folder: Path | str, record: dict[str, Any]) -> dict[str, Any]:
    """Replaces a run's record in one step: a reader sees the old or the new one, no part. Returns what is read."""
    if record.get("status") not in STATUSES:
        raise ValueError(f"status is {record.get('status')!r}, expected one of {', '.join(STATUSES)}")
    text = sealed(plain(record), indent=1, sort_keys=True)
    write_atomically(Path(folder) / RECORD, text)
    return unsealed(text.encode()) or {}


def append_metrics(folder: Path | str, row: dict[str, Any]) -> bytes:
    """Appends one line to a run's metrics and returns it."""
    line = json.dumps(plain(row), sort_keys=True).encode() + b"\n"
    with open(Path(folder) / METRICS, "ab") as handle:
        handle.write(line)
    return line


def read_metrics(folder: Path | str) -> list[dict[str, Any]]:
    """Lines of a run's metrics; a last line torn by a kill is left out.

    Raises:
        ValueError: another line is not a JSON object; names file and line.
    """
    path, rows = Path(folder) / METRICS, []
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            if number < len(lines):
                raise ValueError(
                    f"{path}, line {number} is not JSON ({error}): it was damaged. The run goes on from a checkpoint "
                    "before that line"
                ) from error
    return rows


def metrics_mark(folder: Path | str, lines: int | None = None) -> dict[str, Any]:
    """{"lines", "sha256"} of the first lines of a run's metrics, of all of them if `lines` is None."""
    path = Path(folder) / METRICS
    content = (path.read_bytes() if path.exists() else b"").splitlines(keepends=True)[:lines]
    return {"lines": len(content), "sha256": hashlib.sha256(b"".join(content)).hexdigest()}


def check_metrics(folder: Path | str, record: dict[str, Any]) -> None:
    """Raises ValueError if the metrics of a finished run are not the lines its record was made of."""
    written = record.get("metrics_file")
    if record["status"] in FINISHED and written is not None and metrics_mark(folder) != written:
        folder = Path(folder)
        raise ValueError(
            f"{folder / METRICS} is not as the run left it: it was damaged or edited. Delete its record and run again, "
            f"both are made anew from the newest checkpoint: {advised('rm', folder / RECORD)}"
        )


def truncate_metrics(folder: Path | str, lines: int) -> None:
    """Drops, atomically, every metrics line behind the first `lines` (they will be written again, identically)."""
    path = Path(folder) / METRICS
    content = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if len(content) > lines:
        write_atomically(path, b"".join(content[:lines]))


def collect(out: Path | str, waiting: Collection[str] = ()) -> pd.DataFrame:
    """`run_table`, written to `out/runs.parquet` and returned."""
    table = run_table(out, waiting)
    with replacing(Path(out) / TABLE) as temporary:
        table.to_parquet(temporary, index=False, write_page_checksum=True)
    return table


def has_records(out: Path | str) -> bool:
    """Whether a folder holds runs that `run_table` reads."""
    return any((Path(out) / "runs").glob(f"*/{RECORD}"))


def records_in(folders: Sequence[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Run folders among these folders, or inside those of sweeps, with their records."""
    inside = (
        run
        for folder in folders
        for run in ([folder] if (folder / RECORD).exists() else sorted((folder / "runs").glob("*")))
    )
    return [(run, record) for run in inside if (record := read_record(run)) is not None]


def run_table(out: Path | str, waiting: Collection[str] = ()) -> pd.DataFrame:
    """One row per run: of every line of `out/plan.jsonl`, or where there is no plan of every folder below `out/runs`.

    A planned run without a record has the status "lost"; "planned" while a launcher is at work, or where it is one of
    those `waiting` for a scheduler. A setting in which
    runs of one architecture differ gets a column of its own, named like the setting ("model.combine"), so that the
    arms of an ablation can be told apart.

    Raises:
        FileNotFoundError: there is no run folder at all.
        ValueError: a record that was copied, edited or damaged, or that the plan does not know; the message says
            which, and what to do.
    """
    import pandas as pd  # tables alone need it, steps and batches do not

    out = Path(out)
    found = {folder: record for folder in sorted((out / "runs").glob("*")) if (record := read_record(folder))}
    if not found:
        raise FileNotFoundError(f"no run records below {out / 'runs'}; launch the sweep first, or name its folder")
    for folder, record in found.items():
        if record.get("run_id") not in (None, folder.name):
            raise ValueError(
                f"{folder} holds the record of run {record['run_id']}: it was copied or renamed; take it out with "
                f"{advised('mv', folder, out)}"
            )
        if (folder / METRICS).exists():  # the table needs none; launching says what is missing
            check_metrics(folder, record)
    records = list(found.values())
    if (out / PLAN).exists() or (out / SWEEP).exists():
        records = _joined(out, {folder.name: record for folder, record in found.items()}, waiting)
    varied = _varied_settings([record.get("config", {}) for record in records])
    rows = [run_row(record) | settings for record, settings in zip(records, varied, strict=True)]
    return with_tuning(pd.DataFrame(rows).sort_values("run_id", ignore_index=True))


def _joined(out: Path, records: dict[str, dict[str, Any]], waiting: Collection[str]) -> list[dict[str, Any]]:
    """The record of every planned run; of one that has none what the plan says."""
    plan = {row["run_id"]: row for row in read_plan(out)}
    jobs: dict[str, list[dict[str, Any]]] = {}
    for row in plan.values():
        jobs.setdefault(row["job"], []).append(row["config"])
    for name, record in records.items():
        folder = out / "runs" / name
        if name not in plan:
            raise ValueError(
                f"{out / PLAN} has no line of run {name}. If it was lost, `{replan_command(out)}` brings it back; a "
                f"run that does not belong here is taken out with {advised('mv', folder, out)}"
            )
        known, own = leaves(plan[name]["config"]), leaves(record.get("config", {}))
        differing = [
            f"{key} is {value!r} there, {known[key]!r} in the plan"
            for key, value in own.items()
            if key in known and known[key] != value
        ]
        together = grouped(jobs[plan[name]["job"]])
        differing += [
            f"{key} of the runs it was trained with are {record[key]}, {value} in the plan"
            for key, value in together.items()
            if record.get(key, value) != value
        ]
        if differing:
            raise ValueError(
                f"{folder} holds another run than the plan's {name}: {differing[0]}; take it out with "
                f"{advised('mv', folder, out)}"
            )
    busy = is_held(launch_lock(out))
    reason = f"there is no record of it; train it with {advised('recscale', 'launch', out)}"
    lost = {"status": "lost", "reasons": [reason]}
    return [
        records.get(name) or planned_record(row) | ({} if busy or name in waiting else lost)
        for name, row in plan.items()
    ]


def with_tuning(table: pd.DataFrame, target: str = "logloss") -> pd.DataFrame:
    """The table with `lr_trials` and `lr_bracketed` of every setting that was trained at several learning rates.

    Settings are runs that differ in seed and rate alone. The best rate has the lowest mean target over its seeds; it is
    bracketed if a lower and a higher rate were tried as well. A rate with a diverged run counts as tried and is not
    the best. While runs are missing, and at a single rate, nothing is known: both stay null.
    """
    if target not in table.columns:
        return table
    table = table.astype({"lr_trials": object, "lr_bracketed": object})
    for _, group in table.groupby(["group_id", "examples"], dropna=False):
        rates = group["lr_dense"]
        if rates.nunique() < 2 or not group["status"].isin(FINISHED).all():
            continue
        loss = group[target].where(group["status"] == "done").astype(float).fillna(math.inf)
        best = loss.groupby(rates).mean().idxmin()
        table.loc[group.index, "lr_trials"] = rates.nunique()
        table.loc[group.index, "lr_bracketed"] = bool(rates.min() < best < rates.max())
    return table


def run_row(record: dict[str, Any]) -> dict[str, Any]:
    """Flattens a record into the run table's columns; what a run lacks is null, never 0."""
    config, counts = record.get("config", {}), record.get("counts", {})
    training, data = config.get("training", {}), config.get("data", {})
    work, metrics = record.get("work", {}), dict(record.get("metrics") or {})
    row = {
        "run_id": record.get("run_id"),
        "sweep": record.get("sweep"),
        "architecture": config.get("architecture"),
        "shape_id": record.get("shape_id"),
        "trunk_id": record.get("trunk_id"),
        "group_id": record.get("group_id"),
        "seed": config.get("seed"),
        "replicas": None if record.get("replicas") is None else len(record["replicas"]),
        "data_seed": data.get("log_seed"),
        "status": record["status"],
        "reasons": "; ".join(record.get("reasons", [])),
        **{name: counts.get(name) for name in _COUNTS},
        "backbone_params": _behind(counts),
        "memory_slots": counts.get("memory_slots"),
        "history_length": record.get("history_length"),
        "train_flops": work.get("train_flops"),
        "flops_target": work.get("flops_target"),
        "params_target": work.get("params_target"),
        "match_id": record.get("match_id"),
        "arm": record.get("arm"),
        "dataset": data.get("name"),
        "preset": data.get("preset"),
        "preset_changes": json.dumps(dict(data["overrides"]), sort_keys=True) if data.get("overrides") else None,
        "examples": work.get("examples"),
        "examples_seen": work.get("examples_seen"),
        "unique_examples": work.get("unique_examples"),
        "epochs": work.get("epochs"),
        "protocol": ("passes" if training.get("passes") else "one pass") if training else None,
        "lr_dense": training.get("lr"),
        "lr_embedding": training.get("embedding_lr"),
        "lr_rule": record.get("lr_rule", "fixed"),
        "lr_bracketed": record.get("lr_bracketed"),
        "lr_trials": record.get("lr_trials"),
        "lr_first_trials": record.get("lr_first_trials"),
        "batch_rows": work.get("batch_rows"),
        "optimizer": training.get("optimizer"),
        "schedule": training.get("schedule"),
        "warmup_examples": training.get("warmup_examples"),
        "decayed": training.get("schedule") != "constant" if training else None,
    }
    # Nested results (recovered share per component, tables of a card) stay in run.json; figures become columns.
    row |= {name: value for name, value in metrics.items() if not isinstance(value, dict | list)}
    recovery = metrics.get("recovery")
    if isinstance(recovery, dict):
        row |= {f"recovered_{part}": value for part, value in recovery.items() if not isinstance(value, dict | list)}
    row |= {name: record.get("cost", {}).get(name) for name in _COSTS}
    used = record.get("resources", {})
    row |= {name: (used.get(name) or {}).get("value") for name in _RESOURCES}
    device = record.get("device") or {}
    return row | {"device": device.get("kind") if isinstance(device, dict) else device}


def _behind(counts: dict[str, Any]) -> int | None:
    """Dense parameters of the backbone behind a sequence encoder; None without one."""
    encoder = counts.get("encoder_params")
    return None if encoder is None else counts["dense_params"] - encoder


def _varied_settings(configs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per run its values of all settings that differ between two runs of one architecture, and have no column yet."""
    flat = [leaves(config) for config in configs]
    seen: dict[tuple[Any, str], set[str]] = {}
    for config in flat:
        for key, value in config.items():
            seen.setdefault((config.get("architecture"), key), set()).add(json.dumps(value, sort_keys=True))
    varied = {key for (_, key), values in seen.items() if len(values) > 1 and not key.startswith("tracking.")}
    names = sorted(varied - _WITH_A_COLUMN)
    columns = {name: [config.get(name) for config in flat] for name in names}
    for name, values in columns.items():
        kinds = {type(value) for value in values if value is not None}
        if len(kinds) > 1 or kinds & {list, tuple}:  # a column has one type
            columns[name] = [None if value is None else json.dumps(value) for value in values]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)] or [{}] * len(
        flat
    )


# Settings that `run_row` gives a column under another name, or that do not change a result.
_WITH_A_COLUMN = {
    "architecture",
    "seed",
    "data.log_seed",
    "data.name",
    "data.preset",
    "data.root",
    "training.lr",
    "training.embedding_lr",
    "training.examples",
    "training.optimizer",
    "training.schedule",
    "training.warmup_examples",
    "training.checkpoint_every_s",
}

_COSTS = ("wall_s", "step_ms", "rows_per_s", "mfu", "input_wait_share")

# Figures of `recscale.scaling.resources` that become columns.
_RESOURCES = (
    "device_hours",
    "peak_host_bytes",
    "peak_device_bytes",
    "activation_bytes",
    "energy_kwh",
    "co2e_kg",
    "cost_usd",
    "communication_bytes",
)

# Columns that time and the machine decide: the same run trained once more has others.
MEASURED = tuple(name for name in (*_COSTS, *_RESOURCES) if name != "communication_bytes")

_COUNTS = (
    "dense_params",
    "active_params",
    "embedding_params",
    "head_params",
    "tokenizer_params",
    "encoder_params",
    "position_params",
    "memory_params",
    "forward_flops_per_row",
    "train_flops_per_row",
)
