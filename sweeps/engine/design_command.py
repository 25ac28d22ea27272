"""`recscale design`: which runs to train next, for intervals that are narrow enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd

from recscale.scaling.laws.commands import fit_options, leave, read_and_tell, say, show, table_command
from recscale.scaling.laws.fitting.fit import fit
from recscale.scaling.laws.fitting.law_fit import Refused
from recscale.scaling.laws.forms.registry import ONE_AXIS
from recscale.scaling.laws.grids import Grid
from recscale.scaling.laws.planning.design import BEYOND, Design, Plan, designed, differences, measured_cost, planned
from recscale.scaling.laws.planning.design import plan as plan_runs
from recscale.scaling.laws.tables.axes import over_floor, parse_axes
from recscale.scaling.laws.tables.conditions import rows_where
from recscale.scaling.records.advice import advised
from recscale.scaling.records.number_text import amount

_SHOWN, _LONGEST_LIST = 8, 40


@table_command(
    click.option("--budget", type=float, default=np.inf, help="Core-hours for all next runs together [default: any]."),
    click.option("--goal", metavar="NAME=WIDTH", help="Half-width to reach for every architecture, as in alpha=.02."),
    click.option("--like", type=click.Path(path_type=Path), help="For a planned SWEEP: a table whose law it may obey."),
    click.option("--data", default="examples", show_default=True, help="Column of the rows a run was trained on."),
    click.option("--speed", type=float, help="Price runs at 6 FLOPs a parameter and row, so many FLOP/s, instead."),
    click.option(
        "--beyond", default=BEYOND, show_default=True, help="Largest run offered, in times the largest fitted."
    ),
    click.option("--by", default="architecture", show_default=True, help="Column that tells the laws apart."),
    fit_options(ONE_AXIS),
    table=click.argument("place", metavar="TABLE|SWEEP", type=click.Path(path_type=Path)),
)
def design(
    place: Path, budget: float, goal: str | None, like: Path | None, data: str,
    speed: float | None, beyond: float, by: str, form: str, axes: str | None,
    where: str | None, target: str | None, over: str | None, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Expected widths of the constants of the law of TABLE, and of every candidate next run, best first.

    For a SWEEP that is planned and not yet trained (a folder with plan.jsonl): the widths it would have if it obeys the
    law of --like TABLE. Widths are 95 % half-widths in the constants' own units, of each law by itself. They suppose
    that the law holds wherever runs are offered; a goal is reached where four of five such tables would state it.
    """
    wanted = _goal(goal)
    table = read_and_tell(like if like is not None else place)
    table = table if where is None else table[rows_where(table, where)]
    if over is not None:
        table, target = over_floor(table, target, over)
    options |= {"target": target, "bootstrap": 0, "profile": False}
    prices = {"data": data, "speed": speed}
    designs, refused = _designs(table, by, form, axes, (budget, beyond), prices, options)
    if like is not None:
        designs = _planned(place, designs, by)
    if wanted is not None:
        _check_goal(wanted[0], designs)
    for name, reason in refused.items():
        say(f"{name}: no design. {reason}")
    told: dict[str, Any] = {"now": _widths(designs), "differences": _named(differences(designs)), "refused": refused}
    _show_now(designs)
    if designs and like is None:
        told |= _next(designs, budget, wanted)
    leave(granted=bool(designs), told=told if as_json else None)


def _goal(text: str | None) -> tuple[str, float] | None:
    if text is None:
        return None
    name, _, width = text.partition("=")
    try:
        return name, float(width)
    except ValueError as error:
        raise click.UsageError(f"--goal {text!r} is no NAME=WIDTH, such as alpha=.02") from error


def _check_goal(name: str, designs: list[Design]) -> None:
    for one in designs:
        if name not in one.widths():
            raise ValueError(f"the law of {one.name} has no {name!r} to narrow; it has {', '.join(one.widths())}")


def _designs(
    table: pd.DataFrame,
    by: str,
    form: str,
    axes: str | None,
    limits: tuple[float, float],
    prices: dict[str, Any],
    options: dict[str, Any],
) -> tuple[list[Design], dict[str, str]]:
    """One design a law, and why there is none for others."""
    found, refused = [], {}
    groups = table.groupby(by) if by in table.columns else [("runs", table)]
    for name, group in groups:
        law = fit(group, form, parse_axes(axes), **options)
        try:
            law.solved()
            cost = measured_cost(law.rows.frame, list(law.rows.columns.values()), **prices)
            found.append(designed(str(name), law, cost, *limits))
        except Refused as refusal:
            refused[str(name)] = str(refusal)
    return found, refused


def _planned(folder: Path, designs: list[Design], by: str) -> list[Design]:
    """The designs of a planned sweep; of an architecture that --like does not hold, the law of its first one."""
    from .plan import read_plan
    from .tables import planned_table

    if not (folder / "plan.jsonl").exists():
        raise ValueError(
            f"{folder} holds no plan; make one with {advised('recscale', 'plan', 'FILE', '--out', folder)}"
        )
    runs, laws = planned_table(read_plan(folder)), {one.name: one for one in designs}
    found = []
    for name, group in runs.groupby(by):
        law = laws.get(str(name), designs[0]) if designs else None
        if law is not None:
            points = group[list(law.law.rows.columns.values())].to_numpy(float)
            found.append(planned(law, points, str(name)))
    return found


