"""The resources of a run's record, from what a training loop knows: see `recscale.scaling.resources`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax

from recscale.models.counts import Count
from recscale.models.inputs.tables import find_touched
from recscale.pallas_kernels import targets
from recscale.scaling import resources
from recscale.scaling.counting.abstract import abstract_batch
from recscale.scaling.counting.xla_cost import compiled_cost
from recscale.scaling.data.source import Source
from recscale.scaling.parallel import Lookup, predicted_bytes

from .clock import Clock
from .preflight import device_bytes, state_bytes
from .schedule import train_flops_per_row
from .step import Trainer, TrainState

_PARAMETERS = ("dense_params", "active_params", "embedding_params", "memory_params")


def run_resources(
    trainer: Trainer,
    state: TrainState,
    counts: Count,
    source: Source,
    clock: Clock,
    *,
    steps: int,
    stated: Mapping[str, float],
    energy_kwh: float | None,
) -> dict[str, Any]:
    """Figures of one run after so many steps. Runs that are trained together share device-hours, energy and cost in
    equal parts; times, speeds and memory are those of their program.

    Args:
        stated: the run's `tracking` section. energy_kwh: measured of the program so far, None without a meter.
    """
    replicas = len(trainer.seeds)
    devices = 1 if trainer.mesh is None else trainer.mesh.size
    batch_rows = source.requests * source.candidates
    per_row = train_flops_per_row(counts, source)
    forward = counts.forward_flops_user / source.candidates + counts.forward_flops_candidate
    flops = {"forward_flops_per_row": forward, "train_flops_per_row": per_row}
    flops |= {"train_flops": per_row * batch_rows * steps}
    speed = None if not clock.step_s else batch_rows / clock.step_s
    times = {
        "wall_seconds": clock.wall_s,
        "train_seconds": None if not clock.step_s else clock.step_s * steps,
        "eval_seconds": clock.evaluating_s,
        "devices": devices / replicas,
        "rows_per_second": speed,
        "input_wait_share": None if source.on_device else clock.input_wait_share,
        **resources.percentiles(clock.step_seconds),
    }
    target = targets.current()
    found = resources.computation(flops, times, None if target is None else target.bf16_flops * devices / replicas)
    arrays = {
        "table_bytes": (state.tables, state.values),
        "bank_bytes": state.other,
        "optimizer_bytes": (state.moments, state.slots, state.value_slots),
    }
    parameters = {name: getattr(counts, name) for name in _PARAMETERS}
    temporary = None if trainer.compiled is None else compiled_cost(trainer.compiled).temporary_bytes
    state_parts = {name: state_bytes(part) // replicas for name, part in arrays.items()}
    state_parts["optimizer_bytes_per_device"] = device_bytes(arrays["optimizer_bytes"]) // replicas
    found |= resources.memory(parameters, state_parts, temporary)
    hours = resources.value_of(found, "device_hours")
    share = None if energy_kwh is None else energy_kwh / replicas
    found |= resources.energy_and_money(hours, batch_rows * steps, stated, share)
    return found | resources.network(trainer.communication, steps, predicted_communication(trainer, state))


def predicted_communication(trainer: Trainer, state: TrainState) -> dict[str, float] | None:
    """What the formulas say that a step of a state (arrays or shapes) sends; None where they say nothing."""
    source = trainer.source
    if trainer.mesh is None or state.values:
        return None
    batch = abstract_batch(source.schema, source.requests, source.candidates)
    touched = jax.eval_shape(functools.partial(find_touched, source.schema), batch)
    lookups = []
    for name, rows in touched.items():
        slots = [slot for slot in jax.tree.leaves(state.slots[name]) if slot.ndim > 1]
        ids = sum(place.size for place in rows.positions.values())
        lookups.append(Lookup(ids, rows.rows.size, state.tables[name], slots))
    places = trainer.expert_places
    return predicted_bytes(state.params, trainer.mesh, source.requests * source.candidates, lookups, places)


def stated_figures(tracking: Mapping[str, Any]) -> dict[str, float]:
    """Prices and powers of a run's `tracking` section."""
    names = ("watts_per_device", "usd_per_device_hour", "grid_kg_per_kwh")
    return {name: float(tracking.get(name) or 0.0) for name in names}


def meter() -> resources.Meter:
    """The power of this process's devices."""
    return resources.Meter(resources.nvidia_watts() if jax.default_backend() == "gpu" else None)
