"""Names as a reader sees them: axes, metrics and architectures in words."""

from __future__ import annotations

from recscale.scaling.data.metrics import describe

AXIS_WORDS = {
    "dense_params": "dense parameters",
    "active_params": "active parameters",
    "train_flops": "training FLOPs",
    "examples": "training examples",
    "history_length": "history length",
    "memory_slots": "memory slots",
}
# Architectures of which no equation is public: what is drawn is ours and says so.
RECONSTRUCTIONS = ("lmn",)


def axis_words(column: str) -> str:
    """The axis in words; an unknown column keeps its name."""
    return AXIS_WORDS.get(column, column)


def architecture_words(name: str) -> str:
    """The architecture's name; presets and compositions of a reconstruction are reconstructions."""
    bases = {part.split("_")[0] for part in name.split("+")}
    return f"{name} (reconstruction)" if bases & set(RECONSTRUCTIONS) else name


def target_words(column: str) -> str:
    """The metric in words, with its unit; an unknown column keeps its name."""
    return describe(column).words or column


def shortened(text: str, length: int) -> str:
    """At most `length` characters, cut between words, with an ellipsis."""
    if len(text) <= length:
        return text
    # One more character tells whether the last word is whole.
    return text[:length].rsplit(" ", 1)[0][: length - 1].rstrip(" ;,:") + "…"
