"""Run records on disk: one folder a run, `run.json` (replaced atomically) and `metrics.jsonl` (append-only).

`collect` turns the folders of a sweep into one run table; its column names are those of every table the law fitter
reads. A diverged or failed run is a result and stays in the table with its status and reasons.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import replacing, write_atomically
from .overrides import leaves
from .plain import plain

if TYPE_CHECKING:
    import pandas as pd

RECORD = "run.json"
METRICS = "metrics.jsonl"
TABLE = "runs.parquet"

STATUSES = ("planned", "running", "done", "diverged", "failed")

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
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); move the folder away and run again") from error
    if not isinstance(record, dict) or record.get("status") not in STATUSES:
        raise ValueError(f"{path} is not a run record: status is {record.get('status')!r}, expected {STATUSES}")
    return record


def write_record(folder: Path | str, record: dict[str, Any]) -> dict[str, Any]:
    """Replaces a run's record in one step: a reader sees the old or the new one, no part. Returns what is read."""
    if record.get("status") not in STATUSES:
        raise ValueError(f"status is {record.get('status')!r}, expected one of {', '.join(STATUSES)}")
    text = json.dumps(plain(record), indent=1, sort_keys=True) + "\n"
    write_atomically(Path(folder) / RECORD, text)
    return json.loads(text)


def append_metrics(folder: Path | str, row: dict[str, Any]) -> None:
    """Appends one line to a run's metrics."""
    with open(Path(folder) / METRICS, "a", encoding="utf-8") as handle:
        handle.write(json.dumps(plain(row), sort_keys=True) + "\n")


def read_metrics(folder: Path | str) -> list[dict[str, Any]]:
    """Lines of a run's metrics; a last line torn by a kill is left out.

    Raises:
        ValueError: another line is not JSON; names file and line.
    """
    path, rows = Path(folder) / METRICS, []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is not JSON ({error}); the file was damaged") from error
    return rows


def truncate_metrics(folder: Path | str, step: int) -> None:
    """Drops, atomically, every metrics line beyond a restored step (they will be written again, identically)."""
    path = Path(folder) / METRICS
    if path.exists():
        kept = [row for row in read_metrics(folder) if row["step"] <= step]
        write_atomically(path, "".join(json.dumps(row, sort_keys=True) + "\n" for row in kept))


def collect(out: Path | str) -> pd.DataFrame:
    """One row per run folder below `out/runs`, written to `out/runs.parquet` and returned.

    A setting in which runs of one architecture differ gets a column of its own, named like the setting
    ("model.combine"), so that the arms of an ablation can be told apart.

    Raises:
        FileNotFoundError: there is no run folder at all.
    """
    import pandas as pd  # tables alone need it, steps and batches do not

    out = Path(out)
    records = [record for folder in sorted((out / "runs").glob("*")) if (record := read_record(folder)) is not None]
    if not records:
        raise FileNotFoundError(f"no run records below {out / 'runs'}; launch the sweep first, or name its folder")
    varied = _varied_settings([record.get("config", {}) for record in records])
    rows = [run_row(record) | settings for record, settings in zip(records, varied, strict=True)]
    table = pd.DataFrame(rows).sort_values("run_id", ignore_index=True)
    table = with_tuning(table)
    with replacing(out / TABLE) as temporary:
        table.to_parquet(temporary, index=False)
    return table


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
        "data_seed": data.get("log_seed"),
        "status": record["status"],
        "reasons": "; ".join(record.get("reasons", [])),
        **{name: counts.get(name) for name in _COUNTS},
        "memory_slots": counts.get("memory_slots"),
        "history_length": record.get("history_length"),
        "train_flops": work.get("train_flops"),
        "flops_target": work.get("flops_target"),
        "params_target": work.get("params_target"),
        "dataset": data.get("name"),
        "preset": data.get("preset"),
        "examples": work.get("examples"),
        "unique_examples": work.get("unique_examples"),
        "epochs": work.get("epochs"),
        "lr_dense": training.get("lr"),
        "lr_embedding": training.get("embedding_lr"),
        "lr_rule": record.get("lr_rule", "fixed"),
        "lr_bracketed": record.get("lr_bracketed"),
        "lr_trials": record.get("lr_trials"),
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
    row |= {name: record.get("cost", {}).get(name) for name in ("wall_s", "step_ms", "rows_per_s", "mfu")}
    device = record.get("device") or {}
    return row | {"device": device.get("kind") if isinstance(device, dict) else device}


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

_COUNTS = (
    "dense_params",
    "active_params",
    "embedding_params",
    "head_params",
    "tokenizer_params",
    "memory_params",
    "forward_flops_per_row",
    "train_flops_per_row",
)
