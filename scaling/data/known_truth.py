"""The known-truth click log: a synthetic log whose irreducible loss, exponents and click probability per row
are known.

    config = preset("base", world_seed=1)
    world  = build_world(config)                                  # the teacher: host arrays, a pytree
    batch  = make_batch(world, log_seed, index, requests, candidates)   # pure, jit-able, shards over R
    schema = make_schema(config)

Label = 1 with probability sigmoid(z + eta): z a deterministic function of the inputs (`known_truth_config`
lists its parts), eta normal and unobservable. Nothing is stored: request q is a pure function of (world,
log_seed, q), whatever the batch size, the number of devices or the model that reads it. Ids and logits are
integer arithmetic, so they are the same bits everywhere; only the label threshold uses float32.

Truth per row, metrics and laws: `known_truth_eval`, `known_truth_laws`. As a data set: `known_truth_source`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...models.inputs import Batch, CandidateSide, Field, History, Schema, Sequence, Task, UserSide
from .known_truth_config import (
    BLOCK,
    CANDIDATE_FIELDS,
    CROSS_FIELDS,
    PRESETS,
    REQUEST_FIELDS,
    TASK_NAMES,
    KnownTruthConfig,
    preset,
)
from .known_truth_parts import (
    DRIFT_FIELD,
    SEQUENCE,
    Rows,
    code_words,
    pair_column,
    pair_id,
    parts,
    permute,
    signs,
    total,
)
from .known_truth_random import (
    CANDIDATE,
    DRIFT,
    HISTORY,
    NOISE,
    REQUEST,
    USER_EVENTS,
    candidate_words,
    event_words,
    normal,
    stream_key,
    uniform,
    words,
)
from .known_truth_world import World, build_world, popularity

__all__ = [
    "PRESETS", "KnownTruthConfig", "World", "build_world", "make_batch", "make_requests", "make_schema", "popularity",
    "preset",
]  # fmt: skip

FIRST_EVALUATION_REQUEST = 2**31  # requests from here on are never trained on
_ITEM = CROSS_FIELDS.index("item")
_SOFT_NODES = 21


def make_schema(config: KnownTruthConfig) -> Schema:
    """Fields, history and tasks of a configuration.

    Learned codes: eight id fields; oracle codes: eight dense fields `<field>_code` of `code_bits` signs, and
    the ids of `user` and `item` only where biases or the history need them. Parts with no share bring no
    fields.
    """
    width, memory_width = config.embedding_width, config.memory_embedding_width or config.embedding_width
    needed = {"user": config.has_b, "item": config.has_b or config.has_l}
    groups = {"c1": "context", "c2": "context", "item": "item", "i1": "item", "i2": "item"}
    fields = []
    for name in CROSS_FIELDS:
        side, group = ("user" if name in REQUEST_FIELDS else "candidate"), groups.get(name, "user")
        if config.codes == "oracle":
            fields.append(Field(f"{name}_code", side, config.code_bits, group=group))
        if config.codes == "learned" or needed.get(name, False):
            fields.append(Field(name, side, width, vocabulary=config.vocabulary, group=group))
    if config.has_l and config.match_groups > 1:
        fields.append(Field("cat", "candidate", width, vocabulary=config.match_groups, group="item"))
    if config.has_m and config.pair_field:
        rows = 4 * config.clusters * config.pair_items + 1
        fields.append(Field("pair", "cross", memory_width, vocabulary=rows, group="pair"))
    elif config.has_m:
        fields.append(Field("mem_u", "user", memory_width, vocabulary=2 * config.clusters, group="pair"))
        fields.append(
            Field("mem_i", "candidate", memory_width, vocabulary=2 * config.pair_items + 1, group="pair")
        )
    if config.domains > 1:
        fields.append(Field("domain", "user", width, vocabulary=config.domains, group="context"))
    return Schema(
        fields=tuple(fields),
        sequences=_sequences(config, width),
        tasks=tuple(Task(name) for name in TASK_NAMES[: config.tasks]),
        domains=config.domains,
    )


def make_batch(
    world: World, log_seed: Any, index: Any, requests: int, candidates: int = 1, evaluation: bool = False
) -> Batch:
    """Batch `index`: requests index * R ... index * R + R - 1 of the log.

    `log_seed` and `index` may be traced. With `evaluation` the requests are counted from 2^31, the half of
    the log that training never reads.
    """
    first = jnp.asarray(index).astype(jnp.uint32) * jnp.uint32(requests)
    if evaluation:
        first = first + jnp.uint32(FIRST_EVALUATION_REQUEST)
    return make_requests(world, log_seed, first + jnp.arange(requests, dtype=jnp.uint32), candidates)


def make_requests(world: World, log_seed: Any, request: jax.Array, candidates: int = 1) -> Batch:
    """Batch of the given requests, uint32 [R]; each is a pure function of (world, log_seed, request)."""
    config = world.config
    key = stream_key(log_seed, REQUEST, request)
    rows, ids, coin = _draw_rows(world, log_seed, request, key, candidates)
    hidden, observed = _draw_drift(world, key)
    labels, mask = _labels(world, rows, key, coin, hidden)
    return Batch(
        user=_user_side(world, rows, ids, observed),
        candidates=_candidate_side(world, rows, ids),
        labels=labels,
        label_mask=mask,
        valid=jnp.ones((request.shape[0], candidates), bool),
    )


def _sequences(config: KnownTruthConfig, width: int) -> tuple[Sequence, ...]:
    if not config.has_history:
        return ()
    events = []
    if config.has_l:
        events.append(Field("item", "user", width, vocabulary=config.vocabulary, group="history"))
        if config.match_groups > 1:
            events.append(Field("cat", "user", width, vocabulary=config.match_groups, group="history"))
    if config.drift:
        events.append(Field(DRIFT_FIELD, "user", config.drift, group="history"))
    return (Sequence(SEQUENCE, config.history_max, tuple(events), timestamps=config.timestamps),)


def _draw_rows(world: World, log_seed: Any, request: jax.Array, key, candidates: int):
    """Inputs of the requests: (Rows, popularity-ordered ids, coin [R, C] in {-1, 1} for the sign of fresh
    pairs).
    """
    config = world.config
    # Fixed word numbers: a part that is switched off does not shift the words of the others.
    user, u1, u2, c1, c2, mem, domain_word, length_word = words(key, REQUEST, 8)
    item, i1, i2, bits, rank_word = candidate_words(key, CANDIDATE, candidates, 5)
    ids = {
        name: _popular_id(world, word)
        for name, word in zip(CROSS_FIELDS, (user, u1, u2, c1, c2, item, i1, i2), strict=True)
    }
    fields: dict[str, Any] = {**code_words(world, ids), "user": ids["user"], "item": ids["item"]}
    if config.has_history:
        full = jnp.full(request.shape, config.history_max, jnp.int32)
        drawn = ((length_word >> 16) * np.uint32(config.history_max + 1)) >> 16
        fields["length"] = drawn.astype(jnp.int32) if config.ragged else full
    if config.has_l:
        fields["category"] = _top_bits(bits, config.match_groups).astype(jnp.int32)
        drawn = _draw_events(world, log_seed, request, key, ids["user"])
        fields["event_item"] = _popular_id(world, drawn[0])
        fields["event_category"] = _event_category(config, *drawn)
    if config.has_m:
        thresholds = jnp.asarray(world.rank_threshold)
        fields["cluster"] = _top_bits(mem, config.clusters).astype(jnp.int32)
        fields["request_bit"] = (mem & 1).astype(jnp.int32)
        fields["rank"] = jnp.searchsorted(thresholds, rank_word, side="right").astype(jnp.int32)
        fields["candidate_bit"] = (bits & 1).astype(jnp.int32)
    if config.domains > 1:
        edges = jnp.asarray(world.domain_threshold)
        fields["domain"] = jnp.sum((domain_word >> 16)[:, None] >= edges, axis=1, dtype=jnp.int32)
    coin = 1 - 2 * ((bits >> 1) & 1).astype(jnp.int32)
    return Rows(**fields), ids, coin


def _popular_id(world: World, word: jax.Array) -> jax.Array:
    """Id in popularity order from one word: top bits alias column, 5 bits member, 12 bits alias threshold."""
    column_bits = world.config.blocks.bit_length() - 1
    column = _top_bits(word, world.config.blocks)
    member = (word >> np.uint32(27 - column_bits)) & np.uint32(BLOCK - 1)
    threshold = (word >> np.uint32(15 - column_bits)) & np.uint32(4095)
    keep = threshold < jnp.asarray(world.alias_threshold)[column]
    block = jnp.where(keep, column, jnp.asarray(world.alias_block)[column])
    return (block * np.uint32(BLOCK) + member).astype(jnp.int32)


def _top_bits(word: jax.Array, values: int) -> jax.Array:
    """Uniform integer below a power of two from the top bits of a word (uint32)."""
    bits = values.bit_length() - 1
    return word >> np.uint32(32 - bits) if bits else jnp.zeros_like(word)


def _draw_events(world: World, log_seed: Any, request: jax.Array, key, user: jax.Array):
    """Two words per event, newest first, each uint32 [R, S]; the second is None where one word is enough."""
    config = world.config
    size = config.history_max
    if config.continuing:
        # Absolute event numbers of the user's own stream; the newest one grows with the request number.
        newest = request // np.uint32(config.continuing_stride) + np.uint32(size - 1)
        events = newest[:, None] - jnp.arange(size, dtype=jnp.uint32)
        user_key = stream_key(log_seed, USER_EVENTS, user.astype(jnp.uint32))
        return event_words(user_key, HISTORY, events)
    if _category_fits(config):
        half = event_words(key, HISTORY, jnp.arange(size // 2, dtype=jnp.uint32))
        return jnp.concatenate(half, axis=1), None
    return event_words(key, HISTORY, jnp.arange(size, dtype=jnp.uint32))


def _category_fits(config: KnownTruthConfig) -> bool:
    """Whether the low bits that the alias draw leaves over are enough for the category."""
    return config.match_groups * config.blocks <= 2**15


def _event_category(config: KnownTruthConfig, first: jax.Array, second: jax.Array | None) -> jax.Array:
    word = first if _category_fits(config) else second
    return (word & np.uint32(config.match_groups - 1)).astype(jnp.int32)


def _draw_drift(world: World, key):
    """Hidden states at request time int32 [R, r] and their noisy signs per event float32 [R, S, r], or (None,
    None).

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


