"""`recscale pool`: exponents of several architectures from one hierarchical fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from recscale.scaling.laws.commands import (
    BOOTSTRAP,
    CLUSTER,
    EXIT_CODES,
    JSON,
    SEED,
    TABLE,
    WHERE,
    between,
    leave,
    number,
    read_and_tell,
    say,
    show,
)
from recscale.scaling.laws.fitting.law_fit import Refused

from .pooling import hierarchy


@click.command(epilog=EXIT_CODES)
@TABLE
@click.option("--axis", default="dense_params", show_default=True, help="Column along which they scale.")
@click.option("--target", default="logloss", show_default=True, help="Metric column.")
@click.option("--by", default="architecture", show_default=True, help="Column that names the architectures.")
@CLUSTER
@WHERE
@BOOTSTRAP
@SEED
@JSON
def pool(table: Path, as_json: bool, **options: Any) -> None:
    """Fit every architecture of TABLE together: one floor where they read the same data, exponents partially pooled."""
    try:
        found = hierarchy(read_and_tell(table), **options)
    except Refused as refusal:
        say(str(refusal))
        leave(granted=False, told={"refused": str(refusal)} if as_json else None)
        return
    say(found.shared, *(f"floor of {name}: {number(value, '.5g')}" for name, value in found.floors.items()))
    rows = [
        (p.name, number(p.alone), between(p.alone_interval), number(p.pooled), between(p.pooled_interval),
         "" if p.share is None else f"{p.share:.2f}")
        for p in found.exponents
    ]  # fmt: skip
    show("Exponents", ("", "alone", "95 %", "pooled", "95 %", "weight of its own"), rows)
    if found.mean is not None and found.tau is not None:
        say(f"common exponent {found.mean:.4g} [{between(found.mean_interval)}], spread of ln alpha {found.tau:.2g}")
    else:
        say("fewer than three exponents are granted: nothing is pooled")
    told = {key: value for key, value in vars(found).items() if key != "law"}
    leave(granted=any(p.alone is not None for p in found.exponents), told=told if as_json else None)
