"""The Brier score: mean squared error of the predicted probability."""

import numpy as np

from recscale.scaling.data.metrics import Metric


def brier(logits, labels, *, mask, groups):
    error = 1 / (1 + np.exp(-np.asarray(logits, float))) - labels
    return float(np.mean(error[mask] ** 2))


BRIER = Metric("brier", words="Brier score", function=brier)
