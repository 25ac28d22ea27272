"""What is true of every row of the known-truth log: its logit, the parts of it, its best possible click probability.

Also what a model would predict that knows only so many terms, events and pairs.

Host side, float64; integer parts come from the same arithmetic as the generator, so z is exact.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64

from recscale.models.inputs import Batch

from .batches import assemble, request_numbers
from .config import BLOCK, KnownTruthConfig
from .draw import draw
from .expectations import logit, posterior, smoothed, state_weights, states
from .logit_parts import DRIFT_FIELD, SEQUENCE, Rows, decode, padded_words, parts
from .world import Terms, World, domain_biases

PARTS = ("N1", "N2", "N3", "N4", "L", "M", "B_user", "B_item", "X")


@flax.struct.dataclass
class TruthRows:
    """Truth of a batch; arrays are float64 [R, C, Y] unless said otherwise.

    z: logit without noise, drift states and the unobservable sign of fresh pairs; parts: its parts by name (`PARTS`),
    and `N_request`, the share of N that is constant in a request; noise_sd: s_eta of the row; fresh: bool [R, C], the
    pair's sign is unobservable; p: Bayes probability p* of the label given everything a model can see (for a cascade's
    second label: given the first was 1); q: 1 - p; words: uint32 [R, C, 9], code words of
    `logit_parts.padded_words`; domain: int32 [R, C]; item_block: int32 [R, C], popularity block of the item, 0 the most
    popular (-1 without B).
    """

    z: Any
    parts: dict[str, Any]
    noise_sd: Any
    fresh: Any
    p: Any
    q: Any
    words: Any
    domain: Any
    item_block: Any


@flax.struct.dataclass
class _Integers:
    """What truth is computed from: parts int32 [R, C, Y], words [R, C, 9], the rest [R, C]."""

    parts: dict[str, Any]
    fresh: Any
    rank: Any
    words: Any
    domain: Any
    item_block: Any


def truth(world: World, batch: Batch) -> TruthRows:
    """Truth per row of a batch with its whole history. Labels are not read.

    p* = E sigmoid(z + eta) by 41-node Gauss-Hermite quadrature, averaged over both signs of fresh pairs and, with
    drift, over the posterior of the hidden states.
    """
    return _truth_rows(world, batch, _integers(world, batch))


def sample(world: World, log_seed: int, index: int, requests: int, candidates: int = 1) -> tuple[Batch, TruthRows]:
    """Evaluation batch `index` and its truth, from one program that draws and sums; histories come back without events.

    Much cheaper than `truth(world, make_batch(..., evaluation=True))` and equal to it.
    """
    slim, integers = jax.device_get(
        _sample(world, np.uint32(log_seed & 0xFFFFFFFF), np.uint32(index), requests, candidates)
    )
    return slim, _truth_rows(world, slim, integers)


def oracle_logits(
    world: World,
    batch: Batch,
    *,
    quanta: int | None = None,
    history: int | None = None,
    ranks: int | None = None,
    orders: int | None = None,
    biases: bool = True,
) -> Float64[np.ndarray, "R C Y"]:
    """Bayes logit of a model that knows exactly that much.

    Known: N terms k <= quanta of order <= orders, the newest `history` events, pair ranks <= ranks, biases of user and
    item (and always the domain's); None means all there is. The rest is integrated out: missing terms and events as
    normal noise of their exact variance, missing pairs as a fair sign.

    Raises:
        ValueError: with drift, whose missing part is not normal.
    """
    config = world.config
    if config.drift:
        raise ValueError("oracles are not defined with drift: turn it off (drift=0)")
    integers = jax.device_get(_integers(_limited(world, quanta, orders, history), batch))
    values, unknown = integers.parts, integers.fresh
    if not biases:
        values = values | {name: np.zeros_like(values[name]) for name in ("B_user", "B_item")}
    if config.has_m and ranks is not None:
        unknown = integers.rank >= min(ranks, config.pair_items)
        values = values | {"M": np.where(unknown[..., None], 0, values["M"])}
    missing = _missing_variance(world, batch, quanta, orders, history) + (0.0 if biases else config.c_b)
    sd = np.sqrt(noise_sd(config, batch) ** 2 + missing)
    return logit(*smoothed(_logit(world, values), sd, _amplitude(world, unknown)))


def part_variances(config: KnownTruthConfig, task: int = 0) -> dict[str, float]:
    """Exact variance of each observable part: N, L, M, B, X. Their sum is Var z."""
    law, kappa = config.length_law(), config.history_variances(task)
    seen = np.r_[0.0, np.cumsum(kappa)]
    return {
        "N": float(config.quanta_variances().sum()),
        "L": float(law @ seen) if config.has_l else 0.0,
        "M": config.c_m * (1.0 - config.fresh_share()) if task == 0 else 0.0,
        "B": config.c_b,
        "X": float(config.domain_law() @ domain_biases(config) ** 2),
    }


def order_variances(world: World, task: int = 0) -> dict[str, float]:
    """Variance of N by order, and of its request-only terms (invisible inside a request): N1 ... N4, N_request."""
    squares = world.config.quanta_variances()
    out = {f"N{order}": 0.0 for order in range(1, 5)} | {"N_request": 0.0}
    if world.terms:
        terms = world.terms[task]
        amount = squares[np.asarray(terms.number) - 1] * (np.asarray(terms.domain) <= 0)  # private terms once
        for group in terms.groups:
            variance = float(amount[group.start : group.stop].sum())
            out[f"N{group.order}"] += variance
            out["N_request"] += variance if group.request_only else 0.0
    return out


def drift_offsets(world: World, task: int = 0) -> Float64[np.ndarray, " n"]:
    """What every combination of hidden states adds to the logit; drift belongs to the first label."""
    if task or not world.config.drift:
        return np.zeros(1)
    return states(world.config.drift) @ (world.drift_weight / world.scale)


def noise_sd(config: KnownTruthConfig, batch: Batch) -> Float64[np.ndarray, "_ 1 Y"]:
    """Standard deviation s_eta of each row's unobservable noise: [1, 1, Y], or [R, 1, Y] with ragged histories."""
    variance = np.asarray([config.noise_variance(task) for task in range(config.tasks)])[None, None, :]
    if config.ragged and config.has_l:
        short = np.asarray(batch.user.histories[SEQUENCE].length) < config.history_max
        tails = np.asarray([config.history_tail(task) for task in range(config.tasks)])
        variance = variance - short[:, None, None] * tails
    return np.sqrt(variance)


def _truth_rows(world: World, batch: Batch, integers: _Integers) -> TruthRows:
    integers = jax.device_get(integers)
    values, first = integers.parts, np.arange(world.config.tasks) == 0
    z = _logit(world, values)
    sd = noise_sd(world.config, batch)
    amplitude = _amplitude(world, integers.fresh)
    offsets, weights = drift_offsets(world), _state_weights(world, batch)
    p, q = np.zeros(z.shape), np.zeros(z.shape)
    for offset, weight in zip(offsets, np.moveaxis(weights, -1, 0), strict=True):
        # Like M, drift belongs to the first label.
        p_state, q_state = smoothed(z + offset * first, sd, amplitude)
        p += weight[:, None, None] * p_state
        q += weight[:, None, None] * q_state
    return TruthRows(
        z=z,
        parts={name: value / world.scale for name, value in values.items()},
        noise_sd=np.broadcast_to(sd, z.shape),
        fresh=integers.fresh,
        p=p,
        q=q,
        words=integers.words,
        domain=integers.domain,
        item_block=integers.item_block,
    )


@jax.jit
def _integers(world: World, batch: Batch) -> _Integers:
    rows = decode(world, batch)
    values = tuple(parts(world, rows, task) for task in range(world.config.tasks))
    fresh = rows.rank >= world.config.pair_items if world.config.has_m else jnp.zeros(batch.valid.shape, bool)
    return _collect(rows, values, fresh, world.config.has_b)


@partial(jax.jit, static_argnums=(3, 4))
def _sample(world: World, log_seed: Any, index: Any, requests: int, candidates: int) -> tuple[Batch, _Integers]:
    # Events fill the memory; only drift's observations are needed for the truth.
    shown = None if world.config.drift else 0
    drawn = draw(world, log_seed, request_numbers(index, requests, evaluation=True), candidates, shown)
    batch = assemble(world, drawn)
    bare = {
        name: dataclasses.replace(history, ids={}, delta_s=None, length=drawn.rows.length)
        for name, history in batch.user.histories.items()
    }
    batch = dataclasses.replace(batch, user=dataclasses.replace(batch.user, histories=bare))
    return batch, _collect(drawn.rows, drawn.parts, drawn.fresh, world.config.has_b)


def _collect(rows: Rows, values: tuple[dict[str, Array], ...], fresh: Array, biased: bool) -> _Integers:
    domain = jnp.zeros(fresh.shape, jnp.int32) + (0 if rows.domain is None else rows.domain[:, None])
    rank = jnp.zeros(fresh.shape, jnp.int32) if rows.rank is None else rows.rank
    stacked = {name: jnp.stack([value[name] for value in values], axis=-1) for name in values[0]}
    # Ids decoded from a batch are there only where a part needs them, so ask for them only then.
    item_block = rows.item // BLOCK if biased else jnp.full(fresh.shape, -1, jnp.int32)
    return _Integers(stacked, fresh, rank, jnp.moveaxis(padded_words(rows), 0, -1), domain, item_block)


def _logit(world: World, values: dict[str, np.ndarray]) -> np.ndarray:
    total = np.asarray(world.task_bias, np.int64) + sum(values[name].astype(np.int64) for name in PARTS)
    return total / world.scale


def _amplitude(world: World, unknown: np.ndarray) -> np.ndarray:
    """+-m of pairs whose sign is not known; the second label has no M."""
    first = np.arange(world.config.tasks) == 0
    return np.where(unknown[..., None] & first, world.pair_amplitude / world.scale, 0.0)


def _state_weights(world: World, batch: Batch) -> np.ndarray:
    """Posterior weight of every combination of hidden states, given the visible events: [R, n]."""
    if not world.config.drift:
        return np.ones((batch.valid.shape[0], 1))
    history = batch.user.histories[SEQUENCE]
    observed, length = np.asarray(history.dense[DRIFT_FIELD]), np.asarray(history.length)
    return state_weights(posterior(observed, length, world.drift_refresh / 2.0**16, world.drift_flip / 2.0**15))


def _limited(world: World, quanta: int | None, orders: int | None, history: int | None) -> World:
    """The world with the coefficients of unknown terms and events set to 0: same shapes, so the same program."""
    terms = tuple(
        dataclasses.replace(
            task, coefficient=np.where(_known(task, quanta, orders), task.coefficient, 0).astype(np.int32)
        )
        for task in world.terms
    )
    weight = np.array(world.event_weight)
    if history is not None:
        weight[:, history:] = 0
    return dataclasses.replace(world, terms=terms, event_weight=weight)


def _known(terms: Terms, quanta: int | None, orders: int | None) -> np.ndarray:
    order = np.asarray([group.order for group in terms.groups])[np.asarray(terms.group)]
    limits = (np.inf if quanta is None else quanta), (np.inf if orders is None else orders)
    return (np.asarray(terms.number) <= limits[0]) & (order <= limits[1])


def _missing_variance(
    world: World, batch: Batch, quanta: int | None, orders: int | None, history: int | None
) -> np.ndarray:
    """Variance of the terms and events an oracle does not know, tails left out: [1, 1, Y], or [R, 1, Y] if ragged."""
    config = world.config
    unknown = 0.0
    for terms in world.terms[:1]:
        missed = ~_known(terms, quanta, orders) & (np.asarray(terms.domain) <= 0)
        unknown = config.quanta_variances()[np.asarray(terms.number)[missed] - 1].sum()
    missing = np.full((1, 1, config.tasks), float(unknown))
    if config.has_l and history is not None and history < config.history_max:
        seen = np.stack([np.r_[0.0, np.cumsum(config.history_variances(task))] for task in range(config.tasks)], -1)
        length = (
            np.asarray(batch.user.histories[SEQUENCE].length) if config.ragged else np.asarray([config.history_max])
        )
        missing = missing + (seen[length] - seen[np.minimum(length, history)])[:, None, :]
    return missing
