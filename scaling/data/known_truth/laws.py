"""Closed forms of the known-truth log: loss against quanta known, examples, history seen and pairs stored.

    L = E_inf + v/2 [ f(n, D) + c_L (l+1)^-lam ] + c_M T(ranks) g
    f(n, D) = sum_{k <= n} a_k^2 / (1 + v D a_k^2) + c_N (n+1)^-alpha

f is a bottleneck, not a sum: quanta beyond n_eff(D) = (c alpha v D)^(1/(1+alpha)) are useless. Exponents: alpha in n,
alpha / (1 + alpha) in D, lam in l, a - 1 in ranks. Regressors are n + 1, l + 1 and ranks + 1/2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from .card import card
from .config import KnownTruthConfig, power_differences
from .expectations import entropy_of_both, hermite, smoothed
from .world import World

# Quanta stand for infinity beyond this many terms; what is left of the series is then counted as not yet learned.
_MANY_TERMS = 2**21


@dataclasses.dataclass(frozen=True)
class Surface:
    """Loss on a grid of known terms and rows seen."""

    quanta: Int64[np.ndarray, " n"]
    examples: Float64[np.ndarray, " D"]
    loss: Float64[np.ndarray, "n D"]


def surface(alpha: float, c: float = 1.0, v: float = 0.15, E: float = 0.42) -> Surface:
    """The exact capacity x data surface E + v/2 f(n, D) that fitters are tested on.

    n: 11 geometric values 30 ... 3e4, cut to integers (regressor n + 1); D: 13 geometric values 3e2 ... 3e8.
    """
    quanta = np.geomspace(30, 3e4, 11).astype(np.int64)
    examples = np.geomspace(3e2, 3e8, 13)
    missing = missing_quanta(quanta[:, None], examples[None, :], alpha, c, v)
    return Surface(quanta, examples, np.asarray(E + 0.5 * v * missing))


def missing_quanta(quanta: Any, examples: Any, alpha: float, c: float, v: float) -> Float64[np.ndarray, " ..."]:
    """f(n, D), the logit variance a linear learner on n known terms misses after D examples; arguments broadcast.

    D may be infinite; an infinite n stands for 2^21 terms.
    """
    quanta, examples = np.broadcast_arrays(np.asarray(quanta, np.float64), np.asarray(examples, np.float64))
    known = np.floor(np.minimum(quanta, _MANY_TERMS)).astype(np.int64)
    out = np.asarray(c * (np.where(np.isinf(quanta), _MANY_TERMS, quanta) + 1.0) ** -alpha)
    if np.isinf(examples).all():
        return np.where(np.isinf(quanta), 0.0, out)
    squares = power_differences(c, alpha, int(known.max()))
    for value in np.unique(examples[np.isfinite(examples)]):
        here = examples == value
        learned = np.r_[0.0, np.cumsum(squares / (1.0 + v * value * squares))]
        out[here] += learned[known[here]]
    return out


def predict(
    world: World,
    *,
    quanta: Any = None,
    examples: Any = None,
    history_length: Any = None,
    pairs: Any = None,
    ranks: Any = None,
    exact: bool = False,
    constants: Mapping[str, Any] | None = None,
) -> Float64[np.ndarray, " ..."]:
    """Loss of the learner that knows exactly so much of each resource; arguments are scalars or arrays and broadcast.

    Args:
        quanta: terms known; may exceed the world's, the series being infinite. examples: rows seen by a linear learner
            on these terms. history_length: newest events seen. pairs: stored id pairs, ranks = pairs / (4 clusters);
            or `ranks` themselves. None: all the world has (of examples: infinitely many); np.inf: the asymptote.
        exact: integrate logits of the same variances, pairs as the +-m they are and the rest as normal, instead of
            the second-order v/2 s^2, which overstates large normal deficits by up to 8 % and understates pairs.
            See `has_exact`.
        constants: `asymptote` and `v` to use; default: the world's card.

    Raises:
        ValueError: both `pairs` and `ranks` given, or exact asked of a log that does not have it.
    """
    config = world.config
    if pairs is not None and ranks is not None:
        raise ValueError("predict takes pairs or ranks, not both: ranks = pairs / (4 clusters)")
    if constants is None:
        constants = card(world)
    v = float(constants["v"])
    if pairs is not None:
        ranks = np.asarray(pairs, np.float64) / (4 * config.clusters)
    ranks = config.pair_items if ranks is None else ranks
    missing = np.zeros(())
    if config.has_n:
        n, d = (config.quanta if quanta is None else quanta), (np.inf if examples is None else examples)
        missing = missing_quanta(n, d, config.alpha, config.c_n, v)
    if config.has_l:
        length = config.history_max if history_length is None else history_length
        missing = np.asarray(missing + config.missing_history(length))
    mass = config.missed_mass(ranks) if config.has_m else np.zeros(())
    if exact:
        excess = _exact_excess(config, *np.broadcast_arrays(missing, mass))
    else:
        excess = 0.5 * v * (missing + config.c_m * mass)
    return np.asarray(constants["asymptote"] + excess)


def has_exact(config: KnownTruthConfig) -> bool:
    """Whether `predict` can integrate exactly: one label whose logit has the same law in every request."""
    return config.tasks == 1 and config.domains == 1 and not (config.drift or config.ragged)


def _exact_excess(config: KnownTruthConfig, missing: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """Loss over the asymptote when normal variance `missing` is unknown, and +-m on a share `mass` of the rows.

    Pairs are two points, never a normal: the logit is b + (everything else, normal) +- m.
    """
    if not has_exact(config):
        raise ValueError("exact prediction covers one label and domain, full histories, no drift; use exact=False")
    points, weights = hermite(81)
    amplitude = config.c_m**0.5
    signs = (-amplitude, amplitude) if config.has_m else (0.0,)
    normal = config.signal - config.c_m

    def level(s2: float, shifts: tuple[float, ...], unknown: float) -> float:
        z = config.b + max(normal - s2, 0.0) ** 0.5 * points
        return float(np.mean([weights @ entropy_of_both(*smoothed(z + c, s2**0.5, unknown, 81)) for c in shifts]))

    known = level(0.0, signs, 0.0)
    out = np.empty(missing.shape)
    for index in np.ndindex(missing.shape):
        s2, share = float(missing[index]), float(mass[index])
        if s2 > normal + 1e-9:
            raise ValueError(f"missing variance {s2} exceeds what the log has ({normal}, pairs apart)")
        out[index] = (1.0 - share) * level(s2, signs, 0.0) + share * level(s2, (0.0,), amplitude) - known
    return out
