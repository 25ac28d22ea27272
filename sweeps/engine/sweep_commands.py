"""`recscale plan | launch | status | collect | sweep`: from a sweep file to finished runs and a fitted law."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from recscale.scaling.records.advice import advised

if TYPE_CHECKING:
    import pandas as pd

    from .executors import Outcome
    from .loading import SweepFile

_OUT = click.option(
    "--out", type=click.Path(path_type=Path), help="Folder of the sweep; default runs/<name of the file>."
)
_DATA = click.option("--data", "root", help="Folder of an imported log (sets data.root).")
_SET = click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="Laid over every run, e.g. training.examples=100000.",
)
_EXTEND = click.option("--extend", is_flag=True, help="Add a different sweep's runs to the plan already in the folder.")
_RATES = click.option("--rates", is_flag=True, help="The search for rates alone, of a file that asks for one.")
_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on the last line of standard output.")
_WORKERS = click.option("--workers", type=click.IntRange(1), help="Worker processes; default one a core.")
_MEMORY = click.option("--memory-gb", type=float, help="Memory the running jobs may use; default 80 % of what is free.")
_EXECUTOR = click.option(
    "--executor",
    "--backend",
    default="local",
    show_default=True,
    metavar="NAME",
    help="What runs the jobs: local, slurm, ray, command, one of another distribution, or package.module:class.",
)
_EXECUTOR_OPTION = click.option(
    "--executor-option",
    "--backend-option",
    "--slurm",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="Option of the executor; submitit's for slurm, e.g. slurm_partition=gpu.",
)
_WAIT = click.option("--wait", is_flag=True, help="Stay until jobs that were handed to a scheduler are through.")
_GPUS = click.option("--gpus-per-run", type=click.IntRange(0), default=0, help="GPUs of a job; 0 trains on CPU cores.")
_NODE = click.option("--gpus-per-node", type=click.IntRange(1), help="GPUs of a machine; a job of more has several.")


@dataclasses.dataclass(frozen=True)
class _Planning:
    """What is asked of the planner."""

    out: Path | None
    root: str | None
    assignments: tuple[str, ...]
    extend: bool
    rates: bool

    @property
    def free(self) -> tuple[str, ...]:
        """Settings of this launch that change no result: a plan made earlier may hold others."""
        from .plan import is_free

        place = () if self.root is None else (f"data.root={self.root}",)
        return (*place, *(text for text in self.assignments if is_free(text)))


@dataclasses.dataclass(frozen=True)
class _Running:
    """What is asked of the executor."""

    workers: int | None
    memory_gb: float | None
    executor: str
    options: tuple[str, ...]
    wait: bool
    gpus_per_run: int
    gpus_per_node: int | None

    def check(self) -> None:
        """Raises BadParameter where there is no such executor: before anything is planned."""
        from .executors import executor_class

        try:
            executor_class(self.executor)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--executor") from error


def _options(bundle: type, name: str, *options: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command these options, handed over as one argument: `name`, a `bundle` of them."""
    fields = [field.name for field in dataclasses.fields(bundle)]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def bundled(**given: Any) -> None:
            command(**{name: bundle(*map(given.pop, fields))}, **given)

        return functools.reduce(lambda function, option: option(function), reversed(options), bundled)

    return decorate


_PLANNING = _options(_Planning, "planning", _OUT, _DATA, _SET, _EXTEND, _RATES)
_RUNNING = _options(_Running, "running", _WORKERS, _MEMORY, _EXECUTOR, _EXECUTOR_OPTION, _WAIT, _GPUS, _NODE)


@click.command()
@click.argument("file")
@_PLANNING
@click.option("--device-flops", type=float, help="FLOP/s of training that one accelerator reaches, for device-hours.")
@_JSON
def plan(file: str, planning: _Planning, device_flops: float | None, as_json: bool) -> None:
    """Resolve every run of a sweep FILE: a table of counts, FLOPs, predicted memory and time. Nothing is launched.

    Says what all of it will take (with --set tracking.watts_per_device=..., usd_per_device_hour and grid_kg_per_kwh
    energy, cost and CO2 as well), and which of the laws' gates these runs cannot pass, whatever comes of them.
    """
    out, rows, new = _plan(file, planning)
    from recscale.scaling.laws.planning.foresee import foreseen
    from recscale.scaling.report.views import AXES

    from .tables import bill, bill_line, plan_table, planned_table

    click.echo(plan_table(rows))
    due = bill(rows, planning.free, device_flops)
    click.echo(bill_line(due))
    warned = foreseen(planned_table(rows), AXES)
    for line in warned:
        click.echo(f"foreseen: {line}")
    click.echo(
        f"{len(rows)} runs in {out / 'plan.jsonl'} ({new} new); launch them with {advised('recscale', 'launch', out)}"
    )
    if as_json:
        told = {"out": str(out), "runs": len(rows), "new": new, "job_seconds": _job_seconds(rows)}
        _json(told | {"bill": due, "foreseen": warned})


