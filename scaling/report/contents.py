"""What a report is made of: the run table, its views with their fits, joint laws, and what is known to be true."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from recscale.scaling.data.metrics import describe
from recscale.scaling.laws.grids import Grid

from .estimands import Estimands
from .series import Series, View
from .truth import Truth


@dataclass(frozen=True)
class Report:
    """A sweep's runs, fitted.

    Attributes:
        out: folder of the sweep. table: its run table.
        views: one per axis, the most important first.
        joint: laws of several axes, one per architecture; joint_axes: their slots and columns, both empty without one.
        log_truth: known constants of the log.
        answers: tables of what else was asked: choices, decisions, compute, published laws.
        estimands: axis -> what its exponents are estimates of, one per architecture; empty where the log is not known.
    """

    out: Path
    table: pd.DataFrame
    views: tuple[View, ...]
    joint: tuple[Series, ...]
    joint_axes: Mapping[str, str]
    log_truth: Truth
    estimands: Mapping[str, list[Estimands]]
    answers: Sequence[Grid] = ()

    @property
    def first(self) -> View:
        """The view of the most important axis."""
        return self.views[0]

    @property
    def truth(self) -> Truth:
        """What is known of the metric that was fitted: the log's constants are losses in nats per label."""
        if describe(self.first.target).in_nats:
            return self.log_truth
        return Truth(notes=(f"the log's constants are losses; none is known for {self.first.target}",))

    @cached_property
    def records(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Fit records: axis, or "joint" -> architecture -> record."""
        found = {view.axis: {series.architecture: series.record for series in view.series} for view in self.views}
        joint = {series.architecture: series.record for series in self.joint}
        return found | ({"joint": joint} if joint else {})
