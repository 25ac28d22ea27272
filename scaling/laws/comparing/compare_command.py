"""`recscale compare`: does one architecture scale better than another, from a run table alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recscale.scaling.laws.commands import BOOTSTRAP, CLUSTER, SEED, leave, read_and_tell, table_command

from .compare import Comparison, Interval
from .compare import compare as compare_tables

_MARKS = {True: "[green]x[/green]", False: "[red]-[/red]", None: "[yellow]?[/yellow]"}
_COLOURS = {"yes": "green", "no": "red", "cannot tell": "yellow"}


@table_command(
    click.option("--a", "first", required=True, help="Architecture asked about."),
    click.option("--b", "second", required=True, help="Architecture it is compared with."),
    click.option("--axis", default="train_flops", show_default=True, help="Column along which they scale."),
    click.option("--target", default="logloss", show_default=True, help="Metric column; lower is better."),
    click.option("--by", default="architecture", show_default=True, help="Column that names the architecture."),
    CLUSTER,
    click.option("--match", help="Column that partners share [default: flops_target, then the axis]."),
    BOOTSTRAP,
    click.option("--margin", default=0.1, show_default=True, help="What matters, as a share of the exponents."),
    click.option(
        "--paired-seeds", "paired_seeds_needed", default=5, show_default=True, help="Paired seeds needed at one size."
    ),
    click.option("--equalised", help="What the sweep held equal, for the record."),
    click.option("--known-truth", help="Record in which this pipeline recovered known exponents."),
    SEED,
)
def compare(table: Path, first: str, second: str, as_json: bool, **options: Any) -> None:
    """Answer whether --a scales better than --b: yes, no or cannot tell, with the reasons.

    TABLE is a run table, as `recscale fit` takes it.
    """
    result = compare_tables(read_and_tell(table), first, second, **options)
    render(result, Console())
    leave(granted=result.level is not None, told=result.to_dict() if as_json else None)


def render(result: Comparison, console: Console) -> None:
    """Print a comparison for people: answer, reasons, multipliers, exponents, paired seeds, checklist,
    exclusions.
    """
    colour = _COLOURS[result.answer]
    question = f"Does {result.a} scale better than {result.b} along {result.axis} ({result.target})?"
    console.print(f"{escape(question)} [bold {colour}]{result.answer}[/]", highlight=False)
    for reason in result.reasons:
        console.print(f"  - {escape(reason)}", highlight=False)
    if result.level is not None:
        _render_numbers(result, console)
    if result.checklist:
        _render_checklist(result, console)
    if result.excluded:
        shown = "; ".join(f"{run}: {reason}" for run, reason in result.excluded[:5])
        more = f" and {len(result.excluded) - 5} more" if len(result.excluded) > 5 else ""
        console.print(f"Excluded rows ({len(result.excluded)}): {escape(shown)}{more}", highlight=False)


def _grid(title: str, headings: Sequence[str], left: Sequence[str] = ()) -> Table:
    """An empty table; columns named in `left` are words, the others numbers."""
    grid = Table(title=title, box=box.SIMPLE, title_justify="left")
    for heading in headings:
        grid.add_column(escape(heading), justify="left" if heading in left else "right")
    return grid


def _render_numbers(result: Comparison, console: Console) -> None:
    title = f"{result.b} needs this many times the {result.axis} of {result.a}"
    grid = _grid(title, ("at", result.target, "multiplier", "interval"), left=("at",))
    for row in result.multipliers:
        grid.add_row(
            f"{row.where} common",
            f"{row.metric:.5g}",
            _number(row.multiplier, ".3g"),
            _interval(row.interval, ".3g"),
        )
    held = "" if result.level in ("shared", "shift") else ", rejected"
    grid.add_row(
        f"everywhere (shift model{held})",
        "",
        _number(result.shift, ".3g"),
        _interval(result.shift_interval, ".3g"),
    )
    console.print(grid)
    if not result.multipliers:
        console.print(f"The two have no {result.target} in common: no multiplier at equal loss.", highlight=False)
    headings = ("model", result.a, result.b, "difference", "interval", "admissible")
    grid = _grid("Exponents", headings, left=("model", "admissible"))
    for d in result.differences:
        numbers = [f"{d.alpha_a:.3f}", f"{d.alpha_b:.3f}", f"{d.difference:+.3f}", _interval(d.interval, "+.3f")]
        refused = ["refused"] * 3 + [""]
        grid.add_row(
            d.model, *(numbers if d.admissible else refused), escape("yes" if d.admissible else f"no: {d.reason}")
        )
    console.print(grid)
    kinds = {i.kind for i in (*(d.interval for d in result.differences), result.shift_interval) if i is not None}
    matched = "matched shapes" if result.matched else f"shapes not matched ({result.matching_note})"
    console.print(f"Intervals: {', '.join(sorted(kinds)) or 'none'}; {escape(matched)}.", highlight=False)
    console.print(f"First model that is not worse than a richer one: {result.level}.", highlight=False)
    _render_paired(result, console)


def _render_paired(result: Comparison, console: Console) -> None:
    if not result.paired:
        console.print(f"No paired seeds: {escape(result.paired_note)}.", highlight=False)
        return
    title = f"{result.target} of {result.a} minus {result.b}, same seeds ({result.paired_note})"
    grid = _grid(title, ("size", "pairs", "mean", "95% interval", "sd of difference", "sd of each"))
    for p in result.paired:
        interval = "" if p.interval is None else f"[{p.interval[0]:+.2g}, {p.interval[1]:+.2g}]"
        each = "" if p.sd_a is None else f"{p.sd_a:.2g}, {p.sd_b:.2g}"
        grid.add_row(p.size, str(p.pairs), f"{p.mean:+.3g}", escape(interval), _number(p.sd_difference, ".2g"), each)
    console.print(grid)


def _render_checklist(result: Comparison, console: Console) -> None:
    headings = ("", "item", "found")
    grid = _grid("Checklist (x ticked, - not, ? not recorded; * needed for an answer)", headings, left=headings)
    for item in result.checklist:
        grid.add_row(_MARKS[item.ticked], escape(item.text) + (" *" if item.required else ""), escape(item.detail))
    console.print(grid)


def _number(value: float | None, spec: str) -> str:
    return "not reached" if value is None else format(value, spec)


def _interval(interval: Interval | None, spec: str) -> str:
    return "" if interval is None else escape(f"[{format(interval.low, spec)}, {format(interval.high, spec)}]")
