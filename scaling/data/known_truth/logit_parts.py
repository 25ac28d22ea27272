"""The parts that add up to a click's logit, as int32 arithmetic on the rows of a batch: exact everywhere, in any order.

`Rows` is what a row is made of: code words, item ids of the events, pair ranks, domain. The generator draws
it, `decode` recovers it from a batch; both feed the same `parts`.
"""

from __future__ import annotations

from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Int32, UInt32

from recscale.models.inputs import Batch

from .config import BLOCK, CANDIDATE_FIELDS, CROSS_FIELDS, MAX_ORDER, REQUEST_FIELDS, KnownTruthConfig
from .history import event_sum, facing
from .world import Terms, World, code_words, history_word

SEQUENCE = "clicks"
HISTORY_CODE = "history_code"  # signs of L, of a candidate and of an event
DRIFT_FIELD = "drift"
ITEM = CROSS_FIELDS.index("item")
_TERM_CHUNK = 256  # terms per step of the term-parallel layout


@flax.struct.dataclass
class Rows:
    """Decoded rows; absent parts are None.

    request_words: uint32 [5, R]; candidate_words: uint32 [3, R, C]; user: int32 [R] and item: int32 [R, C],
    ids in popularity order; category: int32 [R, C]; event_item, event_category: int32 [R, S]; length: int32
    [R]; cluster, request_bit: int32 [R]; rank: int32 [R, C], counted from 0, pair_items if fresh;
    candidate_bit: int32 [R, C]; domain: int32 [R]. item_word: uint32 [R, C] and event_word: uint32 [R, S], history
    words, only where a batch shows signs instead of ids. history: int32 [R, C] per task, L where it was added up while
    its events were drawn; then event_item and event_category may be those of the newest events alone.
    """

    request_words: Any
    candidate_words: Any
    user: Any = None
    item: Any = None
    category: Any = None
    event_item: Any = None
    event_category: Any = None
    length: Any = None
    cluster: Any = None
    request_bit: Any = None
    rank: Any = None
    candidate_bit: Any = None
    domain: Any = None
    item_word: Any = None
    event_word: Any = None
    history: Any = None


def parts(world: World, rows: Rows, task: int = 0) -> dict[str, Int32[Array, "R C"]]:
    """Integer logit parts of one task; the logit is `(task_bias + their sum) / scale`.

    N1 ... N4: N by order, request-only terms included; N_request: the request-only terms again (not part of the sum);
    L, M (0 on fresh rows and for the second label), B_user, B_item, X.
    """
    config = world.config
    shape = rows.candidate_words.shape[1:]
    zero = jnp.zeros(shape, jnp.int32)
    out = _n_parts(world, rows, task, zero) | dict.fromkeys(("L", "M", "B_user", "B_item", "X"), zero)
    if config.has_l:
        out["L"] = _history_part(world, rows, task) if rows.history is None else rows.history[task]
    if config.has_m and task == 0:
        out["M"] = _pair_part(world, rows)
    if config.has_b:
        out["B_user"] = zero + _bias(world, 0, rows.user)[:, None]
        out["B_item"] = _bias(world, 1, rows.item)
    if config.domains > 1:
        out["X"] = zero + jnp.asarray(world.domain_bias)[rows.domain][:, None]
    return out


def total(world: World, values: dict[str, Int32[Array, "R C"]], task: int = 0) -> Int32[Array, "R C"]:
    """Integer logit `task_bias + N + L + M + B + X`."""
    return sum((values[n] for n in values if n != "N_request"), jnp.asarray(world.task_bias)[task])


def term_sums(
    words: UInt32[Array, "9 n"],
    terms: Terms,
    domain: Int32[Array, " n"] | None = None,
    layout: Literal["rows", "terms"] | None = None,
) -> Int32[Array, "groups n"]:
    """What every group of terms adds to the integer logit, sum_k A_k psi_k.

    words: one code word per cross field and row, the last row 0; domain: needed with more than one domain. layout:
    "rows" walks the terms and keeps rows vectorised (fastest on CPUs), "terms" forms [chunk of terms, n] blocks that
    fuse with their sum (accelerators); None picks by platform. Neither ever holds [terms, n].
    """
    if layout is None:
        return jax.lax.platform_dependent(words, domain, terms, cpu=_by_rows, default=_by_terms)
    return {"rows": _by_rows, "terms": _by_terms}[layout](words, domain, terms)


