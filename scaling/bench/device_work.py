"""The processes of `recscale bench device`: each does one job and writes a JSON line for every item.

The process gets its task as a line of JSON on its standard input: stage, name, cpu, out, done (ids of rows that are
there), and what the stage needs. It writes {"begun": id} before an item and the item's row after it, and ends when its
standard input does, which is when whoever started it is gone.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from recscale.pallas_kernels import blocks, cases
from recscale.pallas_kernels.cases import Case
from recscale.pallas_kernels.dispatch import Refused
from recscale.pallas_kernels.targets import Target
from recscale.scaling.records.plain import plain
from recscale.scaling.records.provenance import environment

from .accelerator import accelerator
from .kernel_timing import Effort, Function, bit_equal, errors, time_calls
from .kernel_tuning import tune
from .kernels import first_line, functions, timed_rows

# (id, what makes the row's other columns)
Item = tuple[str, Callable[[], dict[str, Any]]]

# Sides of a product, and bytes of an array, that show what a device can do; on a CPU, that the harness works.
_SIDE, _COPIED = 8192, 2**30
_SIDE_ON_CPU, _COPIED_ON_CPU = 128, 2**20

# What an output holds before it is written: what is left of it differs between two runs, and NaN is wrong in any.
_POISONS = (float("nan"), -3.0)


def serve() -> None:
    """The process."""
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_input, daemon=True).start()
    done = set(task["done"])
    where = environment() | {"command": task["command"]}
    _write({"id": "environment", "stage": "", "status": "done", "environment": where})
    for name, make in _ITEMS[task["stage"]](task):
        if name in done:
            continue
        _write({"begun": name})
        begun = time.perf_counter()
        try:
            row = make()
        except Refused as error:
            row = {"status": "refused", "reason": first_line(error)}
        except Exception as error:  # whatever a compiler or library raises is the result
            row = {"status": "failed", "reason": f"{type(error).__name__}: {first_line(error)}"}
        _write({"id": name, **row, "seconds": time.perf_counter() - begun})


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(1)


def _write(message: dict[str, Any]) -> None:
    print(json.dumps(plain(message)), flush=True)


def _target(task: dict[str, Any]) -> Target | None:
    return None if task["cpu"] else accelerator()


# check ---------------------------------------------------------------------------------------------------------------


def _checks(task: dict[str, Any]) -> Iterator[Item]:
    """Small shapes of an operation, the smallest first, or that alone."""
    target, operation = _target(task), task["operation"]
    small = [case for case in cases.cases(operation) if case.group != "bench"]
    small.sort(key=lambda case: cases.GROUPS.index(case.group))
    for case in small[:1] if task["first"] else small:
        for name, function in _checked(case, target).items():
            yield f"check/{operation}/{case.name}/{name}", functools.partial(_check, case, name, function)


def _checked(case: Case, target: Target | None) -> dict[str, Function]:
    """XLA and the kernels of the device; on a CPU those of all, interpreted."""
    if target is not None:
        own = functions(case, target)
        return {name: own[name] for name in own if name not in case.rivals}
    found: dict[str, Function] = {"xla": functools.partial(case.call, implementation="xla")}
    for name in (*cases.kernels(case.operation, "gpu"), *cases.kernels(case.operation, "tpu")):
        found[name] = functools.partial(case.call, implementation=name, interpret=True)
    return found


def _check(case: Case, name: str, function: Function) -> dict[str, Any]:
    """status "right" or "wrong", with the columns of `errors`, and bit_equal: of two runs."""
    arrays = jax.jit(case.inputs)(jax.random.key(0))
    shapes = jax.eval_shape(function, *arrays)
    poisoned = jax.jit(lambda _, *arrays: function(*arrays), donate_argnums=0, keep_unused=True)
    found, again = (poisoned(_poison(shapes, value), *arrays) for value in _POISONS)
    row = errors(case, jax.device_get(found), _reference(case, arrays)) | {"bit_equal": bit_equal(found, again)}
    # XLA adds with atomics on GPUs; kernels promise the same bits.
    same = row["bit_equal"] or not name.startswith("pallas")
    reason = "" if same else "two runs on the same inputs differ"
    if not row["within_tolerance"]:
        reason = f"error {row['max_error']:.3g}, rtol {case.rtol:g}, ids that differ {row['mismatched_ids']}"
    return {"status": "wrong" if reason else "right", "reason": reason, "group": case.group, **row}


def _poison(shapes: Any, value: float) -> Any:
    def one(a: Any) -> jax.Array:
        floating = jnp.issubdtype(a.dtype, jnp.floating)
        return jnp.full(a.shape, value if floating else -7 if value == value else -9, a.dtype)

    return jax.tree.map(one, shapes)


def _reference(case: Case, arrays: tuple[Any, ...]) -> Any:
    """The definition in float32 on the CPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        wide = jax.tree.map(_widened, jax.device_get(arrays))
        return jax.device_get(jax.jit(lambda *a: case.call(*a, implementation="reference"))(*wide))