def _widths(designs: list[Design]) -> dict[str, dict[str, float]]:
    return {one.name: one.widths() for one in designs}


def _named(pairs: dict[tuple[str, str], float]) -> dict[str, float]:
    return {f"{a} - {b}": width for (a, b), width in pairs.items()}


def _show_now(designs: list[Design]) -> None:
    rows = [
        (
            one.name,
            ", ".join(f"{name} ± {width:.2g}" for name, width in one.widths().items()),
            f"{np.count_nonzero(one.counts)} cells, {one.counts.sum()} runs",
            f"{100 * one.within**0.5:.2g} % seeds, {100 * one.between**0.5:.2g} % around the law",
        )
        for one in designs
    ]
    if rows:
        show(Grid("Expected 95 % half-widths", ("law", "", "from", "noise"), rows))
    say(*(f"difference of exponents {pair}: ± {width:.2g}" for pair, width in _named(differences(designs)).items()))


def _next(designs: list[Design], budget: float, goal: tuple[str, float] | None) -> dict[str, Any]:
    """Prints the best single next runs and the plan; returns both as plain data."""
    single = []
    for k, one in enumerate(designs):
        worth = one.gains(goal[0] if goal else None)
        for run in np.argsort(-worth)[:_SHOWN]:
            after = one.with_run(int(run))
            changed = [*designs[:k], after, *designs[k + 1 :]]
            single.append(
                {
                    "law": one.name, "point": _point(one, one.points[run]), "core_hours": float(one.hours[run]),
                    "worth": float(worth[run]), "widths": after.widths(),
                    "differences": _named(differences(changed)),
                }
            )  # fmt: skip
    single = sorted(single, key=lambda entry: -entry["worth"])[:_SHOWN]
    of = f"width of {goal[0]}" if goal else "ln det of the information"
    rows = [
        (
            entry["law"], _words(entry["point"]), f"{entry['core_hours']:.2g}",
            ", ".join(f"{name} ± {width:.2g}" for name, width in entry["widths"].items()),
            ", ".join(f"± {width:.2g}" for width in entry["differences"].values()),
        )
        for entry in single
    ]  # fmt: skip
    headings = ("law", "run", "core-hours", "half-widths with it", "differences of exponents")
    show(Grid(f"Best single next run, by the {of}", headings, rows))
    if goal is None and not np.isfinite(budget):
        say("--budget CORE_HOURS or --goal NAME=WIDTH plans several runs together")
        return {"next": single}
    found = plan_runs(designs, budget, goal)
    _show_plan(found, designs, budget, goal)
    runs = [{"law": r.name, "point": r.point, "core_hours": r.hours} for r in found.runs]
    planned_runs = {
        "runs": runs,
        "core_hours": found.hours,
        "reached": found.reached,
        "widths": _widths(list(found.designs)),
    }
    return {"next": single, "plan": planned_runs}


def _show_plan(found: Plan, designs: list[Design], budget: float, goal: tuple[str, float] | None) -> None:
    before = {one.name: one for one in designs}
    rows = []
    for after in found.designs:
        added = after.counts - before[after.name].counts
        for i in np.flatnonzero(added):
            run = _words(_point(after, after.points[i]))
            rows.append((after.name, run, f"{added[i]}", f"{added[i] * after.hours[i]:.2g}"))
    if len(rows) > _LONGEST_LIST:
        rows = [*rows[:_LONGEST_LIST], ("", f"and {len(rows) - _LONGEST_LIST} more (all are in the JSON)", "", "")]
    of = "" if not np.isfinite(budget) else f" of {budget:g}"
    title = f"Plan: {len(found.runs)} runs, {found.hours:.3g}{of} core-hours"
    show(Grid(title, ("law", "run", "seeds", "core-hours"), rows))
    for after in found.designs:
        widths = after.widths()
        line = f"{after.name} with them: " + ", ".join(f"{name} ± {width:.2g}" for name, width in widths.items())
        if goal is not None:
            verdict = "reaches" if after.reaches(*goal) else "does not reach"
            likely = f"{goal[0]} ± {after.likely_width(goal[0]):.2g} or less in four of five such tables"
            line += f"; {likely}: {verdict} ± {goal[1]:g}"
        say(line)
    if found.reached is False and not np.isfinite(budget):
        say("not with 4 seeds a cell; larger runs (--beyond) or a floor that is known (--fix E=@COLUMN) would help")


def _point(one: Design, values: np.ndarray) -> dict[str, float]:
    columns = [one.law.rows.columns[slot] for slot in one.law.form.axes]
    return dict(zip(columns, map(float, values), strict=True))


def _words(point: dict[str, float]) -> str:
    return ", ".join(f"{column} {amount(value)}" for column, value in point.items())
