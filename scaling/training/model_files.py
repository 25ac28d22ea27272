"""The model a run leaves: its arrays on disk, and back to a model, its tables and its schema.

    <run>/model/best     what the record's metrics are of: the pass that validation chose
    <run>/model/final    the last state, where that is another one; the only one of a run without validation passes

Written by the checkpoint writer of training, one replica, without the optimiser.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from ml_collections import ConfigDict

from recscale import models
from recscale.models.inputs import Schema
from recscale.models.inputs.tables import EmbeddingTables
from recscale.scaling.data import Verifiable, make_source
from recscale.scaling.data.source import Source
from recscale.scaling.processes import is_first
from recscale.scaling.records.advice import advised
from recscale.scaling.records.runs import RECORD, read_record

from .checkpoints import Checkpoints
from .config import get_config, run_id
from .group import RunSpec
from .step import Trainer, TrainState, make_trainer

FOLDER = "model"
_PARTS = ("params", "other", "values", "tables")


class Loaded(NamedTuple):
    """A trained model: logits = model(tables.lookup(batch)).logits, with batches of `schema`."""

    model: Any
    tables: EmbeddingTables
    schema: Schema


def save_model(run: RunSpec, name: str, state: TrainState, replica: int) -> None:
    """Writes the arrays of one replica to `model/<name>` in its run's folder, in place of what is there."""
    folder = run.run_dir / FOLDER / name
    if is_first():
        shutil.rmtree(folder, ignore_errors=True)
    arrays = {part: jax.tree.map(lambda a: a[replica : replica + 1], getattr(state, part)) for part in _PARTS}
    step = int(state.step)
    checkpoints = Checkpoints(folder)
    checkpoints.save(step, {"segment": 0, "step": step, "run_id": run_id(run.config)}, arrays, None)
    checkpoints.close()


def restore_model(run_dir: Path | str, root: str | None = None) -> tuple[Trainer, TrainState, Source]:
    """The trained state of a run, the trainer that evaluates it and the data it was trained on.

    Args:
        run_dir: folder of a run. root: folder of its data set; None = the one it was trained from.

    Raises:
        FileNotFoundError: no record, or no model (the run is not done, or kept none).
        ValueError: the model is damaged, or another run's.
    """
    run_dir = Path(run_dir)
    record = read_record(run_dir)
    if record is None:
        raise FileNotFoundError(f"{run_dir} holds no run (no run.json)")
    config = run_config(record)
    folder = run_dir / FOLDER / ("best" if record["config"]["training"].get("passes") else "final")
    if not folder.is_dir():
        hints = {"done": _mend(run_dir), "diverged": "it leaves no model"}
        hint = hints.get(record["status"], "train it to its end")
        raise FileNotFoundError(f"{folder} is not there, and the run is {record['status']}: {hint}")
    config.data.root = root or record.get("data", {}).get("folder") or ""
    training = config.training
    source = make_source(config.data.to_dict(), requests=training.requests, candidates=training.candidates)
    if isinstance(source, Verifiable):
        source.verify()
    trainer = make_trainer(config, source, [(int(config.seed), float(training.lr))], warmup=0)
    shapes = trainer.state_shapes()
    checkpoints = Checkpoints(folder)
    restored = checkpoints.restore(
        {part: getattr(shapes, part) for part in _PARTS},
        lambda position: None if position.get("run_id") == record["run_id"] else "it is another run's",
    )
    checkpoints.close()
    if restored is None:
        reasons = "; ".join(each["reason"] for each in checkpoints.discarded) or "it is empty"
        raise ValueError(f"{folder} is not the model of run {record['run_id']}: {reasons}; {_mend(run_dir)}")
    return trainer, dataclasses.replace(shapes, **restored.state), source


def _mend(run_dir: Path) -> str:
    return (
        "to have it made anew, delete the run's record and train it again, from its newest checkpoint on: "
        f"{advised('rm', run_dir / RECORD)}"
    )


def load(run_dir: Path | str, root: str | None = None) -> Loaded:
    """The trained model of a run as modules; `root` as in `restore_model`."""
    return loaded(*restore_model(run_dir, root))


def loaded(trainer: Trainer, state: TrainState, source: Source) -> Loaded:
    """What `restore_model` returned, as modules."""
    schema = source.schema
    model = nnx.merge(*trainer.model_state(state))
    tables = EmbeddingTables(schema, rngs=nnx.Rngs(0))
    for name, rows in state.tables.items():
        tables.tables[name][...] = rows[0]
    return Loaded(model, tables, schema)


def run_config(record: dict[str, Any]) -> ConfigDict:
    """The configuration of a recorded run, with today's defaults where it changes no result."""
    plain = _tuples(record["config"])
    config = get_config(plain["architecture"], plain["data"]["name"])
    config.model = models.get_config(plain["architecture"])
    with config.unlocked():
        for section in ("model", "data", "training"):
            config[section].update(plain[section])
    config.seed = plain["seed"]
    return config


def _tuples(value: Any) -> Any:
    """Lists back to tuples: JSON has no tuples, configurations hold no lists."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