def _labels(world: World, rows: Rows, key, coin: jax.Array, hidden: jax.Array | None):
    """Labels and mask, float32 [R, C, Y]: 1 where z + eta > logit(u), eta normal, u uniform."""
    config = world.config
    noise = candidate_words(key, NOISE, coin.shape[1], 3 * config.tasks)
    labels = []
    for task in range(config.tasks):
        z = total(world, parts(world, rows, task), task)
        fresh = jnp.zeros(coin.shape, jnp.int32)
        if config.has_m and task == 0:
            fresh = jnp.where(rows.rank >= config.pair_items, world.pair_amplitude, 0)
        if hidden is not None:
            z = z + jnp.sum(hidden * jnp.asarray(world.drift_weight), axis=1, dtype=jnp.int32)[:, None]
        spread = jnp.sqrt(_noise_variance(config, rows, task))
        if config.soft_labels:
            labels.append(_soft_label(world, z, fresh, spread))
            continue
        logit = (z + coin * fresh).astype(jnp.float32) * jnp.float32(1.0 / world.scale)
        first, second, third = noise[3 * task : 3 * task + 3]
        u = uniform(third)
        labels.append(
            (logit + spread * normal(first, second) > jnp.log(u) - jnp.log1p(-u)).astype(jnp.float32)
        )
    mask = jnp.ones_like(labels[0])
    if config.cascade:
        # The second event can only follow the first, and is only observed there.
        labels[1] = labels[1] * labels[0]
        return jnp.stack(labels, axis=-1), jnp.stack([mask, labels[0]], axis=-1)
    return jnp.stack(labels, axis=-1), jnp.stack([mask] * config.tasks, axis=-1)


