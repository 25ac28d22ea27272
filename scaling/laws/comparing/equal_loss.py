"""Does one architecture need less of the axis than another for the same loss? Yes, no or cannot tell.

That is a question about a factor, not about exponents (`compare` answers those): both curves are read at the losses
both have reached, where nothing is extrapolated, so neither a floor nor two decades of sizes are needed for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from recscale.scaling.laws.judgement import gates

from .compare import Answer, Comparison, EqualLoss, Interval

# What a comparison of factors rests on; items about exponents and extrapolation are not among them.
REQUIRED = ("learning_rate", "paired_seeds", "seeds", "data_stream", "primary_metric")


@dataclass(frozen=True)
class Share:
    """What a needs of b's amount of the axis for the same metric: below 1, a needs less."""

    metric: float
    value: float
    interval: Interval | None


@dataclass(frozen=True)
class EqualLossVerdict:
    """answer: whether a needs less: "yes", "no" (b does) or "cannot tell". shares: at the worst, the middle and the
    best metric both have reached. reasons: what the answer rests on, or what is missing for one."""

    answer: Answer
    shares: tuple[Share, ...]
    reasons: tuple[str, ...]

    @property
    def middle(self) -> Share | None:
        """The share at the middle of the metrics both have reached."""
        return self.shares[len(self.shares) // 2] if self.shares else None


def equal_loss(comparison: Comparison) -> EqualLossVerdict:
    """The verdict of a comparison on the amount of the axis at equal loss.

    yes: at every metric quoted the 95 % interval of a's share lies below 1, and rates are bracketed with equal trials,
    seeds paired, rows the same. no: it lies above 1 everywhere. Otherwise: cannot tell.
    """
    shares = tuple(_share(found) for found in comparison.multipliers if found.multiplier)
    missing = [
        f"{item.text}: {'not recorded' if item.ticked is None else 'no'} ({item.detail})"
        for item in comparison.checklist
        if item.id in REQUIRED and item.ticked is not True
    ]
    missing += [
        f"{gate.id}: {gate.reason}"
        for gate in comparison.gates
        if gate.passed is False and (gates.EVERYTHING in gate.refuses or gate.id == "clusters")
    ]
    if not shares:
        missing.append("the two have no loss in common")
    intervals = [share.interval for share in shares]
    if missing or any(interval is None for interval in intervals):
        return EqualLossVerdict("cannot tell", shares, tuple(missing or ["there is no interval"]))
    below = all(interval is not None and interval.high < 1 for interval in intervals)
    above = all(interval is not None and interval.low > 1 for interval in intervals)
    places = f"at the {len(shares)} losses compared"
    if below or above:
        side = "below" if below else "above"
        return EqualLossVerdict("yes" if below else "no", shares, (f"the share lies {side} 1 {places}",))
    return EqualLossVerdict(
        "cannot tell", shares, (f"the interval of the share holds 1, or its side changes, {places}",)
    )


def _share(found: EqualLoss) -> Share:
    assert found.multiplier is not None
    own = found.interval
    # A factor whose interval reaches down to 0 leaves the share without an upper end.
    ends = own and Interval(1 / own.high, 1 / own.low if own.low else math.inf, own.kind)
    return Share(found.metric, 1 / found.multiplier, ends)