def term_values(
    words: UInt32[Array, "9 n"], terms: Terms, domain: Int32[Array, " n"] | None = None
) -> Float32[Array, "entries n"]:
    """Every term's product of signs, -1 or 1; 0 where an entry is another domain's.

    words, domain: as for `term_sums`, which never builds this array and is what the generator uses.
    """
    x = jnp.uint32(0)
    for i in range(MAX_ORDER):
        x = x ^ (words[jnp.asarray(terms.field)[:, i]] >> jnp.asarray(terms.bit, jnp.uint32)[:, i, None])
    values = 1.0 - 2.0 * (x & 1).astype(jnp.float32)
    if domain is None:
        return values
    owner = jnp.asarray(terms.domain)[:, None]
    return jnp.where((owner < 0) | (owner == domain), values, 0.0)


def padded_words(rows: Rows) -> UInt32[Array, "9 R C"]:
    """Code words of all cross fields per row, and the zero word that pads short terms."""
    shape = rows.candidate_words.shape[1:]
    repeated = jnp.broadcast_to(rows.request_words[:, :, None], (len(REQUEST_FIELDS), *shape))
    return jnp.concatenate([repeated, rows.candidate_words, jnp.zeros((1, *shape), jnp.uint32)])


def permute(
    world: World, first: int, ids: Int[Array | np.ndarray, " fields *shape"]
) -> Int[Array | np.ndarray, " fields *shape"]:
    """Popularity-ordered ids of consecutive cross fields -> ids in batches.

    A fixed bijection per field (xor-shifts and odd multiplications modulo the vocabulary); the identity unless
    `permute_ids`.
    """
    if not world.config.permute_ids:
        return ids
    mask, shift = _mix_sizes(world.config)
    x = ids.astype(jnp.uint32)
    for r in range(3):
        multiplier, offset = _mix_constants(world, first, ids, r)
        x = x ^ (x >> shift)
        x = (x * multiplier + offset) & mask
    return x.astype(jnp.int32)


def unpermute(world: World, first: int, ids: Int[Array | np.ndarray, " fields *shape"]) -> Int[Array, " fields *shape"]:
    """Inverse of `permute`."""
    if not world.config.permute_ids:
        return jnp.asarray(ids)
    mask, shift = _mix_sizes(world.config)
    x = jnp.asarray(ids).astype(jnp.uint32)
    for r in reversed(range(3)):
        multiplier, offset = _mix_constants(world, first, x, r)
        x = ((x - offset) * odd_inverse(multiplier)) & mask
        x = x ^ (x >> shift)
    return x.astype(jnp.int32)


