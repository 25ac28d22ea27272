"""Which columns of a run table are the axes of a form: as the command line writes them, and resolved."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import pandas as pd

from recscale.scaling.laws.forms.form import Form

from .validate import require


def parse_axes(text: str | None) -> dict[str, str] | list[str] | None:
    """`a,b` to a list of columns (in the order of the form's axes), `N=a,D=b` to a mapping, nothing to None.

    Raises:
        ValueError: some entries name a slot and others do not, an entry is empty, or a slot is named twice.
    """
    if text is None or not text.strip():
        return None
    entries = [entry.strip() for entry in text.split(",")]
    pairs = {}
    for entry in entries:
        slot, equals, column = (part.strip() for part in entry.partition("="))
        if equals:
            if slot in pairs:
                raise ValueError(f"--axes {text!r} names {slot!r} twice")
            pairs[slot] = column
    halves = [*pairs, *pairs.values()] if pairs else entries
    if not all(halves) or (pairs and len(pairs) != len(entries)):
        raise ValueError(
            f"--axes {text!r} is neither a list of columns (dense_params,examples) "
            "nor SLOT=COLUMN pairs (N=dense_params,D=examples)"
        )
    return pairs or entries


def usual_target(table: pd.DataFrame) -> str:
    """The metric column where none is asked for."""
    return "loss" if "logloss" not in table.columns and "loss" in table.columns else "logloss"


def over_floor(table: pd.DataFrame, target: str | None, floor: str) -> tuple[pd.DataFrame, str]:
    """(table with a column of what the target exceeds the column `floor` by, the name of that column).

    Of an excess, relative errors count, which those of the loss hide where the floor is most of it. Raises ValueError
    for an unknown column.
    """
    target = target or usual_target(table)
    for column in (target, floor):
        require(table, column, "an excess")
    name = f"{target} over {floor}"
    return table.assign(**{name: table[target] - table[floor]}), name


def usual_cluster(table: pd.DataFrame, axes: Collection[str]) -> str | None:
    """Rows resampled together where no column is asked for: along examples alone, where one shape gives every row,
    those of a trunk; None leaves it to the shape.
    """
    if list(axes) == ["examples"]:
        for column in ("trunk_id", "run_id"):
            if column in table.columns and table[column].notna().all():
                return column
    return None


def parse_point(text: str) -> dict[str, float]:
    """`x=1e7` or `N=1e7,D=1e9` to values by slot or column. Raises ValueError for anything else."""
    pairs = [entry.partition("=") for entry in text.split(",")]
    try:
        return {slot.strip(): float(value) for slot, _, value in pairs}
    except ValueError as error:
        raise ValueError(f"{text!r} is no point, such as x=1e7 or N=1e7,D=1e9") from error


def resolve_axes(form: Form, axes: Mapping[str, str] | Sequence[str] | str | None) -> dict[str, str]:
    """Slot -> column, from slot names or aliases, a sequence in slot order, one column, or None."""
    columns = {slot.name: slot.column for slot in form.slots}
    if axes is None:
        return columns
    if isinstance(axes, str):
        axes = [axes]
    if not isinstance(axes, Mapping):
        if len(axes) > len(columns):
            raise ValueError(f"form {form.id} has {len(columns)} axes, found {len(axes)} columns: {', '.join(axes)}")
        axes = dict(zip(columns, axes, strict=False))
    known = {alias: slot.name for slot in form.slots for alias in (*slot.aliases, slot.name)}
    for key, column in axes.items():
        if key not in known:
            offered = ", ".join(f"{slot.name} (default {slot.column})" for slot in form.slots)
            raise ValueError(f"form {form.id} has no axis {key!r}; its axes are {offered}")
        columns[known[key]] = column
    return columns
