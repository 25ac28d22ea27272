"""Kernels on this machine's accelerator: first whether they are right, then how fast, beside XLA and public rivals.

One row per operation, case and implementation (rivals of the case are implementations too). A share of the roofline is
floor / time with floor = max(bytes / bandwidth, FLOPs / peak) of the case's closed forms; above 1 the byte count is
wrong or a cache served it. A row whose numbers are wrong has no time.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import jax

from recscale.pallas_kernels import cases
from recscale.pallas_kernels.cases import Case
from recscale.pallas_kernels.dispatch import Refused
from recscale.pallas_kernels.names import nearest
from recscale.pallas_kernels.targets import Target
from recscale.scaling.counting.xla_cost import compiled_cost
from recscale.scaling.records.files import write_atomically
from recscale.scaling.records.plain import plain
from recscale.scaling.records.provenance import environment

from .accelerator import accelerator
from .kernel_timing import Effort, Function, bit_equal, errors, input_sets, time_calls
from .kernel_tuning import tune_and_write

# Small shapes are there to be right; their times say nothing.
_BRIEF = Effort(warmup=1, runs=3, calls=2)


def measure_kernels(
    *, tune: bool = False, out: Path | None = None, show: Callable[[str], None] = click.echo, **which: Any
) -> dict[str, Any]:
    """The rows of `kernel_rows(**which)`, shown as they come, as JSON-able figures.

    Args:
        tune: search block sizes first, and keep what is faster as this device's.
        out: also write the result to this file.
        show: receives every row as a line.

    Returns:
        rows; tuning: the attempts of that search; environment.

    Raises:
        NoAccelerator: there is none, and not `cpu`. ValueError: no such operation, or no such case.
    """
    attempts = _tuned(which.get("operations"), which.get("names", ()), show) if tune else []
    rows = []
    for row in kernel_rows(**which):
        show(report(row))
        rows.append(row)
    result = {"rows": rows, "tuning": attempts, "environment": environment()}
    if out is not None:
        write_atomically(out, json.dumps(plain(result), indent=1) + "\n")
    return result


def _tuned(operations: Sequence[str] | None, names: Sequence[str], show: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows of the search of block sizes, shown as they come."""
    target, where, rows = accelerator(), environment(), []
    provenance = {key: where[key] for key in ("device", "date", "versions", "command")}
    effort = Effort(warmup=3, runs=15)
    for row in tune_and_write(operations or cases.OPERATIONS, names, target, provenance, effort):
        time = "-" if row["median_ms"] is None else f"{row['median_ms']:.4f} ms"
        head = f"{row['operation']}/{row['case']} {row['implementation']} {row['key']} {row['sizes']}"
        show(f"{head} {time} {row['reason']}".rstrip())
        rows.append(row)
    return rows