@click.command()
@click.argument("target", metavar="FILE|OUT")
@_PLANNING
@_RUNNING
@_JSON
def launch(target: str, planning: _Planning, running: _Running, as_json: bool) -> None:
    """Train every unfinished run of a planned folder OUT, or plan a sweep FILE first. Stopped runs go on."""
    from recscale.scaling.records.planned import PLAN, SWEEP

    from .plan import FREE_KEYS, is_free

    running.check()
    with _errors():
        if any((Path(target) / name).exists() for name in (PLAN, SWEEP)):
            fixed = [text for text in planning.assignments if not is_free(text)]
            if fixed or planning.extend or planning.out:
                raise click.UsageError(
                    f"{target} is planned already; --extend, --out and --set of anything but {', '.join(FREE_KEYS)} "
                    "go with a sweep file"
                )
            out = Path(target)
        else:
            out, _, _ = _plan(target, planning)
        outcome = _run(out, running, planning.free)
    _tell_handed_over(out, outcome, as_json)
    click.echo(_outcome_line(out, outcome))
    if as_json:
        _json({"out": str(out), "statuses": outcome.statuses, "wall_s": outcome.wall_s})
    _leave(outcome)


@click.command()
@click.argument("out", type=click.Path(path_type=Path, exists=True, file_okay=False))
@_JSON
def status(out: Path, as_json: bool) -> None:
    """What has become of every run planned in OUT."""
    from .job import count
    from .tables import run_states, status_table

    states = run_states(out)
    click.echo(status_table(states))
    counts = count([state["state"] for state in states])
    click.echo(", ".join(f"{count} {name}" for name, count in counts.items()))
    if as_json:
        _json({"out": str(out), "statuses": counts, "runs": states})


@click.command()
@click.argument("out", type=click.Path(path_type=Path, exists=True, file_okay=False))
def cancel(out: Path) -> None:
    """Take the jobs of OUT that were handed to a scheduler from its queue; `recscale launch` submits them again."""
    from .submission import cancel_jobs

    cancelled = cancel_jobs(out)
    click.echo(f"{len(cancelled)} jobs cancelled")


@click.command()
@click.argument("out", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--experts",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write how often every expert of every run was open, too (.parquet).",
)
@_JSON
def collect(out: Path, experts: Path | None, as_json: bool) -> None:
    """Write the run table of OUT (runs.parquet), one row a run, whatever became of it."""
    from recscale.scaling.records.runs import TABLE
    from recscale.scaling.records.runs import collect as collect_runs

    from .job import count
    from .tables import waiting_runs

    table = collect_runs(out, waiting_runs(out))
    counts = count(list(table["status"]))
    click.echo(f"{out / TABLE}: {len(table)} runs, {', '.join(f'{count} {name}' for name, count in counts.items())}")
    if experts is not None:
        from recscale.scaling.report.expert_activity import activity, save

        click.echo(f"{save(activity([out]), experts)}: how often every expert was open")
    if as_json:
        _json({"out": str(out), "table": str(out / TABLE), "runs": len(table), "statuses": counts})
    lost = list(table.loc[table["status"] == "lost", "run_id"])
    if lost:
        shown = ", ".join(lost[:5]) + (", ..." if len(lost) > 5 else "")
        message = (
            f"{len(lost)} planned runs have no record: {shown}; train them with {advised('recscale', 'launch', out)}"
        )
        raise click.ClickException(message)


@click.command()
@click.argument("file")
@_PLANNING
@_RUNNING
@click.option("--no-report", is_flag=True, help="Stop after the run table: no fit, no plot.")
@_JSON
def sweep(file: str, planning: _Planning, running: _Running, no_report: bool, as_json: bool) -> None:
    """Plan a sweep FILE, train it, collect the run table, fit the law and plot it. Run again, it resumes."""
    _sweep(file, planning, running, no_report, as_json)


@click.command()
@click.argument("name", required=False)
@_PLANNING
@_RUNNING
@_JSON
def paper(name: str | None, planning: _Planning, running: _Running, as_json: bool) -> None:
    """Run the orderings that the paper NAME published: each arm at its best rate, each ordering judged by paired seeds.

    Without a NAME: the papers whose orderings come with the package.
    """
    from recscale.pallas_kernels.names import closest

    from .loading import installed, papers

    known = papers()
    if name is None:
        click.echo("\n".join(known))
    elif name in known:
        if name in installed():
            _sweep(name, planning, running, False, as_json)
        else:
            _study(known[name], planning, as_json)
    else:
        nearest = f"no paper {name!r}; nearest is {closest(name, known)!r} (papers: {', '.join(known)})"
        raise click.BadParameter(nearest, param_hint="NAME")


