"""Search of block sizes on this device: every size a kernel offers, timed at its benchmark shapes.

A kernel's module says what is worth trying (`candidates(key, heuristic, target)`); one that does not is tried at half
and twice each size of its own rule. The keys of a case (forward, backward) are searched one after the other. What is
faster than the rule and still right is written to `<operation>/tuned/<device>.json` beside how many times faster than
XLA the kernel then is at each shape: that decides whether it is the automatic choice on that kind of device
(`blocks.beats_xla`). A kernel with a wrong result at any shape gets no entry.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from recscale.pallas_kernels import blocks, cases
from recscale.pallas_kernels.blocks import Asked
from recscale.pallas_kernels.cases import Case
from recscale.pallas_kernels.dispatch import kernel_of
from recscale.pallas_kernels.targets import Target

from .kernel_timing import Effort, errors, input_sets, time_calls

# A faster time must be so much faster to replace the rule: noise is of this order.
_GAIN = 0.98

_WRONG = "error"

Sizes = dict[str, dict[str, int]]


def tune(case: Case, implementation: str, target: Target, effort: Effort) -> tuple[Sizes, list[dict[str, Any]]]:
    """The best sizes found for a case (key -> sizes, those that beat the rule), and one row per attempt.

    Rows: key, sizes, median_ms (None where it does not run or is wrong), reason, times_xla; the last one is XLA's.
    """
    sets = input_sets(case, target, effort)
    expected = jax.jit(lambda *a: case.call(*a, implementation="reference"))(*sets[0])
    best: Sizes = {}
    asked, time, reason = _attempt(case, implementation, {}, sets, expected, effort)
    rows = [{"key": "", "sizes": {}, "median_ms": time, "reason": reason}]
    for request in {request.key: request for request in asked}.values():
        for sizes in offered(request):
            _, attempt, reason = _attempt(case, implementation, best | {request.key: sizes}, sets, expected, effort)
            rows.append({"key": request.key, "sizes": sizes, "median_ms": attempt, "reason": reason})
            if attempt is not None and (time is None or attempt < _GAIN * time):
                time, best[request.key] = attempt, sizes
    _, xla, reason = _attempt(case, "xla", {}, sets, expected, effort)
    rows.append({"implementation": "xla", "key": "", "sizes": {}, "median_ms": xla, "reason": reason})
    for row in rows:
        own = row["median_ms"]
        row["times_xla"] = None if own is None or xla is None else xla / own
    return best, rows


def tune_and_write(
    operations: Iterable[str], names: Iterable[str], target: Target, provenance: dict[str, Any], effort: Effort
) -> Iterator[dict[str, Any]]:
    """Tunes every kernel of the operations at their benchmark shapes, writes what was found, and yields the rows."""
    names = set(names)
    for operation in operations:
        for implementation in cases.kernels(operation, target.platform):
            found: Sizes = {}
            times: dict[str, float | None] = {}
            wrong = False
            for case in cases.cases(operation):
                if case.name in names or (not names and case.group == "bench"):
                    best, rows = tune(case, implementation, target, effort)
                    found |= best
                    own = [row for row in rows[:-1] if row["median_ms"] is not None]
                    if own:
                        times[case.name] = min(own, key=lambda row: row["median_ms"])["times_xla"]
                    wrong |= rows[0]["reason"].startswith(_WRONG)
                    for row in rows:
                        yield {"operation": operation, "case": case.name, "implementation": implementation, **row}
            if times and not wrong:
                blocks.write_tuned(operation, target.device_kind, implementation, found, times, provenance)


def offered(request: Asked) -> Iterator[dict[str, int]]:
    """The sizes to try for a request, those of the kernel's own rule left out."""
    candidates = getattr(kernel_of(request.operation, request.implementation), "candidates", _neighbours)
    for sizes in candidates(request.key, request.heuristic, request.target):
        if request.heuristic | dict(sizes) != request.heuristic:
            yield dict(sizes)


def _neighbours(key: str, heuristic: dict[str, int], target: Target | None) -> Iterator[dict[str, int]]:
    """Each size halved and doubled, the others as they are."""
    for name, size in heuristic.items():
        if size > 1:
            yield {name: size // 2}
        yield {name: 2 * size}


def _attempt(
    case: Case, implementation: str, sizes: Sizes, sets: list[Any], expected: Any, effort: Effort
) -> tuple[list[Asked], float | None, str]:
    """(requests made, milliseconds or None, why None)."""
    jax.clear_caches()
    function = functools.partial(case.call, implementation=implementation)
    with blocks.trial(sizes) as asked:
        try:
            difference = errors(case, jax.jit(function)(*sets[0]), expected)
            if not difference["within_tolerance"]:
                return asked, None, f"{_WRONG} {difference['max_error']:.3g}"
            return asked, time_calls(function, sets, effort)["median_ms"], ""
        except Exception as error:  # sizes a chip has no room for
            return asked, None, f"{type(error).__name__}: {str(error)[:200]}"
