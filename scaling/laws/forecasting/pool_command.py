"""`recscale pool`: exponents of several architectures from one hierarchical fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from recscale.scaling.laws.commands import (
    BOOTSTRAP,
    CLUSTER,
    SEED,
    WHERE,
    leave,
    read_and_tell,
    refuse,
    say,
    show,
    table_command,
)
from recscale.scaling.laws.fitting.law_fit import Refused
from recscale.scaling.laws.grids import Grid, between, number

from .pooling import hierarchy


@table_command(
    click.option("--axis", default="dense_params", show_default=True, help="Column along which they scale."),
    click.option("--target", default="logloss", show_default=True, help="Metric column."),
    click.option("--by", default="architecture", show_default=True, help="Column that names the architectures."),
    CLUSTER,
    WHERE,
    BOOTSTRAP,
    SEED,
)
def pool(table: Path, as_json: bool, **options: Any) -> None:
    """Fit every architecture of TABLE together: one floor where they read the same data, exponents partially pooled."""
    try:
        found = hierarchy(read_and_tell(table), **options)
    except Refused as refusal:
        return refuse(refusal, as_json)
    say(found.shared, *(f"floor of {name}: {number(value, '.5g')}" for name, value in found.floors.items()))
    rows = [
        (p.name, number(p.alone), between(p.alone_interval), number(p.pooled), between(p.pooled_interval),
         "" if p.share is None else f"{p.share:.2f}")
        for p in found.exponents
    ]  # fmt: skip
    show(Grid("Exponents", ("", "alone", "95 %", "pooled", "95 %", "weight of its own"), rows))
    if found.mean is not None and found.tau is not None:
        say(f"common exponent {found.mean:.4g} [{between(found.mean_interval)}], spread of ln alpha {found.tau:.2g}")
    else:
        say("fewer than three exponents are granted: nothing is pooled")
    told = {key: value for key, value in vars(found).items() if key != "law"}
    leave(granted=any(p.alone is not None for p in found.exponents), told=told if as_json else None)
