"""Metric maps used by the forms: AUC to t = 2 Phi^-1(AUC)^2 and back, and AUC from published gains.

t is the logit signal variance of Gaussian logits at a small base rate; it is a power law in the same exponent
as logloss, while 1 - AUC is not (free-offset fits of its exponent are biased by +.04 to +.10).
"""

from __future__ import annotations

import numpy as np
from scipy.special import ndtr, ndtri


def auc_to_t(auc: np.ndarray | float) -> np.ndarray:
    """t = 2 Phi^-1(AUC)^2 for .5 <= AUC < 1, elementwise. Raises ValueError outside, where the sign would be
    lost.
    """
    auc = np.asarray(auc, float)
    if np.any((auc < 0.5) | (auc >= 1.0)):
        raise ValueError(f"AUC must lie in [.5, 1) to become t, found {auc.min():g} to {auc.max():g}")
    return 2.0 * ndtri(auc) ** 2


def t_to_auc(t: np.ndarray | float) -> np.ndarray:
    """AUC = Phi(sqrt(t / 2)) for t >= 0, elementwise; the inverse of `auc_to_t`. Negative t is clipped to 0
    (AUC .5).
    """
    return ndtr(np.sqrt(np.maximum(np.asarray(t, float), 0.0) / 2.0))


def absolute_auc(relative: np.ndarray | float, baseline: float, convention: str) -> np.ndarray:
    """AUC from a published gain. convention: "ratio" AUC/AUC0 - 1, "excess_ratio" (AUC - .5)/(AUC0 - .5) - 1,
    "points" AUC - AUC0.

    Raises ValueError without a known convention or with a baseline outside (.5, 1): the three readings differ
    severalfold.
    """
    if not 0.5 < baseline < 1.0:
        raise ValueError(f"baseline AUC must lie in (.5, 1), found {baseline}")
    gain = np.asarray(relative, float)
    readings = {
        "ratio": baseline * (1.0 + gain),
        "excess_ratio": 0.5 + (baseline - 0.5) * (1.0 + gain),
        "points": baseline + gain,
    }
    if convention not in readings:
        raise ValueError(f"convention must be one of {', '.join(readings)}, found {convention!r}")
    return readings[convention]
