"""The constants of a known-truth log (base rate, irreducible loss, best AUC, variances), computed once and kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from recscale.scaling.records.files import write_atomically
from recscale.scaling.records.sealed import sealed, unsealed

from .config import BLOCK, TASK_NAMES, KnownTruthConfig
from .exact import drift_offsets, order_variances, part_variances, sample
from .expectations import entropy_of_both, entropy_of_logit, expected_auc, noise_mean, on_grid, t_of_auc
from .world import World, popularity

CARD_SEED = 0xCA4D  # the card reads a stream of its own, so it depends on the world alone
SAMPLE_ROWS = 4096  # rows drawn at a time: the arrays of one history pass stay small
_CARDS: dict[tuple[str, int], dict[str, Any]] = {}


def card_rows(config: KnownTruthConfig) -> int:
    """Rows a card is computed from: 2^20, fewer where histories beyond 256 events would make it slow."""
    return 2**20 // max(1, config.history_max // 256 if config.has_history else 1)


def forget() -> None:
    """Drops the cards kept in memory: files are read again."""
    _CARDS.clear()


def card(world: World, *, rows: int | None = None, cache_dir: str | Path | None = None) -> dict[str, Any]:
    """Known constants of a world, JSON-able; cached in memory and, with `cache_dir`, in a file.

    Depends on the world alone, not on any log seed. Means over `rows` evaluation rows (default `card_rows`) with two
    control variates, z - b and (z-b)^2 - Var z, whose means are exactly 0.

    Keys: base_rate; v = E p(1-p) and asymptote E_inf = E h(p) at p = sigmoid(z + eta); entropy_floor H* = E h(p*);
    auc_best, of p*; auc_asymptote and t_asymptote = 2 Phi^-1(AUC)^2, with eta known; noise_variance; fresh_share;
    variance: per part, per order of N, and of its request-only terms (invisible to GAUC); plateaus: variance and loss a
    model misses that cannot form products of more than `order` signs; missing_variance: curves over each resource;
    popularity; exponents; standard_errors; rows. A second label has its constants under its own name.
    """
    rows = rows or card_rows(world.config)
    key = (world.config.truth_hash, rows)
    if key not in _CARDS:
        path = Path(cache_dir) / f"known_truth_card_{key[0]}_{rows}.json" if cache_dir is not None else None
        stored = (unsealed(path.read_bytes()) if path is not None and path.is_file() else None) or {}
        whole = path is not None and stored.get("name") == path.name  # and no copy of another's
        _CARDS[key] = stored["card"] if whole else _compute(world, rows)
        if path is not None and not whole:
            write_atomically(path, sealed({"name": path.name, "card": _CARDS[key]}, indent=1))
    return json.loads(json.dumps(_CARDS[key]))


def _compute(world: World, rows: int) -> dict[str, Any]:
    config = world.config
    samples = _sample(world, rows)
    out = _constants(world, samples, 0)
    for task in range(1, config.tasks):
        out[TASK_NAMES[task]] = _constants(world, samples, task)
    block = popularity(world)
    top = np.searchsorted(np.cumsum(np.sort(block)[::-1]), 0.5) + 1
    return out | {
        "rows": int(samples["z"].shape[0]),
        "preset_hash": config.hash,
        "fresh_share": config.fresh_share(),
        "missing_variance": _curves(config),
        "popularity": {
            "ids_per_field": config.vocabulary, "most_likely_id": float(block.max() / BLOCK),
            "least_likely_id": float(block.min() / BLOCK), "share_of_ids_in_half_of_the_rows": float(top / len(block)),
        },
        "exponents": {
            "quanta": config.alpha, "examples": config.alpha / (1 + config.alpha), "history": config.lam,
            "pairs": config.a - 1 if config.a else None,
        },
    }  # fmt: skip


def _sample(world: World, rows: int) -> dict[str, np.ndarray]:
    """z, p*, noise sd [n, Y] and fresh [n] of the first evaluation rows of the card's stream."""
    kept: dict[str, list[np.ndarray]] = {"z": [], "p": [], "sd": [], "fresh": []}
    for index in range(-(-rows // SAMPLE_ROWS)):
        _, row = sample(world, CARD_SEED, index, SAMPLE_ROWS)
        for name, value in (("z", row.z), ("p", row.p), ("sd", row.noise_sd), ("fresh", row.fresh)):
            kept[name].append(value[:, 0])
    return {name: np.concatenate(values)[:rows] for name, values in kept.items()}


def _constants(world: World, samples: dict[str, np.ndarray], task: int) -> dict[str, Any]:
    config = world.config
    z, p, sd = (samples[name][:, task] for name in ("z", "p", "sd"))
    amplitude = np.where(samples["fresh"] & (task == 0), world.pair_amplitude / world.scale, 0.0)
    # In a cascade the second label exists with the probability of the first.
    weight = samples["p"][:, 0] if config.cascade and task else np.ones_like(z)
    variances = part_variances(config, task)
    deviation = z - config.task_bias(task)
    controls = np.stack([deviation, deviation**2 - sum(variances.values())], axis=1)
    latent = _latent_means(drift_offsets(world, task), z, sd, amplitude)
    values = {"base_rate": p, "entropy_floor": entropy_of_both(p), **latent}
    means, errors = {}, {}
    for name, value in values.items():
        means[name], errors[name] = _controlled_mean(value, weight, controls, config.cascade and task > 0)
    score = _draw_latent(world, z, sd, amplitude, task)
    auc = expected_auc(score, weight * expit(score), weight * expit(-score))
    by_order = order_variances(world, task)
    plateaus = []
    for order in range(1, 4):
        missing = sum(by_order[f"N{o}"] for o in range(order + 1, 5))
        plateaus.append({"order": order, "missing_variance": missing, "excess_half_v": 0.5 * means["v"] * missing})
    return {
        **means,
        "auc_best": expected_auc(p, weight * p, weight * (1.0 - p)),
        "auc_asymptote": auc,
        "t_asymptote": t_of_auc(auc),
        "noise_variance": config.noise_variance(task),
        "variance": variances | by_order | {"total": sum(variances.values())},
        "plateaus": plateaus,
        "standard_errors": errors,
    }


def _latent_means(offsets: np.ndarray, z: np.ndarray, sd: np.ndarray, amplitude: np.ndarray) -> dict[str, np.ndarray]:
    """E h(p) and E p(1-p) at p = sigmoid(everything), over what is unobservable in each row."""
    signs = (-1.0, 1.0) if amplitude.any() else (1.0,)
    out = {"asymptote": np.zeros_like(z), "v": np.zeros_like(z)}
    functions = {"asymptote": entropy_of_logit, "v": lambda x: expit(x) * expit(-x)}
    for name, function in functions.items():
        for noise in np.unique(sd):
            rows = sd == noise
            mean = noise_mean(function, float(noise))
            for offset in offsets:
                for sign in signs:
                    value = on_grid(mean, z[rows] + offset + sign * amplitude[rows])
                    out[name][rows] += value / (len(signs) * len(offsets))
    return out


def _draw_latent(world: World, z: np.ndarray, sd: np.ndarray, amplitude: np.ndarray, task: int) -> np.ndarray:
    """One draw per row of z plus all that is unobservable."""
    rng = np.random.Generator(np.random.Philox(key=[CARD_SEED, task]))
    drawn = z + sd * rng.standard_normal(z.size) + amplitude * rng.choice([-1.0, 1.0], z.size)
    return drawn + rng.choice(drift_offsets(world, task), z.size)


def _controlled_mean(
    value: np.ndarray, weight: np.ndarray, controls: np.ndarray, weighted: bool
) -> tuple[float, float]:
    """(mean, standard error); control variates of known mean 0 unless the weights are random themselves."""
    n = value.size
    if weighted:
        mean = float((weight @ value) / weight.sum())
        return mean, float(np.sqrt(np.sum((weight * (value - mean)) ** 2)) / weight.sum())
    design = np.column_stack([np.ones(n), controls])
    fit, *_ = np.linalg.lstsq(design, value, rcond=None)
    residual = value - design @ fit
    return float(fit[0]), float(residual.std() / np.sqrt(n))


def _curves(config: KnownTruthConfig) -> dict[str, Any]:
    """Logit variance missing at powers of two of each resource, every tail included."""
    out: dict[str, Any] = {}
    if config.has_n:
        n = 2 ** np.arange(int(np.log2(config.quanta)) + 1)
        out["quanta"] = {"known": n.tolist(), "variance": (config.c_n * (n + 1.0) ** -config.alpha).tolist()}
    if config.has_l:
        length = 2 ** np.arange(int(np.log2(config.history_max)) + 1)
        out["history"] = {"known": length.tolist(), "variance": config.missing_history(length).tolist()}
    if config.has_m:
        ranks = 2 ** np.arange(int(np.log2(config.pair_items)) + 1)
        out["ranks"] = {"known": ranks.tolist(), "variance": (config.c_m * config.missed_mass(ranks)).tolist()}
    return out
