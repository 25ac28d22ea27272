"""Tables of other trackers of experiments as run tables: W&B, MLflow and TensorBoard.

Names and words are mapped where they mean what a column of a run table means, all else is left as it is, and every
mapping is told: `State` finished, crashed, killed becomes `status` done, failed, failed; `config.lr` becomes `lr`.
"""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from recscale.scaling.records.runs import STATUSES

# What trackers say of a run, in small letters: W&B, MLflow, Optuna, Ray and Slurm.
_STATUS_WORDS = {
    "done": ("finished", "complete", "completed", "success", "succeeded", "terminated"),
    "failed": ("crashed", "killed", "fail", "error", "errored", "cancelled", "canceled", "timeout", "out_of_memory"),
    "running": ("preempting", "preempted"),
    "planned": ("pending", "scheduled", "queued", "waiting", "created"),
}
_STATUS = {word: status for status, words in _STATUS_WORDS.items() for word in (status, *words)}
_STATUS_COLUMNS = ("status", "Status", "State", "state")
_RUN_COLUMNS = ("run_id", "Run ID", "ID", "id", "Name", "Run Name")
# Groups that exports put before the name of a setting or a result.
_PREFIX = re.compile(r"(?:config|summary|summary_metrics|metrics|params)[./](.+)")
_EVENTS = "events.out.tfevents."


def from_export(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """An exported table with the names and words of a run table, and what was mapped to what."""
    told: list[str] = []
    columns = [str(name) for name in table.columns]
    bare = {name: match[1] for name in columns if (match := _PREFIX.fullmatch(name))}
    once = {name for name in bare.values() if list(bare.values()).count(name) == 1 and name not in columns}
    renamed = {name: inner for name, inner in bare.items() if inner in once}
    if renamed:
        table = table.rename(columns=renamed)
        told.append(f"columns without their prefix: {', '.join(f'{old} as {new}' for old, new in renamed.items())}")
    state = next((name for name in _STATUS_COLUMNS if name in table.columns), None)
    if state is not None:
        table = _with_status(table, state, told)
    run = next((name for name in _RUN_COLUMNS if name in table.columns and table[name].notna().all()), None)
    # Only beside a state is a name that of a run: elsewhere it may be anything.
    if run not in (None, "run_id") and state in ("State", "Status", "state"):
        table = table.assign(run_id=table[run].astype(str))
        told.append(f"{run} as run_id")
    return table, told


def _with_status(table: pd.DataFrame, state: str, told: list[str]) -> pd.DataFrame:
    """The table with our words in `status`, where any of another tracker stands in the column of its states."""
    words = table[state].map(lambda word: str(word).strip().lower(), na_action="ignore")
    status = words.map(_STATUS)
    if status.isna().all() or (state == "status" and table[state].dropna().isin(STATUSES).all()):
        return table
    known = status.notna()
    counts = Counter(zip(table[state][known].astype(str), status[known], strict=True))
    pairs = [f"{word} as {ours} ({count})" for (word, ours), count in counts.items()]
    told.append(f"{state} as status: {', '.join(pairs)}")
    return table.assign(status=status.where(known, table[state]))


def from_folder(folder: Path) -> tuple[pd.DataFrame, list[str]]:
    """The runs below a folder of W&B (offline) or TensorBoard, one row a run with its settings and last values.

    Raises ValueError if there are none, or they cannot be read.
    """
    offline = sorted(folder.rglob("*.wandb"))
    events = sorted(folder.rglob(f"{_EVENTS}*"))
    if offline:
        rows, tracker, files = [_wandb_run(path) for path in offline], "W&B", offline
    elif events:
        places = sorted({path.parent for path in events})
        rows, tracker, files = [_tensorboard_run(place, folder) for place in places], "TensorBoard", events
    else:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"{folder} has no runs.parquet and no runs of W&B or TensorBoard (found {found}); collect the sweep first, "
            "or name a table file"
        )
    told = f"{len(rows)} runs of {tracker} from {len(files)} files below {folder}; of every result the last value"
    table, mapped = from_export(pd.json_normalize(rows, max_level=0))
    return table, [told, *mapped]


def _wandb_run(path: Path) -> dict[str, Any]:
    """Settings, last values and state of one .wandb file, which holds what an offline run would have uploaded."""
    from wandb.proto import wandb_internal_pb2

    record_of = vars(wandb_internal_pb2)["Record"].FromString  # a class made when the module is loaded
    row: dict[str, Any] = {"State": "crashed"}  # a run that ended says so
    settings: dict[str, Any] = {}
    for block in _wandb_blocks(path.read_bytes(), path):
        record = record_of(block)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            row |= {"run_id": record.run.run_id, "Name": record.run.display_name}
            settings |= _wandb_items(record.run.config.update)
        elif kind == "config":
            settings |= _wandb_items(record.config.update)
        elif kind == "summary":
            row |= _wandb_items(record.summary.update)
        elif kind == "history":
            row |= _wandb_items(record.history.item)
        elif kind == "exit":
            row["State"] = "failed" if record.exit.exit_code else "finished"
    nested = pd.json_normalize(settings).iloc[0].to_dict() if settings else {}
    return {str(name): value for name, value in nested.items()} | row


def _wandb_items(items: Any) -> dict[str, Any]:
    """The entries of a W&B record, those of its own left out."""
    found = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
    return {key: value for key, value in found.items() if not key.startswith("_")}


def _wandb_blocks(content: bytes, path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format, 32 KiB blocks of chunks (crc32, length, type) after 7 bytes.

    A record torn by a kill ends the file.
    """
    if content[:4] != b":W&B":
        raise ValueError(f"{path} is not a file of W&B runs: it does not begin with ':W&B'")
    place, parts = 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        if kind == 0 or place + 7 + length > len(content):
            return
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def _tensorboard_run(place: Path, folder: Path) -> dict[str, Any]:
    """Last value of every scalar of one folder of event files, named by its path."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise ValueError(
            f"{place} holds event files, which TensorBoard itself has to read: pip install 'recscale[tensorboard]'"
        ) from error
    events = EventAccumulator(str(place)).Reload()
    scalars = {tag: events.Scalars(tag)[-1] for tag in events.Tags()["scalars"]}
    steps = {"step": max(last.step for last in scalars.values())} if scalars else {}
    return {"run_id": str(place.relative_to(folder)), **steps, **{tag: last.value for tag, last in scalars.items()}}
