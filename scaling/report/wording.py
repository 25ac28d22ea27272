"""Names as a reader sees them: axes, metrics and architectures in words."""

from __future__ import annotations

import re
from collections.abc import Iterable

from recscale.scaling.data.metrics import describe

AXIS_WORDS = {
    "dense_params": "dense parameters",
    "active_params": "active parameters",
    "train_flops": "training FLOPs",
    "examples": "training examples",
    "history_length": "history length",
    "memory_slots": "memory slots",
    "device_hours": "device hours",
    "energy_kwh": "energy (kWh)",
    "cost_usd": "cost ($)",
    "communication_bytes": "bytes sent",
    "peak_device_bytes": "peak bytes of a device",
    "peak_host_bytes": "peak bytes of the host",
    "activation_bytes": "bytes of a step besides its state",
}
# What one of an axis is, for somebody who meets the word here first.
AXIS_MEANINGS = {
    "dense_params": "weights outside embedding tables and memories",
    "active_params": "weights that one row passes through",
    "train_flops": "arithmetic operations of the whole training",
    "examples": "rows trained on",
    "history_length": "past events of a user that a model reads",
    "memory_slots": "vectors of a table that a model writes and reads by content",
}
# What a gate finds, in words that need no statistics; the first that refuses a law is told.
GATE_WORDS = {
    "degenerate": "nothing that matters varies",
    "trend": "that is no more than noise",
    "span": "the sizes are too few or too close together",
    "dof": "there are too few runs",
    "clusters": "there are too few sizes",
    "form": "another curve describes these runs as well as a law does",
    "floor": "where it would level off cannot be told from these runs",
    "width": "these runs leave the law's constants open",
}
# Methods of which not every equation is public: what is drawn is ours and says so. "nes" is an estimator of budgets.
RECONSTRUCTIONS = {"lmn", "nes", "promo"}


def axis_words(column: str) -> str:
    """The axis in words; an unknown column keeps its name."""
    return AXIS_WORDS.get(column, column)


def architecture_words(name: str) -> str:
    """The name of an architecture or arm; presets, variants and compositions of a reconstruction are ones, too."""
    return f"{name} (reconstruction)" if RECONSTRUCTIONS & set(re.split(r"[^a-z0-9]+", name.lower())) else name


def axis_meaning(column: str) -> str:
    """What the axis counts, as a clause; empty for an unknown column."""
    return AXIS_MEANINGS.get(column, "")


def gate_words(gates: Iterable[str]) -> str:
    """Why there is no law, by the first of these gates that has plain words."""
    refusing = set(gates)
    return next((words for gate, words in GATE_WORDS.items() if gate in refusing), "its constants are not pinned down")


def target_words(column: str) -> str:
    """The metric in words, with its unit; an unknown column keeps its name."""
    return describe(column).words or column


def shortened(text: str, length: int) -> str:
    """At most `length` characters, cut between words, with an ellipsis."""
    if len(text) <= length:
        return text
    # One more character tells whether the last word is whole.
    return text[:length].rsplit(" ", 1)[0][: length - 1].rstrip(" ;,:") + "…"
