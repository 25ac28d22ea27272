"""Noise between repeated seeds: its standard deviation as a function of the metric."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import special

MIN_SEED_SIZES = 2


@dataclass(frozen=True)
class SeedNoise:
    """sd of the metric over repeated seeds, log-linear in the metric: ln sd = intercept + slope ln y."""

    intercept: float
    slope: float
    sizes: int
    repeats: int

    def sd(self, y: np.ndarray) -> np.ndarray:
        """Standard deviation at metric values y."""
        return np.exp(self.intercept + self.slope * np.log(np.abs(y)))


def seed_noise(frame: pd.DataFrame, same: list[str], y: np.ndarray) -> SeedNoise | None:
    """sd over rows that share the columns `same` and differ in `seed`; None without repeats at two or more
    sizes.
    """
    if "seed" not in frame.columns:
        return None
    groups = pd.DataFrame({**{c: frame[c].to_numpy() for c in same}, "seed": frame["seed"].to_numpy(), "y": y})
    per_seed = groups.groupby([*same, "seed"], dropna=False, sort=True)["y"].mean().reset_index()
    table = per_seed.groupby(same, dropna=False)["y"].agg(["mean", "var", "count"])
    table = table[(table["count"] >= 2) & (table["var"] > 0)]
    if len(table) < MIN_SEED_SIZES:
        return None
    free = table["count"].to_numpy() - 1.0
    # E[ln s^2] = ln sigma^2 + digamma(f/2) - ln(f/2): removes the bias of averaging logs of variances.
    log_sd = 0.5 * (np.log(table["var"].to_numpy()) - special.digamma(free / 2) + np.log(free / 2))
    log_y = np.log(np.abs(table["mean"].to_numpy()))
    slope = 0.0
    if np.ptp(log_y) > 0 and len(table) >= 3:
        slope = float(np.polyfit(log_y, log_sd, 1, w=np.sqrt(free))[0])
    intercept = float(np.average(log_sd - slope * log_y, weights=free))
    return SeedNoise(intercept, slope, len(table), int(table["count"].sum()))
