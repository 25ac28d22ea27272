"""`recscale isoflop`: how the compute-optimal size grows with compute, by three approaches side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from recscale.scaling.laws.commands import BOOTSTRAP, CLUSTER, SEED, WHERE, leave, read_and_tell, show, table_command
from recscale.scaling.laws.tables.conditions import rows_where

from .approaches import approaches, as_grid


@table_command(
    click.option("--size", default="dense_params", show_default=True, help="Column of sizes N."),
    click.option("--data", default="examples", show_default=True, help="Column of amounts of data D."),
    click.option("--flops", default="train_flops", show_default=True, help="Column of achieved compute."),
    click.option("--budget", default="flops_target", show_default=True, help="Column of planned compute; groups runs."),
    click.option("--target", default="logloss", show_default=True, help="Metric column; lower is better."),
    CLUSTER,
    WHERE,
    BOOTSTRAP,
    SEED,
)
def isoflop(table: Path, where: str | None, as_json: bool, **options: Any) -> None:
    """Exponents a and b of N_opt and D_opt in compute from TABLE: envelope, isoFLOP minima, parametric fit.

    One architecture's: --where keeps it, of a table of several.
    """
    runs = read_and_tell(table)
    runs = runs if where is None else runs[rows_where(runs, where)]
    found, groups, remarks = approaches(runs, **options)
    names = sorted(map(str, runs["architecture"].dropna().unique())) if "architecture" in runs else []
    if len(names) > 1:
        keep = f"--where \"architecture == '{names[0]}'\""
        remarks = [*remarks, f"groups mix runs of {', '.join(names)}; keep one of them, e.g. {keep}"]
    show(as_grid(found, remarks))
    told = {"approaches": found, "isoflop": groups, "remarks": remarks} if as_json else None
    leave(granted=any(f.a is not None for f in found), told=told)
