"""A comparison that was laid out by hand, as it is printed: every number it holds, refusals, and what is missing."""

import io
from dataclasses import replace

import numpy as np
from rich.console import Console

from recscale.scaling.laws.comparing import compare_command
from recscale.scaling.laws.comparing.checklist import Item
from recscale.scaling.laws.comparing.compare import Comparison, EqualLoss, ExponentDifference, Interval
from recscale.scaling.laws.comparing.pairing import PairedSize

KIND = "cluster bootstrap 95%"
FOUND = Comparison(
    "fast", "slow", "train_flops", "logloss", "yes", ["fast has the larger exponent"], "a steeper", "a", "exponents",
    shift=1.7, shift_interval=Interval(1.5, 1.9, KIND),
    multipliers=[
        EqualLoss("worst", 0.45678, 1.25, Interval(1.1, 1.4, KIND)), EqualLoss("best", 0.41234, None, None),
    ],
    differences=[
        ExponentDifference("own", True, "", 0.45, 0.35, 0.1, Interval(0.05, 0.15, KIND)),
        ExponentDifference("power", False, "rejected", np.nan, np.nan, np.nan, None),
    ],
    paired=[
        PairedSize("1e+15", 5, -0.0012, 0.00034, 0.0021, 0.0022, (-0.0016, -0.0008)),
        PairedSize("2e+15", 1, -0.0013, None, None, None, None),
    ],
    paired_note="paired by seed", matched=True, matching_note="same budget",
    checklist=[
        Item("seeds", "seeds enough", True, "three", True), Item("sizes", "sizes enough", False, "two", True),
        Item("counts", "counts given", None, "none", False),
    ],
    excluded=[(f"run{i}", "diverged") for i in range(7)],
)  # fmt: skip


def printed(found):
    console = Console(width=220, record=True, file=io.StringIO())
    compare_command.render(found, console)
    return [" ".join(line.split()) for line in console.export_text().splitlines() if line.strip()]


def test_every_number_of_a_comparison_is_printed():
    lines = printed(FOUND)
    for line in (
        "Does fast scale better than slow along train_flops (logloss)? yes",
        "- fast has the larger exponent",
        "worst common 0.45678 1.25 [1.1, 1.4]",
        "best common 0.41234 not reached",
        "everywhere (shift model, rejected) 1.7 [1.5, 1.9]",
        "own 0.450 0.350 +0.100 [+0.050, +0.150] yes",
        "power refused refused refused no: rejected",
        f"Intervals: {KIND}; matched shapes.",
        "First model that is not worse than a richer one: exponents.",
        "1e+15 5 -0.0012 [-0.0016, -0.0008] 0.00034 0.0021, 0.0022",
        "2e+15 1 -0.0013 not reached",
        "x seeds enough * three",
        "- sizes enough * two",
        "? counts given none",
        f"Excluded rows (7): {'; '.join(f'run{i}: diverged' for i in range(5))} and 2 more",
    ):
        assert line in lines, line


def test_what_a_comparison_lacks_is_said():
    for level in ("shared", "shift"):
        assert "everywhere (shift model) 1.7 [1.5, 1.9]" in printed(replace(FOUND, level=level))
    lines = printed(
        replace(
            FOUND, multipliers=[], paired=[], paired_note="no seeds", matched=False, matching_note="odd budgets",
            differences=[], shift_interval=None, checklist=[], excluded=FOUND.excluded[:5],
        )
    )  # fmt: skip
    assert "The two have no logloss in common: no multiplier at equal loss." in lines
    assert "No paired seeds: no seeds." in lines and "Intervals: none; shapes not matched (odd budgets)." in lines
    assert lines[-1].endswith("run4: diverged") and not any("Checklist" in line for line in lines)
    refused = printed(replace(FOUND, level=None, answer="cannot tell", checklist=[], excluded=[]))
    assert refused == [
        "Does fast scale better than slow along train_flops (logloss)? cannot tell", "- fast has the larger exponent",
    ]  # fmt: skip
