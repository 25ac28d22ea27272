"""What the rows of `recscale bench device` say: a line a row as they come, a page at the end, which kernels lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]

_GOOD = ("right", "measured", "done")


def line(row: Row) -> str:
    """One line for people."""
    facts = [
        _figure(row, "max_error", "error {:.1e}"),
        _figure(row, "median_ms", "{:.4g} ms"),
        _figure(row, "gb_per_s", "{:.4g} GB/s"),
        _figure(row, "tflop_per_s", "{:.4g} TFLOP/s"),
        row.get("reason") or None,
    ]
    return f"{row['id']:64s} {row['status']:10s} {'  '.join(fact for fact in facts if fact)}".rstrip()


def lost(rows: Iterable[Row], operation: str) -> list[tuple[str, str]]:
    """(case, kernel) of an operation where XLA or a rival took less time than the kernel."""
    measured = _measured(rows)
    found = []
    for (owner, case), times in measured.items():
        for name, row in times.items():
            if owner == operation and name.startswith("pallas"):
                best = min((other["median_ms"] for rival, other in times.items() if rival != name), default=None)
                if best is not None and best < row["median_ms"]:
                    found.append((case, name))
    return found


def text(rows: Sequence[Row], unreached: Sequence[str], seconds: float) -> str:
    """The page, in Markdown."""
    where = next((row["environment"] for row in rows if "environment" in row), None)
    parts = ["# Kernels on a device", ""]
    if where is not None:
        versions = "  ".join(f"{name} {version}" for name, version in where["versions"].items())
        parts += [f"{where['date']}, {where['device']['count']} x {where['device']['kind']}, {versions}", "",
                  f"    {where['command']}", ""]  # fmt: skip
    parts += [f"{len(rows)} rows; this call took {seconds:.0f} s.", ""]
    for title, table in (
        ("Right or wrong", _checks(rows)),
        ("Headline shapes", _headlines(rows)),
        ("Training steps", _steps(rows)),
        ("Tuning", _tunings(rows)),
        ("Sweep", _printed(rows)),
        ("What went wrong", [f"- {line(row)}" for row in rows if row["status"] not in (*_GOOD, "refused")]),
        ("Refused", [f"- {line(row)}" for row in rows if row["status"] == "refused"]),
        ("Not reached; the same command goes on with it", [f"- {name}" for name in unreached]),
    ):
        if table:
            parts += [f"## {title}", "", *table, ""]
    return "\n".join(parts)


def _measured(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """(operation, case) -> implementation -> its row, of those that have a time."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row["stage"] == "measure" and row.get("median_ms") and "case" in row:
            found.setdefault((row["operation"], row["case"]), {})[row["implementation"]] = row
    return found


