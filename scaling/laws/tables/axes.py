"""Axes of a law as the command line writes them."""

from __future__ import annotations


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
