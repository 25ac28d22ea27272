"""`recscale fit`: a scaling law from a table of runs, with intervals, refusals and a record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recscale.scaling.laws import forms
from recscale.scaling.laws.commands import EXIT_CODES, JSON, TABLE, fit_options, leave
from recscale.scaling.laws.fitting.fit import fit as fit_table
from recscale.scaling.laws.fitting.law_fit import LawFit, Settings
from recscale.scaling.laws.fitting.record import record as build_record
from recscale.scaling.laws.judgement.rolling import Rolling, ladder_ends, rolling_origin
from recscale.scaling.laws.tables.axes import over_floor, parse_axes
from recscale.scaling.laws.tables.read import read
from recscale.scaling.records.files import write_atomically
from recscale.scaling.records.plain import plain

# What every fit is ranked against when extrapolation is scored; one-axis forms meet one-axis rivals.
_RIVALS = {
    1: ("power", "power_offset"),
    2: ("chinchilla", "chinchilla_tied", "kaplan_offset", "kappa", "kappa_tied"),
}


def _show_forms(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    """Print the registry and stop."""
    if not wanted:
        return
    for name in forms.names():
        found = forms.describe(name)
        axes = ", ".join(f"{axis['slot']} ({axis['column']})" for axis in found["axes"])
        named = ", ".join(f"{p['name']} [{p['unit']}]" for p in found["parameters"])
        click.echo(f"{' / '.join([name, *found['aliases']])}: {found['equation']}   [{found['source']}]")
        click.echo(f"    axes: {axes}; valid: {found['valid']}")
        click.echo(f"    parameters: {named}")
        click.echo(f"    limits: {found['limits']}" + (f"; {found['note']}" if found["note"] else ""))
    context.exit()


@click.command(epilog=EXIT_CODES)
@TABLE
@fit_options()
@click.option("--weights", help="Column of precision weights; a column ending in _se holds standard errors.")
@click.option(
    "--huber-delta",
    default=Settings.huber_delta,
    show_default=True,
    help="Width of the Huber loss; inf is least squares.",
)
@click.option("--residuals", type=click.Choice(["auto", "log", "plain"]), default="auto", show_default=True)
@click.option(
    "--invalid",
    type=click.Choice(["refuse", "exclude"]),
    default="refuse",
    show_default=True,
    help="What to do with a table that has broken rows.",
)
@click.option("--rolling", "score", is_flag=True, help="Also score extrapolation of this form and its rivals.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the full record to this JSON file.")
@JSON
@click.option(
    "--forms",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_forms,
    help="List the forms and stop.",
)
def fit(
    table: Path,
    form: str | None,
    axes: str | None,
    target: str | None,
    over: str | None,
    cluster: str | None,
    bootstrap: int,
    score: bool,
    out: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Fit a scaling law to TABLE: a file (csv, tsv, json, jsonl, parquet, feather), a sweep's or a tracker's folder.

    Every finished run that --where keeps is fitted; recscale plot takes the best learning rate of every size, and
    predicts the largest size instead. Refused quantities are printed with the reason and never as a number.
    """
    frame = read(table)
    if over is not None:
        frame, target = over_floor(frame, target, over)
    law = fit_table(frame, form, parse_axes(axes), target, bootstrap, cluster, **options)
    rolling = _score(frame, law, cluster, options) if score and not law.refused else None
    validation = _validation(law, rolling) if rolling is not None else {}
    record = build_record(law, validation)
    if out is not None:
        write_atomically(out, json.dumps(record, indent=2) + "\n")
    if not as_json:
        _print(law, rolling)
    told = {**summary(law), "validation": validation, "record": record} if as_json else None
    leave(granted=law.granted, told=told)


def _score(frame, law: LawFit, cluster: str | None, options: dict) -> Rolling:
    """Rolling origin of the form and its rivals on the same axes."""
    rivals = [form for form in _RIVALS.get(len(law.form.slots), ()) if form != law.form.id]
    names = [law.form.id, *rivals]
    return rolling_origin(frame, names, law.rows.columns, law.rows.target, cluster=cluster, **options)


def _validation(law: LawFit, rolling: Rolling) -> dict:
    return plain({"rolling_origin": rolling.record(), "ladder_ends": ladder_ends(law)})