def _noise_variance(config: KnownTruthConfig, rows: Rows, task: int) -> jax.Array:
    """s_eta^2: [1, 1], or [R, 1] with ragged histories, where only full ones have a tail."""
    if not (config.ragged and config.has_l):
        return jnp.full((1, 1), config.noise_variance(task), jnp.float32)
    full = (rows.length == config.history_max)[:, None]
    return jnp.float32(config.quanta_tail()) + jnp.where(full, jnp.float32(config.history_tail(task)), 0.0)


def _soft_label(world: World, z: jax.Array, fresh: jax.Array, spread: jax.Array) -> jax.Array:
    """p* by Gauss-Hermite quadrature in float32, averaged over the sign of fresh pairs: [R, C]."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(_SOFT_NODES)
    weights = (weights / weights.sum()).astype(np.float32)
    mean = jnp.zeros(z.shape, jnp.float32)
    for node, weight in zip(nodes.astype(np.float32), weights, strict=True):
        for sign in (-1, 1):
            logit = (z + sign * fresh).astype(jnp.float32) * jnp.float32(1.0 / world.scale)
            mean = mean + 0.5 * weight * jax.nn.sigmoid(logit + spread * node)
    return mean


def _user_side(world: World, rows: Rows, ids, observed: jax.Array | None) -> UserSide:
    config = world.config
    out_ids, dense = {}, {}
    for index, name in enumerate(REQUEST_FIELDS):
        if config.codes == "oracle":
            dense[f"{name}_code"] = signs(rows.request_words[index], config.code_bits, 1).astype(jnp.float32)
        if config.codes == "learned" or (name == "user" and config.has_b):
            out_ids[name] = permute(world, index, ids[name])
    if config.has_m and not config.pair_field:
        out_ids["mem_u"] = 2 * rows.cluster + rows.request_bit
    if config.domains > 1:
        out_ids["domain"] = rows.domain
    histories = {SEQUENCE: _history(world, rows, observed)} if config.has_history else {}
    return UserSide(ids=out_ids, dense=dense, histories=histories, domain=rows.domain)


def _history(world: World, rows: Rows, observed: jax.Array | None) -> History:
    config = world.config
    live = jnp.arange(config.history_max, dtype=jnp.int32) < rows.length[:, None]
    ids, dense, delta = {}, {}, None
    if config.has_l:
        ids["item"] = jnp.where(live, permute(world, _ITEM, rows.event_item), 0)
        if config.match_groups > 1:
            ids["cat"] = jnp.where(live, rows.event_category, 0)
    if observed is not None:
        dense[DRIFT_FIELD] = jnp.where(live[..., None], observed, 0.0)
    if config.timestamps:
        # About an hour and eight minutes per event, strictly growing with age; a hash of the visible ids
        # jitters it.
        base = rows.event_item if config.has_l else jnp.zeros(live.shape, jnp.int32)
        jitter = (base.astype(jnp.uint32) * np.uint32(0x9E3779B1)) >> 20
        age = 4096 * jnp.arange(config.history_max, dtype=jnp.int32) + 1 + jitter.astype(jnp.int32)
        delta = jnp.where(live, age, 0)
    return History(ids=ids, dense=dense, length=rows.length, delta_s=delta)


def _candidate_side(world: World, rows: Rows, ids) -> CandidateSide:
    config = world.config
    out_ids, dense = {}, {}
    for index, name in enumerate(CANDIDATE_FIELDS):
        if config.codes == "oracle":
            dense[f"{name}_code"] = signs(rows.candidate_words[index], config.code_bits, 1).astype(
                jnp.float32
            )
        if config.codes == "learned" or (name == "item" and (config.has_b or config.has_l)):
            out_ids[name] = permute(world, CROSS_FIELDS.index(name), ids[name])
    if config.has_l and config.match_groups > 1:
        out_ids["cat"] = rows.category
    if config.has_m:
        known = rows.rank < config.pair_items
        column = 2 * pair_column(world, rows.cluster[:, None], rows.rank) + rows.candidate_bit
        mem_i = jnp.where(known, column, 2 * config.pair_items)
        if config.pair_field:
            out_ids["pair"] = pair_id(config, 2 * rows.cluster + rows.request_bit, mem_i)
        else:
            out_ids["mem_i"] = mem_i
    return CandidateSide(ids=out_ids, dense=dense)