def _study(file: Path, planning: _Planning, as_json: bool) -> None:
    """The orderings of a paper whose runs are no sweep: its study, unless its table is there, and what it says."""
    import pandas as pd

    from recscale.scaling.records.runs import TABLE
    from recscale.scaling.report.orderings import as_option

    if planning.assignments or planning.extend or planning.rates:
        raise click.UsageError(f"the study of {file.stem} is no sweep: it takes --out, and --data where it reads a log")
    out = planning.out or Path("runs") / file.stem
    study = importlib.import_module(f"recscale.sweeps.papers.{file.stem}")
    if not (out / TABLE).exists():
        study.run_study(out / TABLE, planning.root)
    table, orderings = study.get_orderings(pd.read_parquet(out / TABLE))
    report = _judge(out, table, as_option(orderings))
    if as_json:
        _json({"out": str(out), "report": report})


def _sweep(file: str, planning: _Planning, running: _Running, no_report: bool, as_json: bool) -> None:
    from recscale.scaling.records.runs import TABLE
    from recscale.scaling.records.runs import collect as collect_runs

    from .loading import load

    began = time.monotonic()
    running.check()
    loaded = load(file)
    with _errors():
        if loaded.rates() is not None and not planning.rates:
            _search_rates(planning, loaded, running, as_json)
        out, rows, _ = _plan(file, planning)
        click.echo(f"{len(rows)} runs planned, about {_job_seconds(rows):.0f} core-seconds (estimated)", err=True)
        outcome = _run(out, running, planning.free)
        _tell_handed_over(out, outcome, as_json)
        if outcome.interrupted:
            click.echo(_outcome_line(out, outcome))
            _leave(outcome)
        table = collect_runs(out)
        click.echo(_outcome_line(out, outcome))
        click.echo(f"run table: {out / TABLE}")
        if outcome.unfinished:
            click.echo(f"the table is PARTIAL: {outcome.unfinished} of its {len(table)} runs have no result")
        report = {} if no_report else _report(out)
    if as_json:
        result = {"out": str(out), "runs": len(table), "statuses": outcome.statuses}
        _json(result | {"wall_s": round(time.monotonic() - began, 1), "report": report})
    _leave(outcome)


def _search_rates(planning: _Planning, loaded: SweepFile, running: _Running, as_json: bool) -> None:
    """Trains the search for rates that a sweep file asks for, in a folder of the sweep's own; it goes on beyond the
    rates first tried where the best one is the lowest or highest of them."""
    from .rates import FOLDER

    asked = dataclasses.replace(planning, out=(planning.out or Path("runs") / loaded.name) / FOLDER, rates=True)
    for beyond in itertools.chain([False], itertools.repeat(True)):
        out, rows, new = _plan(str(loaded.path), asked, beyond_edges=beyond)
        if beyond and not new:
            return
        runs = f"{new} runs beyond the rates tried" if beyond else f"{len(rows)} runs"
        click.echo(f"rates: {runs} planned, about {_job_seconds(rows[-new:]):.0f} core-seconds (estimated)", err=True)
        outcome = _run(out, running, planning.free)
        _tell_handed_over(out, outcome, as_json)
        if outcome.interrupted:
            click.echo(_outcome_line(out, outcome))
            _leave(outcome)


def _plan(file: str, asked: _Planning, *, beyond_edges: bool = False) -> tuple[Path, list[dict[str, Any]], int]:
    """Loads, resolves and writes a plan; returns its folder, all its rows and how many are new.

    beyond_edges: the further trials of a finished search for rates, as a later stage of its plan.
    """
    from recscale.scaling.data.sources import use_log
    from recscale.scaling.training.preflight import check_places

    from .loading import load
    from .plan import make_plan, read_plan, write_plan, write_sweep
    from .rates import FOLDER, points_beyond, points_of

    loaded = load(file)
    out = asked.out or Path("runs") / loaded.name / (FOLDER if asked.rates else "")
    try:
        points = points_beyond(loaded, out) if beyond_edges else points_of(loaded, out, search=asked.rates)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    if beyond_edges and not points:
        return out, [], 0
    check_places(out, out / "cache")
    config = loaded.config()
    if asked.root is not None:
        use_log(config, asked.root)
    planned = make_plan(
        config,
        points,
        sweep=loaded.name,
        assignments=asked.assignments,
        given=() if asked.root is None else ("data.root",),
        stage=1 + max(row["stage"] for row in read_plan(out)) if beyond_edges else 0,
        cache_dir=out / "cache",
        folder=loaded.folder,
    )
    for note in planned.notes:
        click.echo(f"note: {note}", err=True)
    arguments = [str(loaded.path), *(() if asked.root is None else ("--data", str(Path(asked.root).absolute())))]
    arguments += [*(["--rates"] if asked.rates else []), *(p for text in asked.assignments for p in ("--set", text))]
    rows, new = write_plan(out, planned, extend=asked.extend or beyond_edges, arguments=arguments)
    write_sweep(out, loaded.name, loaded.report(), rows)
    return out, rows, new


