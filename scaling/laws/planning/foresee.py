"""Which gates a planned sweep cannot pass, said before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from recscale.scaling.laws.forms import registry
from recscale.scaling.laws.judgement import gates

_FORM = "power_offset"
_BRACKET = 3  # learning rates without which none lies between others


def foreseen(planned: pd.DataFrame, axes: Sequence[str]) -> list[str]:
    """One line per architecture and axis that no result of these runs can save, from the columns of a run table.

    planned: a row a run, with architecture, shape_id, seed, lr_dense and the axes, and lr_bracketed where a sweep notes
    that its rates were found elsewhere. An axis that does not vary within an architecture is none.
    """
    form, told = registry.get(_FORM), []
    for name, runs in planned.groupby("architecture", sort=True):
        for axis in axes:
            if axis not in runs or runs[axis].nunique() < 2:
                continue
            values = runs[axis].to_numpy(float)
            if none := int((values <= 0).sum()):
                told.append(f"{name} along {axis}: the whole fit will be refused (values: {none} runs have {axis} 0)")
            cluster = "trunk_id" if axis == "examples" and "trunk_id" in runs else "shape_id"
            found = [
                gates.span(form, form.axes[0], values),
                gates.dof(form, len(runs), runs[cluster].nunique(), runs[axis].nunique()),
                gates.clusters(runs[cluster].nunique()),
            ]
            told += [
                f"{name} along {axis}: {_what(gate)} will be refused ({gate.id}: {gate.reason})"
                for gate in found
                if gate.passed is False
            ]
        if not _bracketed(runs).all():
            lack = f"a size with fewer than {_BRACKET} learning rates, and none noted as bracketed elsewhere"
            told.append(f"{name}: titles will say trend, not law (tuning: {lack})")
        if runs["seed"].groupby(runs["shape_id"]).nunique().max() < 2:
            told.append(f"{name}: seed noise will stay unknown (one seed a size)")
    return told


def _bracketed(runs: pd.DataFrame) -> pd.Series:
    """Per run whether its size's rate may turn out bracketed: by rates on either side of it, or, where it has a single
    one, by a search that its sweep notes.
    """
    tried = runs.groupby("shape_id")["lr_dense"].transform("nunique")
    noted = runs["lr_bracketed"].eq(True) if "lr_bracketed" in runs else False
    return (tried >= _BRACKET) | ((tried == 1) & noted)


def _what(gate: gates.Gate) -> str:
    if gates.EVERYTHING in gate.refuses:
        return "the whole fit"
    return "bootstrap intervals" if gates.INTERVALS in gate.refuses else "exponent and floor"
