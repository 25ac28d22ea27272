"""A small sweep's core-seconds by part (generation, compile, step, holdout, bookkeeping), of this tree and another.

The smallest and the largest shape of the quickstart, with its log, batch and seeds. Every turn is a process of its own,
on one core, and the trees take turns, so that whatever else the machine does hits both. Compilation is never read from
a cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from recscale.scaling.processes import ONE_THREAD

from . import sweep_turn

PARTS = ("generation", "compile", "step", "holdout", "bookkeeping")


def measure_sweep(*, rounds: int = 3, rows: int = 262_144, against: Path | None = None) -> dict[str, Any]:
    """Core-seconds by part and rows per core-second of every shape, as medians over rounds.

    Args:
        rounds: turns of each tree. rows: of every run.
        against: root of another checkout of this project.

    Returns:
        shapes: shape -> {parts: seconds; rows_per_core_s: rows of all seeds over generation, step and bookkeeping};
        `against` the same of the other tree; `ratio`: shape -> this tree's rows per core-second over the
        other's, of every round and their median.

    Raises:
        ValueError: `against` is no checkout of this project. RuntimeError: a turn failed; with its last lines.
    """
    paths = {"here": None} if against is None else {"here": None, "against": _packages(against)}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in paths}
    for _ in range(rounds):
        for name, path in paths.items():
            turns[name].append(_turn(rows, path))
    found = {name: {shape: _summary(shape, rows, own) for shape in sweep_turn.SHAPES} for name, own in turns.items()}
    result: dict[str, Any] = {"rows": rows, "rounds": rounds, "shapes": found["here"]}
    if against is not None:
        result |= {"against": found["against"], "tree": str(against), "ratio": {}}
        for shape in sweep_turn.SHAPES:
            ratios = [
                _speed(shape, rows, own) / _speed(shape, rows, other)
                for own, other in zip(turns["here"], turns["against"], strict=True)
            ]
            result["ratio"][shape] = {"median": median(ratios), "rounds": ratios}
    return result


def _packages(tree: Path) -> Path:
    """What a checkout's packages are found under by their names."""
    links = tree / ".paths"
    if not (links / "recscale" / "scaling").exists():
        raise ValueError(f"{tree} is no checkout of this project: it has no {links}/recscale; try git worktree add")
    return links.resolve()


def _turn(rows: int, packages: Path | None) -> dict[str, Any]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    given = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    given |= {**ONE_THREAD, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    if packages is not None:
        given["PYTHONPATH"] = str(packages)
    command = [sys.executable, "-P", sweep_turn.__file__, str(rows)]
    done = subprocess.run(command, env=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"a turn failed ({' '.join(command)}):\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _speed(shape: str, rows: int, turn: dict[str, Any]) -> float:
    """Rows of all seeds per core-second, without what a run pays once: compilation and its holdout.

    A log that is drawn once serves every shape of a sweep: its cost is shared.
    """
    spent = turn[shape]["step"] + turn[shape].get("bookkeeping", 0.0) + turn[shape]["generation"]
    return rows * sweep_turn.SHAPES[shape][2] / spent


def _summary(shape: str, rows: int, turns: list[dict[str, Any]]) -> dict[str, Any]:
    parts = {part: median(turn[shape].get(part, 0.0) for turn in turns) for part in PARTS}
    return {**parts, "rows_per_core_s": median(_speed(shape, rows, turn) for turn in turns)}
