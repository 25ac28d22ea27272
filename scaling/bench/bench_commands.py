"""`recscale bench`: measurements on this machine, each with the versions, device, date and command it belongs to.

A benchmark is a line of `BENCHMARKS`: where the function is that measures, and its options. Nothing of it is imported
before it runs, so that what changes a process (memory kept, huge pages) is settled before anything computes.
"""

from __future__ import annotations

import dataclasses
import json
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One subcommand.

    Attributes:
        address: "module:function" of what measures and returns figures; its keyword arguments are the options.
        text: what `--help` says.
        params: options and arguments.
        keep_memory: freed memory stays in the process ("yes", "no"), or that is an option, on by default ("option").
        shows_itself: it shows its figures as they come.
        passed: whether a result meets its gates; if not, the command ends with code 1.
    """

    address: str
    text: str
    params: tuple[click.Parameter, ...] = ()
    keep_memory: str = "no"
    shows_itself: bool = False
    passed: Callable[[dict[str, Any]], bool] = lambda result: True

    def command(self, name: str) -> click.Command:
        """The click command that measures, shows, and ends with the code the outcome has."""
        params = [*self.params]
        if self.keep_memory == "option":
            params.append(_switch("keep-memory", "Keep freed memory in the process."))
        params.append(click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object as the last line."))
        return click.Command(name, callback=self._run, params=params, help=self.text)

    def _run(self, *, as_json: bool, keep_memory: bool | None = None, **options: Any) -> None:
        from recscale.scaling import host_memory

        if self.keep_memory == "yes" or keep_memory:
            host_memory.keep_freed_memory()  # before anything computes
        measure = pkgutil.resolve_name(self.address)
        from recscale.scaling.records.provenance import environment

        from .accelerator import NoAccelerator

        try:
            result = measure(**options)
        except NoAccelerator as error:
            click.echo(str(error), err=True)
            click.get_current_context().exit(2)
        if "environment" not in result:
            result["environment"] = environment()
        _show(result, as_json, figures=not self.shows_itself)
        if not self.passed(result):
            click.get_current_context().exit(1)


def _show(result: dict[str, Any], as_json: bool, figures: bool) -> None:
    from recscale.scaling.records.plain import plain

    from .figures import figure_lines

    if figures:
        click.echo("\n".join(figure_lines({key: value for key, value in result.items() if key != "environment"})))
    where = result["environment"]
    if where is not None:
        device, versions = where["device"], where["versions"]
        click.echo(
            f"\n{where['date']}  {device['count']} x {device['kind']} ({where['cpu']}, {where['cores']} cores, load "
            f"{where['load_average']:.1f})  " + "  ".join(f"{name} {version}" for name, version in versions.items())
        )
        click.echo(where["command"])
    if as_json:
        click.echo(json.dumps(plain(result)))


def _switch(name: str, text: str, parameter: str | None = None) -> click.Option:
    """An option that is on unless `--no-NAME` is given."""
    return click.Option([parameter or name.replace("-", "_"), f"--{name}/--no-{name}"], default=True, help=text)


def _number(name: str, default: int, text: str) -> click.Option:
    return click.Option([f"--{name}"], default=default, show_default=True, help=text)


def _save() -> click.Option:
    return click.Option(["--save"], type=click.Path(path_type=Path), help="Parquet file for the rows of every seed.")


def _several(name: str, parameter: str, text: str, **settings: Any) -> click.Option:
    return click.Option([parameter, f"--{name}"], multiple=True, help=text, **settings)


def _kernels_are_right(result: dict[str, Any]) -> bool:
    """Whether no implementation of this project fails or is wrong; what a rival does decides nothing."""
    ours = (row for row in result["rows"] if row["implementation"].startswith(("pallas", "xla")))
    return not any(row["status"] in ("wrong", "failed") for row in ours)


def _device_is_right(result: dict[str, Any]) -> bool:
    """Whether nothing of ours was wrong, failed or was lost; what a rival does decides nothing."""

    def ours(row: dict[str, Any]) -> bool:
        stage, *rest = row["id"].split("/")
        rival = stage == "measure" and len(rest) == 3 and not rest[-1].startswith(("pallas", "xla", "reference"))
        return not rival and "torch" not in rest

    return not any(ours(row) and row["status"] in ("wrong", "failed", "crashed", "timed out") for row in result["rows"])


BENCHMARKS = {
    "budgets": Benchmark(
        "recscale.scaling.acceptance.budgets:compare_budgets",
        "Regret of budget policies trained in two stages and by their decisions, on a trial with every counterfactual.",
        (_number("seeds", 5, "Paired seeds."), _save()),
    ),
    "cold-start": Benchmark(
        "recscale.scaling.acceptance.cold_start:compare_cold_start",
        "Excess loss of PROMO (a reconstruction) on cold items, beside the most that anything could gain there.",
        (_number("seeds", 5, "Paired seeds."), _save()),
    ),
    "cold-start-log": Benchmark(
        "recscale.scaling.acceptance.cold_start_log:compare_on_log",
        "Ranks of items left out of an imported log of ratings (MovieLens), by PROMO (a reconstruction) and its frozen "
        "base.",
        (
            click.Argument(["folder"], type=click.Path(path_type=Path, exists=True, file_okay=False), metavar="DIR"),
            _number("seeds", 5, "Paired seeds."),
            _save(),
        ),
    ),
    "train-step": Benchmark(
        "recscale.scaling.bench.train_step:measure_train_step",
        "One RankMixer training step (T16 D128 F512 L2, 1,024 rows, float32, Adam) against PyTorch.",
        (
            _number("rounds", 8, "Turns each rival gets, of 4 timed steps."),
            _switch("torch", "Race the same model in PyTorch with torch.compile."),
            _switch("tables", "Also compare a table of 10,000,000 rows with 10,000."),
            _switch("known-truth", "Also measure the share of generating the data."),
        ),
        keep_memory="option",
    ),
    "sweep": Benchmark(
        "recscale.scaling.bench.sweep:measure_sweep",
        "Core-seconds of the quickstart's smallest and largest shape by part, and against another tree.",
        (
            _number("rounds", 3, "Turns of each tree, every one a process."),
            _number("rows", 262_144, "Rows of every run."),
            click.Option(
                ["--against"],
                type=click.Path(path_type=Path, exists=True, file_okay=False),
                help="Root of another checkout, which takes turns with this one.",
            ),
        ),
    ),
    "bank": Benchmark(
        "recscale.scaling.bench.step_costs:bank_rows",
        "A LEMUR training step with a bank of 10,000,000 rows against 10,000; ends with code 1 above 1.1 times.",
        (_number("rounds", 8, "Turns of each, of 4 timed steps."),),
        keep_memory="option",
        passed=lambda result: result["ratio"] <= 1.1,
    ),
    "known-truth": Benchmark(
        "recscale.scaling.acceptance.known_truth:accept_known_truth",
        "The acceptance experiment of the known-truth log; ends with code 1 if a gate fails.",
        (
            click.Option(["--quick"], is_flag=True, help="A sixteenth of the rows, with wider gates."),
            _switch("networks", "Also train three architectures at six sizes (part 5).", "with_networks"),
        ),
        keep_memory="yes",
        shows_itself=True,
        passed=lambda result: result["passed"],
    ),
    "reliability": Benchmark(
        "recscale.scaling.acceptance.reliability:measure_reliability",
        "Damages files of runs and sweeps in every way and kills processes at random: results must stay the same.\n\n"
        "Ends with code 1 if a figure changed, or a message was missing.",
        (_number("kills", 20, "Kills of a sweep."), _number("seed", 0, "Of the moments of the kills.")),
        shows_itself=True,
        passed=lambda result: not result["faults"] and result["identical"],
    ),
    "checkpoints": Benchmark(
        "recscale.scaling.bench.checkpoint_cost:measure_checkpoint_cost",
        "Share of a training run's wall time that hashes and manifests of its checkpoints take.\n\n"
        "Ends with code 1 if it is above 3 %, with a checkpoint after each of 24 logging intervals.",
        (_number("rows", 1_000_000, "Rows of the run."),),
        passed=lambda result: result["share"] <= 0.03,
    ),
    "experts": Benchmark(
        "recscale.scaling.bench.experts:measure_experts",
        "Training TokenMixer-Large and serving RankMixer with all, half and a quarter of the experts active.",
        (_number("rounds", 6, "Turns each variant gets, of 2 timed steps."),),
        keep_memory="option",
    ),
    "serve": Benchmark(
        "recscale.scaling.bench.serve:measure_serving",
        "Reusing the user's part of a model (8 requests, 64 candidates, D 256) against computing it per candidate.",
        (
            _several("case", "names", "Only this comparison, by name; may be given several times."),
            _number("rounds", 10, "Turns each of the two models gets, of 2 timed calls."),
            click.Option(
                ["--exported"],
                is_flag=True,
                help="Instead: exported programs, p50 and p99 of single calls; --case names an architecture, or the "
                "folder of an export [default: every architecture].",
            ),
            _number("calls", 200, "Timed calls of each exported program."),
        ),
        keep_memory="option",
    ),
    "history": Benchmark(
        "recscale.scaling.bench.history_length:measure_history_lengths",
        "LONGER training step on 512 to 8,192 events at 64 query rows: time, memory and FLOPs against the length.",
        (_number("rounds", 5, "Timed steps of each length."),),
        keep_memory="option",
    ),
    "laws": Benchmark(
        "recscale.scaling.bench.law_calibration:measure",
        "Accuracy and speed of the law fitter on laws that are known.\n\n"
        "With --calibration: how often it refuses what is right, prints what is noise, and states an interval that "
        "misses the truth, over simulated studies, about 13 core-minutes of them; with --out the same command goes on "
        "where it was ended. Ends with code 1 if a condition fails.",
        (
            click.Option(["--calibration"], is_flag=True, help="Simulate studies instead of timing."),
            _number("studies", 200, "Studies of each kind."),
            _number("pairs", 40, "Pairs of architectures to compare, of each kind."),
            _number("rivals", 40, "Studies of each kind of the small design put to what most papers do; 0 for none."),
            click.Option(["--small"], is_flag=True, help="A handful of kinds only."),
            _number("seed", 0, "Another seed draws other studies."),
            click.Option(
                ["--out"],
                type=click.Path(path_type=Path, file_okay=False),
                help="Folder for the table and the figure.",
            ),
        ),
        passed=lambda result: result.get("passed", True),
    ),
    "memory": Benchmark(
        "recscale.scaling.bench.memory:measure_memory",
        "A memory read and row update at 2^20 slots against 2^14, same hits and width; the search beside it.",
        (_number("rounds", 8, "Turns each size gets, of 8 timed steps."),),
        keep_memory="yes",
    ),
    "import": Benchmark(
        "recscale.scaling.bench.importing:measure_import",
        "Rows per second and peak memory of an import of 30 columns; ends with code 1 if it misses its goals.",
        (
            _number("rows", 10_000_000, "Rows of the made-up log."),
            _number("memory-mb", 2_000, "Memory the import may use, in MB."),
        ),
        passed=lambda result: result["passed"],
    ),
    "reader": Benchmark(
        "recscale.scaling.bench.reader:measure_reader",
        "Rows per second of the reader, and the share of its time a small model waits for it.",
        (
            _number("rows", 400_000, "Rows of the made-up log."),
            _number("history-length", 64, "Events of a history, 0 for none."),
        ),
    ),
    "kernels": Benchmark(
        "recscale.scaling.bench.kernels:measure_kernels",
        "Kernels of this machine's accelerator: errors, time, share of the roofline, beside XLA and public rivals.\n\n"
        "Ends with code 2 where there is no accelerator, and with code 1 if a kernel fails or is wrong.",
        (
            _several("operation", "operations", "Only this one; may be repeated.", metavar="OP"),
            _several("case", "names", "Only this shape; may be repeated.", metavar="NAME"),
            _several("implementation", "implementations", "Only this one, beside XLA.", metavar="NAME"),
            _several("group", "groups", "Only such shapes.", type=click.Choice(("tiny", "ragged", "bench"))),
            click.Option(
                ["--tune"], is_flag=True, help="Search block sizes first and keep what is faster as this device's."
            ),
            click.Option(
                ["--cpu"], is_flag=True, help="Tiny shapes of the XLA paths on the CPU, to prove the harness."
            ),
            click.Option(
                ["--out"],
                type=click.Path(path_type=Path, dir_okay=False),
                help="Also write the rows to this JSON file.",
            ),
        ),
        shows_itself=True,
        passed=_kernels_are_right,
    ),
    "device": Benchmark(
        "recscale.scaling.bench.device:measure_device",
        "Whether the kernels are right on this machine's accelerator and how fast, within a budget of seconds: five "
        "stages, most valuable first, each job in a process of its own.\n\n"
        "Results stand in OUT/results.jsonl as they come, OUT/summary.md at the end; the same command goes on where it "
        "was. Ends with code 1 if a kernel is wrong, fails or ends its process.",
        (
            click.Option(
                ["--out"], required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder for results."
            ),
            click.Option(["--budget"], default=480.0, show_default=True, help="Seconds this call may take."),
            _several("operation", "operations", "Only this one; may be repeated.", metavar="OP"),
            _several("stage", "stages", "Only this one; may be repeated.", metavar="STAGE"),
            click.Option(["--dry-run"], is_flag=True, help="Show the schedule and its estimates, no more."),
            click.Option(["--cpu"], is_flag=True, help="Small shapes, kernels interpreted: to prove the harness."),
            click.Option(["--adopt"], is_flag=True, help="Copy block sizes of OUT/tuned into the package, no more."),
        ),
        shows_itself=True,
        passed=_device_is_right,
    ),
    "mfu": Benchmark(
        "recscale.scaling.bench.mfu:measure_mfu",
        "Model FLOPs utilisation of MODEL's training step on this machine's accelerator; code 2 without one.",
        (click.Argument(["model"], default="rankmixer_1b"), _number("rows", 4096, "Rows of a step.")),
    ),
}


@click.group()
def bench() -> None:
    """Measures speed and correctness on this machine."""
    from recscale.scaling.host_memory import restart_with_huge_pages

    restart_with_huge_pages()


for _name, _benchmark in BENCHMARKS.items():
    bench.add_command(_benchmark.command(_name))