def _checks(rows: Sequence[Row]) -> list[str]:
    """A line an operation and implementation: how many cases of each outcome, and the largest error."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        parts = row["id"].split("/", 3)
        if row["stage"] == "check" and len(parts) == 4:
            groups.setdefault((parts[1], parts[3]), []).append(row)
    cells = []
    for (operation, implementation), own in groups.items():
        count = Counter(row["status"] for row in own)
        errors = [row["max_error"] for row in own if row.get("max_error") is not None]
        differ = sum(row.get("bit_equal") is False for row in own)
        outcome = ", ".join(f"{number} {status}" for status, number in count.items())
        cells.append([operation, implementation, outcome, f"{max(errors):.1e}" if errors else "-", str(differ)])
    return _table(["operation", "implementation", "cases", "largest error", "reruns that differ"], cells)


def _headlines(rows: Sequence[Row]) -> list[str]:
    """A line a case and implementation, with its share of what the device was measured to do."""
    ceilings = {row["id"]: row for row in rows}
    bandwidth = ceilings.get("measure/ceilings/copy", {}).get("gb_per_s")
    rate = ceilings.get("measure/ceilings/product", {}).get("tflop_per_s")
    cells = []
    for (operation, case), own in _measured(rows).items():
        xla = own.get("xla", {}).get("median_ms")
        rivals = {
            name: row["median_ms"] for name, row in own.items() if name != "xla" and not name.startswith("pallas")
        }
        best = min(rivals, key=rivals.__getitem__, default=None)
        for name, row in own.items():
            time = row["median_ms"]
            against = [f"{xla / time:.2f}" if xla else "-", f"{rivals[best] / time:.2f} ({best})" if best else "-"]
            spread = f"{row['lower_quartile_ms']:.4g} to {row['upper_quartile_ms']:.4g}"
            share = _share(row, bandwidth, rate)
            cells.append([f"{operation}/{case}", name, f"{time:.4g}", spread, share, *against])
    table = _table(["case", "implementation", "ms", "quartiles", "of ceiling", "x XLA", "x best rival"], cells)
    if bandwidth and rate:
        table += ["", f"Measured ceilings: {bandwidth:,.0f} GB/s copied, {rate:,.1f} TFLOP/s of a product."]
    return table


def _share(row: Row, bandwidth: float | None, rate: float | None) -> str:
    """floor / time, the floor by the measured ceilings; above 1 a cache served it or the byte count is wrong."""
    if not (bandwidth and rate and "bytes_moved" in row):
        return "-"
    floor_ms = max(row["bytes_moved"] / bandwidth / 1e6, row["flops"] / rate / 1e9)
    return f"{100 * floor_ms / row['median_ms']:.0f} %"


def _steps(rows: Sequence[Row]) -> list[str]:
    rate = next((row.get("tflop_per_s") for row in rows if row["id"] == "measure/ceilings/product"), None)
    cells = []
    for row in rows:
        if row["stage"] != "train" or row["status"] != "measured":
            continue
        for name, time in _times(row).items():
            achieved = row["train_flops_per_step"] / time / 1e9
            stated = row.get("peak_tflop_per_s")
            memory = row.get("peak_memory_bytes")
            cells.append([
                name, f"{time:.4g}", f"{achieved:.4g}", f"{100 * achieved / rate:.1f} %" if rate else "-",
                f"{100 * achieved / stated:.1f} %" if stated else "-", f"{memory / 2**30:.1f} GiB" if memory else "-",
            ])  # fmt: skip
    return _table(["step", "ms", "TFLOP/s", "MFU, measured peak", "MFU, stated peak", "peak memory"], cells)


def _times(row: Row) -> dict[str, float]:
    """Name -> milliseconds of a training row, which may be a race of two."""
    name = row["id"].split("/", 1)[1].rsplit("/", 1)[0]
    if "median_ms" in row:
        return {f"{name}, {row['rows_per_step']:,} rows": row["median_ms"]}
    rows = row["shape"]["rows"]
    return {f"{name}, {rows:,} rows, {rival}": row[rival]["median_ms"] for rival in ("jax", "torch") if row.get(rival)}


def _tunings(rows: Sequence[Row]) -> list[str]:
    cells = []
    for row in rows:
        if row["stage"] == "tune" and "attempts" in row:
            times = [attempt["median_ms"] for attempt in row["attempts"][:-1] if attempt["median_ms"]]
            first = row["attempts"][0]["median_ms"]
            cells.append([row["id"].split("/", 1)[1], f"{first:.4g}" if first else "-",
                          f"{min(times):.4g}" if times else "-", str(row["best"] or "the rule's own")])  # fmt: skip
    return _table(["kernel", "ms by its rule", "best ms", "sizes"], cells)


def _printed(rows: Sequence[Row]) -> list[str]:
    return [f"    {said}" for row in rows if row["stage"] == "sweep" for said in row.get("printed", [])]


def _table(head: list[str], cells: list[list[str]]) -> list[str]:
    if not cells:
        return []
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells)]


def _figure(row: Row, key: str, form: str) -> str | None:
    value = row.get(key)
    return None if value is None else form.format(value)
