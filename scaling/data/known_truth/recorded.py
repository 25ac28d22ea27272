"""The rows of a log whose inputs are signs, drawn once and kept: a bit a sign, so 2 million rows take 80 MB.

Drawing a row takes longer than a small model takes to train on it. Jobs of one process read the same log, so it is
drawn for the first and kept for the next; requests are numbered, so it serves every batch size.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from recscale.models.inputs import Batch

from .batches import assemble, request_numbers
from .config import CANDIDATE_FIELDS, REQUEST_FIELDS, KnownTruthConfig
from .draw import Drawn, draw
from .logit_parts import Rows
from .world import World

# Requests drawn at a time, whatever the batch size: the same program, so the same bits.
_PIECE = 8192

# A log that takes more is drawn in the step: its models are large, and drawing is a small part of theirs.
MOST_BYTES = 2**28


@flax.struct.dataclass
class Recorded:
    """The first n requests. request_words: uint32 [n, 5]; candidate_words: uint32 [n, C, 3]; labels, label_mask:
    float32 [n, C, Y]."""

    request_words: Any
    candidate_words: Any
    labels: Any
    label_mask: Any


# The log of the jobs that this process trains; one, since a sweep has one as a rule.
_kept: dict[tuple[KnownTruthConfig, int, int], Recorded] = {}


def recorded_bytes(config: KnownTruthConfig, requests: int, candidates: int) -> int:
    """Memory that so many requests take; 0 where they are not kept: batches hold more than signs, or it is too much."""
    if not config.shows_codes or config.has_l or config.has_m or config.has_b or config.drift or config.domains > 1:
        return 0
    row = 4 * (len(CANDIDATE_FIELDS) + 2 * config.tasks)
    size = _whole_pieces(requests) * (4 * len(REQUEST_FIELDS) + candidates * row)
    return size if size <= MOST_BYTES else 0


def record(world: World, log_seed: int, requests: int, candidates: int) -> Recorded:
    """The first requests of a log, at least so many; drawn if this process did not keep them."""
    key = world.config, log_seed, candidates
    kept = _kept.get(key)
    if kept is None or len(kept.labels) < requests:
        _kept.clear()
        kept = _kept[key] = _drawn(world, log_seed, _whole_pieces(requests), candidates)
    return kept


def replay(world: World, recorded: Recorded, index: Int[jax.Array, ""], requests: int) -> Batch:
    """Batch `index` of so many requests; equal to `make_batch` in all inputs."""

    def cut(array: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(array, index * requests, requests)

    words = jnp.moveaxis(cut(recorded.request_words), -1, 0), jnp.moveaxis(cut(recorded.candidate_words), -1, 0)
    labels, mask = cut(recorded.labels), cut(recorded.label_mask)
    fresh = jnp.zeros(labels.shape[:2], bool)
    rows = Rows(request_words=words[0], candidate_words=words[1])
    return assemble(world, Drawn(rows, None, None, fresh, (), None, labels, mask))


def _whole_pieces(requests: int) -> int:
    return -(-requests // _PIECE) * _PIECE


def _drawn(world: World, log_seed: int, requests: int, candidates: int) -> Recorded:
    def piece(index: jax.Array) -> Recorded:
        drawn = draw(world, log_seed, request_numbers(index, _PIECE), candidates)
        words = drawn.rows.request_words, drawn.rows.candidate_words
        request, candidate = (jnp.moveaxis(w, 0, -1) for w in words)
        return Recorded(request, candidate, drawn.labels, drawn.label_mask)

    drawing = jax.jit(piece)
    shapes = jax.eval_shape(drawing, np.int32(0))
    whole = jax.tree.map(lambda s: np.empty((requests, *s.shape[1:]), s.dtype), shapes)
    for start in range(0, requests, _PIECE):
        found = jax.device_get(drawing(np.int32(start // _PIECE)))
        for place, values in zip(jax.tree.leaves(whole), jax.tree.leaves(found), strict=True):
            place[start : start + _PIECE] = values
    return jax.device_put(whole)
