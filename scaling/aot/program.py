"""One program compiled for one target, and what the compiler says about it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from recscale.pallas_kernels.dispatch import Refused
from recscale.pallas_kernels.targets import Target, compiling_for
from recscale.scaling.counting.xla_cost import compiled_cost
from recscale.scaling.records.number_text import byte_text
from recscale.scaling.resources import collective_bytes

from .devices import Devices, compile_only_devices

COMPILED, LOWERED, REFUSED, FAILED = "compiled", "lowered", "refused", "failed"

# A collective of XLA's program text, counted once whether it is one instruction or a pair of start and done.
_COLLECTIVE = re.compile(
    r"= \S.*? (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast)(?:-start)?\("
)
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
# Of an error's message; compilers can write pages.
_MESSAGE_LENGTH = 600


@dataclasses.dataclass(frozen=True)
class Program:
    """What to compile.

    Attributes:
        kind: "kernel" or "train_step". name: the operation or the model. case: the named shape, "" for a model.
        implementation: of an operation, "" for a model. mesh: text of the mesh, "" for one device.
        devices: how many the program runs on.
        build: devices -> (jitted function, abstract arguments that say where they lie).
        temporaries_bound: bytes of temporaries the program may have; None is any.
        memory: abstract arguments -> bytes a device holds of what has a name: state_bytes, batch_bytes, gradient_bytes,
            the largest array of the state; and the collectives' bytes by formula.
        fitting: bytes of a device -> text of a mesh on which state and gradients fit, "" if none was found.
        facts: further columns of the row.
    """

    kind: str
    name: str
    case: str
    implementation: str
    mesh: str
    devices: int
    build: Callable[[Devices], tuple[Any, tuple[Any, ...]]]
    temporaries_bound: int | None = None
    memory: Callable[[tuple[Any, ...]], dict[str, Any]] = lambda args: {}
    fitting: Callable[[int], str] = lambda room: ""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


def compile_program(program: Program, target: Target, devices: Devices, *, lower_only: bool = False) -> dict[str, Any]:
    """One row: what was compiled and how it went. Bytes are per device.

    Keys: target, kind, name, case, implementation, mesh, devices, status ("compiled", "lowered", "refused" or
    "failed"), reason, compile_s, argument_bytes, output_bytes, temporary_bytes, bytes_per_device, temporaries_bound,
    flops, bytes_accessed (of the compiler's cost analysis, None where it gives none), collectives (name -> count),
    collective_bytes (name -> bytes of their operands), registers, spill_bytes (GPU kernels), the program's own facts,
    and of a training step state_bytes, batch_bytes, gradient_bytes, activation_bytes (temporaries that are no
    gradients), largest_array and predicted_bytes (like collective_bytes, None where no formula holds).
    """
    row = blank_row(program, target)
    start = time.perf_counter()
    try:
        with _printed(target.platform == "gpu") as printed:
            function, args = program.build(devices)
            row |= program.memory(args)
            traced = function.trace(*args)
            lowered = traced.lower(lowering_platforms=(_lowering_platform(target),))
            executable = None if lower_only else lowered.compile()
    except Refused as error:
        return row | {"status": REFUSED, "reason": _message(error)}
    except Exception as error:  # whatever a compiler raises is the result
        return row | {"reason": f"{type(error).__name__}: {_message(error)}{_limit(row, program, target, str(error))}"}
    row["compile_s"] = time.perf_counter() - start
    if executable is None:
        return row | {"status": LOWERED}
    text = executable.as_text() or ""
    row |= _cost(executable) | {"collectives": collectives(text), "collective_bytes": collective_bytes(text)}
    if target.platform == "gpu" and program.kind == "kernel":
        row |= _registers("".join(printed))
    if row["gradient_bytes"] is not None:
        row["activation_bytes"] = max(row["temporary_bytes"] - row["gradient_bytes"], 0)
    row["reason"] = _over_bounds(row, program, target)
    return row | {"status": FAILED if row["reason"] else COMPILED}


def blank_row(program: Program, target: Target) -> dict[str, Any]:
    """The row of a program before anything is known about it."""
    return {
        "target": target.name,
        "kind": program.kind,
        "name": program.name,
        "case": program.case,
        "implementation": program.implementation,
        "mesh": program.mesh,
        "devices": program.devices,
        "status": FAILED,
        "reason": "",
        **dict.fromkeys(("compile_s", "argument_bytes", "output_bytes", "temporary_bytes", "bytes_per_device")),
        "temporaries_bound": program.temporaries_bound,
        **dict.fromkeys(("flops", "bytes_accessed", "collectives", "collective_bytes", "registers", "spill_bytes")),
        **dict.fromkeys(("state_bytes", "batch_bytes", "gradient_bytes", "activation_bytes", "largest_array")),
        "predicted_bytes": None,
        **program.facts,
    }


def compile_all(
    programs: Callable[[Target], list[Program]],
    target: Target,
    begin: Callable[[dict[str, Any]], None] = lambda row: None,
    *,
    lower_only: bool = False,
) -> Iterator[dict[str, Any]]:
    """The rows of a target's programs, each as soon as it is there; `begin` is told of each one (its blank row).

    With `lower_only` no compiler is needed: programs are lowered for the target from this machine's CPU.
    """
    with compiling_for(target):
        devices: dict[int, Devices] = {}
        for program in programs(target):
            if program.devices not in devices:
                here = jax.devices("cpu") if lower_only else compile_only_devices(target, program.devices)
                devices[program.devices] = here
            begin(blank_row(program, target))
            yield compile_program(program, target, devices[program.devices], lower_only=lower_only)


def collectives(text: str) -> dict[str, int]:
    """Collective operation -> how often it stands in the text of a compiled program."""
    found: dict[str, int] = {}
    for name in _COLLECTIVE.findall(text):
        found[name] = found.get(name, 0) + 1
    return found


def _lowering_platform(target: Target) -> str:
    return "cuda" if target.platform == "gpu" else target.platform


def _cost(executable: Any) -> dict[str, float | None]:
    """Memory, FLOPs and bytes of a device; never the compiler's guess of a time."""
    cost = compiled_cost(executable)
    return {
        "argument_bytes": cost.argument_bytes,
        "output_bytes": cost.output_bytes,
        "temporary_bytes": cost.temporary_bytes,
        # A donated argument and the output that takes its place are one.
        "bytes_per_device": cost.peak_bytes,
        "flops": cost.flops,
        "bytes_accessed": cost.bytes_accessed,
    }


def _registers(printed: str) -> dict[str, int | None]:
    """The most registers and spilled bytes of the kernels ptxas reported on."""
    registers = [int(n) for n in _REGISTERS.findall(printed)]
    spills = [int(stores) + int(loads) for stores, loads in _SPILLS.findall(printed)]
    return {"registers": max(registers, default=None), "spill_bytes": max(spills, default=None)}


def _over_bounds(row: dict[str, Any], program: Program, target: Target) -> str:
    """Why a compiled program does not do, "" if it does."""
    bound, temporaries = row["temporaries_bound"], row["temporary_bytes"]
    if bound is not None and temporaries is not None and temporaries > bound:
        return f"{temporaries:,} bytes of temporaries, at most {bound:,} expected"
    if row["spill_bytes"]:
        return f"spills {row['spill_bytes']:,} bytes of registers ({row['registers']} in use)"
    if row["kind"] == "train_step" and (row["bytes_per_device"] or 0) > target.hbm_bytes:
        return f"needs {byte_text(row['bytes_per_device'])} a device{_limit(row, program, target, 'memory')}"
    return ""


def _limit(row: dict[str, Any], program: Program, target: Target, said: str) -> str:
    """Of a training step that ran out of memory: which part of it is too large, and what helps."""
    if row["state_bytes"] is None or not any(word in said.lower() for word in ("memory", "hbm", "resource_exhausted")):
        return ""
    state, room = row["state_bytes"], byte_text(target.hbm_bytes)
    if state + row["gradient_bytes"] > target.hbm_bytes:
        held = f"state and gradients alone are {byte_text(state + row['gradient_bytes'])}"
        largest = f", the largest array is {row['largest_array']}" if row["largest_array"] else ""
        mesh = program.fitting(target.hbm_bytes)
        mend = f"they fit on --mesh {mesh}" if mesh else "split them over more of fsdp and tensor"
        return f"; the limit is {room} of {target.name}, {held}{largest}: {mend}"
    held = f"state and gradients are {byte_text(state + row['gradient_bytes'])}, activations take more than the rest"
    return f"; the limit is {room} of {target.name}, {held}: fewer --rows-per-step, or more devices that split requests"


def _message(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MESSAGE_LENGTH else f"{text[:_MESSAGE_LENGTH]} ..."


@contextlib.contextmanager
def _printed(wanted: bool) -> Iterator[list[str]]:
    """What this process, native code included, writes while the block runs; nothing of it is shown."""
    text: list[str] = []
    if not wanted:
        yield text
        return
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {number: os.dup(number) for number in (1, 2)}
    with tempfile.TemporaryFile() as file:
        for number in kept:
            os.dup2(file.fileno(), number)
        try:
            yield text
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in kept.items():
                os.dup2(copy, number)
                os.close(copy)
            file.seek(0)
            text.append(file.read().decode(errors="replace"))
