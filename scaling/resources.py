"""What a run used of five resources: computation, memory, energy, money and network. Each figure says how it is known.

    measured    by a clock or a meter            counted     from shapes, closed forms or the compiled program
    estimated   from figures somebody stated     absent      not known; never 0

Prices, watts and the grid's intensity are the user's (`tracking.usd_per_device_hour`, `tracking.watts_per_device`,
`tracking.grid_kg_per_kwh`); without them there is no cost, no estimate of energy and no CO2.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

Source = Literal["measured", "counted", "estimated", "absent"]

# Seconds between two readings of the power of the devices.
_SAMPLE_S = 1.0

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
_COLLECTIVE = re.compile(
    r"= (?P<result>\S.*?) (?P<name>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    r"(?P<operands>[^)]*)\)"
)
_COMMENT = re.compile(r"/\*.*?\*/")
_SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_DEFINED = re.compile(r"^\s*(?:ROOT )?(%?[\w.\-]+) = (\(.*?\)|\S+) ", re.MULTILINE)


def figure(value: float | int | None, unit: str, source: Source) -> dict[str, Any]:
    """{"value", "unit", "source"}; of None the source is "absent"."""
    return {"value": value, "unit": unit, "source": "absent" if value is None else source}


def value_of(resources: Mapping[str, Any], name: str) -> float | int | None:
    """The value of a figure, None where it is absent or not recorded."""
    return (resources.get(name) or {}).get("value")


def computation(flops: Mapping[str, float], clock: Mapping[str, float | None], peak: float | None) -> dict[str, Any]:
    """Computation and time.

    Args:
        flops: forward_flops_per_row, train_flops_per_row, train_flops. peak: FLOP/s of all devices, None if unknown.
        clock: wall_seconds, train_seconds, eval_seconds, devices, rows_per_second, step_ms_p10, _p50, _p90 and
            input_wait_share; None or missing where not known.
    """
    wall, speed = clock.get("wall_seconds"), clock.get("rows_per_second")
    found = {name: figure(value, "FLOP", "counted") for name, value in flops.items()}
    for name in ("wall_seconds", "train_seconds", "eval_seconds", "compile_seconds"):
        found[name] = figure(clock.get(name), "s", "measured")
    found["device_hours"] = figure(None if wall is None else wall * (clock["devices"] or 1) / 3600, "h", "measured")
    for name in ("step_ms_p10", "step_ms_p50", "step_ms_p90"):
        found[name] = figure(clock.get(name), "ms", "measured")
    found["rows_per_second"] = figure(speed, "1/s", "measured")
    found["input_wait_share"] = figure(clock.get("input_wait_share"), "ratio", "measured")
    found["peak_flops_used"] = figure(peak, "FLOP/s", "estimated")
    useful = None if speed is None else speed * flops["train_flops_per_row"]
    found["mfu"] = figure(None if useful is None or peak is None else useful / peak, "ratio", "measured")
    return found


def memory(counts: Mapping[str, int], state: Mapping[str, int], temporary: int | None = None) -> dict[str, Any]:
    """Parameters (`counts`), bytes of the parts of the state, the most that a step holds besides (`temporary`, as its
    compiler says: activations, gradients, what a collective needs), and the peaks of this process and its first device.
    """
    import jax

    found = {name: figure(value, "count", "counted") for name, value in counts.items()}
    found |= {name: figure(value, "B", "counted") for name, value in state.items()}
    found["activation_bytes"] = figure(temporary, "B", "counted")
    held = jax.local_devices()[0].memory_stats() or {}
    found["peak_device_bytes"] = figure(held.get("peak_bytes_in_use"), "B", "measured")
    scale = 1 if sys.platform == "darwin" else 1024
    found["peak_host_bytes"] = figure(scale * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "B", "measured")
    return found


def energy_and_money(
    device_hours: float | None, rows: int, stated: Mapping[str, float], measured_kwh: float | None = None
) -> dict[str, Any]:
    """Energy of the devices alone, its CO2 and the cost of their hours.

    Args:
        rows: trained. stated: watts_per_device, usd_per_device_hour, grid_kg_per_kwh; 0 or missing where nobody said.
        measured_kwh: of a meter; else watts times hours.
    """
    watts, price, grid = (
        stated.get(name) or None for name in ("watts_per_device", "usd_per_device_hour", "grid_kg_per_kwh")
    )
    guess = None if device_hours is None or watts is None else device_hours * watts / 1000
    energy = guess if measured_kwh is None else measured_kwh
    cost = None if device_hours is None or price is None else device_hours * price
    return {
        "energy_kwh": figure(energy, "kWh", "estimated" if measured_kwh is None else "measured"),
        "co2e_kg": figure(None if energy is None or grid is None else energy * grid, "kg", "estimated"),
        "cost_usd": figure(cost, "$", "estimated"),
        "usd_per_million_rows": figure(None if cost is None or not rows else 1e6 * cost / rows, "$", "estimated"),
    }


def network(
    per_step: Mapping[str, int] | None, steps: int, predicted: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Communication of a device: operand bytes of each kind of collective a step, and of the whole run.

    predicted: see `recscale.scaling.parallel.predicted_bytes`.
    """
    total = None if per_step is None else sum(per_step.values())
    found = {
        f"communication_bytes_per_step_{name.replace('-', '_')}": figure(count, "B", "counted")
        for name, count in (per_step or {}).items()
    }
    found["communication_bytes_per_step"] = figure(total, "B", "counted")
    found["communication_bytes"] = figure(None if total is None else total * steps, "B", "counted")
    foreseen = None if predicted is None else sum(predicted.values())
    found["communication_bytes_per_step_predicted"] = figure(foreseen, "B", "estimated")
    return found


