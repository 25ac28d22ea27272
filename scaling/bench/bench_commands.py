"""`recscale bench`: measurements on this machine, each with the versions, device, date and command it belongs to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from recscale.scaling.records.plain import plain

_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line.")


@click.group()
def bench() -> None:
    """Measures speed and correctness on this machine."""
    from recscale.scaling.host_memory import restart_with_huge_pages

    restart_with_huge_pages()


@bench.command("train-step")
@click.option("--rounds", default=8, show_default=True, help="Turns each rival gets, of 4 timed steps.")
@click.option("--torch/--no-torch", "torch", default=True, help="Race the same model in PyTorch with torch.compile.")
@click.option("--tables/--no-tables", default=True, help="Also compare a table of 10,000,000 rows with 10,000.")
@click.option("--known-truth/--no-known-truth", default=True, help="Also measure the share of generating the data.")
@click.option("--keep-memory/--no-keep-memory", default=True, help="Keep freed memory in the process, for both rivals.")
@_JSON
def train_step(rounds: int, torch: bool, tables: bool, known_truth: bool, keep_memory: bool, as_json: bool) -> None:
    """One RankMixer training step (T16 D128 F512 L2, 1,024 rows, float32, Adam) against PyTorch."""
    from recscale.scaling import host_memory

    if keep_memory:
        host_memory.keep_freed_memory()  # before anything computes
    from . import train_step as measured

    result = measured.run(rounds=rounds, torch=torch, tables=tables, known_truth=known_truth)
    click.echo(_step_report(result))
    _finish(result, as_json)


@bench.command("known-truth")
@click.option("--quick", is_flag=True, help="A sixteenth of the rows, with wider gates.")
@click.option("--networks/--no-networks", default=True, help="Also train three architectures at six sizes (part 5).")
@_JSON
def known_truth(quick: bool, networks: bool, as_json: bool) -> None:
    """The acceptance experiment of the known-truth log; ends with code 1 if a gate fails."""
    from recscale.scaling import host_memory

    host_memory.keep_freed_memory()  # before anything computes
    from recscale.scaling.acceptance import known_truth as measured
    from recscale.scaling.records.provenance import environment

    result = measured.run(quick=quick, with_networks=networks)
    _finish({**result, "environment": environment()}, as_json)
    if not result["passed"]:
        click.get_current_context().exit(1)


@bench.command("experts")
@click.option("--rounds", default=6, show_default=True, help="Turns each variant gets, of 2 timed steps.")
@click.option("--keep-memory/--no-keep-memory", default=True, help="Keep freed memory in the process.")
@_JSON
def experts(rounds: int, keep_memory: bool, as_json: bool) -> None:
    """Training TokenMixer-Large and serving RankMixer with all, half and a quarter of the experts active."""
    from recscale.scaling import host_memory

    if keep_memory:
        host_memory.keep_freed_memory()  # before anything computes
    from . import experts as measured

    result = measured.run(rounds=rounds)
    click.echo(_experts_report(result))
    _finish(result, as_json)


@bench.command("serve")
@click.option("--case", "names", multiple=True, help="Only this comparison, by name; may be given several times.")
@click.option("--rounds", default=10, show_default=True, help="Turns each of the two models gets, of 2 timed calls.")
@click.option("--keep-memory/--no-keep-memory", default=True, help="Keep freed memory in the process.")
@_JSON
def serve(names: tuple[str, ...], rounds: int, keep_memory: bool, as_json: bool) -> None:
    """Reusing the user's part of a model (8 requests, 64 candidates, D 256) against computing it per candidate."""
    from recscale.scaling import host_memory

    if keep_memory:
        host_memory.keep_freed_memory()
    from . import serve as measured

    try:
        result = measured.run(names=names or None, rounds=rounds)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo(_serve_report(result))
    _finish(result, as_json)


@bench.command("history")
@click.option("--rounds", default=5, show_default=True, help="Timed steps of each length.")
@click.option("--keep-memory/--no-keep-memory", default=True, help="Keep freed memory in the process.")
@_JSON
def history(rounds: int, keep_memory: bool, as_json: bool) -> None:
    """LONGER training step on 512 to 8,192 events at 64 query rows: time, memory and FLOPs against the length."""
    from recscale.scaling import host_memory

    if keep_memory:
        host_memory.keep_freed_memory()
    from . import history_length as measured

    _show(measured.run(rounds=rounds), as_json)


@bench.command("laws")
@_JSON
def laws(as_json: bool) -> None:
    """Accuracy and speed of the law fitter on laws that are known."""
    from . import laws as measured

    _show(measured.run(), as_json)


@bench.command("memory")
@click.option("--rounds", default=8, show_default=True, help="Turns each size gets, of 8 timed steps.")
@_JSON
def memory(rounds: int, as_json: bool) -> None:
    """A memory read and row update at 2^20 slots against 2^14, same hits and width; the search beside it."""
    from recscale.scaling import host_memory

    host_memory.keep_freed_memory()  # before anything computes
    from . import memory as measured

    _show(measured.run(rounds=rounds), as_json)


@bench.command("reader")
@click.option("--rows", default=400_000, show_default=True, help="Rows of the made-up log.")
@_JSON
def reader(rows: int, as_json: bool) -> None:
    """Rows per second of the reader alone, without a model."""
    from . import reader as measured

    _show(measured.run(rows=rows), as_json)


