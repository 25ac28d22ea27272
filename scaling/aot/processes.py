"""Targets compiled side by side, each in a process of its own.

A compiler that ends its process takes one program with it, not the others: that program is a failed row, and a new
process goes on after it.

The process gets {target, request, start} as JSON on its standard input and writes one JSON line for every program:
first what it is about to compile, then its row.
"""

from __future__ import annotations

import dataclasses
import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from .request import Request

_COMMAND = (sys.executable, "-c", "from recscale.scaling.aot.processes import serve; serve()")


def rows_side_by_side(targets: Sequence[str], request: Request, jobs: int) -> Iterator[dict[str, Any]]:
    """The rows of `compile_all` for every target, from `jobs` processes at most, in the order they are finished.

    Raises:
        ValueError: what a process says about a request it cannot read.
    """
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for target in targets:
        waiting.put(target)
    found: queue.SimpleQueue[dict[str, Any] | Exception | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            while not waiting.empty():
                _compile(waiting.get_nowait(), request, found)
        except queue.Empty:  # another thread took the last one
            pass
        except Exception as error:
            found.put(error)
        found.put(None)

    running = min(jobs, len(targets))
    for _ in range(running):
        threading.Thread(target=work, daemon=True).start()
    while running:
        row = found.get()
        if isinstance(row, Exception):
            raise row
        if row is None:
            running -= 1
        else:
            yield row


def _compile(target: str, request: Request, found: queue.SimpleQueue) -> None:
    """Puts the rows of one target, starting again after a program that ended its process."""
    start = 0
    while start is not None:
        start = _once(target, request, start, found)


def _once(target: str, request: Request, start: int, found: queue.SimpleQueue) -> int | None:
    """One process. Returns where to go on: None at the end, else the number after the program that ended it."""
    task = json.dumps({"target": target, "request": dataclasses.asdict(request), "start": start})
    begun: dict[str, Any] | None = None
    done = start
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(_COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(task)
        process.stdin.close()
        for line in process.stdout:
            if not line.startswith("{"):  # a compiler's own remark
                continue
            message = json.loads(line)
            if "begun" in message:
                begun = message["begun"]
            else:
                found.put(message)
                begun, done = None, done + 1
        code = process.wait()
        errors.seek(0)
        said = " ".join(errors.read().split())[-600:]
    if code == 0:
        return None
    if begun is None:
        raise ValueError(f"compiling for {target} ended with code {code}: {said}")
    found.put(begun | {"reason": f"the compiler ended its process with code {code}: {said}"})
    return done + 1


def serve() -> None:
    """The process: compiles what its standard input asks for."""
    task = json.load(sys.stdin)
    request = Request(**task["request"])
    from recscale.pallas_kernels.targets import Target, get_target

    from .environment import prepare
    from .program import Program, compile_all

    target = get_target(task["target"])
    prepare({target.platform}, compiler=not request.lower_only)

    def show(message: dict[str, Any]) -> None:
        print(json.dumps(message), flush=True)

    def waiting(target: Target) -> list[Program]:
        return request.programs(target)[task["start"] :]

    for row in compile_all(waiting, target, lambda row: show({"begun": row}), lower_only=request.lower_only):
        show(row)
