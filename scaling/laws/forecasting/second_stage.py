"""From a forecast loss to AUC in two stages: t = 2 Phi^-1(AUC)^2 is a straight line in the logloss of the same runs.

Excess logloss is v/2 times the logit variance a model misses, and t what it has of it, so that t falls linearly with
the loss while the base rate stays the same. The interval carries both stages: the forecast's own interval of the loss,
and the line refitted to resampled clusters with their scatter around it.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from recscale.scaling.laws.fitting.law_fit import Refused
from recscale.scaling.laws.forms.metric_maps import auc_to_t, t_to_auc
from recscale.scaling.laws.judgement.gates import MIN_CLUSTERS
from recscale.scaling.laws.uncertainty.bootstrap import cluster_counts

from .forecast import Forecast

_LEVELS = (2.5, 97.5)


def to_auc(found: Forecast, table: pd.DataFrame, auc: str = "auc", draws: int = 400, seed: int = 0) -> pd.DataFrame:
    """The forecast's points and held-out rows with `auc`, `auc_low`, `auc_high`; missing where the loss is refused.

    Raises Refused with too few clusters, or where t does not fall with the loss over the rows below the cut.
    """
    rows = table[pd.to_numeric(table[found.axis], errors="coerce") <= found.cut]
    rows = rows[rows["status"] == "done"] if "status" in rows else rows
    rows = rows.dropna(subset=[auc, found.target])
    codes, labels = pd.factorize(rows["shape_id"] if "shape_id" in rows else rows[found.axis])
    if len(labels) < MIN_CLUSTERS:
        raise Refused(f"{len(labels)} clusters with {auc} below the cut, at least {MIN_CLUSTERS} needed")
    loss, t = rows[found.target].to_numpy(float), auc_to_t(rows[auc].to_numpy(float))
    slope, level = np.polyfit(loss, t, 1)
    if slope >= 0:
        raise Refused(f"t of {auc} does not fall with {found.target} over the rows below the cut")
    generator = np.random.default_rng(seed)
    counts = cluster_counts(len(labels), draws, generator)
    counts = counts[(counts > 0).sum(axis=1) >= 3]
    lines = np.array([np.polyfit(loss, t, 1, w=np.sqrt(count[codes])) for count in counts])
    noise = generator.choice(t - np.polyval((slope, level), loss), size=len(lines))
    points = pd.concat([found.held_out, found.points], ignore_index=True)

    def at(losses: pd.Series, level_of: float) -> np.ndarray:
        drawn = np.outer(lines[:, 0], losses) + (lines[:, 1] + noise)[:, None]
        return t_to_auc(np.percentile(drawn, level_of, axis=0))

    mean = t_to_auc(np.polyval((slope, level), points["predicted"].to_numpy(float)))
    ends = {"auc_low": at(points["high"], _LEVELS[0]), "auc_high": at(points["low"], _LEVELS[1])}
    refused = points["predicted"].isna().to_numpy()
    return points.assign(**{k: np.where(refused, np.nan, v) for k, v in {"auc": mean, **ends}.items()})