@bench.command("kernels")
@click.option("--operation", "operations", multiple=True, metavar="OP", help="Only this one; may be repeated.")
@click.option("--case", "names", multiple=True, metavar="NAME", help="Only this shape; may be repeated.")
@click.option("--implementation", "implementations", multiple=True, metavar="NAME", help="Only this one, beside XLA.")
@click.option(
    "--group", "groups", multiple=True, type=click.Choice(("tiny", "ragged", "bench")), help="Only such shapes."
)
@click.option("--tune", is_flag=True, help="Search block sizes first and keep what is faster as this device's.")
@click.option("--cpu", is_flag=True, help="Tiny shapes of the XLA paths on the CPU, to prove the harness.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Also write the rows to this JSON file.")
@_JSON
def kernels(
    operations: tuple[str, ...],
    names: tuple[str, ...],
    implementations: tuple[str, ...],
    groups: tuple[str, ...],
    tune: bool,
    cpu: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Kernels of this machine's accelerator: errors, time, share of the roofline, beside XLA and public rivals.

    Ends with code 2 where there is no accelerator, and with code 1 if a kernel fails or is wrong.
    """
    from recscale.scaling.records.provenance import environment

    from . import kernels as measured

    rows, attempts = [], []
    try:
        if tune:
            attempts = list(_tuned(operations, names))
        for row in measured.run(
            operations=operations, names=names, implementations=implementations, groups=groups, cpu=cpu
        ):
            click.echo(measured.report(row))
            rows.append(row)
    except measured.NoAccelerator as error:
        click.echo(str(error), err=True)
        click.get_current_context().exit(2)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    result = {"rows": rows, "tuning": attempts, "environment": environment()}
    if out is not None:
        from recscale.scaling.records.files import write_atomically

        write_atomically(out, json.dumps(plain(result), indent=1) + "\n")
    _finish(result, as_json)
    ours = [row for row in rows if row["implementation"].startswith(("pallas", "xla"))]
    if any(row["status"] in ("wrong", "failed") for row in ours):
        click.get_current_context().exit(1)


def _tuned(operations: tuple[str, ...], names: tuple[str, ...]):
    """Rows of the search of block sizes, shown as they come."""
    from recscale.pallas_kernels.cases import OPERATIONS
    from recscale.scaling.records.provenance import environment

    from .kernel_timing import Effort
    from .kernel_tuning import tune_and_write
    from .kernels import accelerator

    target, where = accelerator(), environment()
    provenance = {key: where[key] for key in ("device", "date", "versions", "command")}
    for row in tune_and_write(operations or OPERATIONS, names, target, provenance, Effort(warmup=3, runs=15)):
        time = "-" if row["median_ms"] is None else f"{row['median_ms']:.4f} ms"
        head = f"{row['operation']}/{row['case']} {row['implementation']} {row['key']} {row['sizes']}"
        click.echo(f"{head} {time} {row['reason']}".rstrip())
        yield row


@bench.command("mfu")
@click.argument("model", default="rankmixer_1b")
@click.option("--rows", default=4096, show_default=True, help="Rows of a step.")
@_JSON
def mfu(model: str, rows: int, as_json: bool) -> None:
    """Model FLOPs utilisation of MODEL's training step on this machine's accelerator; code 2 without one."""
    from . import mfu as measured
    from .kernels import NoAccelerator

    try:
        result = measured.run(model, rows=rows)
    except NoAccelerator as error:
        click.echo(str(error), err=True)
        click.get_current_context().exit(2)
    _show(result, as_json)


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


def _experts_report(result: dict[str, Any]) -> str:
    """The figures of `experts` for people."""
    lines = []
    for found in result["shapes"].values():
        shape = found["shape"]
        sizes = f"T {shape['tokens']}, D {shape['width']}, experts {shape['hidden'] // shape['experts']} wide"
        for name, what in (("train", "TokenMixer-Large, training step"), ("serve", "RankMixer, forward pass")):
            falls = "falls" if found[f"{name}_falls"] else "does NOT fall"
            lines.append(f"{what}, {sizes} ({falls} with active experts)")
            for variant, time in found[name].items():
                lines.append(
                    f"  {variant:11s} {time['median_ms']:8.1f} ms "
                    f"({time['lower_quartile_ms']:.1f} to {time['upper_quartile_ms']:.1f})   "
                    f"{time['ratio']:.3f} of dense, FLOPs {time['flops_ratio']:.3f}, "
                    f"dropped {100 * time['dropped_share']:.2f} %"
                )
    return "\n".join(lines)


def _serve_report(result: dict[str, Any]) -> str:
    """The figures of `serve` for people."""
    lines = []
    for name, found in result["cases"].items():
        reused, rival = found["reused"], found["rival"]
        lines.append(
            f"{name:24s} {rival['median_ms']:8.1f} -> {reused['median_ms']:7.1f} ms a call: {found['time_ratio']:.2f}x "
            f"(CPU {found['cpu_ratio']:.2f}x) of {found['flops_ratio']:.2f}x fewer FLOPs, "
            f"{100 * found['reached']:.0f} % reached; {found['state_elements']:,} numbers kept a request"
        )
    return "\n".join(lines)


def _show(result: dict[str, Any], as_json: bool) -> None:
    """Prints a result's figures, one a line, nested ones dotted."""
    from recscale.scaling.records.provenance import environment

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
        click.echo(json.dumps(plain(result)))


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows = []
    for name, value in values.items():
        nested = isinstance(value, dict)
        rows.extend(_flat(value, f"{prefix}{name}.") if nested else [(f"{prefix}{name}", value)])
    return rows