def _widened(array: Any) -> jax.Array:
    return jnp.asarray(array, jnp.float32 if jnp.issubdtype(array.dtype, jnp.floating) else None)


# measure -------------------------------------------------------------------------------------------------------------


def _measurements(task: dict[str, Any]) -> Iterator[Item]:
    """What the device can do, or an operation's headline cases by XLA, kernels and rivals."""
    target = _target(task)
    if task["name"] == "ceilings":
        yield "measure/ceilings/copy", functools.partial(_copying, target)
        yield "measure/ceilings/product", functools.partial(_multiplying, target)
        return
    for case in _headlines(task):
        row = functools.cache(functools.partial(timed_rows, case, target, _effort(target)))
        for name, function in functions(case, target).items():
            yield f"{_of(case)}/{name}", functools.partial(_measure, case, row, name, function)
        for name in _torch_names(case):
            yield f"{_of(case)}/{name}", functools.partial(_race_torch, case, target, name)


def _headlines(task: dict[str, Any]) -> list[Case]:
    """The cases asked for; on a CPU the operation's first."""
    own = cases.cases(task["operation"])
    return [own[0]] if task["cpu"] else [case for case in own if case.name in task["cases"]]


def _of(case: Case) -> str:
    return f"measure/{case.operation}/{case.name}"


def _effort(target: Target | None) -> Effort:
    return Effort(warmup=1, runs=3, calls=2) if target is None else Effort(warmup=3, runs=21)


def _measure(case: Case, row: Callable[[], Callable[..., dict[str, Any]]], name: str, function: Function):
    return row()(name, function) | {"bytes_moved": case.bytes_moved, "flops": case.flops}


