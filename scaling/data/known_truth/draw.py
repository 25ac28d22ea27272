"""What the rows of a request of the known-truth log are, and their labels, drawn from counter-based random words."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt32

from .config import REQUEST_FIELDS, KnownTruthConfig
from .content import query_word
from .expectations import hermite
from .history import draw_history
from .logit_parts import Rows, parts, total
from .words import (
    CANDIDATE,
    DRIFT,
    NOISE,
    REQUEST,
    Key,
    candidate_words,
    event_words,
    normal,
    stream_key,
    uniform,
    words,
)
from .world import World, code_words, popular_id, top_bits

_SOFT_NODES = 21


@flax.struct.dataclass
class Drawn:
    """Requests of the log before they become a batch.

    rows: decoded rows; request_ids: int32 [5, R] and candidate_ids: int32 [3, R, C], ids of the cross fields in
    popularity order; fresh: bool [R, C], the sign of the pair is a coin; parts: integer logit parts, one dictionary
    per task; observed: float32 [R, S, r], noisy signs of the hidden states, None without drift; labels, label_mask:
    float32 [R, C, Y]; query: uint32 [R], the signs that a request asks for, None without content.
    """

    rows: Rows
    request_ids: Any
    candidate_ids: Any
    fresh: Any
    parts: tuple[dict[str, Any], ...]
    observed: Any
    labels: Any
    label_mask: Any
    query: Any = None


def draw(world: World, log_seed: Any, request: UInt32[Array, " R"], candidates: int, shown: int | None = None) -> Drawn:
    """Draws requests by their numbers; each is a pure function of (world, log_seed, request).

    shown: how many of the newest events are kept; None is all. Labels depend on all of them.
    """
    config = world.config
    shown = config.history_max if shown is None else shown
    key = stream_key(log_seed, REQUEST, request)
    # Fixed word numbers: a part that is switched off does not shift the words of the others.
    request_words = words(key, REQUEST, 8)
    candidate_bits = candidate_words(key, CANDIDATE, candidates, 6)
    request_ids, candidate_ids = popular_id(world, request_words[:5]), popular_id(world, candidate_bits[:3])
    mem, domain_word, length_word = request_words[5:]
    bits, rank_word, _ = candidate_bits[3:]
    fields: dict[str, Any] = {
        "request_words": code_words(world, 0, request_ids),
        "candidate_words": code_words(world, len(REQUEST_FIELDS), candidate_ids),
        "user": request_ids[0],
        "item": candidate_ids[0],
    }
    if config.has_history:
        fields["length"] = _lengths(config, length_word)
    if config.has_l:
        fields["category"] = top_bits(bits, config.match_groups).astype(jnp.int32)
        candidate = candidate_ids[0], fields["category"]
        fields["event_item"], fields["event_category"], fields["history"] = draw_history(
            world, log_seed, request, key, request_ids[0], fields["length"], *candidate, shown
        )
    fresh = jnp.zeros(bits.shape, bool)
    if config.has_m:
        fields["cluster"] = top_bits(mem, config.clusters).astype(jnp.int32)
        fields["request_bit"] = (mem & 1).astype(jnp.int32)
        rank = jnp.searchsorted(jnp.asarray(world.rank_threshold), rank_word, side="right")
        fields["rank"] = rank.astype(jnp.int32)
        fields["candidate_bit"] = (bits & 1).astype(jnp.int32)
        fresh = fields["rank"] >= config.pair_items
    if config.domains > 1:
        edges = jnp.asarray(world.domain_threshold)
        fields["domain"] = jnp.sum((domain_word >> 16)[:, None] >= edges, axis=1, dtype=jnp.int32)
    rows = Rows(**fields)
    coin = 1 - 2 * ((bits >> 1) & 1).astype(jnp.int32)
    hidden, observed = _drift(world, key)
    observed = None if observed is None else observed[:, :shown]
    values = tuple(parts(world, rows, task) for task in range(config.tasks))
    labels, mask = _labels(world, rows, values, key, coin, fresh, hidden)
    query = None
    if config.content_tokens:
        query = query_word(world, log_seed, request, key, request_ids[0], fields["length"])
    return Drawn(rows, request_ids, candidate_ids, fresh, values, observed, labels, mask, query)


def _lengths(config: KnownTruthConfig, word: UInt32[Array, " R"]) -> Int32[Array, " R"]:
    if not config.ragged:
        return jnp.full(word.shape, config.history_max, jnp.int32)
    return (((word >> 16) * np.uint32(config.history_max + 1)) >> 16).astype(jnp.int32)


def _drift(world: World, key: Key) -> tuple[Int32[Array, "R r"] | None, Float32[Array, "R S r"] | None]:
    """Hidden states at request time and their noisy signs per event, or (None, None).

    The chain is reversible, so it is walked from the newest event back: going one event back, state i is
    redrawn with probability rho_i. One word per (event, state): 16 bits redraw, 15 bits flip, 1 bit state.
    """
    config = world.config
    if not config.drift:
        return None, None
    size, states = config.history_max, config.drift
    half = event_words(key, DRIFT, jnp.arange(size // 2 * states, dtype=jnp.uint32))
    word = jnp.concatenate([w.reshape(-1, size // 2, states) for w in half], axis=1)
    redraw = ((word >> 16) < jnp.asarray(world.drift_refresh)).at[:, 0].set(True)
    event = jnp.arange(size, dtype=jnp.int32)[:, None]
    source = jax.lax.cummax(jnp.where(redraw, event, 0), axis=1)
    state = jnp.take_along_axis(1 - 2 * (word & 1).astype(jnp.int32), source, axis=1)
    flip = ((word >> 1) & np.uint32(0x7FFF)) < jnp.asarray(world.drift_flip)
    return state[:, 0], jnp.where(flip, -state, state).astype(jnp.float32)


def _labels(
    world: World,
    rows: Rows,
    values: tuple[dict[str, Array], ...],
    key: Key,
    coin: Array,
    fresh: Array,
    hidden: Array | None,
) -> tuple[Float32[Array, "R C Y"], Float32[Array, "R C Y"]]:
    """Labels and mask: 1 where z + eta > logit(u), eta normal, u uniform."""
    config = world.config
    noise = candidate_words(key, NOISE, coin.shape[1], 4 * config.tasks)
    labels = []
    for task in range(config.tasks):
        z = total(world, values[task], task)
        amplitude = jnp.where(fresh, world.pair_amplitude if task == 0 else 0, 0)
        if hidden is not None and task == 0:
            z = z + jnp.sum(hidden * jnp.asarray(world.drift_weight), axis=1, dtype=jnp.int32)[:, None]
        spread = jnp.sqrt(_noise_variance(config, rows, task))
        if config.soft_labels:
            labels.append(_soft_label(world, z, amplitude, spread))
            continue
        logit = (z + coin * amplitude).astype(jnp.float32) * jnp.float32(1.0 / world.scale)
        eta = spread * normal(noise[4 * task], noise[4 * task + 1])
        u = uniform(noise[4 * task + 2])
        labels.append((logit + eta > jnp.log(u) - jnp.log1p(-u)).astype(jnp.float32))
    mask = jnp.ones_like(labels[0])
    if config.cascade:
        # The second event can only follow the first, and is only observed there.
        labels[1] = labels[1] * labels[0]
        return jnp.stack(labels, axis=-1), jnp.stack([mask, labels[0]], axis=-1)
    return jnp.stack(labels, axis=-1), jnp.stack([mask] * config.tasks, axis=-1)


def _noise_variance(config: KnownTruthConfig, rows: Rows, task: int) -> Array:
    """Variance of the noise: [1, 1], or [R, 1] with ragged histories, where only full ones have a tail."""
    if not (config.ragged and config.has_l):
        return jnp.full((1, 1), config.noise_variance(task), jnp.float32)
    full = (rows.length == config.history_max)[:, None]
    return jnp.float32(config.quanta_tail()) + jnp.where(full, jnp.float32(config.history_tail(task)), 0.0)


def _soft_label(world: World, z: Array, fresh: Array, spread: Array) -> Array:
    """Click probability by Gauss-Hermite quadrature in float32, averaged over the sign of fresh pairs: [R, C]."""
    nodes, weights = (x.astype(np.float32) for x in hermite(_SOFT_NODES))
    mean = jnp.zeros(z.shape, jnp.float32)
    for node, weight in zip(nodes, weights, strict=True):
        for sign in (-1, 1):
            logit = (z + sign * fresh).astype(jnp.float32) * jnp.float32(1.0 / world.scale)
            mean = mean + 0.5 * weight * jax.nn.sigmoid(logit + spread * node)
    return mean
