"""The history of the known-truth log: its events, and what they add to the logit,

    L = sum_l K_l [cat_l = cat_c] (e(i_l) . H e(c))        e: signs of an item, c: the candidate

On a CPU the requests of a batch are drawn a few at a time, and only the events that a model is shown are kept: what is
in between stays in the cache, where 4,096 events of 1,024 requests would go through memory a dozen times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, UInt32

from recscale.pallas_kernels.targets import current_platform

from .config import KnownTruthConfig
from .words import HISTORY, USER_EVENTS, Key, event_words, stream_key
from .world import World, history_word, popular_id, signs

# Random words of a piece of a batch: int32 arrays of 128 KiB, several of which fit a core's cache of 1 MiB.
_CACHED = 2**15
# The least requests in a piece: devices that share a batch share every piece of it.
_LEAST = 8


def draw_history(
    world: World,
    log_seed: Any,
    request: UInt32[Array, " R"],
    key: Key,
    user: Int32[Array, " R"],
    length: Int32[Array, " R"],
    item: Int32[Array, "R C"],
    category: Int32[Array, "R C"],
    shown: int,
) -> tuple[Int32[Array, "R shown"], Int32[Array, "R shown"], tuple[Int32[Array, "R C"], ...]]:
    """Items and categories of the newest `shown` events, and L of every task.

    request: numbers of the requests, and their key; length: events that count; item, category: the candidate's. How
    many events are shown changes no sum.
    """
    config = world.config

    def draw(rows: Any) -> tuple[Array, Array, tuple[Array, ...]]:
        request, key, user, length, category, towards = jax.lax.optimization_barrier(rows)
        halves = []
        sums = [jnp.zeros(category.shape, jnp.int32)] * config.tasks
        first = 0
        for event_item, event_category in draw_events(world, log_seed, request, key, user):
            # Barriers: XLA would unroll the draw into each of its readers, and take minutes over it.
            event_item, event_category = jax.lax.optimization_barrier((event_item, event_category))
            word = jax.lax.optimization_barrier(history_word(world, event_item))
            for task, toward in enumerate(towards):
                sums[task] += event_sum(world, task, toward, category, word, event_category, length, first)
            kept = max(shown - first, 0)
            halves.append((event_item[:, :kept], event_category[:, :kept]))
            first += event_item.shape[1]
        items, categories = (jnp.concatenate(parts, axis=1) for parts in zip(*halves, strict=True))
        return items, categories, tuple(sums)

    towards = tuple(facing(world, history_word(world, item), task) for task in range(config.tasks))
    words = config.history_max // (2 if _two_events_a_hash(config) else 1)
    return _in_pieces(draw, (request, key, user, length, category, towards), _pieces(request.shape[0], words))


def facing(world: World, word: UInt32[Array, "R C"], task: int) -> Int32[Array, "R C d"]:
    """What a candidate rewards in an event, H e(c), from the history words of candidates."""
    matrix = jnp.asarray(world.matrix)[task]
    code = signs(word, world.config.code_width, 0)
    return jnp.sum(matrix * code[..., None, :], axis=-1, dtype=jnp.int32)


def event_sum(
    world: World,
    task: int,
    toward: Int32[Array, "R C d"],
    category: Int32[Array, "R C"],
    word: UInt32[Array, "R events"],
    event_category: Int32[Array, "R events"],
    length: Int32[Array, " R"],
    first: int = 0,
) -> Int32[Array, "R C"]:
    """What events add to the logit: sum of K_l [cat_l = cat_c] (e(i_l) . H e(c)) over events first, first + 1, ...

    toward: of `facing`; word: history words of the events; length: events that count.
    """
    events = word.shape[1]
    weight = jnp.asarray(world.event_weight)[task, first : first + events][None, :]
    if world.config.ragged:
        weight = jnp.where(first + jnp.arange(events, dtype=jnp.int32) < length[:, None], weight, 0)
    dot = jnp.zeros((*toward.shape[:2], events), jnp.int32)
    for j in range(toward.shape[-1]):
        negative = ((word >> np.uint32(j)) & 1)[:, None, :] == 1
        dot = dot + jnp.where(negative, -toward[:, :, j, None], toward[:, :, j, None])
    match = event_category[:, None, :] == category[:, :, None]
    return jnp.sum(jnp.where(match, weight[:, None, :] * dot, 0), axis=-1, dtype=jnp.int32)


def draw_events(
    world: World, log_seed: Any, request: UInt32[Array, " R"], key: Key, user: Int32[Array, " R"]
) -> list[tuple[Array, Array]]:
    """(items, categories) of all events, newest first, in one or two stretches: int32 [R, events] each."""
    config, size = world.config, world.config.history_max
    if _two_events_a_hash(config):
        words = event_words(key, HISTORY, jnp.arange(size // 2, dtype=jnp.uint32))
        return [(popular_id(world, word), _category(config, word)) for word in words]
    count = jnp.arange(size, dtype=jnp.uint32)
    if config.continuing:
        # Absolute event numbers of the user's own stream; the newest one grows with the request number.
        newest = request // np.uint32(config.continuing_stride) + np.uint32(size - 1)
        key, count = stream_key(log_seed, USER_EVENTS, user.astype(jnp.uint32)), newest[:, None] - count
    first, second = event_words(key, HISTORY, count)
    return [(popular_id(world, first), _category(config, first if _one_word(config) else second))]


def _two_events_a_hash(config: KnownTruthConfig) -> bool:
    """Whether both words of one hash are events: the second words are then those of the older half of the history."""
    return _one_word(config) and not config.continuing


def _one_word(config: KnownTruthConfig) -> bool:
    """Whether the low bits that the alias draw leaves over are enough for the category."""
    return config.match_groups * config.blocks <= 2**15


def _category(config: KnownTruthConfig, word: Array) -> Array:
    return (word & np.uint32(config.match_groups - 1)).astype(jnp.int32)


def _pieces(requests: int, words: int) -> int:
    """In how many pieces requests with so many random words each are drawn: a divisor of their number."""
    if current_platform() != "cpu":
        return 1
    most = max(_CACHED // words, _LEAST)
    return next(n for n in range(-(-requests // most), requests + 1) if n and requests % n == 0)


def _in_pieces(function: Callable[[Any], Any], rows: Any, pieces: int) -> Any:
    """function(rows), every `pieces`-th request at a time; rows and results (int32) are trees of arrays [R, ...].

    Neighbouring requests go to different pieces, so a batch sharded over requests is sharded within every piece.
    """
    if pieces == 1:
        return function(rows)
    folded = jax.tree.map(lambda x: x.reshape(-1, pieces, *x.shape[1:]), rows)

    def piece(index: Any) -> Any:
        return function(jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, 1, keepdims=False), folded))

    def put(index: Any, results: Any) -> Any:
        put_one = lambda into, x: jax.lax.dynamic_update_slice_in_dim(into, x[:, None], index, 1)  # noqa: E731
        return jax.tree.map(put_one, results, piece(index))

    # Zeros made from the rows, so that the results are laid out as they are.
    zero = (jax.tree.leaves(folded)[0] & 0).astype(jnp.int32)
    start = jax.tree.map(
        lambda x: jnp.broadcast_to(zero.reshape(*zero.shape, *(1,) * (x.ndim - 1)), (*zero.shape, *x.shape[1:])),
        jax.eval_shape(piece, jax.ShapeDtypeStruct((), jnp.int32)),
    )
    results = jax.lax.fori_loop(0, pieces, put, start)
    return jax.tree.map(lambda x: x.reshape(zero.size, *x.shape[2:]), results)
