"""The result of `recscale aot`: a table for people, one line a program with bytes per device, and JSON."""

from __future__ import annotations

from collections import Counter
from typing import Any

from recscale.scaling.records.number_text import byte_text
from recscale.scaling.records.provenance import environment

from .program import COMPILED, FAILED, LOWERED

_COLUMNS = (
    ("target", 8, "<"),
    ("program", 58, "<"),
    ("compile s", 9, ">"),
    ("arguments", 10, ">"),
    ("outputs", 10, ">"),
    ("temporaries", 11, ">"),
    ("per device", 10, ">"),
    ("GFLOP", 10, ">"),
    ("GB moved", 9, ">"),
)


def header() -> str:
    """Names of the columns."""
    return "  ".join(f"{name:{side}{width}}" for name, width, side in _COLUMNS) + "  collectives, remarks"


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    sizes = row["collective_bytes"] or {}
    remarks = [
        f"{count} {name} of {byte_text(sizes.get(name, 0))}" for name, count in (row["collectives"] or {}).items()
    ]
    if sizes and row["predicted_bytes"] is not None:
        sent, predicted = (sum(row[key].values()) for key in ("collective_bytes", "predicted_bytes"))
        remarks.append(f"in all {byte_text(sent)}, by formula {byte_text(predicted)}")
    if row["registers"] is not None:
        remarks.append(f"{row['registers']} registers")
    if row["status"] not in (COMPILED, LOWERED):
        remarks.append(f"{row['status'].upper()}: {row['reason']}")
    cells = (
        row["target"],
        _program(row),
        _digits(row["compile_s"], 1.0),
        *(byte_text(row[key]) for key in ("argument_bytes", "output_bytes", "temporary_bytes", "bytes_per_device")),
        _digits(row["flops"], 1e9),
        _digits(row["bytes_accessed"], 1e9),
    )
    text = "  ".join(f"{cell:{side}{width}}" for cell, (_, width, side) in zip(cells, _COLUMNS, strict=True))
    text = f"{text}  {', '.join(remarks)}".rstrip()
    if row["state_bytes"] is None:
        return text
    parts = [f"{name} {byte_text(row[f'{name}_bytes'])}" for name in ("state", "batch", "gradient", "activation")]
    return f"{text}\n{'':10s}a device holds: {', '.join(parts)}; temporaries are the last two"


def summary(rows: list[dict[str, Any]]) -> str:
    """How many programs compiled, were refused, failed."""
    count = Counter(row["status"] for row in rows)
    done = f"{count[LOWERED]} lowered" if count[LOWERED] else f"{count[COMPILED]} compiled"
    return f"\n{done}, {count['refused']} refused, {count['failed']} failed; nothing was run"


def result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """JSON-able: `programs` (the rows), `failed` (how many), `environment`; a single row's own keys beside them."""
    return {
        **(rows[0] if len(rows) == 1 else {}),
        "programs": rows,
        "failed": sum(row["status"] == FAILED for row in rows),
        "environment": environment(),
    }


def _program(row: dict[str, Any]) -> str:
    if row["kind"] == "kernel":
        return f"{row['name']}/{row['case']} {row['implementation']}"
    return f"train {row['name']} {row['mesh']} rows={row['rows_per_step']}"


def _digits(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:.3g}"