def _copying(target: Target | None) -> dict[str, Any]:
    """gb_per_s of reading an array and writing another."""
    size = _COPIED_ON_CPU if target is None else _COPIED
    sets = [(jnp.full(size // 4, float(i)),) for i in range(2)]
    times = time_calls(lambda x: -x, sets, _effort(target))
    return {"status": "measured", **times, "gb_per_s": 2 * size / times["median_ms"] / 1e6}


def _multiplying(target: Target | None) -> dict[str, Any]:
    """tflop_per_s of a bfloat16 product of square matrices."""
    side = _SIDE_ON_CPU if target is None else _SIDE
    dtype = jnp.float32 if target is None else jnp.bfloat16
    sets = [(jax.random.normal(jax.random.key(i), (side, side), dtype),) for i in range(2)]
    times = time_calls(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32).astype(x.dtype), sets,
                       _effort(target))  # fmt: skip
    return {"status": "measured", **times, "tflop_per_s": 2 * side**3 / times["median_ms"] / 1e9}


def _torch_names(case: Case) -> tuple[str, ...]:
    try:
        from . import torch_kernels
    except ImportError:
        return ()
    return torch_kernels.names(case.operation, case.name)


def _race_torch(case: Case, target: Target | None, name: str) -> dict[str, Any]:
    from . import torch_kernels

    return {"operation": case.operation, "case": case.name, "implementation": name} | torch_kernels.measure(
        case, target, name, _effort(target)
    )


# train ---------------------------------------------------------------------------------------------------------------


def _trainings(task: dict[str, Any]) -> Iterator[Item]:
    yield f"train/{task['name']}/step", functools.partial(_train, task)


def _train(task: dict[str, Any]) -> dict[str, Any]:
    """Figures of a training step, at half the rows as long as the device has too little memory."""
    target, rows, torch = _target(task), task["rows"], task["implementation"] == "torch"
    steps = {"warmup": 1, "steps": 3} if target is None else {"warmup": 3, "steps": 10}
    if not torch and task["implementation"] != "xla":
        os.environ["RECSCALE_IMPLEMENTATION"] = f"per_token_ffn={task['implementation']}"
    while True:
        try:
            if torch:
                from .train_step import race_torch_at

                device = "cpu" if target is None else "cuda"
                found = race_torch_at(task["model"], rows, steps=steps["steps"], device=device)
            else:
                from .mfu import measure_step

                found = measure_step(task["model"], target, rows=rows, **steps)
            break
        except Exception as error:
            if target is None or rows < 512 or "memory" not in str(error).lower():
                raise
            rows //= 2
    return {"status": "measured", **found, "peak_memory_bytes": _peak_memory()}


def _peak_memory() -> int | None:
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


# tune ----------------------------------------------------------------------------------------------------------------


def _tunings(task: dict[str, Any]) -> Iterator[Item]:
    """The cases at which a kernel lost."""
    target = accelerator()
    own = {case.name: case for case in cases.cases(task["operation"])}
    for name, implementation in task["lost"]:
        item = f"tune/{task['operation']}/{name}/{implementation}"
        yield (
            item,
            functools.partial(_tune, own[name], implementation, target, Path(task["out"]) / "tuned", task["command"]),
        )


def _tune(case: Case, implementation: str, target: Target, folder: Path, command: str) -> dict[str, Any]:
    best, attempts = tune(case, implementation, target, Effort(warmup=2, runs=9))
    where = environment()
    provenance = {key: where[key] for key in ("device", "date", "versions")} | {"command": command}
    own = [row for row in attempts[:-1] if row["median_ms"] is not None]
    if own:
        times = {case.name: min(own, key=lambda row: row["median_ms"])["times_xla"]}
        blocks.write_tuned(case.operation, target.device_kind, implementation, best, times, provenance, folder=folder)
    return {"status": "measured" if own else "failed", "reason": attempts[0]["reason"], "best": best,
            "attempts": attempts}  # fmt: skip


# sweep ---------------------------------------------------------------------------------------------------------------


def _sweeps(task: dict[str, Any]) -> Iterator[Item]:
    yield f"sweep/{task['name']}/runs", functools.partial(_sweep, task)


def _sweep(task: dict[str, Any]) -> dict[str, Any]:
    """A sweep by its own command; one that is ended goes on where it was."""
    import subprocess

    folder = Path(task["out"]) / "sweep"
    command = (sys.executable, "-c", "from recscale.scaling.cli import main; main()", "sweep", task["sweep"], "--out")
    ended = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        said = " ".join(ended.stderr.split())[-600:]
        return {"status": "failed", "reason": f"its command ended with code {ended.returncode}: {said}"}
    return {"status": "measured", "printed": ended.stdout.strip().splitlines()[-12:]}


_ITEMS: dict[str, Callable[[dict[str, Any]], Iterator[Item]]] = {
    "check": _checks,
    "measure": _measurements,
    "train": _trainings,
    "tune": _tunings,
    "sweep": _sweeps,
}
