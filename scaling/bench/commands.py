"""`recscale bench`: measurements on this machine, each with the versions, device, date and command it belongs to."""

from __future__ import annotations

import json
from typing import Any

import click

_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line.")


@click.group()
def bench() -> None:
    """Measures speed and correctness on this machine."""


@bench.command("train-step")
@click.option("--rounds", default=8, show_default=True, help="Turns each rival gets, of 4 timed steps.")
@click.option("--torch/--no-torch", "torch", default=True, help="Race the same model in PyTorch with torch.compile.")
@click.option("--tables/--no-tables", default=True, help="Also compare a table of 10,000,000 rows with 10,000.")
@click.option("--known-truth/--no-known-truth", default=True, help="Also measure the share of generating the data.")
@click.option("--keep-memory/--no-keep-memory", default=True, help="Keep freed memory in the process, for both rivals.")
@_JSON
def train_step(rounds: int, torch: bool, tables: bool, known_truth: bool, keep_memory: bool, as_json: bool) -> None:
    """One RankMixer training step (T16 D128 F512 L2, 1,024 rows, float32, Adam) against PyTorch."""
    from .. import host_memory

    if keep_memory:
        host_memory.keep_freed_memory()  # before anything computes
    from . import train_step as measured

    result = measured.run(rounds=rounds, torch=torch, tables=tables, known_truth=known_truth)
    click.echo(_step_report(result))
    _finish(result, as_json)


@bench.command("known-truth")
@click.option("--quick", is_flag=True, help="A sixteenth of the rows, with wider gates.")
@_JSON
def known_truth(quick: bool, as_json: bool) -> None:
    """The acceptance experiment of the known-truth log; ends with code 1 if a gate fails."""
    from . import known_truth as measured
    from .environment import environment

    result = measured.run(quick=quick)
    _finish({**result, "environment": environment()}, as_json)
    if not result["passed"]:
        click.get_current_context().exit(1)


@bench.command("laws")
@_JSON
def laws(as_json: bool) -> None:
    """Accuracy and speed of the law fitter on laws that are known."""
    from ..laws import bench as measured

    _show(measured.run(), as_json)


@bench.command("reader")
@click.option("--rows", default=400_000, show_default=True, help="Rows of the made-up log.")
@_JSON
def reader(rows: int, as_json: bool) -> None:
    """Rows per second of the reader alone, without a model."""
    from . import reader as measured

    _show(measured.run(rows=rows), as_json)


def _step_report(result: dict[str, Any]) -> str:
    """The figures of `train-step` for people."""
    lines = []
    for name in ("jax", "torch"):
        if result[name] is not None:
            time = result[name]
            layout = f", {time['layout']}" if "layout" in time else ""
            lines.append(
                f"{name + layout:16s} {time['median_ms']:8.1f} ms a step (median of {time['turns']} turns; quartiles "
                f"{time['lower_quartile_ms']:.1f} to {time['upper_quartile_ms']:.1f}; {time['cpu_ms']:.0f} ms of CPU) "
                f"{time['rows_per_s']:10,.0f} rows/s {time['flops_per_s'] / 1e9:7.1f} GFLOP/s"
            )
    if result["ratio"] is not None:
        lines.append(f"ours / PyTorch   {result['ratio']:.3f} in rows per second")
    if result["note"]:
        lines.append(result["note"])
    if result["tables"]:
        tables = result["tables"]
        lines.append(
            f"row table        a step with {tables['large_rows']:,} rows costs {tables['ratio']:.2f}x that with "
            f"{tables['small_rows']:,} ({tables['large']['median_ms']:.1f} and {tables['small']['median_ms']:.1f} ms)"
        )
    if result["known_truth"]:
        made = result["known_truth"]
        lines.append(
            f"known truth      generating the batch ({made['preset']}) takes {100 * made['share']:.1f} % of a step of "
            f"{made['dense_params']:,} dense parameters ({100 * made['share_alone']:.1f} % if done apart)"
        )
    return "\n".join(lines)


def _show(result: dict[str, Any], as_json: bool) -> None:
    """Prints a result's figures, one a line, nested ones dotted."""
    from .environment import environment

    result = dict(result)
    result.setdefault("environment", environment())
    for name, value in _flat({k: v for k, v in result.items() if k != "environment"}):
        click.echo(f"{name:44s} {f'{value:.6g}' if isinstance(value, float) else value}")
    _finish(result, as_json)


def _finish(result: dict[str, Any], as_json: bool) -> None:
    where = result["environment"]
    device, versions = where["device"], where["versions"]
    click.echo(
        f"\n{where['date']}  {device['count']} x {device['kind']} ({where['cpu']}, {where['cores']} cores, load "
        f"{where['load_average']:.1f})  " + "  ".join(f"{name} {version}" for name, version in versions.items())
    )
    click.echo(where["command"])
    if as_json:
        click.echo(json.dumps(result, default=_plain))


def _plain(value: Any) -> Any:
    """NumPy scalars and arrays as JSON has them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a benchmark returned {type(value).__name__}, which JSON cannot hold: {value!r}")


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows = []
    for name, value in values.items():
        nested = isinstance(value, dict)
        rows.extend(_flat(value, f"{prefix}{name}.") if nested else [(f"{prefix}{name}", value)])
    return rows