def kernel_rows(
    *,
    operations: Sequence[str] = (),
    names: Sequence[str] = (),
    implementations: Sequence[str] = (),
    cpu: bool = False,
    groups: Sequence[str] = (),
    effort: Effort | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows as they are measured; see `measure_case`. Small shapes come first: what is wrong shows before it is timed.

    Args:
        operations, names, implementations: which; none given is all (with `cpu` "xla" and "reference" alone).
        groups: of shapes, see `cases.GROUPS`; none given is all, with `cpu` the tiny ones. `names` come before it.

    Raises:
        NoAccelerator: there is none, and not `cpu`.
        ValueError: no such operation, or no such case.
    """
    target = None if cpu else accelerator()
    groups = groups or (("tiny",) if cpu else cases.GROUPS)
    chosen = [case for operation in operations or cases.OPERATIONS for case in cases.cases(operation)]
    known = [case.name for case in chosen]
    for name in names:
        if name not in known:
            raise ValueError(f"there is no case {name!r}{nearest(name, known)}")
    where = _provenance()
    for case in sorted(chosen, key=lambda case: cases.GROUPS.index(case.group)):
        if case.name in names or (not names and case.group in groups):
            timed = case.group == "bench" and not cpu
            for row in measure_case(case, target, implementations, effort or (Effort() if timed else _BRIEF)):
                yield row | where


def measure_case(
    case: Case, target: Target | None, implementations: Sequence[str], effort: Effort
) -> list[dict[str, Any]]:
    """The rows of one case: XLA first, then kernels, then rivals.

    Keys: those of `timed_rows`; times_xla (how many times faster than XLA) and times_rival (rival -> likewise).
    """
    row = timed_rows(case, target, effort)
    rows = [row(name, function) for name, function in functions(case, target, implementations).items()]
    times = {row["implementation"]: row["median_ms"] for row in rows}
    for row in rows:
        own = row["median_ms"]
        faster = {name: time / own for name, time in times.items() if own and time and name != row["implementation"]}
        row["times_xla"] = faster.get("xla")
        row["times_rival"] = {name: faster[name] for name in case.rivals if name in faster}
    return rows


def timed_rows(case: Case, target: Target | None, effort: Effort) -> Callable[[str, Function], dict[str, Any]]:
    """(name, function of a case's arrays) -> its row; inputs and the right result are made once, now.

    Keys: operation, case, group, implementation, status ("measured", "wrong", "refused" or "failed"), reason, the
    columns of `errors`, bit_equal, those of `time_calls`, temporary_bytes and peak_bytes (arguments, outputs and
    temporaries, by the compiler), gb_per_s, tflop_per_s, floor_ms, share_of_floor. What could not be had is None.
    """
    sets = input_sets(case, target, effort)
    expected, trouble = _reference(case, sets[0])

    def row(name: str, function: Function) -> dict[str, Any]:
        exact = name not in case.rivals
        return _row(case, name, function, sets, expected, trouble, target, effort, exact=exact)

    return row


def functions(case: Case, target: Target | None, implementations: Sequence[str] = ()) -> dict[str, Function]:
    """Name -> what to run on a case's arrays."""
    ours = ["xla", "reference"] if target is None else ["xla", *cases.kernels(case.operation, target.platform)]
    ours = [name for name in ours if not implementations or name in implementations or name == "xla"]
    found: dict[str, Function] = {name: functools.partial(case.call, implementation=name) for name in ours}
    if target is None:
        return found
    return found | {name: f for name, f in case.rivals.items() if case.only_on.get(name) in (None, target.platform)}


def _reference(case: Case, arrays: tuple[Any, ...]) -> tuple[Any, str]:
    """The right result, or nothing and why."""
    try:
        expected = jax.jit(lambda *a: case.call(*a, implementation="reference"))(*arrays)
        return jax.block_until_ready(expected), ""
    except jax.errors.JaxRuntimeError as error:  # too large for the device
        return None, f"the reference does not run at this shape: {first_line(error)}"


def _row(
    case: Case,
    name: str,
    function: Function,
    sets: list[Any],
    expected: Any,
    trouble: str,
    target: Target | None,
    effort: Effort,
    *,
    exact: bool,
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "operation": case.operation,
        "case": case.name,
        "group": case.group,
        "implementation": name,
        "status": "failed",
        "reason": trouble,
        **dict.fromkeys(("max_error", "mismatched_ids", "within_tolerance", "bit_equal", "median_ms")),
        **dict.fromkeys(("lower_quartile_ms", "upper_quartile_ms", "runs", "calls", "rounds")),
        **dict.fromkeys(("temporary_bytes", "peak_bytes")),
        **dict.fromkeys(("gb_per_s", "tflop_per_s", "floor_ms", "share_of_floor")),
    }
    try:
        once = jax.jit(function).lower(*sets[0]).compile()
        cost = compiled_cost(once)
        row |= {"temporary_bytes": cost.temporary_bytes, "peak_bytes": cost.peak_bytes}
        found = once(*sets[0])
        row["bit_equal"] = bit_equal(found, once(*sets[0]))
        if expected is not None and jax.tree.structure(found) == jax.tree.structure(expected):
            row |= errors(case, found, expected)
        elif exact and expected is not None:
            return row | {"status": "wrong", "reason": "its results do not have the structure of the reference's"}
        del found
        if exact and row["within_tolerance"] is False:
            return row | {"status": "wrong", "reason": f"error {row['max_error']:.3g}, rtol {case.rtol:g}"}
        # XLA adds with atomics on GPUs: that is a column of its row, not a reason to be without its time.
        if name.startswith("pallas") and not row["bit_equal"]:
            return row | {"status": "wrong", "reason": "two runs on the same inputs differ"}
        row |= time_calls(function, sets, effort)
    except Refused as error:
        return row | {"status": "refused", "reason": first_line(error)}
    except Exception as error:  # a rival or kernel that does not run here is a row too
        return row | {"reason": f"{type(error).__name__}: {first_line(error)}"}
    return row | rates(case, row["median_ms"], target) | {"status": "measured"}


def rates(case: Case, median_ms: float, target: Target | None) -> dict[str, Any]:
    """Bandwidth and FLOP/s a time means at the case's closed forms, and their share of the roofline."""
    seconds = median_ms / 1e3
    found = {"gb_per_s": case.bytes_moved / seconds / 1e9, "tflop_per_s": case.flops / seconds / 1e12}
    if target is None:
        return found
    floor = target.floor_s(case.bytes_moved, case.flops, int8=case.int8)
    return found | {"floor_ms": 1e3 * floor, "share_of_floor": floor / seconds}


def report(row: dict[str, Any]) -> str:
    """One line for people."""
    head = f"{row['operation']}/{row['case']}  {row['implementation']}"
    if row["status"] != "measured":
        return f"{head:64s} {row['status'].upper()}: {row['reason']}"
    error = "no reference" if row["max_error"] is None else f"error {row['max_error']:.1e}"
    share = "" if row["share_of_floor"] is None else f"  {100 * row['share_of_floor']:5.1f} % of roofline"
    against = "" if row["times_xla"] is None else f"  {row['times_xla']:.2f}x XLA"
    against += "".join(f"  {ratio:.2f}x {name}" for name, ratio in row["times_rival"].items())
    return (
        f"{head:64s} {row['median_ms']:9.4f} ms  {row['gb_per_s']:8.1f} GB/s  {row['tflop_per_s']:8.2f} TFLOP/s"
        f"{share}{against}  {error}, reruns {'equal' if row['bit_equal'] else 'DIFFER'}, "
        f"{row['peak_bytes'] / 2**20:,.1f} MiB"
    )


def _provenance() -> dict[str, Any]:
    where = environment()
    return {"device": where["device"]["kind"], **{key: where[key] for key in ("versions", "date", "command")}}


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
