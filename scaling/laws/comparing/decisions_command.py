"""`recscale decisions`: how often small runs, or laws fitted to them, order settings as the largest runs do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from recscale.scaling.laws.commands import leave, read_and_tell, show, table_command

from .decision_accuracy import as_grid, decision_accuracy


@table_command(
    click.option("--by", default="architecture", show_default=True, help="Column that names what is to be ordered."),
    click.option(
        "--scale", default="flops_target", show_default=True, help="Column of levels that all settings share."
    ),
    click.option("--axis", default="train_flops", show_default=True, help="Column laws are fitted along."),
    click.option("--target", default="logloss", show_default=True, help="Metric column; lower is better."),
    click.option(
        "--form", "forms", multiple=True, default=("power_offset", "power"), show_default=True, help="Repeatable."
    ),
)
def decisions(table: Path, as_json: bool, **options: Any) -> None:
    """Share of pairs of settings in TABLE whose order at the largest scale was predicted from smaller ones."""
    found = decision_accuracy(read_and_tell(table), **options)
    show(as_grid(found))
    leave(granted=any(a.pairs for a in found.accuracies), told=vars(found) if as_json else None)
