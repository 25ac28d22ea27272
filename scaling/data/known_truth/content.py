"""What items of the known-truth log are made of, and what its requests ask for, as tokens.

    item     token j = 1 + j 2^b + number of the b signs that slot j names, of the d signs e(i) that L reads
    query    the same of the signs of H^T sum_l K_l e(i_l): a candidate that agrees with them has a high L

Every sign is flipped with probability `content_flip`, an item's by the item, a query's by the request. So relevance can
be read off content alone, for items that no click was seen of, and an encoder that learns it really changes on the way.
Requests that ask for the same signs have the same query number. Whatever the category, all events count in a query.

Letters: R requests, C candidates, n slots, b bits of one, d signs.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32, UInt32

from .config import KnownTruthConfig
from .history import draw_events
from .words import ITEM_CONTENT, QUERY, Draws, Key, stream_key, uniform, words
from .world import World, history_word, signs


def vocabulary(config: KnownTruthConfig) -> int:
    """Token ids, padding included."""
    return 1 + config.content_tokens * 2**config.content_bits


def item_tokens(world: World, ids: Int32[Array, "*shape"]) -> Int32[Array, "*shape n"]:
    """Tokens of items, by their ids in popularity order."""
    config = world.config
    flat = ids.reshape(-1)
    key = stream_key(config.world_seed, ITEM_CONTENT, flat.astype(jnp.uint32))
    flips = _flips(config, key, ITEM_CONTENT, config.content_tokens * config.content_bits)
    bits = _named(config, history_word(world, flat), config.content_tokens)
    tokens = _tokens(config, bits ^ flips.T.reshape(bits.shape))
    return tokens.reshape(*ids.shape, config.content_tokens)


def query_word(
    world: World,
    log_seed: Any,
    request: UInt32[Array, " R"],
    key: Key,
    user: Int32[Array, " R"],
    length: Int32[Array, " R"],
) -> UInt32[Array, " R"]:
    """What requests ask for: bit j is set where sign j of the interest, possibly flipped, is -1."""
    config, d = world.config, world.config.code_width
    interest, first = jnp.zeros((*user.shape, d), jnp.int32), 0
    for item, _ in draw_events(world, log_seed, request, key, user):
        count = item.shape[1]
        weight = jnp.asarray(world.event_weight)[0, first : first + count][None]
        live = first + jnp.arange(count, dtype=jnp.int32)[None] < length[:, None]
        weight = jnp.where(live, weight, 0)
        interest += jnp.sum(weight[..., None] * signs(history_word(world, item), d, 0), axis=1, dtype=jnp.int32)
        first += count
    wanted = jnp.sum(interest[:, :, None] * jnp.asarray(world.matrix)[0][None], axis=1, dtype=jnp.int32)
    negative = (wanted < 0) ^ (_flips(config, key, QUERY, d).T == 1)
    return jnp.sum(negative.astype(jnp.uint32) << jnp.arange(d, dtype=jnp.uint32)[None], axis=1, dtype=jnp.uint32)


def query_tokens(config: KnownTruthConfig, word: UInt32[Array, " R"]) -> Int32[Array, "R n"]:
    """Tokens of queries."""
    return _tokens(config, _named(config, word, config.query_tokens))


@functools.lru_cache(maxsize=16)
def _slots(config: KnownTruthConfig) -> Int[np.ndarray, "n b"]:
    """Which signs every slot names, each slot distinct ones."""
    draws = Draws(config.world_seed, 9)
    return np.stack([draws.permutation(config.code_width)[: config.content_bits] for _ in range(config.content_tokens)])


def _named(config: KnownTruthConfig, word: Array, count: int) -> Array:
    """The bits that the first `count` slots name: uint32 [rows, count, b]."""
    slots = jnp.asarray(_slots(config)[:count], jnp.uint32)
    return (word[:, None, None] >> slots[None]) & 1


def _tokens(config: KnownTruthConfig, bits: Array) -> Array:
    """[rows, n, b] bits -> [rows, n] token ids."""
    places = jnp.arange(bits.shape[-1], dtype=jnp.uint32)[None, None]
    number = jnp.sum(bits << places, axis=-1, dtype=jnp.uint32).astype(jnp.int32)
    return 1 + jnp.arange(bits.shape[1], dtype=jnp.int32)[None] * 2**config.content_bits + number


def _flips(config: KnownTruthConfig, key: Key, stream: int, count: int) -> Array:
    """uint32 [count, rows], 1 with probability `content_flip`."""
    drawn = words(key, stream, count + count % 2)[:count]
    return (uniform(drawn) < config.content_flip).astype(jnp.uint32)