def summary(law: LawFit) -> dict:
    """The short result of a fit as plain data: numbers, intervals, refusals, and how the fit went."""
    return {
        "form": law.form.id,
        "axes": law.rows.columns,
        "target": law.rows.target,
        "params": law.params,
        "centred": law.centred,
        "derived": law.derived,
        "intervals": law.intervals,
        "ranges": law.ranges,
        "given": law.given,
        "refusals": [gate.as_dict() for gate in law.refusals],
        "warnings": list(law.warnings),
        "rows": len(law.rows.y),
        "fitted_to": law.rows.described,
        "clusters": len(law.rows.cluster_labels),
        "excluded": [vars(exclusion) for exclusion in law.rows.exclusions],
        "objective": None if law.solution is None else law.solution.objective,
        "convergence_share": None if law.solution is None else law.solution.convergence_share,
    }


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}"


def _parameters(law: LawFit) -> Table:
    """Parameters with their 95% intervals, clusters as the unit of noise; refusals and given values in words."""
    listing = Table(box=box.SIMPLE)
    for heading in ("parameter", "centred", "95% interval", "raw", "unit of raw"):
        listing.add_column(heading, overflow="fold")
    for name, told in law.given.items():
        listing.add_row(name, f"given: {escape(told)}")
    for name in law.form.names:
        reason = law.reason(name)
        if reason:
            listing.add_row(name, f"[yellow]refused: {escape(reason)}[/yellow]", _range(law, name))
            continue
        listing.add_row(
            name,
            _cell(law.centred[name]),
            _interval(law.centred_intervals[name]),
            f"[dim]{_cell(law.params[name])}[/dim]",
            f"[dim]{escape(law.form[name].unit)}[/dim]",
        )
    for name, value in law.derived.items():
        listing.add_row(name, _cell(value) or "refused", _interval(law.intervals.get(name)))
    return listing


def _range(law: LawFit, name: str) -> str:
    ends = law.ranges.get(name)
    owners = ", ".join(owner for owner in law.form.belongs_to(name) if law.reason(owner))
    return f"{_interval(ends)}, whatever {owners} is" if ends else ""


def _print(law: LawFit, rolling: Rolling | None) -> None:
    """The fit for a terminal."""
    console = Console()
    console.print(f"[bold]{escape(law.headline())}[/bold]")
    console.print(escape(law.form.equation))
    excluded = law.rows.exclusions
    console.print(
        f"fitted to {law.rows.described}; {len(law.rows.cluster_labels)} clusters by {law.rows.cluster}, "
        f"{len(excluded)} rows excluded",
        highlight=False,
    )
    for exclusion in excluded[:10]:
        console.print(f"  excluded {escape(exclusion.run_id)}: {escape(exclusion.reason)}")
    if len(excluded) > 10:
        console.print(f"  and {len(excluded) - 10} more (all are in the record)")
    if not law.refused:
        console.print(_parameters(law))
    for gate in law.refusals:
        console.print(f"[yellow]refused by {gate.id}:[/yellow] {escape(gate.reason)}; {escape(gate.consequence)}")
    if law.solution is not None and not law.refused:
        influence = law.jackknife.get("most_influential")
        console.print(
            f"{law.solution.convergence_share:.0%} of the starts reached the optimum"
            + (f"; leaving out {escape(str(influence))} moves the fit most" if influence is not None else "")
        )
    if law.floor_upper_bound is not None and law.reason(law.form.floor or ""):
        console.print(f"95% upper bound of {law.form.floor}: {law.floor_upper_bound:.5g}")
    for notice in law.warnings:
        console.print(f"[dim]note: {escape(notice)}[/dim]")
    if rolling is not None:
        _print_rolling(console, rolling)


def _print_rolling(console: Console, rolling: Rolling) -> None:
    """Held-out errors per form and coverage of the best one."""
    listing = Table(box=box.SIMPLE, title=f"Held-out error of ln y, cuts along {rolling.axis}")
    for heading in ("form", "mean rms", "worst rms", "bias", "cuts", "weight"):
        listing.add_column(heading)
    for name, row in rolling.ranking.iterrows():
        listing.add_row(
            str(name),
            f"{row['mean_rms']:.3g}",
            f"{row['worst_rms']:.3g}",
            f"{row['bias']:+.2g}",
            f"{row['cuts']:.0f}",
            f"{row['weight']:.2f}",
        )
    console.print(listing)
    measured = rolling.coverage
    for _, row in measured[(measured["form"] == rolling.best) & (measured["level"] == 0.95)].iterrows():
        console.print(
            f"coverage of {row['form']} at {row['ratio']}: {row['coverage']:.2f} of .95 ({row['points']:.0f} points)"
        )
    for name, reason in rolling.refused.items():
        console.print(f"[yellow]{name} not ranked:[/yellow] {escape(reason)}")