def odd_inverse(odd: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Inverse of an odd uint32 modulo 2^32 by Newton's iteration (3 correct bits, doubled five times)."""
    inverse = odd
    for _ in range(5):
        inverse = inverse * (jnp.uint32(2) - odd * inverse)
    return inverse


def pair_column(world: World, cluster: Int32[Array, "*lead"], rank: Int32[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """Item column of the k-th most popular pair of cluster u, k from 0: (odd_u k + offset_u) mod pair_items."""
    odd, offset = jnp.asarray(world.pair_odd)[cluster], jnp.asarray(world.pair_offset)[cluster]
    return ((rank.astype(jnp.uint32) * odd + offset) & jnp.uint32(world.config.pair_items - 1)).astype(jnp.int32)


def decode(world: World, batch: Batch) -> Rows:
    """Rows of a batch, from its inputs alone (labels unused). The history must be whole, not cut to fewer events."""
    config = world.config
    user, candidates = batch.user, batch.candidates
    requests, count = batch.valid.shape
    fields: dict[str, Any] = {}
    for side, names, first, words in (
        (user, REQUEST_FIELDS, 0, "request_words"),
        (candidates, CANDIDATE_FIELDS, len(REQUEST_FIELDS), "candidate_words"),
    ):
        if config.shows_codes:
            fields[words] = _pack(jnp.stack([jnp.asarray(side.dense[f"{name}_code"]) for name in names]))
        elif config.codes == "none":
            shape = (requests,) if side is user else (requests, count)
            fields[words] = jnp.zeros((len(names), *shape), jnp.uint32)  # N, which reads them, has no share
        else:
            ids = unpermute(world, first, jnp.stack([jnp.asarray(side.ids[name]) for name in names]))
            fields[words] = code_words(world, first, ids)
        if names[0] in side.ids:  # `user` and `item` are the first of their side
            fields[names[0]] = unpermute(world, first, jnp.asarray(side.ids[names[0]])[None])[0]
    if config.has_history:
        history = user.histories[SEQUENCE]
        fields["length"] = jnp.asarray(history.length)
    if config.has_l:
        if config.shows_history_codes:
            fields["event_word"] = _pack(history.dense[HISTORY_CODE]) >> 1
            fields["item_word"] = _pack(candidates.dense[HISTORY_CODE]) >> 1
        else:
            fields["event_item"] = unpermute(world, ITEM, jnp.asarray(history.ids["item"])[None])[0]
        if config.match_groups > 1:
            fields["event_category"] = jnp.asarray(history.ids["cat"])
            fields["category"] = jnp.asarray(candidates.ids["cat"])
        else:
            fields["event_category"] = jnp.zeros((requests, config.history_max), jnp.int32)
            fields["category"] = jnp.zeros((requests, count), jnp.int32)
    if config.has_m:
        fields.update(_decode_pairs(world, batch))
    if config.domains > 1:
        fields["domain"] = jnp.asarray(user.domain)
    return Rows(**fields)


def pair_id(config: KnownTruthConfig, mem_u: Int32[Array, " R"], mem_i: Int32[Array, "R C"]) -> Int32[Array, "R C"]:
    """Crossed id of (`mem_u`, `mem_i`); every fresh pair shares the last id."""
    columns = 2 * config.pair_items
    return jnp.where(mem_i < columns, mem_u[:, None] * columns + mem_i, 2 * config.clusters * columns)


def _decode_pairs(world: World, batch: Batch) -> dict[str, Array]:
    config = world.config
    columns = 2 * config.pair_items
    if config.pair_field:
        pair = jnp.asarray(batch.candidates.ids["pair"])
        fresh = pair >= 2 * config.clusters * columns
        mem_u, mem_i = jnp.where(fresh, 0, pair // columns), jnp.where(fresh, columns, pair % columns)
        cluster, request_bit = mem_u // 2, mem_u % 2
    else:
        mem_i = jnp.asarray(batch.candidates.ids["mem_i"])
        mem_u = jnp.asarray(batch.user.ids["mem_u"])
        cluster, request_bit = (mem_u // 2)[:, None], (mem_u % 2)[:, None]
    inverse = odd_inverse(jnp.asarray(world.pair_odd))[cluster]
    column = (mem_i // 2).astype(jnp.uint32)
    rank = ((column - jnp.asarray(world.pair_offset)[cluster]) * inverse) & jnp.uint32(config.pair_items - 1)
    rank = jnp.where(mem_i >= columns, config.pair_items, rank.astype(jnp.int32))
    return {"cluster": cluster, "request_bit": request_bit, "rank": rank, "candidate_bit": mem_i % 2}


def _n_parts(world: World, rows: Rows, task: int, zero: Array) -> dict[str, Array]:
    out = {f"N{order}": zero for order in range(1, MAX_ORDER + 1)} | {"N_request": zero}
    if not world.terms:
        return out
    domain = None
    if rows.domain is not None:
        domain = jnp.broadcast_to(rows.domain[:, None], zero.shape).reshape(zero.size)
    terms = world.terms[task]
    sums = term_sums(padded_words(rows).reshape(-1, zero.size), terms, domain)
    for index, group in enumerate(terms.groups):
        value = sums[index].reshape(zero.shape)
        out[f"N{group.order}"] = out[f"N{group.order}"] + value
        if group.request_only:
            out["N_request"] = out["N_request"] + value
    return out


def _history_part(world: World, rows: Rows, task: int) -> Array:
    """What the history adds to the logit, L, from decoded events: int32 [R, C]."""
    word = history_word(world, rows.item) if rows.item_word is None else rows.item_word
    events = history_word(world, rows.event_item) if rows.event_word is None else rows.event_word
    return event_sum(world, task, facing(world, word, task), rows.category, events, rows.event_category, rows.length)


def _pair_part(world: World, rows: Rows) -> Array:
    """What a pair adds to the logit, m s(u, k) (-1)^(i+j), 0 on fresh rows: int32 [R, C]."""
    config = world.config
    cluster = rows.cluster if rows.cluster.ndim == 2 else rows.cluster[:, None]
    request_bit = rows.request_bit if rows.request_bit.ndim == 2 else rows.request_bit[:, None]
    known = rows.rank < config.pair_items
    rank = jnp.where(known, rows.rank, 0)
    word = jnp.asarray(world.pair_signs)[cluster, rank // BLOCK]
    bit = ((word >> (rank % BLOCK).astype(jnp.uint32)) & 1).astype(jnp.int32)
    sign = 1 - 2 * ((bit + request_bit + rows.candidate_bit) & 1)
    return jnp.where(known, world.pair_amplitude * sign, 0)


def _bias(world: World, which: int, ids: Array) -> Array:
    block, member = ids // BLOCK, ids % BLOCK
    return jnp.asarray(world.bias_scores)[(member ^ jnp.asarray(world.bias_words)[which][block].astype(jnp.int32))]


def _by_rows(words: Array, domain: Array | None, terms: Terms) -> Array:
    field, bit, coefficient = (jnp.asarray(x) for x in (terms.field, terms.bit, terms.coefficient))
    group, owner = jnp.asarray(terms.group), jnp.asarray(terms.domain)

    def step(k, sums):
        x = jnp.uint32(0)
        for i in range(MAX_ORDER):
            word = jax.lax.dynamic_index_in_dim(words, field[k, i], 0, keepdims=False)
            x = x ^ (word >> bit[k, i].astype(jnp.uint32))
        value = jnp.where((x & 1) == 1, -coefficient[k], coefficient[k])
        if domain is not None:
            value = jnp.where((owner[k] < 0) | (owner[k] == domain), value, 0)
        return sums.at[group[k]].add(value)

    # Zeros made from `words`, so that a batch sharded over requests keeps its layout through the loop.
    start = jnp.broadcast_to((words[0] & 0).astype(jnp.int32), (len(terms.groups), words.shape[1]))
    return jax.lax.fori_loop(0, field.shape[0], step, start)


def _by_terms(words: Array, domain: Array | None, terms: Terms) -> Array:
    field, bit, coefficient = (jnp.asarray(x) for x in (terms.field, terms.bit, terms.coefficient))
    owner = jnp.asarray(terms.domain)[:, None]
    sums = []
    for group in terms.groups:
        total = jnp.zeros(words.shape[1], jnp.int32)
        for start in range(group.start, group.stop, _TERM_CHUNK):
            chunk = slice(start, min(start + _TERM_CHUNK, group.stop))
            x = jnp.uint32(0)
            for i in range(group.order):
                x = x ^ (words[field[chunk, i]] >> bit[chunk, i].astype(jnp.uint32)[:, None])
            a = coefficient[chunk][:, None]
            value = jnp.where((x & 1) == 1, -a, a)
            if domain is not None:
                value = jnp.where((owner[chunk] < 0) | (owner[chunk] == domain), value, 0)
            total = total + jnp.sum(value, axis=0, dtype=jnp.int32)
        sums.append(total)
    return jnp.stack(sums)


def _pack(dense: Array | np.ndarray) -> Array:
    """Inverse of the oracle codes: signs [..., bits] -> uint32 words with bit j + 1 set where sign j is negative."""
    shift = jnp.arange(1, dense.shape[-1] + 1, dtype=jnp.uint32)
    return jnp.sum((jnp.asarray(dense) < 0).astype(jnp.uint32) << shift, axis=-1, dtype=jnp.uint32)


def _mix_sizes(config: KnownTruthConfig) -> tuple[Array, Array]:
    bits = config.vocabulary.bit_length() - 1
    return jnp.uint32(config.vocabulary - 1), jnp.uint32((bits + 1) // 2)


def _mix_constants(world: World, first: int, ids: Array | np.ndarray, r: int) -> tuple[Array, Array]:
    shape = (ids.shape[0], *(1,) * (ids.ndim - 1))
    rows = slice(first, first + ids.shape[0])
    multiplier, offset = (jnp.asarray(x)[rows, r].reshape(shape) for x in (world.id_multiplier, world.id_offset))
    return multiplier, offset