def _run(out: Path, asked: _Running, overrides: tuple[str, ...]) -> Outcome:
    from .executors import Launch
    from .submission import carry_out

    return carry_out(
        Launch(out, overrides, asked.options, asked.workers, asked.memory_gb),
        asked.executor,
        wait=asked.wait,
        gpus_per_run=asked.gpus_per_run,
        gpus_per_node=asked.gpus_per_node,
        told=lambda line: click.echo(line, err=True),
    )


def _tell_handed_over(out: Path, outcome: Outcome, as_json: bool) -> None:
    """Ends the command where jobs were given to a scheduler that goes on by itself: code 1 until all are through."""
    if outcome.submitted is None:
        return
    click.echo(f"{len(outcome.submitted)} jobs submitted; follow them with {advised('recscale', 'status', out)}")
    if as_json:
        _json({"out": str(out), "submitted": outcome.submitted, "statuses": outcome.statuses})
    _leave(outcome)
    sys.exit(0)


def _report(out: Path) -> dict[str, Any]:
    """Fits and draws with the options of the sweep file, prints the summary, and returns it."""
    from recscale.scaling.laws.tables.read import read
    from recscale.scaling.report.frame import save
    from recscale.scaling.report.report import FOLDER, make_report, print_summary
    from recscale.scaling.report.verdict import as_options, judge, verdict_figure

    from .plan import read_sweep

    given = read_sweep(out).get("report", {})
    if "orderings" in given:
        return _judge(out, read(out), given["orderings"])
    options, versus = as_options(given)
    summary = make_report(out, **options)
    print_summary(summary)
    if versus is not None:
        verdict = judge(read(out), *versus, out=out)
        picture = save(verdict_figure(verdict), out / FOLDER / "verdict.png")
        summary["verdict"] = verdict.lines
        click.echo("\n".join([f"picture  {picture}", "", *verdict.lines]))
    return summary


def _judge(out: Path, table: pd.DataFrame, orderings: list[dict[str, Any]]) -> dict[str, Any]:
    """Judges published orderings by a run table, prints them, and leaves a table and a figure of them in a report."""
    from recscale.scaling.records.files import write_atomically
    from recscale.scaling.report.comparison_figures import orderings_figure
    from recscale.scaling.report.frame import save
    from recscale.scaling.report.orderings import judge, lines, markdown, orderings_table
    from recscale.scaling.report.report import FOLDER

    judged = judge(table, orderings)
    found = orderings_table(judged)
    write_atomically(out / FOLDER / "orderings.csv", found.to_csv(index=False))
    write_atomically(out / FOLDER / "orderings.md", "\n".join(markdown(judged)) + "\n")
    click.echo("\n".join(["", *lines(judged), f"table: {out / FOLDER / 'orderings.csv'}"]))
    if any(one.interval is not None for one in judged):
        figure = orderings_figure(judged, title=f"published orderings: {out.name}")
        click.echo(f"picture: {save(figure, out / FOLDER / 'orderings.png')}")
    return {"orderings": json.loads(found.to_json(orient="records"))}


def _outcome_line(out: Path, outcome: Outcome) -> str:
    counts = ", ".join(f"{count} {name}" for name, count in outcome.statuses.items())
    line = f"{counts} in {outcome.wall_s:.0f} s"
    if outcome.interrupted:
        return f"stopped: {line}; go on with {advised('recscale', 'launch', out)}"
    if outcome.failed:
        return f"{line}; the reasons of the failed runs: {advised('recscale', 'status', out)}"
    if outcome.unfinished:
        return f"{line}; go on with {advised('recscale', 'launch', out)}"
    return line


def _leave(outcome: Outcome) -> None:
    """Exit code 130 after an interruption, 1 while a planned run has no result."""
    if outcome.interrupted:
        sys.exit(130)
    if outcome.unfinished:
        sys.exit(1)


def _job_seconds(rows: list[dict[str, Any]]) -> float:
    return sum({row["job"]: row["predicted"]["job_seconds"] for row in rows}.values())


def _json(value: dict[str, Any]) -> None:
    click.echo(json.dumps(value, default=str))


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """A condition of this machine, no fault: an optional dependency that is missing."""
    from .executors import MissingExtra

    try:
        yield
    except MissingExtra as error:
        raise click.ClickException(str(error)) from error