def collective_bytes(text: str) -> dict[str, int]:
    """{collective: bytes of its operands on a device} of the text of a compiled program, once each, loops included."""
    text = _COMMENT.sub("", text)  # long lists of operands are numbered in comments
    shapes = {name.lstrip("%"): _shape_bytes(kind) for name, kind in _DEFINED.findall(text)}
    found: dict[str, int] = {}
    for match in _COLLECTIVE.finditer(text):
        operands = match["operands"]
        # An operand is written with its shape or by its name alone, as the compiler of the day likes.
        size = _shape_bytes(operands)
        if not size:
            size = sum(shapes.get(name.strip().lstrip("%"), 0) for name in operands.split(","))
        found[match["name"]] = found.get(match["name"], 0) + size
    return found


def percentiles(step_seconds: Sequence[float]) -> dict[str, float]:
    """step_ms_p10, _p50 and _p90 of the time of a step; {} of none."""
    if not step_seconds:
        return {}
    values = 1e3 * np.percentile(step_seconds, (10, 50, 90))
    return {f"step_ms_p{p}": float(value) for p, value in zip((10, 50, 90), values, strict=True)}


class Meter:
    """Integrates the power of devices over time: `kwh` after the block; None where no meter can be read.

    Args:
        watts: reads the power of all devices together, None where there is no meter. clock: seconds.
    """

    def __init__(self, watts: Callable[[], float] | None, clock: Callable[[], float] = time.monotonic):
        self._watts, self._clock, self._joules = watts, clock, 0.0
        self._last: tuple[float, float] | None = None

    @property
    def kwh(self) -> float | None:
        return None if self._watts is None else self._joules / 3.6e6

    def resume_from(self, kwh: float | None) -> None:
        """Counts the energy of earlier processes in."""
        self._joules += 3.6e6 * (kwh or 0.0)

    def sample(self) -> None:
        """Adds the time since the last sample, at the mean of both powers."""
        if self._watts is None:
            return
        now, watts = self._clock(), self._watts()
        if self._last is not None:
            self._joules += (now - self._last[0]) * (watts + self._last[1]) / 2
        self._last = now, watts

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Samples every second while the block runs."""
        if self._watts is None:
            yield
            return
        done = threading.Event()

        def keep() -> None:
            while not done.wait(_SAMPLE_S):
                self.sample()

        self.sample()
        sampling = threading.Thread(target=keep, daemon=True)
        sampling.start()
        try:
            yield
        finally:
            done.set()
            sampling.join()
            self.sample()


def nvidia_watts() -> Callable[[], float] | None:
    """Reads the power of this process's NVIDIA devices; None where there are none, or no `pynvml`."""
    import jax

    devices = [device for device in jax.local_devices() if device.platform == "gpu"]
    try:
        import pynvml  # pyright: ignore[reportMissingImports]  # comes with NVIDIA's tools where there are any

        pynvml.nvmlInit()
        # NVML counts all devices of the machine, jax those that this process may see.
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        numbers = [device.local_hardware_id for device in devices]
        handles = [pynvml.nvmlDeviceGetHandleByIndex(int(visible[n]) if visible else n) for n in numbers]
    except Exception:  # whatever a driver says, there is no meter
        return None
    return (lambda: sum(pynvml.nvmlDeviceGetPowerUsage(handle) for handle in handles) / 1000) if handles else None


def _shape_bytes(text: str) -> int:
    """Bytes of all shapes that a text of a compiled program names."""
    total = 0
    for kind, sizes in _SHAPE.findall(text):
        count = int(np.prod([int(size) for size in sizes.split(",") if size], dtype=np.int64))
        total += count * _BYTES.get(kind, 4)
    return total
