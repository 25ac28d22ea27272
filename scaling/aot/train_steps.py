"""Whole training steps, the trainer's own, as programs to compile for a mesh of devices that are not there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from recscale.models import registry
from recscale.models.inputs import Schema
from recscale.scaling import parallel
from recscale.scaling.counting.abstract import abstract_batch
from recscale.scaling.counting.schemas import REFERENCE, load_schema
from recscale.scaling.records import overrides
from recscale.scaling.records.number_text import byte_text
from recscale.scaling.training import get_config
from recscale.scaling.training.preflight import device_bytes
from recscale.scaling.training.run_resources import predicted_communication
from recscale.scaling.training.step import Trainer, make_trainer

from .devices import Devices
from .program import Program

# Schema of a model that reads histories, unless another is named.
HISTORY_SCHEMA = "known_truth:long"

# One step of every family: (model, schema or None, settings, mesh). Modest sizes and few tables: every table is sorted
# or scattered into once, and those are slow to compile.
FAMILIES: tuple[tuple[str, str | None, tuple[str, ...], dict[str, int]], ...] = (
    ("rankmixer_10m", None, (), {"data": 2, "tensor": 2}),
    (
        "tokenmixer_large",
        "known_truth:smoke",
        ("tokenizer=cut", "tokens=8", "heads=8", "width=256", "hidden=256"),
        {"fsdp": 2, "tensor": 2},
    ),
    ("longer+rankmixer", "known_truth:smoke", ("model.backbone.tokens=8",), {"data": 2, "tensor": 2}),
    ("mixformer", "known_truth:smoke", (), {"data": 4}),
    ("msn", "known_truth:smoke", ("tokens=8",), {"data": 1}),
)


# Meshes that are tried for a state that does not fit, and the share of a device that state and gradients may take: the
# rest is for activations.
_MORE_DEVICES, _LARGEST_FSDP, _SHARE = tuple(2**k for k in range(1, 13)), 16, 0.8


@dataclasses.dataclass(frozen=True)
class ShapesOnly:
    """What a trainer needs of a source whose batches are never drawn: the host gives them, as shapes."""

    schema: Schema
    requests: int
    candidates: int
    on_device: bool = False
    total_rows: int | None = None
    batches: int | None = None


def train_step_program(
    model: str,
    *,
    axes: Mapping[str, int] | None = None,
    schema_name: str | None = None,
    assignments: Sequence[str] = (),
    rows: int,
    candidates: int = 1,
) -> Program:
    """A training step of one replica as a program.

    Args:
        model: as in the registry: a name, a preset, or encoder+backbone.
        axes: the mesh; None is `parallel.default_axes`.
        schema_name: see `load_schema`; None is the reference schema, or `HISTORY_SCHEMA` for a model that reads
            histories.
        assignments: `key=value` settings of the run's configuration, or of the model's ("tokens=16").
        rows: R * C of a step.

    Raises:
        ValueError: rows that do not divide into candidates and devices, an unknown model, schema or setting.
    """
    schema_name = schema_name or (HISTORY_SCHEMA if registry.reads_history(model) else REFERENCE)
    schema = load_schema(schema_name)
    config = get_config(model)
    config = overrides.apply(config, overrides.parse(config, [_qualified(config, text) for text in assignments]))
    counts = registry.count(model, schema, config.model)
    axes = dict(axes or parallel.default_axes(counts.dense_params))
    requests = _requests(rows, candidates, axes)
    config.training.requests, config.training.candidates = requests, candidates

    source: Any = ShapesOnly(schema, requests, candidates)

    def trainer(mesh: Any) -> Trainer:
        return make_trainer(config, source, [(0, config.training.lr)], warmup=1, mesh=mesh)

    def build(devices: Devices) -> tuple[Any, tuple[Any, ...]]:
        mesh = parallel.make_mesh(axes, devices)
        split = jax.sharding.NamedSharding(mesh, parallel.batch_spec(mesh))
        batch = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=split),
            abstract_batch(schema, requests, candidates),
        )
        whole = trainer(mesh)
        return whole.program, (whole.state_shapes(), batch)

    def memory(args: tuple[Any, ...]) -> dict[str, Any]:
        return _memory(args) | {"predicted_bytes": predicted_communication(trainer(_abstract(axes)), args[0])}

    def fitting(room: int) -> str:
        for devices in _MORE_DEVICES:
            fsdp = min(devices, _LARGEST_FSDP)
            wider = {"fsdp": fsdp} | ({"tensor": devices // fsdp} if devices > fsdp else {})
            if requests % fsdp:
                continue
            shapes = trainer(_abstract(wider)).state_shapes()
            if device_bytes(shapes) + device_bytes(shapes.params) <= _SHARE * room:
                return parallel.mesh_text(wider)
        return ""

    return Program(
        kind="train_step",
        name=model,
        case="",
        implementation="",
        mesh=parallel.mesh_text(axes),
        devices=math.prod(axes.values()),
        build=build,
        facts={
            "schema": schema_name,
            "rows_per_step": rows,
            "dense_params": counts.dense_params,
            "embedding_params": counts.embedding_params,
            "train_flops_per_step": counts.train_flops_per_row * rows,
        },
        memory=memory,
        fitting=fitting,
    )


def _abstract(axes: Mapping[str, int]) -> Any:
    """A mesh without devices."""
    return jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes))


def _memory(args: tuple[Any, ...]) -> dict[str, Any]:
    """Bytes of a device before anything is computed: of the state, of the batch, and of the gradients to come; and the
    largest array of the state by name, with its bytes on a device."""
    state, batch = args
    sizes = {
        jax.tree_util.keystr(path): device_bytes(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    largest = max(sizes, key=lambda name: sizes[name])
    return {
        "state_bytes": device_bytes(state),
        "batch_bytes": device_bytes(batch),
        "gradient_bytes": device_bytes(state.params),
        "largest_array": f"{largest} with {byte_text(sizes[largest])}",
    }


def family_programs(rows: int) -> list[Program]:
    """One training step of so many rows per family of architectures."""
    return [
        train_step_program(model, schema_name=schema, assignments=settings, axes=axes, rows=rows)
        for model, schema, settings, axes in FAMILIES
    ]


def _requests(rows: int, candidates: int, axes: Mapping[str, int]) -> int:
    """R, checked: rows fill whole requests, and requests whole parts of the batch."""
    if rows % candidates:
        raise ValueError(f"rows per step are {rows}, not a multiple of {candidates} candidates per request")
    ways = math.prod(axes.get(axis, 1) for axis in parallel.BATCH_AXES)
    requests = rows // candidates
    if requests % ways:
        raise ValueError(
            f"{requests} requests per step do not divide over {ways} devices of the mesh axes "
            f"{', '.join(a for a in parallel.BATCH_AXES if a in axes)}; change --rows-per-step"
        )
    return requests


def _qualified(config: Any, assignment: str) -> str:
    """A setting of the model may leave out `model.`, as in `recscale count`."""
    key = assignment.partition("=")[0].strip()
    return assignment if key.partition(".")[0] in config else f"model.{assignment}"
